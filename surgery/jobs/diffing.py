"""What differs between two models, for a person who reviews a change."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from surgery.compare.comparison import Aspect, Comparison
    from surgery.compare.subjects import Subject
    from surgery.compare.tensor_contents import Manifests
    from surgery.graph.model import Model
    from surgery.source.hub import HubSource


def diff(
    before: str | Path | Model,
    after: str | Path | Model,
    *,
    precision: str | None = None,
    weights: Literal["auto", "reference", "digest"] = "auto",
    ignore: Collection[Aspect] = (),
    numbers: str | Path | None = None,
    manifests: Manifests = "claimed",
) -> Comparison:
    """Compare two of: a model in memory, an .onnx file, an export (one precision's graphs), a GenAI folder; the last
    two may be Hub repositories, of which no weights are fetched.

    `weights`: by `reference` (file digest, offset and length), by `digest` (read them), or `auto` (read small ones).
    `ignore` are aspects that are shown but do not count as a difference; `numbers` is a file that `validate --json`
    wrote of AFTER. `manifests="read"` reads the data files that a manifest.json speaks of, and takes its word where it
    is true; otherwise that is a claim. Raises SurgeryError for what cannot be read.

        found = surgery.diff("before.onnx", "after.onnx")
        print(found.differs, found.nodes)
    """
    from surgery.compare.comparing import compare
    from surgery.compare.provenance import read_validation
    from surgery.compare.subjects import open_subjects
    from surgery.source.hub import hub_source

    given = (before, after)
    hubs = [hub_source(str(one)) if isinstance(one, str | Path) else None for one in given]
    places = [Path(one) if isinstance(one, str) else one for one in given]
    labels = [_named(place) for place in places]
    with contextlib.ExitStack() as stack:
        for index, hub in enumerate(hubs):
            if hub is not None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemma4-surgery-")))
                labels[index] = _outlined(hub, folder, precision, places[1 - index])
                places[index] = folder
        sides = open_subjects(places[0], places[1], precision)
        if labels[0] != labels[1] and (any(hubs) or sides[0].label == sides[1].label):
            sides = _told_apart(sides, labels)
        found = compare(*sides, weights_by=weights, ignore=frozenset(ignore), manifests=manifests)
    return found if numbers is None else replace(found, numbers=read_validation(Path(numbers)))


def _named(place: Path | Model) -> Sequence[str]:
    """The parts of a path; of a model in memory none."""
    return place.absolute().parts if isinstance(place, Path) else ()


def _outlined(hub: HubSource, folder: Path, precision: str | None, other: Path | Model) -> Sequence[str]:
    """Fetch what a comparison reads, of the precision and the modalities that the other side has. Returns its name."""
    from surgery.folder.manifest import recorded_precision
    from surgery.folder.multimodal import media_of
    from surgery.source.outline import outline

    beside = isinstance(other, Path) and other.is_dir()
    known = (recorded_precision(other), media_of(other)) if beside and isinstance(other, Path) else (None, ())
    taken = outline(hub, folder, precision or known[0], known[1])
    return (f"{hub} {taken}" if taken else str(hub),)


def _told_apart(sides: tuple[Subject, Subject], names: Sequence[Sequence[str]]) -> tuple[Subject, Subject]:
    """The sides with labels that differ: as many of the last parts of their paths as that takes."""
    most = max(len(parts) for parts in names)
    ends = [["/".join(parts[-count:]) for parts in names] for count in range(1, most + 1)]
    before, after = next((pair for pair in ends if pair[0] != pair[1]), ends[-1] if ends else ["", ""])
    return replace(sides[0], label=_label(before, sides[0])), replace(sides[1], label=_label(after, sides[1]))


def _label(name: str, side: Subject) -> str:
    return side.label if not name else name if side.kind == "file" or " " in name else f"{name}/{side.label}"
