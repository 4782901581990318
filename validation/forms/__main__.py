"""Repack each form of the same model, and print a table of what comes of it, for docs/validation/forms.md.

    python -m validation.forms WORK                  every form
    python -m validation.forms WORK --only rotary    those whose name has this

A form is a small export whose two graphs are rewritten. Its pair is run in ONNX Runtime, and held against the export as
it was; then it is repacked with each preset, and the proof that every repack ends with holds the folder against the pair.
Ends with 1 where a number is wrong, a proof fails, or an error is no sentence.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

import fixtures
from fixtures.zoo import FIXTURES
from surgery import RepackOptions, repack
from surgery.choices import Preset
from surgery.errors import GateFailed, ModelError, SurgeryError
from surgery.runtime.sessions import Settings, versions
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, GraphPair, open_export
from surgery.verify.agreement import agreement_of
from surgery.verify.prompts import Case, ModelTokens, admissible, of_ids
from surgery.verify.recording import Recording, record
from validation.forms import rewrites
from validation.forms.rewrites import Pair, Rewrite

NAMES = {
    "one-token", "highest-ids", "pad-inside", "chunks-of-7", "batch", "ragged-batch", "cached-past-the-window",
    "cached-padded-batch",
}  # fmt: skip
PRESETS: tuple[Preset, ...] = ("compatible", "fast")
STEPS = 2
WORTH = 1e-3
"""What another order of summation may be worth between a form and the export as it was, in the logits."""


@dataclass(frozen=True)
class Form:
    """`name` as the table has it; `rewrite` makes it of `precision`, of a model with this window."""

    group: str
    name: str
    rewrite: Rewrite | None = None
    precision: str = "fp32"
    window: int = 8
    context: int = 0
    """Tokens; 0: four windows."""
    rounds: bool = False
    """Whether the rewrite rounds weights: then the pair is not what the export was."""


FORMS = (
    Form("as published", "fp32"),
    Form("as published", "q4f16", None, "q4f16"),
    Form("rotary", "explicit: Gather, Mul, Sub, Add", rewrites.rotary_explicit),
    Form("rotary", "RotaryEmbedding of opset 23", rewrites.rotary_23),
    Form("rotary", "inside of GroupQueryAttention", rewrites.rotary_inside),
    Form("attention", "plain operators everywhere", rewrites.attention_plain),
    Form("attention", "Attention of opset 23", rewrites.attention_23),
    Form("attention", "MultiHeadAttention on shared caches", rewrites.multi_head),
    Form("attention", "GroupQueryAttention with empty keys and values", rewrites.grouped_without_rows),
    Form("attention", "GroupQueryAttention that appends once more", rewrites.grouped_recomputing),
    Form("norms", "RMSNormalization of opset 23", rewrites.norm_23),
    Form("norms", "decomposed", rewrites.norm_decomposed),
    *(Form("opsets", f"embeddings {one}, decoder {other}", rewrites.opsets(one, other))
      for one, other in ((22, 22), (23, 23), (24, 24), (21, 23), (23, 21), (20, 21))),
    *(Form("IR version", str(version), rewrites.ir(version)) for version in (8, 11, 12, 13)),
    Form("container", "initializers among the inputs", rewrites.initializers_as_inputs),
    Form("container", "small initializers as Constant nodes", rewrites.constants),
    Form("container", "functions of the model", rewrites.functions),
    Form("container", "bodies of If that capture", rewrites.bodies),
    Form("weights", "8-bit codes behind DequantizeLinear", rewrites.quantised_8),
    Form("weights", "8-bit codes of the layers' matrices behind DequantizeLinear", rewrites.quantised_matrices, rounds=True),
    Form("weights", "the layers' matrices through QuantizeLinear and back", rewrites.rounded_on_the_way, rounds=True),
    Form("weights", "BFLOAT16 behind Cast", rewrites.bfloat_16, rounds=True),
    Form("weights", "BFLOAT16 everywhere", rewrites.bfloat_16_everywhere, "fp16", rounds=True),
    Form("inputs", "attention_mask INT32", rewrites.mask_32),
    Form("inputs", "input_ids INT32", rewrites.ids_32),
    Form("inputs", "no position_ids", rewrites.positions_inside),
    Form("sizes", "logits wider than the vocabulary", rewrites.logits_padded),
    Form("sizes", "logits and vocab_size wider than the tables", rewrites.logits_and_size_padded),
    Form("sizes", "tables longer than the vocabulary", rewrites.tables_padded),
    Form("sizes", "a window of 512", None, "fp32", 512),
    Form("sizes", "a window of 1,024, in q4f16", None, "q4f16", 1024),
    Form("sizes", "a window of 500 in a context of 512", None, "fp32", 500, 512),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What came of a form: what its pair is worth against the export, and each preset's graph against the pair."""

    form: Form
    pair: str
    presets: tuple[str, ...]
    sound: bool

    def __str__(self) -> str:
        return f"| {self.form.group} | {self.form.name} | {self.pair} | {' | '.join(self.presets)} |"


def cases(form: Form) -> list[Case]:
    context = form.context or 4 * max(form.window, 64)
    vocabulary = ModelTokens(size=100, context=context, bos=2, pad=0, window=form.window)
    return [case for case in admissible(list(of_ids(vocabulary)), vocabulary, STEPS)[0] if case.name in NAMES]


def built(form: Form, work: Path) -> Path:
    """The export as it was, in the form's precision and with its window."""
    name, place = "tiny-e2b", work / f"{form.precision}-{form.window}-{form.context}"
    if place.is_dir():
        return place
    if form.window == 8:
        fixtures.build(name, form.precision, place)
        return place
    fixture = FIXTURES[name]
    context = form.context or 4 * form.window
    architecture = replace(fixture.architecture, sliding_window=form.window, max_position_embeddings=context)
    FIXTURES[f"{name}-wide"] = replace(fixture, name=f"{name}-wide", architecture=architecture)
    try:
        fixtures.build(f"{name}-wide", form.precision, place)
    finally:
        del FIXTURES[f"{name}-wide"]
    return place


def rewritten(form: Form, source: Path, target: Path) -> Export:
    """A copy of the export in the form."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*encoder*"))
    export = open_export(target)
    if form.rewrite is not None:
        pair = export.pair(form.precision)
        embed, decoder = (onnx.load(str(path), load_external_data=False) for path in (pair.embed, pair.decoder))
        form.rewrite(Pair(embed, decoder, json.loads((target / "config.json").read_text()), pair.embed.parent))
        pair.embed.write_bytes(embed.SerializeToString())
        pair.decoder.write_bytes(decoder.SerializeToString())
        export = open_export(target)
    return export


def answers(pair: GraphPair, form: Form, follow: Recording | None = None) -> Recording:
    return record(TwoGraphModel.open(pair, Settings()), cases(form), steps=STEPS, follow=follow, padding="none")


def row(form: Form, work: Path) -> Row:
    source = built(form, work)
    export = rewritten(form, source, work / "form")
    pair = export.pair(form.precision)
    theirs, sound = None, True
    try:
        theirs = answers(pair, form)
        truth = answers(open_export(source).pair(form.precision), form, theirs)
        found = agreement_of(truth, theirs, owners(export))
        worth, sound = f"{found.max_abs:.2g}", form.rounds or found.max_abs <= WORTH
    except (ModelError, SurgeryError) as error:
        worth = f"{'it cannot be run' if theirs is None else 'other sizes'}: {one_sentence(error)}"
    made = [preset(export, name, form, work / "out") for name in PRESETS]
    texts = tuple(text if good else f"**{text}**" for text, good in made)
    return Row(form, worth, texts, sound and all(good for _, good in made))


def owners(export: Export) -> dict[int, int]:
    return {layer.index: layer.kv_source for layer in export.architecture.layers}


def preset(export: Export, name: Preset, form: Form, target: Path) -> tuple[str, bool]:
    """What `repack` makes of a form, and whether that is right: its own proof passes, or a sentence says why not."""
    shutil.rmtree(target, ignore_errors=True)
    options = RepackOptions(precision=form.precision, preset=name, provider="cpu", accuracy_level="keep")
    try:
        made = repack(export.root, target, options)
    except GateFailed as failed:
        gate = failed.report.failed[0]
        return f"the proof fails: {gate.name}: {one_sentence(gate.detail or gate.reading)}", gate.name == SOURCE_RUNS
    except SurgeryError as error:
        return one_sentence(error), True
    except Exception as error:  # a traceback is what this looks for
        return f"{type(error).__name__}: {error}", False
    assert made.proof is not None and made.proof.parity is not None
    left = [str(finding) for outcome in made.outcomes for finding in outcome.findings if outcome.name in LEFT]
    skipped = [text.removeprefix("skipped ") for text in left if text.startswith("skipped") and "already" not in text]
    skipped += [f"{case.name} is left out: {case.reason}" for case in made.proof.skipped if case.name in CROSSING][:1]
    return "; ".join([f"{made.proof.parity.smallest_tolerance:.2g}", *skipped[:1]]), True


LEFT = {"fuse-attention", "drop-attention-bias"}
"""Passes of which the table says what they leave."""
SOURCE_RUNS = "source runs"
"""The gate that fails where the pair itself cannot be run, and says why."""
CROSSING = {"cached-past-the-window", "cached-padded-batch"}
"""Prompts of the proof that cross every window that the context has room for."""


def one_sentence(error: BaseException | str) -> str:
    hint = getattr(error, "hint", None)
    text = re.sub(r"^([a-z-]+) after [^:]+:", r"\1:", " ".join(str(error).split())) + (f" ({hint})" if hint else "")
    return text.replace("|", "\\|")


def main() -> int:
    """0 where every form is right or refused in a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.forms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="", metavar="TEXT")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print("| what | form | the pair against the export | compatible against the pair | fast against the pair |")
    print("| --- | --- | --- | --- | --- |")
    sound = True
    for form in FORMS:
        if options.only in f"{form.group} {form.name}":
            found = row(form, options.work)
            print(str(found).replace(f"{options.work}/form/", ""), flush=True)
            sound &= found.sound
    print(f"\n{', '.join(f'{name} {version}' for name, version in versions().items())}")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
