"""The main job: a community export in, a folder out that ONNX Runtime GenAI loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from surgery.engine import Outcome, Pass, apply
from surgery.export import Export, Pair
from surgery.genai import CONFIG_FILE, MODEL_FILE, CacheCost, cache_costs, genai_config, write_json, write_side_files
from surgery.model import Model
from surgery.staging import refuse_existing, require_space, staged_folder
from surgery.weights import Placement, Progress

Proof = TypeVar("Proof")


@dataclass(frozen=True)
class Repacked(Generic[Proof]):
    """What a repack came to. Sizes in bytes; `proof` is what the check returned."""

    folder: Path
    outcomes: tuple[Outcome, ...]
    weight_bytes: int
    costs: dict[str, CacheCost]
    proof: Proof | None


def plan(
    pair: Pair, export: Export, recipe: Sequence[Pass], observe: Callable[[Outcome], None] | None = None
) -> tuple[Model, list[Outcome]]:
    """Apply the recipe to the decoder of a pair, in memory. Every extent of every weight is checked first."""
    decoder = Model.open(pair.decoder, export.architecture)
    decoder.check_weights()
    Model.open(pair.embed).check_weights()
    return apply(decoder, recipe, observe)


def repack(
    export: Export,
    pair: Pair,
    recipe: Sequence[Pass],
    target: Path,
    *,
    provider: str = "cpu",
    weights: Placement = "copy",
    force: bool = False,
    observe: Callable[[Outcome], None] | None = None,
    started: Callable[[int], None] | None = None,
    progress: Progress | None = None,
    check: Callable[[Path], Proof] | None = None,
) -> Repacked[Proof]:
    """Write `target`: it appears complete and checked, or not at all.

    `started` is told the number of weight bytes, `progress` each portion placed. `check` is called with the staged
    folder; what it raises keeps the target from appearing. Raises SurgeryError for everything that a user can mend.
    """
    refuse_existing(target, force=force)
    model, outcomes = plan(pair, export, recipe, observe)
    config = genai_config(model, export, provider)
    total = sum(file.stat().st_size for file in model.used_weight_files().values())
    if weights == "copy":
        require_space(target.absolute().parent, total)
    if started is not None:
        started(total)
    with staged_folder(target, force=force) as stage:
        model.save(stage / MODEL_FILE, weights=weights, progress=progress)
        write_json(stage / CONFIG_FILE, config)
        write_side_files(export, stage)
        proof = check(stage) if check is not None else None
    return Repacked(target, tuple(outcomes), total, cache_costs(model), proof)
