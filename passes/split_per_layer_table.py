"""split-per-layer-table: the table of per-layer inputs becomes one table for each layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.errors import PassError
from surgery.graph.embedding_tables import Matrix, TableLookup, drop, made_from, move_along, scaled_by, table_lookups
from surgery.graph.external_data import is_external
from surgery.graph.index import producers, use_counts
from surgery.graph.model import Model
from surgery.graph.nodes import copied, node_in_words, replace_nodes
from surgery.graph.renaming import fresh
from surgery.graph.scopes import all_names
from surgery.graph.weight_conversion import Columns, Conversion, NewFiles, side_by_side

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

DATA_FILE = "per_layer_tables.onnx_data"

VALUE = "per_layer_inputs"
_ON_THE_WAY = ("Mul", "Cast", "Reshape", "Identity", "Concat")


@dataclass(frozen=True)
class SplitPerLayerTable(Pass):
    """One table for each layer in place of one for all of them.

        before                                  after

        ids -> Gather(table [V, L*D])           ids -> Gather(table.layer_0 [V, D]) -> Mul(16) --+
                  |                             ids -> Gather(table.layer_1 [V, D]) -> Mul(16) --+-> Concat
               Mul(16)                          ...                                            --+     |
                  |                                                                                [B,S,L*D]
              [B,S,L*D] -> Reshape, ...                                                                |
                                                                                                  Reshape, ...

    The one table of E2B has 262144 x 8960 elements: more than 2^31, beyond which the Gather of ONNX Runtime's CUDA
    provider before 1.27 reads elsewhere without an error (float16 and float32 tables; ids from 239,674 on), and more
    than one buffer of WebGPU takes. A block-quantised table (GatherBlockQuantized) is split with its scales and its
    zero points, two of which may share a byte.

    The bytes are moved when the model is saved, in one pass over the source, into new data files of up to 2 GB. What
    else lies in the table's file moves along, so that no file holds a table that nobody reads.

    A constant that alone scales the rows goes with each look-up: the CPU provider computes a float16 look-up and a Mul
    behind it in one go, and between them it would round where the source does not (measured: one unit in the last
    place).

    Requires: the architecture; one look-up of rows of layers x per-layer input size, its table read by it alone.
    Ensures: no look-up of such rows is left. Every number is as it was.
    """

    name: ClassVar[str] = "split-per-layer-table"
    summary: ClassVar[str] = "one table of per-layer inputs for each layer, for small buffers and 32-bit look-ups"
    rewrites_weights: ClassVar[bool] = True

    def requires(self, model: Model) -> None:
        if (lookup := _per_layer_lookup(model)) is not None:
            layers = len(model.require_architecture().layers)
            for matrix in lookup.matrices.values():
                _check(model.graph, lookup, matrix, layers)

    def run(self, model: Model) -> list[Finding]:
        arch = model.require_architecture()
        if not arch.per_layer_input_size:
            return [Finding("skipped", "per-layer inputs", "the model has none")]
        lookup = _per_layer_lookup(model)
        if lookup is None:
            return [Finding("skipped", "per-layer table", "no look-up reads the rows of all layers from one table")]
        layers = len(arch.layers)
        left, rows = lookup.locations, lookup.node.output[0]
        old = {matrix.tensor.name for matrix in lookup.matrices.values()}
        names = _replace_lookup(model.graph, lookup, layers)
        new = [
            [_cut(matrix, names[index, n], n, layers) for index, matrix in lookup.matrices.items()]
            for n in range(layers)
        ]
        files = NewFiles(DATA_FILE, {*model.weight_files, *model.converted_files()})
        for n, layer in enumerate(new):
            made = zip(layer, lookup.matrices.values(), strict=True)
            files.add(model.converted, [(t, _part(model, m, n, layers)) for t, m in made if is_external(m.tensor)])
        findings = [
            Finding("changed", name, f"cut into {layers} tables of {lookup.width // layers} columns")
            for name in sorted(old)
        ]
        model.graph.initializer.extend(tensor for layer in new for tensor in layer)
        drop(model, old | ({rows} - producers(model.graph).keys()))
        return [*findings, *move_along(model, left, files)]

    def ensures(self, model: Model) -> None:
        if (left := _per_layer_lookup(model)) is not None:
            raise PassError(f"{node_in_words(left.node)} still reads the rows of all layers from one table")


def _per_layer_lookup(model: Model) -> TableLookup | None:
    """The look-up of the rows of all layers; None where there is none. Raises PassError where several could be it."""
    arch = model.require_architecture()
    if not arch.per_layer_input_size:
        return None
    width = len(arch.layers) * arch.per_layer_input_size
    found = [lookup for lookup in table_lookups(model.graph) if lookup.width == width]
    behind = _behind(model.graph, VALUE)
    if len(behind) > 1:  # the token table may be as wide
        found = [lookup for lookup in found if lookup.node.output[0] in behind]
    if len(found) > 1:
        raise PassError(
            f"rows of {width} values are read by {' and '.join(node_in_words(lookup.node) for lookup in found)}; one is expected"
        )
    return found[0] if found else None


def _behind(graph: GraphProto, value: str) -> set[str]:
    """The values that `value` is made from by scaling and reshaping."""
    behind = {value}
    for node in reversed(graph.node):
        if node.op_type in _ON_THE_WAY and behind.intersection(node.output):
            behind.update(node.input)
    return behind


def _check(graph: GraphProto, lookup: TableLookup, matrix: Matrix, layers: int) -> None:
    stored = matrix.columns.stored
    if stored % layers or lookup.width // layers % matrix.width:
        raise PassError(
            f"{matrix.tensor.name!r} has {stored} elements a row; they do not come apart into {layers} layers"
        )
    lookup.check_rows(matrix, replace(matrix.columns, count=stored // layers))
    if use_counts(graph)[matrix.tensor.name] > 1 or any(v.name == matrix.tensor.name for v in graph.input):
        raise PassError(f"{matrix.tensor.name!r} is read elsewhere, too, or is an input; its look-up alone is expected")


def _replace_lookup(graph: GraphProto, lookup: TableLookup, layers: int) -> dict[tuple[int, int], str]:
    """Put a look-up for each layer and a Concat in place of the one; the names of the new tables, by input and
    layer."""
    from onnx.helper import make_node

    taken = all_names(graph)
    scaling = scaled_by(graph, lookup)
    chain = [copied(node) for node in (lookup.node, scaling) if node is not None]
    names: dict[tuple[int, int], str] = {}
    new: list[NodeProto] = []
    for n in range(layers):
        renamed = {node.output[0]: fresh(f"{node.output[0]}/layer.{n}", taken) for node in chain}
        for index, matrix in lookup.matrices.items():
            names[index, n] = fresh(f"{matrix.tensor.name}.layer_{n}", taken)
            renamed[matrix.tensor.name] = names[index, n]
        for old in chain:
            node = copied(old)
            node.name = fresh(f"{old.name}/layer.{n}", taken)
            node.input[:] = [renamed.get(name, name) for name in old.input]
            node.output[:] = [renamed[old.output[0]]]
            new.append(node)
        _declare(graph, renamed, lookup.width // layers)
    last = chain[-1]
    parts = [node.output[0] for node in new[len(chain) - 1 :: len(chain)]]
    new.append(make_node("Concat", parts, [last.output[0]], name=fresh(f"{last.name}/Concat", taken), axis=-1))
    replace_nodes(graph, [lookup.node] if scaling is None else [lookup.node, scaling], new)
    return names


def _declare(graph: GraphProto, renamed: dict[str, str], width: int) -> None:
    """Declare a layer's values as those of all layers are declared, with fewer columns."""
    for value in [value for value in graph.value_info if value.name in renamed]:
        if value.type.tensor_type.shape.dim:
            twin = graph.value_info.add()
            twin.CopyFrom(value)
            twin.name = renamed[value.name]
            twin.type.tensor_type.shape.dim[-1].dim_value = width


def _columns(matrix: Matrix, layer: int, layers: int) -> Columns:
    count = matrix.columns.stored // layers
    return replace(matrix.columns, first=layer * count, count=count)


def _cut(matrix: Matrix, name: str, layer: int, layers: int) -> TensorProto:
    """One layer's columns of a matrix; an external one gets its place later."""
    columns = _columns(matrix, layer, layers)
    tensor = matrix.resized(name, columns.count)
    if not is_external(matrix.tensor):
        tensor.raw_data = side_by_side([(matrix.inline_rows(), columns)]).tobytes()
    return tensor


def _part(model: Model, matrix: Matrix, layer: int, layers: int) -> Conversion:
    """What one layer's columns of an external matrix are made from."""
    whole = made_from(model, matrix)
    (part,) = whole.parts
    columns = replace(_columns(matrix, layer, layers), bits=part.columns.bits)
    return replace(whole, parts=(replace(part, columns=columns),))
