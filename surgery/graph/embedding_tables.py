"""Table look-ups: one row for each token id, out of a plain table or a block-quantised one.

    Gather                 (table [V, width], ids)
    GatherBlockQuantized   (codes [V, bytes], ids, scales [V, blocks], zero points [V, bytes])

Each of these tensors is a matrix of one row for each id, so that columns of the table are columns of each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.errors import PassError
from surgery.graph.changes import Finding
from surgery.graph.external_data import BITS, external_field, is_external, reference, tensors
from surgery.graph.model import Model
from surgery.graph.nodes import node_in_words
from surgery.graph.scopes import reads
from surgery.graph.tensor_types import initializer_type
from surgery.graph.weight_conversion import Columns, Conversion, NewFiles, SourcePart, compacted, moved

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import GraphProto, NodeProto, TensorProto

_IDS = 1
"""Input of the ids, in both operators."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One tensor of a table: `columns` are all elements of a row, `width` columns of the table to each of them."""

    tensor: TensorProto
    columns: Columns
    width: int

    def inline_rows(self) -> NDArray[np.uint8]:
        """The bytes of an inline matrix, uint8 [rows, bytes of a row]."""
        return self.inline_bytes().reshape(self.tensor.dims[0], -1)

    def inline_bytes(self) -> NDArray[np.uint8]:
        """The bytes of an inline matrix one after the other, whatever field holds them."""
        import numpy as np
        from onnx.numpy_helper import to_array

        if self.tensor.HasField("raw_data"):
            return np.frombuffer(self.tensor.raw_data, np.uint8)
        if 0 < _bits(self.tensor) < 8:
            return np.array(self.tensor.int32_data, np.int32).astype(np.uint8)
        return np.frombuffer(to_array(self.tensor).tobytes(), np.uint8)

    def resized(self, name: str, count: int) -> TensorProto:
        """A tensor like this one, without its data, for rows of `count` elements."""
        from onnx import TensorProto

        container = _bits(self.tensor)
        dims = [self.tensor.dims[0], (count * self.columns.bits + container - 1) // container]
        return TensorProto(name=name, data_type=self.tensor.data_type, dims=dims)


@dataclass(frozen=True, slots=True)
class TableLookup:
    """A look-up of whole rows. `matrices` are its tensors by input; `width` is the number of values in a row."""

    node: NodeProto
    matrices: dict[int, Matrix]
    width: int

    @property
    def ids(self) -> str:
        """The name of the value that holds the token ids, integers [batch, tokens]."""
        return str(self.node.input[_IDS])

    @property
    def locations(self) -> set[str]:
        """The data files that its external tensors name."""
        stored = [matrix.tensor for matrix in self.matrices.values() if is_external(matrix.tensor)]
        return {external_field(tensor, "location") or "" for tensor in stored}

    def check_rows(self, matrix: Matrix, columns: Columns) -> None:
        """Raise PassError unless the rows of one of its matrices, or of these columns of it, begin at a byte."""
        tensor, bits = matrix.tensor, _bits(matrix.tensor)
        stored = bits * tensor.dims[1]
        if stored % 8 or columns.row_bytes * 8 != stored or (bits < 8 and columns.count * columns.bits % 8):
            raise PassError(
                f"{node_in_words(self.node)}: the rows of {tensor.name!r}, {initializer_type(tensor)}, do not begin at a byte"
            )


def table_lookups(graph: GraphProto) -> Iterator[TableLookup]:
    """Every look-up in the main graph whose table is stored in it, in node order."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("Gather", "GatherBlockQuantized") or node.input[0] not in tensors:
            continue
        given = {i: tensors[name] for i, name in enumerate(node.input) if i != _IDS and name in tensors}
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if all(len(tensor.dims) == 2 for tensor in given.values()):
            found = _plain(node, given, attributes) if node.op_type == "Gather" else _blocks(node, given, attributes)
            if found is not None:
                yield found


def _plain(node: NodeProto, given: dict[int, TensorProto], attributes: dict[str, int]) -> TableLookup | None:
    if attributes.get("axis", 0) != 0:
        return None
    width = given[0].dims[1]
    return TableLookup(node, {0: Matrix(given[0], Columns(width, 0, width, _bits(given[0])), 1)}, width)


def _blocks(node: NodeProto, given: dict[int, TensorProto], attributes: dict[str, int]) -> TableLookup | None:
    """uint8 codes are packed; zero points are packed as the codes are, and absent for symmetric codes."""
    bits, block = attributes.get("bits", 4), attributes.get("block_size", 128)
    whole = all(index in given for index, name in enumerate(node.input) if index != _IDS and name)
    if attributes.get("gather_axis", 0) != 0 or attributes.get("quantize_axis", 1) != 1 or not whole or 2 not in given:
        return None
    width = given[0].dims[1] * _bits(given[0]) // bits
    matrices = {}
    for index, tensor in given.items():
        count, size = (width, 1) if index == 0 else (given[2].dims[1], block)
        matrices[index] = Matrix(tensor, Columns(count, 0, count, _bits(tensor) if index == 2 else bits), size)
    return TableLookup(node, matrices, width)


def _bits(tensor: TensorProto) -> int:
    return BITS.get(initializer_type(tensor).dtype, 0)


def scaled_by(graph: GraphProto, lookup: TableLookup) -> NodeProto | None:
    """The Mul by one number that alone reads the rows, or None."""
    rows = lookup.node.output[0]
    readers = [node for node in graph.node if rows in reads(node)]
    if len(readers) != 1 or readers[0].op_type != "Mul" or any(value.name == rows for value in graph.output):
        return None
    others = [name for name in readers[0].input if name != rows]
    single = [tensor for tensor in graph.initializer if tensor.name in others and list(tensor.dims) in ([], [1])]
    return readers[0] if len(others) == len(single) == 1 else None


def made_from(model: Model, matrix: Matrix) -> Conversion:
    """What an external matrix is made from, by columns: its own bytes, or what a pass before has them made from."""
    tensor, columns = matrix.tensor, matrix.columns
    made = model.conversion(tensor)
    if made is None:
        return Conversion((SourcePart(reference(tensor, model.weight_files), columns),))
    if len(made.parts) == 1 and made.parts[0].columns.is_whole:
        # as a whole it may be declared in rows of any length
        columns = replace(columns, bits=32) if made.half else columns
        return replace(made, parts=(SourcePart(made.parts[0].source, columns),))
    return made


def drop(model: Model, names: set[str]) -> None:
    """Take weights out of the model."""
    graph = model.graph
    for listed in (graph.initializer, graph.value_info):
        for index in range(len(listed) - 1, -1, -1):
            if listed[index].name in names:
                del listed[index]
    for name in names:
        model.converted.pop(name, None)


def move_along(model: Model, left: set[str], files: NewFiles) -> list[Finding]:
    """Move what else lies in data files that a table has left, so that these files can stay behind."""
    count = 0
    for tensor in tensors(model.proto):
        if is_external(tensor) and external_field(tensor, "location") in left & set(model.weight_files):
            files.add(model.converted, [(tensor, moved(reference(tensor, model.weight_files)))])
            count += 1
    compacted(model.proto, model.converted)
    if not files.files:
        return []
    along = f", with {count} weights that shared a data file with the table" if count else ""
    return [Finding("added", str(files), f"to be written when the model is saved{along}")]
