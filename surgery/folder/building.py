"""The main job: a community export in, a folder out that ONNX Runtime GenAI loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from passes.base import Outcome, Pass, apply
from surgery.choices import Target, WeightMode
from surgery.cuda.prediction import require_cuda
from surgery.errors import SurgeryError
from surgery.files.atomic import ToDict, refuse_existing, refuse_holding, require_space, staged_folder
from surgery.files.safe_reading import sha256
from surgery.folder.genai_config import (
    CONFIG_FILE,
    COPIED,
    MODEL_FILE,
    CacheCost,
    cache_costs,
    check_side_files,
    copy_side_files,
    genai_config,
    takes_tools,
    write_json,
    write_side_files,
    write_text,
)
from surgery.folder.manifest import NAME as MANIFEST_FILE
from surgery.folder.manifest import manifest, refuse_foreign
from surgery.folder.minimum_versions import minimum_versions
from surgery.folder.model_card import CARD_FILE, model_card, on_batches, on_capture, on_level
from surgery.folder.multimodal import PROCESSORS, GraphPlan, check_export, media_config, write_media_files
from surgery.folder.publishing import Published
from surgery.graph.model import Model
from surgery.graph.quantised_weights import check_quantised
from surgery.graph.weight_writing import Placed, Progress, consolidated_size, unlinkable
from surgery.source.export import EMBED, ENCODERS, MEDIA_FILES, Export, GraphPair
from surgery.source.kept_tokens import VOCABULARY_FILE

Proof = TypeVar("Proof")
Proof_co = TypeVar("Proof_co", covariant=True)


@dataclass(frozen=True)
class Repacked(Generic[Proof_co]):
    """What a repack came to. `proof` is what the check returned; `others` are the passes of the graphs beside the
    decoder, by role."""

    folder: Path
    precision: str
    outcomes: tuple[Outcome, ...]
    placed: tuple[Placed, ...]
    costs: dict[str, CacheCost]
    proof: Proof_co | None
    others: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)
    published: Published | None = None

    def to_dict(self: Repacked[ToDict]) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order; the passes of the other graphs are keyed by their roles."""
        return {
            "folder": str(self.folder),
            "precision": self.precision,
            "weights": [file.to_dict() for file in self.placed],
            "kv_caches": {
                layout: {"pairs": cost.pairs, "bytes_per_token": cost.bytes_per_token}
                for layout, cost in self.costs.items()
            },
            "passes": [outcome.to_dict() for outcome in self.outcomes],
            **{role: [outcome.to_dict() for outcome in found] for role, found in self.others.items()},
            "proof": self.proof.to_dict() if self.proof is not None else None,
            **({"published": self.published.to_dict()} if self.published else {}),
        }


def plan(
    pair: GraphPair, export: Export, recipe: Sequence[Pass], observe: Callable[[Outcome], None] | None = None
) -> tuple[Model, list[Outcome]]:
    """Apply the recipe to the decoder of a pair, in memory. Every extent of every weight is checked first."""
    decoder = Model.open(pair.decoder, export.architecture)
    for model in (decoder, Model.open(pair.embed)):
        model.check_weights()
        check_quantised(model)
    return apply(decoder, recipe, observe)


def build_folder(
    export: Export,
    pair: GraphPair,
    recipe: Sequence[Pass],
    target: Path,
    *,
    media: Sequence[GraphPlan] = (),
    recipe_text: str | Mapping[str, str] = "",
    provider: str = "cpu",
    runtime: Target = "genai-0.15",
    speculative: bool = False,
    weights: WeightMode = "copy",
    force: bool = False,
    observe: Callable[[Outcome], None] | None = None,
    started: Callable[[int], None] | None = None,
    progress: Progress | None = None,
    check: Callable[[Path], Proof] | None = None,
    describe: Callable[[Path, Sequence[Outcome], Proof | None], Mapping[str, str]] | None = None,
) -> Repacked[Proof]:
    """Write `target`: it appears complete and checked, or not at all.

    `media` are the graphs of a folder that takes images or sound too: its embeddings and its encoders. `recipe` is
    then the decoder's alone. `runtime` is the oldest GenAI that must load it, and `speculative` is whether it is to guess
    tokens; the recipe has to suit both.
    `recipe_text` is the recipe as the manifest is to record it, with paths relative to the export.
    `started` is told the number of weight bytes, `progress` each portion placed. `check` is called with the staged
    folder; what it raises keeps the target from appearing. `describe` is called last, with the staged folder, the
    outcomes of all passes and what the check returned: it gives the names and texts of reports to add.
    Raises SurgeryError for everything that a user can mend.
    """
    may_replace = refuse_foreign if force else None
    refuse_existing(target, may_replace)
    encoders = [part.source for part in media if part.role != EMBED]
    modalities = [modality for modality, role in ENCODERS.items() if any(part.role == role for part in media)]
    refuse_holding(target, (export.root, pair.embed, pair.decoder, *encoders))
    check_side_files(export)
    if media:
        check_export(export, modalities)
    with staged_folder(target, may_replace=may_replace) as stage:
        model, outcomes = plan(pair, export, recipe, observe)
        if provider == "cuda":
            require_cuda(model)
        others = {part: _apply_named(part, observe) for part in media}
        models = {MODEL_FILE: model, **{part.file: other for part, (other, _) in others.items()}}
        config = (
            media_config(model, export, modalities, provider, runtime)
            if media
            else genai_config(model, export, provider, runtime, speculative)
        )
        data_files = [file for one in models.values() for file in one.source_files()]
        refuse_holding(target, data_files)
        _announce(models.values(), weights, target.absolute().parent, started)
        rewritten = any(one.converted_files() for one in models.values())
        placed = [
            place
            for name, one in models.items()
            for place in one.write(stage, name, weights=weights, progress=progress)
        ]
        write_json(stage / CONFIG_FILE, config)
        write_side_files(export, stage, multimodal=bool(media))
        if pair.kept is not None:
            copy_side_files(export, stage, [VOCABULARY_FILE])
        if media:
            write_media_files(export, stage, modalities)
        marks = "bot_token_id" in config["model"]
        needs = minimum_versions(model, runtime, multimodal=bool(media), marks=marks, speculative=speculative)
        card = model_card(
            export, pair, "genai", placed,
            recipe=recipe_text, rewritten=rewritten, modalities=modalities,
            needs=f"{needs} {on_batches(model.graph)}{on_capture(config)}{on_level(recipe_text)}",
            tools=takes_tools(stage),
        )  # fmt: skip
        write_text(stage / CARD_FILE, card)
        described = manifest(stage, export, pair, recipe_text, weights, placed, data_files, encoders, runtime)
        write_json(stage / MANIFEST_FILE, described)
        proof = check(stage) if check is not None else None
        if describe is not None:
            everything = [*outcomes, *(outcome for _, found in others.values() for outcome in found)]
            _add(stage, describe(stage, everything, proof), described)
    passed = {part.role: tuple(found) for part, (_, found) in others.items()}
    return Repacked(target, pair.precision, tuple(outcomes), tuple(placed), cache_costs(model), proof, passed)


def planned_files(
    export: Export, pair: GraphPair, recipe: Sequence[Pass], parts: Sequence[GraphPlan], weights: WeightMode
) -> dict[str, int | None]:
    """The files of the folder and their bytes; None for what is written anew, or is not there yet to be measured."""
    models = {MODEL_FILE: apply(Model.open(pair.decoder, export.architecture), recipe, weights_absent=True)[0]}
    models |= {part.file: Model.open(part.source) for part in parts}
    new = [*models, CONFIG_FILE, "config.json", "tokenizer_config.json", CARD_FILE, MANIFEST_FILE]
    found: dict[str, int | None] = dict.fromkeys([*new, *([VOCABULARY_FILE] if pair.kept is not None else [])])
    modalities = [modality for modality, role in ENCODERS.items() if any(part.role == role for part in parts)]
    found |= dict.fromkeys(PROCESSORS[modality] for modality in modalities)
    copied = (*COPIED, *MEDIA_FILES) if parts else COPIED
    found |= {name: path.stat().st_size for name in copied if (path := export.file(name))}
    for name, model in models.items():
        named = model.with_data_names(name)
        ends = named.data_ends()
        placed = {at: ends[file] if file.is_file() else None for at, file in named.used_weight_files().items()}
        placed |= named.converted_files()
        found |= placed if weights != "consolidate" else dict.fromkeys(list(placed)[:1])
    return dict(sorted(found.items()))


def _add(stage: Path, texts: Mapping[str, str], manifest: dict[str, Any]) -> None:
    """Write reports into a folder whose manifest is written already, and have the manifest name them too."""
    for name, text in texts.items():
        write_text(stage / name, text)
        manifest["files"][name] = {"size": (stage / name).stat().st_size, "sha256": sha256(stage / name)}
    manifest["files"] = dict(sorted(manifest["files"].items()))
    (stage / MANIFEST_FILE).unlink()
    write_json(stage / MANIFEST_FILE, manifest)


def _apply_named(part: GraphPlan, observe: Callable[[Outcome], None] | None) -> tuple[Model, list[Outcome]]:
    """Apply a part's recipe; an error names the graph."""
    model = Model.open(part.source)
    model.check_weights()
    check_quantised(model)
    try:
        return apply(model, part.recipe, observe)
    except SurgeryError as error:
        raise type(error)(f"{part.source}: {error}", hint=error.hint) from error


def _announce(
    models: Collection[Model], weights: WeightMode, parent: Path, started: Callable[[int], None] | None
) -> None:
    """Check the space for what is to be written, and say how many bytes that is."""
    ends: dict[Path, int] = {}
    for model in models:
        ends |= model.data_ends()
    new = sum(size for model in models for size in model.converted_files().values())
    total = sum(map(consolidated_size, models)) if weights == "consolidate" else sum(ends.values()) + new
    require_space(parent, total if weights != "link" else unlinkable(ends, parent) + new)
    if started is not None:
        started(total)
