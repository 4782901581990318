"""Putting weights where a graph's references say: copied, linked, or consolidated into one aligned file.

    copy         each data file, as it is; in the kernel, which shares extents on filesystems that can (reflink)
    link         a hard link: no byte is written, and the file shares its bytes with the source
    consolidate  one file, every tensor at a multiple of 4096 bytes, in the order in which the nodes use them

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from surgery.weights import WeightReference, is_external, reference, set_extent, tensors

if TYPE_CHECKING:
    from onnx import TensorProto

    from surgery.model import Model

Placement = Literal["copy", "link", "consolidate"]
Progress = Callable[[int], None]

CHUNK = 16 * 1024 * 1024
"""Bytes moved between two progress reports."""

HASH_CHUNK = 4 * 1024 * 1024

ALIGNMENT = 4096
"""A page: each tensor of a consolidated file can be mapped into memory by itself, and suits every device's DMA."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One weight file as it was placed. `sha256` is None for a link: its bytes were neither read nor written."""

    location: str
    size: int
    how: Literal["copied", "linked", "consolidated"]
    sha256: str | None


class TrailingDigest:
    """SHA-256 of a file while it is being written: a second thread reads behind the writer, out of the page cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0
        self._closed = False
        self._changed = threading.Condition()
        self._digest = hashlib.sha256()
        self._fault: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def written(self, count: int) -> None:
        with self._changed:
            self._written += count
            self._changed.notify()

    def hexdigest(self) -> str:
        """The digest of everything written. Raises OSError where the file could not be read back."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        if self._fault is not None:
            raise self._fault
        return self._digest.hexdigest()

    def _follow(self) -> None:
        try:
            with self._path.open("rb") as reader:
                done = 0
                while (limit := self._wait_beyond(done)) > done:
                    while done < limit and (chunk := reader.read(min(HASH_CHUNK, limit - done))):
                        self._digest.update(chunk)
                        done += len(chunk)
        except OSError as error:
            self._fault = error

    def _wait_beyond(self, done: int) -> int:
        """Wait for bytes after `done`, and return how many there are; `done` itself when there will be no more."""
        with self._changed:
            while self._written <= done and not self._closed:
                self._changed.wait()
            return self._written


def place(source: Path, target: Path, location: str, placement: Placement, progress: Progress | None = None) -> Placed:
    """Put one weight file at `target`, which must be free: a hard link where asked for and possible, else a copy.

    A symlink (a Hub cache's) is followed to the file it stands for. `progress` is told the bytes since its last call.
    """
    report = progress or (lambda _: None)
    real = source.resolve()
    size = real.stat().st_size
    if placement == "link":
        try:
            os.link(real, target)
        except OSError:
            pass  # another filesystem, or one without hard links: fall through to a copy
        else:
            report(size)
            return Placed(location, size, "linked", None)
    with real.open("rb") as reader, target.open("xb", buffering=0) as writer:
        digest = TrailingDigest(target)
        try:
            for moved in _moved(reader, writer, 0, size):
                digest.written(moved)
                report(moved)
        finally:
            sha256 = digest.hexdigest()
    shutil.copymode(real, target)
    return Placed(location, size, "copied", sha256)


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
    """Bytes of a source file, and where they go in the consolidated one. Tensors that share bytes go on sharing them."""

    file: Path
    offset: int
    length: int


def consolidate(model: Model, target: Path, location: str, progress: Progress | None = None) -> Placed:
    """Write every external tensor of `model` to one file, and point the model's own references at it.

    `model` is changed in place: pass a copy. Memory use does not depend on the size of the weights.
    """
    report = progress or (lambda _: None)
    external = [(tensor, reference(tensor, model.weight_files)) for tensor in _in_order_of_use(model)]
    layout = _layout([ref for _, ref in external])
    size = 0
    with target.open("xb", buffering=0) as writer:
        digest = TrailingDigest(target)
        try:
            for extent, start in layout.items():
                _pad(writer, start - size)
                digest.written(start - size)
                with extent.file.open("rb") as reader:
                    for moved in _moved(reader, writer, extent.offset, extent.length):
                        digest.written(moved)
                        report(moved)
                size = start + extent.length
        finally:
            sha256 = digest.hexdigest()
    for tensor, ref in external:
        set_extent(tensor, location, layout[_extent(ref)], ref.length)
    model.weight_files = {location: target}
    return Placed(location, size, "consolidated", sha256)


def consolidated_size(model: Model) -> int:
    """Bytes that `consolidate` would write."""
    layout = _layout([reference(tensor, model.weight_files) for tensor in _in_order_of_use(model)])
    return max((start + extent.length for extent, start in layout.items()), default=0)


def _extent(ref: WeightReference) -> _Extent:
    return _Extent(ref.file, ref.offset, ref.length)


def _layout(references: list[WeightReference]) -> dict[_Extent, int]:
    """Where each extent starts, in order; equal extents are one."""
    layout: dict[_Extent, int] = {}
    end = 0
    for ref in references:
        extent = _extent(ref)
        if extent not in layout:
            layout[extent] = end
            end = -(-(end + ref.length) // ALIGNMENT) * ALIGNMENT
    return layout


def _in_order_of_use(model: Model) -> list[TensorProto]:
    """External tensors: initializers in the order in which nodes read them, then all others."""
    place_of = {name: index for index, name in enumerate(_names_read(model))}
    external = [tensor for tensor in tensors(model.proto) if is_external(tensor)]
    return sorted(external, key=lambda tensor: place_of.get(tensor.name, len(place_of)))


def _names_read(model: Model) -> dict[str, None]:
    return dict.fromkeys(name for node in model.graph.node for name in node.input)


def _pad(writer: BinaryIO, count: int) -> None:
    if count:
        os.write(writer.fileno(), bytes(count))
