"""Weights that change on their way: rounded to float16, cut into columns, put side by side, some of their rows left
out; a portion at a time.

A pass declares a changed weight: the tensor takes its new dtype and shape and a place in a data file that does not
exist yet (`NewFile`), and `Model.converted` says what it is made from. The bytes are read, changed and written when the
model is saved, once; a pass itself reads none of them, and memory use does not depend on the size of the weights.
Weights that are cut from one source are written in one pass over it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from surgery.errors import WeightError
from surgery.graph.external_data import WeightReference, external_field, is_external, set_extent, tensors
from surgery.graph.int8_weights import ChannelWeights
from surgery.graph.renaming import fresh

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, TensorProto

HALF_MAX = 65504.0
"""The largest number that float16 holds."""

CHUNK = 16 * 1024 * 1024
"""Bytes of the sources in memory at a time."""

ALONG = 4096
"""Rows that are left out are read along where they are no more bytes than this: a page of the disk."""

MAX_FILE_BYTES = 2_000_000_000
"""Of one new data file: a browser's ArrayBuffer ends at 2 GiB, and the exporter keeps its files below that, too."""

Opener = Callable[[Path], BinaryIO]
"""Opens a data file of a model, wherever it may lie; see `Model.open_data`."""

Extent = tuple[object, int, int]
"""File, offset and length: what two references have in common that mean the same bytes."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Some columns of a matrix: of the `stored` elements that a row has, `bits` each, `count` from `first` on.

    A row begins at a byte; elements of less than a byte are packed, low bits first.
    """

    stored: int
    first: int
    count: int
    bits: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        return (self.stored * self.bits + 7) // 8

    @property
    def is_whole(self) -> bool:
        """Whether these are all of the columns."""
        return self.count == self.stored

    @property
    def on_bytes(self) -> bool:
        """Whether they begin and end at a byte; the end of a row counts as one, with the bits that fill it up."""
        end = self.first + self.count
        return self.first * self.bits % 8 == 0 and (end * self.bits % 8 == 0 or end == self.stored)


@dataclass(frozen=True, slots=True)
class Selection:
    """Some of the rows of a matrix, or some elements of each row: their numbers, ascending. `digest` tells them
    apart."""

    numbers: tuple[int, ...] = field(repr=False, compare=False)
    digest: str

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Selection:
        """The selection of rows, columns or elements by their numbers."""
        import numpy as np

        found = np.fromiter(numbers, np.int64)
        return cls(tuple(found.tolist()), hashlib.sha256(found.tobytes()).hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True)
class SourcePart:
    """Columns of a weight that is stored."""

    source: WeightReference
    columns: Columns

    @property
    def extent(self) -> Extent:
        """File, offset and length of the weight in bytes."""
        return self.source.file, self.source.offset, self.source.length

    @property
    def rows(self) -> int:
        """Rows of the matrix that it is cut from."""
        return self.source.length // self.columns.row_bytes


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a weight is made from: the columns of its parts side by side, row by row.

    Parts have equally many rows, and elements of one size. `taken` are the rows that are written, `picked` the elements
    of the row that they make; None for all. `half` rounds float32 to float16, and `clip` then keeps what float16 does
    not hold at its end of the range.

    With `channels`, the parts are a product's codes, their scales and perhaps their zero points, a row for each output
    channel; weights of 8 bits, or their scales, are made from all rows at once.
    """

    parts: tuple[SourcePart, ...]
    half: bool = False
    clip: bool = False
    taken: Selection | None = None
    picked: Selection | None = None
    channels: ChannelWeights | None = None

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        if self.channels is not None:
            return self.parts[0].rows // self.channels.of
        return self.parts[0].rows if self.taken is None else len(self.taken)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is written."""
        if self.channels is not None:
            return self.channels.row_bytes
        bits = sum(part.columns.count * part.columns.bits for part in self.parts)
        if self.picked is not None:
            bits = len(self.picked) * self.parts[0].columns.bits
        return (bits + 7) // 8 // (2 if self.half else 1)

    @property
    def length(self) -> int:
        """Bytes written."""
        return self.rows * self.row_bytes

    @property
    def reading(self) -> tuple[object, ...]:
        """What is read, and in rows of which form: weights that have this in common are written together."""
        return (
            self.taken,
            self.channels is None,
            *((part.extent, part.columns.stored, part.columns.bits) for part in self.parts),
        )

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for two weights of the same bytes."""
        parts = tuple((part.extent, part.columns) for part in self.parts)
        return parts, self.half, self.clip, self.taken, self.picked, self.channels

    @property
    def unchanged(self) -> WeightReference | None:
        """The weight whose bytes are written as they are, or None."""
        whole = len(self.parts) == 1 and self.parts[0].columns.is_whole
        whole = whole and not self.half and self.taken is None and self.picked is None and self.channels is None
        return self.parts[0].source if whole else None

    def rounded(self, *, clip: bool = False) -> Conversion:
        """The same, of float32, as float16."""
        if (source := self.unchanged) is not None:
            return Conversion((SourcePart(source, Columns(1, 0, 1, 32)),), half=True, clip=clip)
        return replace(self, half=True, clip=clip)


def moved(source: WeightReference) -> Conversion:
    """The weight as it is, in another file."""
    return Conversion((SourcePart(source, Columns(1, 0, 1, 8)),))


@dataclass
class NewFile:
    """A data file that comes into being when the model is saved. Weights of the same bytes have one place in it."""

    location: str
    end: int = 0
    _places: dict[tuple[object, ...], int] = field(default_factory=dict)

    def add(self, converted: dict[str, Conversion], tensor: TensorProto, conversion: Conversion) -> None:
        """Declare that `tensor`, whose dtype and shape are declared already, is made so and lies in this file."""
        start = self._places.setdefault(conversion.content, self.end)
        self.end = max(self.end, start + conversion.length)
        set_extent(tensor, self.location, start, conversion.length)
        converted[tensor.name] = conversion


@dataclass
class NewFiles:
    """New data files of bounded size, called as the exporter calls a row of them: LOCATION, LOCATION_1, ..."""

    location: str
    taken: set[str]
    limit: int = MAX_FILE_BYTES
    files: list[NewFile] = field(default_factory=list)

    def add(self, converted: dict[str, Conversion], made: Sequence[tuple[TensorProto, Conversion]]) -> None:
        """Declare weights that lie together; where there is no room left for all of them, another file begins."""
        size = sum(conversion.length for _, conversion in made)
        if not self.files or (self.files[-1].end and self.files[-1].end + size > self.limit):
            number = len(self.files)
            self.files.append(NewFile(fresh(f"{self.location}_{number}" if number else self.location, self.taken)))
        for tensor, conversion in made:
            self.files[-1].add(converted, tensor, conversion)

    def __str__(self) -> str:
        count = len(self.files)
        files = f"{count} data files" if count > 1 else "a data file"
        return f"{files} of their own, {sum(file.end for file in self.files):,} bytes"


def compacted(proto: ModelProto, converted: Mapping[str, Conversion]) -> None:
    """Close the gaps in data files that do not exist yet: a pass may have given a weight a place in another one."""
    files: dict[str, NewFile] = {}
    made = [tensor for tensor in tensors(proto) if is_external(tensor) and tensor.name in converted]
    for tensor in sorted(made, key=lambda tensor: int(external_field(tensor, "offset") or 0)):
        location = external_field(tensor, "location") or ""
        files.setdefault(location, NewFile(location)).add({}, tensor, converted[tensor.name])


def halved(values: NDArray[Any], name: str, *, clip: bool) -> NDArray[Any]:
    """float32 rounded to float16. Raises WeightError for a finite value beyond its range, unless it is to be
    clipped."""
    import numpy as np

    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    beyond = np.isinf(half) & np.isfinite(values)
    if not beyond.any():
        return half
    if not clip:
        raise WeightError(
            f"tensor {name!r} holds {float(values[beyond].flat[0]):g}, and float16 ends at {HALF_MAX:g}",
            hint="to-fp16{overflow=clip} keeps such values at the end of the range",
        )
    return np.where(beyond, np.copysign(np.float16(HALF_MAX), half), half)


def side_by_side(pieces: Sequence[tuple[NDArray[Any], Columns]]) -> NDArray[Any]:
    """The columns of matrices, uint8 [rows, bytes of a row] each, put side by side; the same form."""
    import numpy as np

    last = len(pieces) - 1
    if all(c.on_bytes and (n == last or c.count * c.bits % 8 == 0) for n, (_, c) in enumerate(pieces)):
        cut = [rows[:, c.first * c.bits // 8 : ((c.first + c.count) * c.bits + 7) // 8] for rows, c in pieces]
        return cut[0] if len(cut) == 1 else np.concatenate(cut, axis=1)
    bits = pieces[0][1].bits
    codes = [_codes(rows, bits)[:, c.first : c.first + c.count] for rows, c in pieces]
    return _packed(np.concatenate(codes, axis=1), bits)


def picked_elements(rows: NDArray[Any], numbers: Sequence[int], bits: int) -> NDArray[Any]:
    """Some elements of each row of a matrix, uint8 [rows, bytes of a row]; the same form."""
    import numpy as np

    if bits >= 8:
        elements = rows.reshape(len(rows), -1, bits // 8)
        return np.take(elements, np.asarray(numbers), axis=1).reshape(len(rows), -1)
    return _packed(np.take(_codes(rows, bits), np.asarray(numbers), axis=1), bits)


def _codes(rows: NDArray[Any], bits: int) -> NDArray[Any]:
    """Elements of less than a byte, one a byte."""
    import numpy as np

    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: NDArray[Any] = (rows[:, :, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(rows), -1)


def _packed(codes: NDArray[Any], bits: int) -> NDArray[Any]:
    """The way back; what fills up the last byte of a row is 0."""
    import numpy as np

    each = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each))).reshape(len(codes), -1, each)
    packed: NDArray[Any] = np.bitwise_or.reduce(padded << np.arange(0, 8, bits, dtype=np.uint8), axis=2)
    return packed


def write_converted(places: Mapping[Conversion, int], writer: BinaryIO, opened: Opener) -> Iterator[int]:
    """Write weights of equal `reading`, each at its place, and yield the size of each portion."""
    for conversion, row, data in made_portions(list(places), opened):
        yield _write(writer, data, places[conversion] + row * conversion.row_bytes)


def made_portions(made: Sequence[Conversion], opened: Opener) -> Iterator[tuple[Conversion, int, memoryview]]:
    """Weights of equal `reading` as they are written, a portion of rows of each in turn: which, from which row on, the bytes.

    The sources are read once, from the first row to the last, whatever the number of weights.
    """
    first = made[0]
    parts = {part.extent: part for part in first.parts}
    step = max(1, CHUNK // sum(part.columns.row_bytes for part in parts.values()))
    portions = _portions(first, step) if first.channels is None else [(0, first.parts[0].rows)]
    with ExitStack() as stack:
        files = {extent: stack.enter_context(opened(part.source.file)) for extent, part in parts.items()}
        for row, count in portions:
            numbers = first.taken.numbers[row : row + count] if first.taken is not None else None
            held = {extent: _rows(files[extent], part, row, count, numbers) for extent, part in parts.items()}
            for conversion in made:
                yield conversion, row, _portion(conversion, held)


def _portions(conversion: Conversion, step: int) -> Iterator[tuple[int, int]]:
    """The rows that are written, in portions: the first row of each and how many, of no more than `step` stored
    rows."""
    row = 0
    while row < conversion.rows:
        end = min(row + step, conversion.rows)
        if conversion.taken is not None:
            numbers = conversion.taken.numbers
            end = bisect_left(numbers, numbers[row] + step, row, end)
        yield row, end - row
        row = end


def _rows(file: BinaryIO, part: SourcePart, row: int, count: int, numbers: Sequence[int] | None) -> NDArray[Any]:
    """`count` rows from `row` on, or those of these numbers; uint8 [count, bytes of a row]."""
    import numpy as np

    if numbers is None:
        return np.frombuffer(_read(file, part, row, count), np.uint8).reshape(count, -1)
    rows = np.empty((count, part.columns.row_bytes), np.uint8)
    there = np.asarray(numbers)
    ends = np.flatnonzero((np.diff(there) - 1) * part.columns.row_bytes > ALONG) + 1
    for start, end in zip([0, *ends], [*ends, count], strict=True):
        here = there[start:end] - there[start]
        span = np.frombuffer(_read(file, part, int(there[start]), int(here[-1]) + 1), np.uint8)
        rows[start:end] = span.reshape(len(span) // rows.shape[1], -1)[here]
    return rows


def _read(file: BinaryIO, part: SourcePart, row: int, count: int) -> bytes:
    size = count * part.columns.row_bytes
    data = os.pread(file.fileno(), size, part.source.offset + row * part.columns.row_bytes)
    while len(data) < size:
        more = os.pread(file.fileno(), size - len(data), part.source.offset + row * part.columns.row_bytes + len(data))
        if not more:
            raise OSError(errno.EIO, f"{part.source.file} ends early; it changed while it was being read")
        data += more
    return data


def _portion(conversion: Conversion, held: Mapping[Extent, NDArray[Any]]) -> memoryview:
    import numpy as np

    if conversion.channels is not None:
        made = conversion.channels.made([held[part.extent] for part in conversion.parts])
        return memoryview(made.view(np.uint8).reshape(-1).data)
    rows = side_by_side([(held[part.extent], part.columns) for part in conversion.parts])
    if conversion.picked is not None:
        rows = picked_elements(rows, conversion.picked.numbers, conversion.parts[0].columns.bits)
    rows = np.ascontiguousarray(rows)
    if conversion.half:
        values = rows.reshape(-1).view("<f4")
        name = conversion.parts[0].source.name
        rows = halved(values, name, clip=conversion.clip).astype("<f2", copy=False).view(np.uint8)
    return memoryview(rows.reshape(-1).data)


def _write(writer: BinaryIO, data: memoryview, place: int) -> int:
    size = len(data)
    while data:
        written = os.pwrite(writer.fileno(), data, place)
        data, place = data[written:], place + written
    return size
