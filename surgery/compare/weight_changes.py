"""The weights section: tensors by what they hold, and the files beside the graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from surgery.compare.comparison import FewerTokens, FileChange, Weight, WeightChange, Weights
from surgery.compare.node_changes import Compared
from surgery.compare.numbered_graph import Stored, inline_content
from surgery.compare.tensor_contents import Contents, Held, data_files, file_size
from surgery.compare.vocabulary_rows import RowsOfTokens
from surgery.graph.external_data import BITS, byte_size
from surgery.graph.tensor_types import initializer_type


def weights(compared: Compared, contents: Contents, fewer: RowsOfTokens | None = None) -> Weights:
    """Changed tensors, the largest difference first; raises WeightError for an extent that no file can have. Those that
    only have `fewer` tokens' rows are counted by themselves."""
    tally: Counter[str] = Counter()
    changes: list[WeightChange] = []
    rows: list[WeightChange] = []
    renamed = _renamed(compared, contents)
    for scopes in compared.all():
        for change, stored in _pairs(scopes, contents, renamed, tally):
            equal = fewer is not None and change.verb == "changed" and fewer.are_equal(*contents.tensors(*stored))
            (rows if equal else changes).append(change)
        changes += list(_unpaired(scopes, contents))
    changes.sort(key=lambda change: (-abs(change.delta), -_size(change), _name(change)))
    files, why = _files(contents, renamed)
    return Weights(
        method=contents.method,
        changes=tuple(changes),
        files=files,
        unchanged=tally["same"],
        relocated=tally["relocated"],
        uncompared=tally["unknown"],
        basis=contents.basis() if tally["same"] or tally["unknown"] or changes else (),
        why=why if tally["unknown"] else (),
        vocabulary=_fewer(fewer, rows) if fewer is not None and rows else None,
    )


def _fewer(fewer: RowsOfTokens, rows: Sequence[WeightChange]) -> FewerTokens:
    names = tuple(sorted(change.after.name for change in rows if change.after is not None))
    return FewerTokens(fewer.size, len(fewer.kept), names, sum(change.delta for change in rows))


def _renamed(compared: Compared, contents: Contents) -> dict[str, str]:
    """Data files that go on under another name: what is in the one before is in the other after, and nothing else
    is."""
    places: dict[str, set[str]] = {}
    origins: dict[str, set[str]] = {}
    for scopes in compared.all():
        for ours, theirs in scopes.alignment.stored.items():
            before = contents.place(0, scopes.before.stored[ours])
            after = contents.place(1, scopes.after.stored[theirs])
            if before and after:
                places.setdefault(before[0], set()).add(after[0])
                origins.setdefault(after[0], set()).add(before[0])
    old, new = (set(data_files(side).values()) for side in contents.sides)
    pairs = ((name, min(found)) for name, found in places.items() if len(found) == 1)
    return {one: other for one, other in pairs if origins[other] == {one} and one not in new and other not in old}


def _pairs(
    scopes: Compared, contents: Contents, renamed: Mapping[str, str], tally: Counter[str]
) -> Iterator[tuple[WeightChange, tuple[Stored, Stored]]]:
    for ours, theirs in scopes.alignment.stored.items():
        one, other = scopes.before.stored[ours], scopes.after.stored[theirs]
        before, after = _weight(contents, 0, one), _weight(contents, 1, other)
        held: tuple[Held, Held] = contents.held(0, one), contents.held(1, other)
        if before.type != after.type:
            yield WeightChange("changed", before, after), (one, other)
        elif contents.comparable(*held):
            if held[0] != held[1]:
                yield WeightChange("changed", before, after), (one, other)
            elif before.name != after.name:
                yield WeightChange("renamed", before, after), (one, other)
            else:
                tally["same"] += 1
                file = renamed.get(before.file or "", before.file)
                tally["relocated"] += (file, before.offset) != (after.file, after.offset)
        else:
            tally["unknown"] += 1


def _unpaired(scopes: Compared, contents: Contents) -> Iterator[WeightChange]:
    kept = set(scopes.alignment.stored.values())
    for index, stored in enumerate(scopes.after.stored):
        if index not in kept:
            yield WeightChange("added", None, _weight(contents, 1, stored))
    for index, stored in enumerate(scopes.before.stored):
        if index not in scopes.alignment.stored:
            yield WeightChange("removed", _weight(contents, 0, stored), None)


def _weight(contents: Contents, side: int, stored: Stored) -> Weight:
    found = contents.place(side, stored)
    return Weight(stored.tensor.name, str(initializer_type(stored.tensor)), _bytes(stored), *(found or (None, None)))


def _bytes(stored: Stored) -> int:
    """Bytes of a tensor by its dtype and shape; of one whose dtype has no size on disk, by its content."""
    declared = initializer_type(stored.tensor)
    if declared.dtype in BITS and all(isinstance(dim, int) and dim >= 0 for dim in declared.shape or ()):
        return byte_size(declared.dtype, stored.tensor.dims)
    return len(inline_content(stored.tensor))


def bytes_of_tensors(scopes: Compared) -> tuple[int, int]:
    """Bytes of the main graph's tensors, on each side."""
    return sum(map(_bytes, scopes.before.stored)), sum(map(_bytes, scopes.after.stored))


def _files(contents: Contents, renamed: Mapping[str, str]) -> tuple[tuple[FileChange, ...], tuple[str, ...]]:
    """Data files by name, of a renamed one the new, the largest difference first, and why some of them could not be
    compared."""
    sides = [{name: file for file, name in data_files(side).items()} for side in contents.sides]
    found, why = [], []
    old_names = {new: old for old, new in renamed.items()}
    for name in dict.fromkeys((*(renamed.get(name, name) for name in sides[0]), *sides[1])):
        old = old_names.get(name)
        pair = [sides[0].get(old or name), sides[1].get(name)]
        before, after = (file_size(path) if path is not None else None for path in pair)
        same: bool | None = False
        if pair[0] is not None and pair[1] is not None:
            same = contents.same_file(pair[0], pair[1])
        found.append(FileChange(name, before, after, same, old_name=old))
        if same is None:
            claimed = contents.claimed(*(path for path in pair if path is not None))
            why.append(_why(name, before is None or after is None, claimed))
    found.sort(key=lambda change: (-abs(change.delta), change.name))
    return tuple(found), tuple(why)


def _why(name: str, missing: bool, claimed: bool) -> str:
    if missing:
        return f"{name} is not there"
    if claimed:
        return f"the digest of {name} is claimed by the folder, not checked; --weights digest reads it"
    return f"no digest of {name} is known on both sides; --weights digest reads it"


def _size(change: WeightChange) -> int:
    return max(side.size for side in (change.before, change.after) if side is not None)


def _name(change: WeightChange) -> str:
    return (change.after or change.before).name  # type: ignore[union-attr]
