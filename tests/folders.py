"""What tests make of an export, in one call; and what a folder holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from passes.base import Outcome, Pass
from passes.presets import compatible
from surgery.folder.building import Repacked, build_folder, plan
from surgery.graph.model import Model
from surgery.source.export import Export, open_export

Preset = Callable[[Path], Sequence[Pass]]
"""The passes for an export with this embedding graph."""


def repack(
    source: Path | Export, target: Path, precision: str = "q4", preset: Preset = compatible, **options: Any
) -> Repacked[Any]:
    """The folder of one precision, as it is written, without a proof. `options` are those of build_folder."""
    export = source if isinstance(source, Export) else open_export(source)
    pair = export.pair(precision)
    return build_folder(export, pair, preset(pair.embed), target, **options)


def planned(
    source: Path | Export, precision: str = "q4", preset: Preset = compatible
) -> tuple[Model, Sequence[Outcome]]:
    """The graph that `repack` would write, and what each pass did."""
    export = source if isinstance(source, Export) else open_export(source)
    pair = export.pair(precision)
    return plan(pair, export, preset(pair.embed))


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file below a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
