"""Putting weights beside a graph: copied, linked, or consolidated into one aligned file.

    copy         each data file, as it is up to the last byte that a tensor refers to; in the kernel, which shares
                 extents on filesystems that can (reflink)
    link         a hard link: no byte is written, and the file shares its bytes with the source
    consolidate  one file, every tensor at a multiple of 4096 bytes, in the order in which the nodes use them

Weights that a pass changes (surgery.graph.weight_conversion) are written in each way, into a file of their own or the
one file.

Copying is the default, for two reasons. onnx 1.21 and later refuse a data file with a second hard link ("indicating
a potential hardlink attack"), so a link makes the folder and its source unreadable for `onnx.load` (ONNX Runtime does
not mind). And `onnx.save` opens an existing data file for writing in place: a later edit of a linked folder would
change the source, or the Hub's cache.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

from surgery.choices import WeightMode
from surgery.files.atomic import existing
from surgery.files.safe_reading import sha256
from surgery.graph.external_data import WeightReference, external_field, is_external, reference, set_extent, tensors
from surgery.graph.weight_conversion import Conversion, Opener, write_converted

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

Progress = Callable[[int], None]

CHUNK = 16 * 1024 * 1024
"""Bytes moved between two progress reports."""

_BEYOND_DATA = 0o7111
"""Modes that a link would take along: executable, or running as its owner."""

ALIGNMENT = 4096
"""A page: each tensor of a consolidated file can be mapped into memory by itself, and suits every device's DMA."""


class Weighted(Protocol):
    """What placement needs of a model: its graph, where its weights are, and those that a pass changed."""

    proto: ModelProto
    weight_files: dict[str, Path]
    converted: dict[str, Conversion]

    def conversion(self, tensor: TensorProto) -> Conversion | None:
        """How a tensor's bytes are made, None where they are those of its file."""

    def open_data(self, file: Path) -> BinaryIO:
        """Open a data file for reading. Raises OSError where it cannot be."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One weight file as it was placed. `sha256` is None for a link: its bytes were neither read nor written.

    `source` is the file that it is a copy of, or a link to; None where it was made of several, or converted.
    """

    location: str
    size: int
    how: Literal["copied", "linked", "consolidated", "converted"]
    sha256: str | None
    source: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order; no path of the machine."""
        return {"file": self.location, "size": self.size, "how": self.how, "sha256": self.sha256}


def data_names(graph: str) -> Iterator[str]:
    """The names of a graph's data files, in order: as the community's exporter gives them, and runtimes look for
    them."""
    yield f"{graph}_data"
    yield from (f"{graph}_data_{number}" for number in itertools.count(1))


def unlinkable(lengths: Mapping[Path, int], parent: Path) -> int:
    """Bytes that are copied although links are asked for: of files on another filesystem, or that anybody may execute.

    `lengths` is how much of each file is used.
    """
    device = existing(parent).stat().st_dev
    found = ((file.stat(), length) for file, length in lengths.items())
    return sum(length for status, length in found if status.st_dev != device or status.st_mode & _BEYOND_DATA)


def write_data_file(
    source: Path,
    opened: Opener,
    target: Path,
    placement: WeightMode,
    length: int,
    progress: Progress | None = None,
) -> Placed:
    """Put one weight file at `target`, which must be free: a hard link where asked for and possible, else a copy.

    A copy has the first `length` bytes, which tensors refer to, and the mode of a new file; a link has what the source
    has. `progress` is told the bytes since its last call. Raises OSError.
    """
    report = progress or (lambda _: None)
    with opened(source) as reader:
        if placement == "link" and (size := _linked(source, reader, target)) is not None:
            report(length)
            return Placed(target.name, size, "linked", None, source)
        with target.open("xb", buffering=0) as writer:
            for moved in _moved(reader, writer, 0, length):
                report(moved)
    return Placed(target.name, length, "copied", sha256(target), source)


def _linked(source: Path, reader: BinaryIO, target: Path) -> int | None:
    """Link to the file that was opened; its size. None where that is not possible, or it is more than data."""
    found = os.fstat(reader.fileno())
    if found.st_mode & _BEYOND_DATA:
        return None
    try:
        os.link(os.path.realpath(source), target, follow_symlinks=False)
    except OSError:
        return None  # another filesystem, or one without hard links
    if not os.path.samestat(found, target.lstat()):
        target.unlink()
        raise OSError(errno.EIO, f"{source} changed while it was being read")
    return found.st_size


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
    """Bytes to be written: those of a source file, or what is made of one or several. Tensors that share bytes go on
    so.

    `content` tells extents apart; `length` is in bytes.
    """

    content: object
    length: int
    source: WeightReference | None = field(default=None, compare=False)
    conversion: Conversion | None = field(default=None, compare=False)


def consolidate(model: Weighted, target: Path, progress: Progress | None = None) -> Placed:
    """Write every external tensor of `model` to one file, and point the model's own references at it.

    `model` is changed in place: pass a copy. Memory use does not depend on the size of the weights.
    """
    external = _pieces(model)
    layout = _layout([extent for _, extent in external])
    size, digest = _write(layout, model.open_data, target, progress)
    for tensor, extent in external:
        set_extent(tensor, target.name, layout[extent], extent.length)
    model.weight_files, model.converted = {target.name: target}, {}
    return Placed(target.name, size, "consolidated", digest)


def convert(model: Weighted, location: str, target: Path, progress: Progress | None = None) -> Placed:
    """Write the converted weights of one location, each where its tensor says; the model stays as it is."""
    pieces = [(tensor, extent) for tensor, extent in _pieces(model) if extent.conversion is not None]
    places = {
        extent: int(external_field(tensor, "offset") or 0)
        for tensor, extent in pieces
        if external_field(tensor, "location") == location
    }
    layout = dict(sorted(places.items(), key=lambda entry: entry[1]))
    size, digest = _write(layout, model.open_data, target, progress)
    return Placed(target.name, size, "converted", digest)


def _write(layout: dict[_Extent, int], opened: Opener, target: Path, progress: Progress | None) -> tuple[int, str]:
    """Write extents where they belong, in ascending order. Returns the size of the file and its SHA-256."""
    report = progress or (lambda _: None)
    size = 0
    together = _made_together(layout)
    there: set[_Extent] = set()
    with target.open("xb", buffering=0) as writer:
        for extent, start in layout.items():
            _pad(writer, start - size)
            if extent.conversion is None:
                for moved in _transferred(extent, writer, opened):
                    report(moved)
            else:
                if extent not in there:
                    group = together[extent.conversion.reading]
                    for made in write_converted({c: layout[one] for c, one in group.items()}, writer, opened):
                        report(made)
                    there.update(group.values())
                os.lseek(writer.fileno(), extent.length, os.SEEK_CUR)
            size = start + extent.length
    return size, sha256(target)


def _made_together(layout: Iterable[_Extent]) -> dict[object, dict[Conversion, _Extent]]:
    """Extents that one pass over their sources makes, by what they read: the tables of all layers are cut at once."""
    groups: dict[object, dict[Conversion, _Extent]] = {}
    for extent in layout:
        if extent.conversion is not None:
            groups.setdefault(extent.conversion.reading, {})[extent.conversion] = extent
    return groups


def _transferred(extent: _Extent, writer: BinaryIO, opened: Opener) -> Iterator[int]:
    assert extent.source is not None
    with opened(extent.source.file) as reader:
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
