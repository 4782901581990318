"""What differs between two models, for a person who reviews a change."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from surgery.compare.comparison import Aspect, Comparison
    from surgery.graph.model import Model


def diff(
    before: str | Path | Model,
    after: str | Path | Model,
    *,
    precision: str | None = None,
    weights: Literal["auto", "reference", "digest"] = "auto",
    ignore: Collection[Aspect] = (),
    numbers: str | Path | None = None,
) -> Comparison:
    """Compare two of: a model in memory, an .onnx file, an export (one precision's graphs), a GenAI folder.

    `weights`: by `reference` (file digest, offset and length), by `digest` (read them), or `auto` (read small ones).
    `ignore` are aspects that are shown but do not count as a difference; `numbers` is a file that `validate --json`
    wrote of AFTER. Raises SurgeryError for what cannot be read.

        found = surgery.diff("before.onnx", "after.onnx")
        print(found.differs, found.nodes)
    """
    from surgery.compare.comparing import compare
    from surgery.compare.provenance import read_validation
    from surgery.compare.subjects import open_subjects

    sides = open_subjects(_subject(before), _subject(after), precision)
    found = compare(*sides, weights_by=weights, ignore=frozenset(ignore))
    return found if numbers is None else replace(found, numbers=read_validation(Path(numbers)))


def _subject(given: str | Path | Model) -> Path | Model:
    return Path(given) if isinstance(given, str) else given
