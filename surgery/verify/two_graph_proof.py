"""Proof that a two-graph folder is its source: both answer every prompt through surgery.runtime.two_graphs, and bit for
bit alike."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from passes.base import Pass, apply
from passes.set_accuracy_level import SetAccuracyLevel
from surgery.choices import Provider
from surgery.errors import FolderError, SurgeryError
from surgery.folder.genai_config import token_ids
from surgery.graph.model import Model
from surgery.runtime.sessions import Settings, versions
from surgery.runtime.tokenizer import Tokenizer
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, GraphPair, open_export
from surgery.verify.agreement import agreement_of, coarsest
from surgery.verify.gates import number_gates
from surgery.verify.parity import parity
from surgery.verify.prompt_file import cases_of, shipped
from surgery.verify.prompts import Case, Coverage, ModelTokens, Skipped, admissible, of_ids, within
from surgery.verify.recording import Recording, record
from surgery.verify.report import Gate, Report
from surgery.verify.request import TOKENS
from surgery.verify.source_files import files_beside, two_graph_file_gate
from surgery.verify.stages import TOKENIZER, Progress, numbered
from surgery.verify.thresholds import default_thresholds
from surgery.verify.validation import manifest_gate
from surgery.verify.vocabulary_proof import inside_gate, vocabulary_gates


def validate_two_graphs(
    folder: Path,
    source: GraphPair,
    *,
    provider: Provider = "cpu",
    scope: Coverage = "closing",
    progress: Progress | None = None,
    files: Path | None = None,
    corpus: Sequence[str] = (),
) -> Report:
    """Check a two-graph folder against its source. Both are held one after the other, never together. `files` is where
    the source's tokenizer lies, and `corpus` are texts, for a vocabulary of fewer tokens.

    Raises RuntimeMissing without onnxruntime, tokenizers or jinja2; every other fault is a failed gate.
    """
    told = progress or (lambda _: None)
    settings, started = Settings(provider), time.perf_counter()
    gates = [manifest_gate(folder)]
    cases: Sequence[Case] = ()
    skipped: list[Skipped] = []
    found = None
    try:
        export = open_export(folder)
        gates.append(_one_pair(export))
        if not all(gate.passed for gate in gates):
            raise FolderError("nothing was run: a file is not what was written, or there are other graphs")
        told(TOKENIZER)
        cases, skipped = _cases(export, scope, TOKENS[scope])
        gates.append(Gate("structure", "prompts can be made", bool(cases), 1, len(cases), f"{len(cases)} cases"))
        if (root := files or files_beside(source)) is not None:
            gates.append(two_graph_file_gate(folder, source, root))
            gates += vocabulary_gates(folder, root, source.kept, corpus) if source.kept is not None else []
        told("source")
        pair, steps = next(iter(export.pairs.values())), TOKENS[scope] - 1
        level = SetAccuracyLevel("4", "slow")
        quick = [level] if provider == "cpu" and level.concerns(Model.open(source.decoder)) else []
        theirs, inside = _record(source, settings, cases, None, steps, quick, numbered(told, "source", len(cases)))
        gates += [inside_gate(source.kept, inside)] if source.kept is not None else []
        told("folder")
        ours, _ = _record(pair, settings, cases, theirs, steps, quick, numbered(told, "folder", len(cases)))
        if quick:
            gates.append(Gate("numbers", "accuracy level 4 on both sides", True, detail=_SLOW))
        found = agreement_of(theirs, ours, {layer.index: layer.kv_source for layer in export.architecture.layers})
        gates += number_gates(found, default_thresholds(coarsest(theirs, ours)))
    except SurgeryError as error:
        gates.append(Gate("structure", "folder answers", False, detail=str(error)))
    return Report(
        gates=tuple(gates),
        cases=found.cases if found else (),
        skipped=tuple(skipped),
        seconds={"all": time.perf_counter() - started},
        versions=versions(),
        settings={**settings.to_dict(), "scope": scope, "tokens": TOKENS[scope]},
        parity=parity(found) if found else None,
    )


def _one_pair(export: Export) -> Gate:
    held = ", ".join(export.pairs)
    return Gate("structure", "two graphs of one precision", len(export.pairs) == 1, 1, len(export.pairs), held)


def _cases(export: Export, scope: Coverage, tokens: int) -> tuple[list[Case], list[Skipped]]:
    tokenizer, ids, arch = Tokenizer(export), token_ids(export), export.architecture
    vocabulary = ModelTokens(
        size=arch.vocab_size,
        context=arch.context_length,
        bos=next(iter(ids.get("bos_token_id", ())), None),
        pad=next(iter(ids.get("pad_token_id", ())), None),
        eos=ids.get("eos_token_id", ()),
        image=_placeholder(export, "image_token_id"),
        audio=_placeholder(export, "audio_token_id"),
        window=max((layer.window or 0 for layer in arch.layers), default=0) or None,
    )
    prompts = cases_of(
        shipped(),
        vocabulary,
        tokenizer.encode,
        lambda messages: tokenizer.encode(tokenizer.render([{"role": r, "content": c} for r, c in messages])),
    )
    return admissible(within(scope, [*of_ids(vocabulary), *prompts]), vocabulary, tokens)


def _placeholder(export: Export, key: str) -> int | None:
    value = export.config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


_SLOW = "each run would dequantise whole weights as published; the two files are compared with int8 products in both"


def _record(
    pair: GraphPair,
    settings: Settings,
    cases: Sequence[Case],
    follow: Recording | None,
    steps: int,
    quick: Sequence[Pass],
    told: Progress,
) -> tuple[Recording, Counter[bool]]:
    """The recording, and how often the likeliest token of all was one that stays."""
    decoder = apply(Model.open(pair.decoder), quick)[0] if quick else None
    try:
        model = TwoGraphModel.open(pair, settings, decoder)
        return record(model, cases, steps=steps, follow=follow, progress=told), model.inside
    finally:
        gc.collect()
