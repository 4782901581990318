"""What a tensor holds, without its weights in memory: by the digest of its file, offset and length, or by reading it.

    method      equal if                                                      known to differ if
    reference   the same extent of one file, or of files of equal digests     inline, and other bytes
    digest      the same SHA-256, read in portions                            another SHA-256

A file's digest is known from the user's cache of the Hub, which names large files by it, from a Git LFS pointer in its
place, or because both sides refer to one file. What a manifest.json says of a file is a claim of whoever made the
folder: it tells which tensors to hold against each other, and never that they are equal. Where nothing else tells, a
tensor is not compared, and the report says so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import stat
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.compare.comparison import Method
from surgery.compare.numbered_graph import Label, Stored, inline_content
from surgery.compare.subjects import Subject
from surgery.errors import WeightError
from surgery.files.digests import FileDigests, Part, read_digests
from surgery.files.safe_reading import read_pointer, sha256
from surgery.folder.manifest import blob_digest
from surgery.graph.external_data import Extents, WeightReference, is_external, reference, tensors
from surgery.graph.model import Model

if TYPE_CHECKING:
    from onnx import TensorProto

Held = tuple[str, Hashable] | None
"""What a tensor holds: its bytes or their digest, or the extent of a known file; None where nothing is known."""

WeightsBy = Literal["auto", "reference", "digest"]

Manifests = Literal["claimed", "own", "read"]
"""What a manifest.json says of data files: a claim; the word of this very process; held to the files, which are
read."""

QUICK_BYTES = 64 * 1024 * 1024
"""Data files of so many bytes, both sides together, are read where nobody chose: that takes a tenth of a second."""

_SHORT = 64
"""Bytes that are compared as they are; of more, their SHA-256 is."""


@dataclass(frozen=True, slots=True)
class FileContent:
    """What a data file holds as a whole, and how that is known. Equal keys, equal bytes, unless they are a `claim`."""

    key: Hashable
    basis: str
    claim: bool = False


class Contents:
    """What the tensors of both sides hold, as far as the method tells. `labels` serve the alignment, one a side."""

    def __init__(
        self, before: Subject, after: Subject, choice: WeightsBy = "auto", manifests: Manifests = "claimed"
    ) -> None:
        self.sides = (before, after)
        self.files = _file_contents(before, after, manifests, QUICK_BYTES if choice == "auto" else 0)
        self.method: Method = _method(before, after) if choice == "auto" else choice
        self._models = tuple([{part.role: part.model for part in side.parts} for side in self.sides])
        self._held: dict[int, tuple[Stored, Held]] = {}  # with the key, so that its id stays its own
        self._read: dict[tuple[int, int], FileDigests] = {}

    @property
    def labels(self) -> tuple[Label, Label]:
        """What BEFORE and AFTER hold of a tensor, each as a function of it."""
        return (lambda stored: self.held(0, stored)), (lambda stored: self.held(1, stored))

    def held(self, side: int, stored: Stored) -> Held:
        """What a tensor holds. Raises WeightError for an extent that no file can have."""
        if id(stored) not in self._held:
            self._held[id(stored)] = stored, self._find(side, stored)
        return self._held[id(stored)][1]

    def _find(self, side: int, stored: Stored) -> Held:
        if not is_external(stored.tensor):
            data = inline_content(stored.tensor)
            return "bytes", hashlib.sha256(data).hexdigest() if len(data) > _SHORT else data
        ref = self._reference(side, stored)
        if self.method == "digest":
            digest = self._digest(ref)
            held: Held = ("bytes", digest) if digest is not None else None
        else:
            content = self.files.get(ref.file)
            kind = "claim" if content is not None and content.claim else "extent"
            held = (kind, (content.key, ref.offset, ref.length)) if content is not None else None
        conversion = self._models[side][stored.role].conversion(stored.tensor)
        if held is None or conversion is None or conversion.unchanged is not None:
            return held
        if len(conversion.parts) > 1:
            return None
        return "converted", (held, conversion.parts[0].columns, conversion.half, conversion.clip)

    def comparable(self, one: Held, other: Held) -> bool:
        """Whether it is known if they are equal: two extents of different files may hold the same, and claims
        anything."""
        if one is None or other is None or "claim" in (one[0], other[0]):
            return False
        return one == other or one[0] == other[0] == "bytes"

    def place(self, side: int, stored: Stored) -> tuple[str, int] | None:
        """The data file and the offset of an external tensor; None for an inline one."""
        if not is_external(stored.tensor):
            return None
        ref = self._reference(side, stored)
        return ref.location, ref.offset

    def tensors(self, one: Stored, other: Stored) -> tuple[tuple[Model, TensorProto], tuple[Model, TensorProto]]:
        """A tensor of each side, with the graph that it is in."""
        ours, theirs = (self._models[side][stored.role] for side, stored in enumerate((one, other)))
        return (ours, one.tensor), (theirs, other.tensor)

    def same_file(self, one: Path, other: Path) -> bool | None:
        """Whether two data files hold the same as wholes; None where that is not known."""
        ours, theirs = self.files.get(one), self.files.get(other)
        if ours is not None and theirs is not None and not (ours.claim or theirs.claim):
            if ours.key == theirs.key:
                return True
            if isinstance(ours.key, str) and isinstance(theirs.key, str):
                return False
        sizes = file_size(one), file_size(other)
        return False if None not in sizes and sizes[0] != sizes[1] else None

    def claimed(self, *files: Path) -> bool:
        """Whether what is said of one of these files is its folder's claim."""
        return any(file in self.files and self.files[file].claim for file in files)

    def digests(self, side: int) -> dict[str, str | None]:
        """Name -> SHA-256 of the side's data files: of those that are read anyway, or known by it; else None."""
        return {name: self._digest_of(file) for file, name in data_files(self.sides[side]).items()}

    def _digest_of(self, file: Path) -> str | None:
        content = self.files.get(file)
        if content is not None and not content.claim and isinstance(content.key, str):
            return content.key
        read = self._digests(file) if self.method == "digest" else None
        return read.whole if read is not None else None

    def basis(self) -> tuple[str, ...]:
        """What equality was concluded from, in words."""
        if self.method == "digest":
            read = sum(length for file in self._read.values() for _, length in file.parts)
            return (f"{read:,} bytes of data files were read, and compared tensor by tensor",)
        counts = Counter(content.basis for content in self.files.values())
        return tuple(f"{n} data file{'s' if n > 1 else ''} {basis}" for basis, n in sorted(counts.items()))

    def _reference(self, side: int, stored: Stored) -> WeightReference:
        model = self._models[side][stored.role]
        conversion = model.conversion(stored.tensor)
        return conversion.parts[0].source if conversion else reference(stored.tensor, model.weight_files)

    def _digest(self, ref: WeightReference) -> str | bytes | None:
        """SHA-256 of an extent (short ones as they are, like inline tensors); None where the file does not hold it."""
        read = self._digests(ref.file)
        return read.parts.get((ref.offset, ref.length)) if read is not None else None

    def _digests(self, file: Path) -> FileDigests | None:
        """What is read of a file, once; None where it is not there, or is a pointer."""
        found = _regular(file)
        if found is None or read_pointer(file):
            return None
        place = (found.st_dev, found.st_ino)
        if place not in self._read:
            try:
                self._read[place] = read_digests(file, self._wanted.get(place, set()), _SHORT)
            except OSError:
                return None
        return self._read[place]

    @functools.cached_property
    def _wanted(self) -> Mapping[tuple[int, int], set[Part]]:
        """The extents of every file, of both sides. Raises WeightError where those of one side overlap."""
        wanted: dict[tuple[int, int], set[Part]] = {}
        for models in self._models:
            extents = Extents()
            for ref in itertools.chain.from_iterable(map(_references, models.values())):
                found = _regular(ref.file)
                if found is not None and ref.end <= found.st_size:
                    extents.add(ref, found)
                    wanted.setdefault((found.st_dev, found.st_ino), set()).add((ref.offset, ref.length))
        return wanted


def _references(model: Model) -> Iterator[WeightReference]:
    """Of those tensors that are sound."""
    for tensor in tensors(model.proto):
        if is_external(tensor):
            with contextlib.suppress(WeightError):
                conversion = model.conversion(tensor)
                yield conversion.parts[0].source if conversion else reference(tensor, model.weight_files)


def _regular(file: Path) -> os.stat_result | None:
    """None where it is not there, or no regular file: to open one might take for ever."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _method(before: Subject, after: Subject) -> Method:
    """`digest` where that is quick: the data files are there, and small."""
    files = [file for side in (before, after) for file in data_files(side)]
    sizes = [None if read_pointer(file) else file_size(file) for file in files]
    known = [size for size in sizes if size is not None]
    return "digest" if len(known) == len(sizes) and sum(known) <= QUICK_BYTES else "reference"


def data_files(side: Subject) -> dict[Path, str]:
    """Every data file that the side's tensors refer to, and its name in the report."""
    found: dict[Path, str] = {}
    for part in side.parts:
        for location, file in part.model.weight_files.items():
            found.setdefault(file, location)
    return found


def _file_contents(before: Subject, after: Subject, manifests: Manifests, most: int) -> dict[Path, FileContent]:
    """What is known of each data file. A manifest speaks of its folder's files, and of the source's it was made from.

    Files of up to `most` bytes, together, are read where nothing but a claim is known of them.
    """
    claim = manifests == "claimed"
    basis = "claimed by the folder's manifest.json, not checked" if claim else "known by the SHA-256 in manifest.json"
    found: dict[Path, FileContent] = {}
    for side, other in ((before, after), (after, before)):
        files = data_files(side)
        recorded = _recorded(other, "source", side.root, files) | _recorded(side, "files", side.root, files)
        for file in files:
            if (blob := blob_digest(file)) is not None:
                found[file] = FileContent(blob, "known by the SHA-256 that the Hub's cache names it by")
            elif (pointer := read_pointer(file)) is not None:
                found[file] = FileContent(pointer.sha256, "known by the SHA-256 in its Git LFS pointer")
            elif claim and file not in found and (size := file_size(file) or 0) <= most and file.is_file():
                most -= size
                found[file] = FileContent(sha256(file), "read, and known by its SHA-256")
            elif (digest := recorded.get(file)) is not None and (manifests != "read" or _holds(file, digest)):
                found[file] = FileContent(digest, basis, claim)
    _same_files(before, after, found)
    return found


def _holds(file: Path, digest: str) -> bool:
    return _regular(file) is not None and sha256(file) == digest


def _recorded(side: Subject, key: Literal["source", "files"], root: Path, wanted: Collection[Path]) -> dict[Path, str]:
    """File -> SHA-256 of those `wanted` files that a manifest lists and that still have the size it says."""
    entries: Any = (side.manifest or {}).get(key)
    if key == "source" and isinstance(entries, Mapping):
        entries = entries.get("files")
    if not isinstance(entries, Mapping):
        return {}
    return {
        root / str(name): entry["sha256"]
        for name, entry in entries.items()
        if root / str(name) in wanted
        and isinstance(entry, Mapping)
        and isinstance(entry.get("sha256"), str)
        and file_size(root / str(name)) == entry.get("size")
    }


def _same_files(before: Subject, after: Subject, found: dict[Path, FileContent]) -> None:
    """Files of which both sides refer to the same one, by a link say, are equal whatever they hold."""
    ours = {_identity(file): file for file in data_files(before)}
    for file in data_files(after):
        twin = ours.get(_identity(file))
        if twin is not None:
            known = [content for one in (twin, file) if (content := found.get(one)) and not content.claim]
            key = known[0].key if known else _identity(file)
            same = FileContent(key, "shared: one file, which both sides refer to")
            found[twin] = found[file] = same


def _identity(file: Path) -> Hashable:
    """Which file it is: device and inode, or its path where it is not there."""
    try:
        status = file.stat()
    except OSError:
        return file.absolute()
    return status.st_dev, status.st_ino


def file_size(file: Path) -> int | None:
    """Bytes of a file, or of the one that a Git LFS pointer stands for; None where it is not there."""
    if (pointer := read_pointer(file)) is not None:
        return pointer.size
    try:
        return file.stat().st_size
    except OSError:
        return None
