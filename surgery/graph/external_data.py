"""Weights that stay on disk: references to them, their checked extents, and their checked places.

External data is treated as a file format: an extent is checked (offset + length inside the file,
length = shape x dtype, sub-byte types included) without reading a byte of it. `onnx.checker` accepts an
offset past the end of the file, and `onnx.load` accepts a length that contradicts the shape (measured, onnx 1.23.2).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from surgery.errors import WeightError, WeightsAbsent
from surgery.files.safe_reading import stays_inside

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

BITS = {
    "FLOAT": 32, "UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16, "INT32": 32, "INT64": 64, "BOOL": 8,
    "FLOAT16": 16, "DOUBLE": 64, "UINT32": 32, "UINT64": 64, "COMPLEX64": 64, "COMPLEX128": 128, "BFLOAT16": 16,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
    "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2,
}  # fmt: skip
"""Bits of one element on disk, by ONNX dtype name. Sub-byte types are packed, low bits first (TensorProto's spec)."""


@dataclass(frozen=True, slots=True)
class WeightReference:
    """Where one tensor lies on disk. `length` is in bytes; `dtype` is the ONNX name, e.g. `FLOAT16`."""

    name: str
    location: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: initializers, sparse ones, and those in attributes, subgraphs, functions, training."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)
    for training in proto.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            yield attribute.sparse_tensor.values
            yield attribute.sparse_tensor.indices
        for sparse in attribute.sparse_tensors:
            yield sparse.values
            yield sparse.indices
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)


def is_external(tensor: TensorProto) -> bool:
    """Whether its bytes lie in a data file."""
    return tensor.data_location == 1  # TensorProto.EXTERNAL


def external_field(tensor: TensorProto, key: str) -> str | None:
    """The last value of one `external_data` entry, as the readers of ONNX take it, or None."""
    found = None
    for entry in tensor.external_data:
        if entry.key == key:
            found = entry.value
    return found


def set_extent(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Point a tensor at bytes of a data file; other entries stay, but for a checksum of the file."""
    from onnx import TensorProto

    tensor.data_location = TensorProto.EXTERNAL
    kept = [(e.key, e.value) for e in tensor.external_data if e.key not in ("location", "offset", "length", "checksum")]
    del tensor.external_data[:]
    fields = [("location", location), ("offset", str(offset)), ("length", str(length)), *kept]
    for key, value in fields:
        tensor.external_data.add(key=key, value=value)


def set_location(tensor: TensorProto, location: str) -> None:
    """Name another data file; offset and length stay."""
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def byte_size(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a packed tensor of this dtype and shape; Python's integers cannot overflow."""
    elements = 1
    for dim in shape:
        elements *= dim
    return (elements * BITS[dtype] + 7) // 8


def reference(tensor: TensorProto, files: Mapping[str, Path]) -> WeightReference:
    """The reference of an external tensor, its fields checked against its dtype and shape, not yet against the file.

    Raises WeightError: unknown dtype, negative or non-numeric offset or length, length that is not shape x dtype.
    """
    from onnx import TensorProto

    location = external_field(tensor, "location")
    if not location or location not in files:
        raise WeightError(f"tensor {tensor.name!r} is stored externally but names no data file that is known")
    known = tensor.data_type in TensorProto.DataType.values()
    dtype = TensorProto.DataType.Name(tensor.data_type) if known else str(tensor.data_type)
    if dtype not in BITS:
        raise WeightError(f"tensor {tensor.name!r} in {location!r} has dtype {dtype}, which has no size on disk")
    shape = tuple(tensor.dims)
    if any(dim < 0 for dim in shape):
        raise WeightError(f"tensor {tensor.name!r} has a negative dimension in its shape {list(shape)}")
    expected = byte_size(dtype, shape)
    offset = _whole_number(tensor, location, "offset", default=0)
    length = _whole_number(tensor, location, "length", default=expected)
    if length != expected:
        raise WeightError(
            f"tensor {tensor.name!r} in {location!r} is {dtype} {list(shape)} = {expected} bytes, "
            f"but its external data says length {length}"
        )
    return WeightReference(tensor.name, location, files[location], offset, length, dtype, shape)


def _whole_number(tensor: TensorProto, location: str, key: str, default: int) -> int:
    text = external_field(tensor, key)
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20):  # 2**63 has 19 digits
        raise WeightError(
            f"tensor {tensor.name!r} in {location!r} has {key} {text[:40]!r}; a whole number >= 0 is expected"
        )
    return int(text)


def check_location(location: str, model: str) -> None:
    """Raise WeightError unless `location` is a plain relative path that stays inside the model's folder."""
    if not location:
        raise WeightError(f"{model}: a tensor is stored externally but names no data file")
    path = PurePosixPath(location)
    windows = "\\" in location or (len(location) > 1 and location[1] == ":")
    if path.is_absolute() or windows or ".." in path.parts or "\0" in location or not path.parts:
        raise WeightError(
            f"{model}: external data location {location!r} leads out of the model's folder; "
            "only relative paths without '..' are followed"
        )


def check_data_name(location: str, model: Path) -> None:
    """Raise WeightError for a location that is no plain name of a data file, such as `model.onnx_data_1`.

    Where a graph is written as it is, its data files get the names that it chose: not `conftest.py`, not `.envrc`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}[._]data(_[0-9]{1,4})?", location):
        raise WeightError(
            f"{model} stores weights in {location!r}; a name such as model.onnx_data is expected",
            hint="repack and apply give data files names of their own; strip leaves a graph as it is",
        )


def data_folder(model: Path) -> Path:
    """The folder that the data files of a graph lie in, or below: the export's, if the graph lies in its `onnx`."""
    folder = model.parent
    return folder.absolute().parent if folder.absolute().name == "onnx" else folder


def check_link(file: Path, model: Path) -> None:
    """Raise WeightError if a data file is a link that leads out of the export, other than to the Hub cache's blobs."""
    if not stays_inside(file, root := data_folder(model)):
        raise WeightError(
            f"{file} is a link to {os.path.realpath(file)}, outside of {root}",
            hint="put a copy in its place if you trust it",
        )


def check_extents(references: Iterable[WeightReference]) -> int:
    """Check that every extent lies inside its file, without reading it. Returns the bytes referenced.

    Raises WeightError naming the tensor, the bytes that it needs and the bytes that the file has.
    """
    found: dict[Path, os.stat_result] = {}
    extents = Extents()
    total = 0
    for ref in references:
        if ref.file not in found:
            found[ref.file] = _status(ref)
        size = found[ref.file].st_size
        if ref.end > size:
            raise WeightError(
                f"{ref.file}: tensor {ref.name!r} needs bytes {ref.offset} to {ref.end}, but the file has {size} bytes",
                hint="the download may be incomplete: compare the size with the one the repository lists",
            )
        extents.add(ref, found[ref.file])
        total += ref.length
    return total


class Extents:
    """The parts of data files that tensors refer to: reading each of them once is never more than reading the files.

    Tied tensors share a part as a whole. Parts that overlap otherwise are of no exporter; with N tensors of nearly the
    whole file, a small download would be read N times, or be written as N files' worth. A file is told by its number,
    because a link can give it any number of names.
    """

    def __init__(self) -> None:
        self._parts: set[tuple[int, int, int, int]] = set()
        self._bytes: dict[tuple[int, int], int] = {}

    def add(self, ref: WeightReference, found: os.stat_result) -> None:
        """Raises WeightError where the file is shorter than its parts together."""
        file = (found.st_dev, found.st_ino)
        part = (*file, ref.offset, ref.length)
        if part in self._parts:
            return
        self._parts.add(part)
        self._bytes[file] = self._bytes.get(file, 0) + ref.length
        if self._bytes[file] > found.st_size:
            raise WeightError(
                f"{ref.file}: tensor {ref.name!r}, bytes {ref.offset} to {ref.end}, overlaps others: all of them need "
                f"{self._bytes[file]:,} bytes, and the file has {found.st_size:,}",
                hint="tensors may share bytes only as a whole; save the graph again with onnx.save",
            )


def _status(ref: WeightReference) -> os.stat_result:
    try:
        found = ref.file.stat()
    except FileNotFoundError:
        raise WeightsAbsent(
            f"{ref.file} is missing: tensor {ref.name!r} and perhaps others are stored in it",
            hint="fetch the file, or pick another precision",
        ) from None
    except OSError as error:
        raise WeightError(
            f"{ref.file}, where tensor {ref.name!r} is stored, cannot be read: {error.strerror}"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise WeightError(f"{ref.file}, where tensor {ref.name!r} is stored, is not a regular file")
    return found
