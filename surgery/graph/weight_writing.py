"""Putting weights where a graph's references say: copied, linked, or consolidated into one aligned file.

    copy         each data file, as it is up to the last byte that a tensor refers to; in the kernel, which shares
                 extents on filesystems that can (reflink)
    link         a hard link: no byte is written, and the file shares its bytes with the source
    consolidate  one file, every tensor at a multiple of 4096 bytes, in the order in which the nodes use them

Weights that a pass changes (surgery.graph.weight_conversion) are written in each way, into a file of their own or the one file.

Copying is the default, for two reasons. onnx 1.21 and later refuse a data file with a second hard link ("indicating
a potential hardlink attack"), so a link makes the folder and its source unreadable for `onnx.load` (ONNX Runtime does
not mind). And `onnx.save` opens an existing data file for writing in place: a later edit of a linked folder would
change the source, or the Hub's cache.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

from surgery.choices import WeightMode
from surgery.files.atomic import existing
from surgery.graph.external_data import WeightReference, external_field, is_external, reference, set_extent, tensors
from surgery.graph.weight_conversion import Conversion, write_converted

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

Progress = Callable[[int], None]

CHUNK = 16 * 1024 * 1024
"""Bytes moved between two progress reports."""

HASH_CHUNK = 1024 * 1024

FLUSH_STEP = 256 * 1024 * 1024
"""Bytes written between two flushes: the disk is kept busy, and not asked to commit every small tensor."""

ALIGNMENT = 4096
"""A page: each tensor of a consolidated file can be mapped into memory by itself, and suits every device's DMA."""


class Weighted(Protocol):
    """What placement needs of a model: its graph, where its weights are, and those that a pass changed."""

    proto: ModelProto
    weight_files: dict[str, Path]
    converted: dict[str, Conversion]

    def conversion(self, tensor: TensorProto) -> Conversion | None: ...


@dataclass(frozen=True, slots=True)
class Placed:
    """One weight file as it was placed. `sha256` is None for a link: its bytes were neither read nor written."""

    location: str
    size: int
    how: Literal["copied", "linked", "consolidated", "converted"]
    sha256: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {"file": self.location, "size": self.size, "how": self.how, "sha256": self.sha256}


class Trail:
    """What follows the writer of a file: one thread takes its SHA-256, out of the page cache, another flushes it.

    Copying, hashing and the disk then work at the same time, and when the writer is done little is left of either.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0
        self._closed = False
        self._changed = threading.Condition()
        self._digest = hashlib.sha256()
        self._fault: OSError | None = None
        followers = ((self._hash, 1), (self._flush, FLUSH_STEP))
        self._threads = [threading.Thread(target=self._follow, args=each, daemon=True) for each in followers]
        for thread in self._threads:
            thread.start()

    def written(self, count: int) -> None:
        with self._changed:
            self._written += count
            self._changed.notify_all()

    def close(self) -> None:
        """Say that nothing more will be written."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def sha256(self) -> str:
        """The digest of everything written, once it is on disk. Raises OSError where it cannot be read back or flushed."""
        self.close()
        for thread in self._threads:
            thread.join()
        if self._fault is not None:
            raise self._fault
        return self._digest.hexdigest()

    def _follow(self, do: Callable[[BinaryIO, int], None], step: int) -> None:
        """Do something with what was written, `step` bytes or more at a time until the writer is done."""
        try:
            with self._path.open("rb") as reader:
                done = 0
                while (limit := self._wait_for(done + step)) > done:
                    do(reader, limit - done)
                    done = limit
        except OSError as error:
            self._fault = error

    def _wait_for(self, count: int) -> int:
        """Wait until so many bytes are written, or there will be no more; how many there are."""
        with self._changed:
            while self._written < count and not self._closed:
                self._changed.wait()
            return self._written

    def _hash(self, reader: BinaryIO, count: int) -> None:
        while count:
            chunk = reader.read(min(HASH_CHUNK, count))
            if not chunk:
                raise OSError(errno.EIO, f"{reader.name} is {count} bytes shorter than what was written to it")
            self._digest.update(chunk)
            count -= len(chunk)

    def _flush(self, reader: BinaryIO, _: int) -> None:
        os.fsync(reader.fileno())


def unlinkable(files: Iterable[Path], parent: Path) -> int:
    """Bytes that are copied although links are asked for, because they lie on another filesystem than `parent`."""
    device = existing(parent).stat().st_dev
    return sum(found.st_size for found in (file.stat() for file in files) if found.st_dev != device)


class CopiesAhead:
    """Copies that begin before it is known under which names they are wanted: while passes work on the graph.

    They are made in `folder` under names of their own. `take` gives one its place; what nobody took goes with `close`.
    The copying runs in one thread; digests and flushing trail behind it in others.
    """

    def __init__(self, sources: Iterable[Path], folder: Path, progress: Progress | None = None) -> None:
        self._report = progress or (lambda _: None)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._paths = {
            real: folder / f".ahead-{n}" for n, real in enumerate(dict.fromkeys(s.resolve() for s in sources))
        }
        self._copies = {real: self._pool.submit(self._copy, real, path) for real, path in self._paths.items()}

    def take(self, source: Path, target: Path, length: int) -> tuple[int, str] | None:
        """Move the copy of `source`, cut to `length`, to `target`; its size and SHA-256.

        None where it was not begun, or taken already.
        """
        copy = self._copies.pop(source.resolve(), None)
        if copy is None:
            return None
        size, trail = copy.result()
        sha256, path = trail.sha256(), self._paths[source.resolve()]
        if length < size:
            size, sha256 = length, _cut(path, length)
        path.rename(target)
        return size, sha256

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> CopiesAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy(self, source: Path, target: Path) -> tuple[int, Trail]:
        def report(count: int) -> None:
            if self._stop.is_set():
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            self._report(count)

        return _copied(source, target, report)


def _cut(path: Path, length: int) -> str:
    """Shorten a file; the SHA-256 of what is left."""
    os.truncate(path, length)
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def place(
    source: Path,
    target: Path,
    location: str,
    placement: WeightMode,
    length: int,
    progress: Progress | None = None,
    ahead: CopiesAhead | None = None,
) -> Placed:
    """Put one weight file at `target`, which must be free: a hard link where asked for and possible, else a copy.

    A copy has the first `length` bytes, which tensors refer to; a link has what the source has.
    A symlink (a Hub cache's) is followed to the file it stands for. `progress` is told the bytes since its last call.
    A copy that `ahead` has made is taken.
    """
    report = progress or (lambda _: None)
    if ahead is not None and (taken := ahead.take(source, target, length)):
        return Placed(location, taken[0], "copied", taken[1])
    real = source.resolve()
    if placement == "link":
        size = real.stat().st_size
        try:
            os.link(real, target)
        except OSError:
            pass  # another filesystem, or one without hard links: fall through to a copy
        else:
            report(size)
            return Placed(location, size, "linked", None)
    size, trail = _copied(real, target, report, length)
    return Placed(location, size, "copied", trail.sha256())


def _copied(source: Path, target: Path, report: Progress, length: int | None = None) -> tuple[int, Trail]:
    """Copy a file, or its first `length` bytes; the size, and the copy's trail, which may be behind still."""
    with source.open("rb") as reader, target.open("xb", buffering=0) as writer:
        size = os.fstat(reader.fileno()).st_size if length is None else length
        trail = Trail(target)
        try:
            for moved in _moved(reader, writer, 0, size):
                trail.written(moved)
                report(moved)
        finally:
            trail.close()
    shutil.copymode(source, target)
    return size, trail


def _moved(reader: BinaryIO, writer: BinaryIO, offset: int, length: int) -> Iterator[int]:
    """Move bytes from `offset` of one file to the position of another, and yield the size of each portion."""
    source, target = reader.fileno(), writer.fileno()
    remaining, in_kernel = length, hasattr(os, "copy_file_range")
    while remaining and in_kernel:
        try:
            moved = os.copy_file_range(source, target, min(remaining, CHUNK), offset)
        except OSError:
            break  # EXDEV, EINVAL: not between these two files; the loop below goes on where this one stopped
        if moved == 0:
            break
        offset, remaining = offset + moved, remaining - moved
        yield moved
    while remaining:
        chunk = memoryview(os.pread(source, min(remaining, CHUNK), offset))
        if not chunk:
            raise OSError(errno.EIO, f"{reader.name} ends {remaining} bytes early; it changed while it was being read")
        offset, remaining = offset + len(chunk), remaining - len(chunk)
        while chunk:
            moved = os.write(target, chunk)
            yield moved
            chunk = chunk[moved:]


@dataclass(frozen=True, slots=True)
class _Extent:
    """Bytes to be written: those of a source file, or what is made of one or several. Tensors that share bytes go on so.

    `content` tells extents apart; `length` is in bytes.
    """

    content: object
    length: int
    source: WeightReference | None = field(default=None, compare=False)
    conversion: Conversion | None = field(default=None, compare=False)


def consolidate(model: Weighted, target: Path, location: str, progress: Progress | None = None) -> Placed:
    """Write every external tensor of `model` to one file, and point the model's own references at it.

    `model` is changed in place: pass a copy. Memory use does not depend on the size of the weights.
    """
    external = _pieces(model)
    layout = _layout([extent for _, extent in external])
    size, sha256 = _write(layout, target, progress)
    for tensor, extent in external:
        set_extent(tensor, location, layout[extent], extent.length)
    model.weight_files, model.converted = {location: target}, {}
    return Placed(location, size, "consolidated", sha256)


def convert(model: Weighted, target: Path, location: str, progress: Progress | None = None) -> Placed:
    """Write the converted weights of one location, each where its tensor says; the model stays as it is."""
    pieces = [(tensor, extent) for tensor, extent in _pieces(model) if extent.conversion is not None]
    places = {
        extent: int(external_field(tensor, "offset") or 0)
        for tensor, extent in pieces
        if external_field(tensor, "location") == location
    }
    size, sha256 = _write(dict(sorted(places.items(), key=lambda entry: entry[1])), target, progress)
    return Placed(location, size, "converted", sha256)


def _write(layout: dict[_Extent, int], target: Path, progress: Progress | None) -> tuple[int, str]:
    """Write extents where they belong, in ascending order. Returns the size of the file and its SHA-256."""
    report = progress or (lambda _: None)
    size = 0
    together = _made_together(layout)
    there: set[_Extent] = set()
    with target.open("xb", buffering=0) as writer:
        trail = Trail(target)
        try:
            for extent, start in layout.items():
                _pad(writer, start - size)
                trail.written(start - size)
                if extent.conversion is None:
                    for moved in _transferred(extent, writer):
                        trail.written(moved)
                        report(moved)
                else:
                    if extent not in there:
                        group = together[extent.conversion.reading]
                        for made in write_converted({c: layout[one] for c, one in group.items()}, writer):
                            report(made)
                        there.update(group.values())
                    os.lseek(writer.fileno(), extent.length, os.SEEK_CUR)
                    trail.written(extent.length)
                size = start + extent.length
        finally:
            sha256 = trail.sha256()
    return size, sha256


def _made_together(layout: Iterable[_Extent]) -> dict[object, dict[Conversion, _Extent]]:
    """Extents that one pass over their sources makes, by what they read: the tables of all layers are cut at once."""
    groups: dict[object, dict[Conversion, _Extent]] = {}
    for extent in layout:
        if extent.conversion is not None:
            groups.setdefault(extent.conversion.reading, {})[extent.conversion] = extent
    return groups


def _transferred(extent: _Extent, writer: BinaryIO) -> Iterator[int]:
    assert extent.source is not None
    with extent.source.file.open("rb") as reader:
        yield from _moved(reader, writer, extent.source.offset, extent.length)


def consolidated_size(model: Weighted) -> int:
    """Bytes that `consolidate` would write."""
    layout = _layout([extent for _, extent in _pieces(model)])
    return max((start + extent.length for extent, start in layout.items()), default=0)


def _pieces(model: Weighted) -> list[tuple[TensorProto, _Extent]]:
    """Every external tensor and where its bytes come from, in order of use."""
    return [(tensor, _extent(model, tensor)) for tensor in _in_order_of_use(model)]


def _extent(model: Weighted, tensor: TensorProto) -> _Extent:
    if conversion := model.conversion(tensor):
        return _Extent(conversion.content, conversion.length, conversion=conversion)
    ref = reference(tensor, model.weight_files)
    return _Extent((ref.file, ref.offset), ref.length, source=ref)


def _layout(extents: list[_Extent]) -> dict[_Extent, int]:
    """Where each extent starts, in order; equal extents are one."""
    layout: dict[_Extent, int] = {}
    end = 0
    for extent in extents:
        if extent not in layout:
            layout[extent] = end
            end = -(-(end + extent.length) // ALIGNMENT) * ALIGNMENT
    return layout


def _in_order_of_use(model: Weighted) -> list[TensorProto]:
    """External tensors: initializers in the order in which nodes read them, then all others."""
    place_of = {name: index for index, name in enumerate(_names_read(model))}
    external = [tensor for tensor in tensors(model.proto) if is_external(tensor)]
    return sorted(external, key=lambda tensor: place_of.get(tensor.name, len(place_of)))


def _names_read(model: Weighted) -> dict[str, None]:
    return dict.fromkeys(name for node in model.proto.graph.node for name in node.input)


def _pad(writer: BinaryIO, count: int) -> None:
    if count:
        os.write(writer.fileno(), bytes(count))
