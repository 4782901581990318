"""fuse-per-layer-table: the tables of all layers become one table again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.errors import PassError
from surgery.graph.embedding_tables import Matrix, TableLookup, drop, made_from, move_along, table_lookups
from surgery.graph.external_data import is_external, set_extent, tensors
from surgery.graph.index import producers, use_counts
from surgery.graph.model import Model
from surgery.graph.nodes import copied, node_in_words, replace_nodes
from surgery.graph.renaming import fresh
from surgery.graph.scopes import all_names
from surgery.graph.tensor_types import initializer_type, tensor_type
from surgery.graph.weight_conversion import Conversion, NewFiles, SourcePart, side_by_side

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

DATA_FILE = "per_layer_table.onnx_data"


@dataclass(frozen=True)
class FusePerLayerTable(Pass):
    """One table for all layers in place of one for each: the way back from split-per-layer-table.

        before                                   after

        ids -> Gather(table.0 [V, D])  --+       ids -> Gather(table [V, L*D])
        ids -> Gather(table.1 [V, D])  --+-> Concat -> y             |
        ...                            --+                        y [B,S,L*D]

    One look-up instead of dozens, for providers that take large tables. Any Concat along the last axis is fused whose
    inputs are look-ups of the same ids in tables of the same form, each read by nothing else. What a split in the
    same recipe cut is put together without a byte being written: the tensor refers to its source again.

    Requires: look-ups with equal attributes; all tables inline or all external. Ensures: none of them is left.
    Every number is as it was.
    """

    name: ClassVar[str] = "fuse-per-layer-table"
    summary: ClassVar[str] = "one table of per-layer inputs for all layers: the way back from split-per-layer-table"
    rewrites_weights: ClassVar[bool] = True

    def requires(self, model: Model) -> None:
        for joint in _fusible(model.graph):
            _check(joint.lookups)

    def run(self, model: Model) -> list[Finding]:
        findings: list[Finding] = []
        files = NewFiles(DATA_FILE, {*model.weight_files, *model.converted_files()})
        left: set[str] = set()
        for joint in _fusible(model.graph):
            parts = joint.lookups
            left |= {location for lookup in parts for location in lookup.locations}
            old = {matrix.tensor.name for lookup in parts for matrix in lookup.matrices.values()}
            new = [_fuse(model, [lookup.matrices[index] for lookup in parts], files) for index in parts[0].matrices]
            _replace_lookups(model.graph, joint, new)
            drop(model, old)
            model.graph.initializer.extend(new)
            findings += [Finding("changed", tensor.name, f"put together from {len(parts)} tables") for tensor in new]
        if not findings:
            return [Finding("skipped", "per-layer tables", "no Concat joins look-ups of the same ids")]
        _return_neighbours(model)
        return findings + move_along(model, left, files)

    def ensures(self, model: Model) -> None:
        for joint in _fusible(model.graph):
            raise PassError(f"{node_in_words(joint.concat)} still joins look-ups of the same ids")


@dataclass(frozen=True, slots=True)
class _Joint:
    """A Concat along the last axis, the look-ups that it joins, and the Mul behind each where one number scales all."""

    concat: NodeProto
    lookups: list[TableLookup]
    scalings: list[NodeProto]

    @property
    def nodes(self) -> list[NodeProto]:
        return [*(lookup.node for lookup in self.lookups), *self.scalings, self.concat]


def _fusible(graph: GraphProto) -> list[_Joint]:
    """Each Concat of look-ups that nothing else reads."""
    made, uses = producers(graph), use_counts(graph)
    by_output = {lookup.node.output[0]: lookup for lookup in table_lookups(graph)}
    ranks = {value.name: len(t.shape) for value in graph.input if (t := tensor_type(value)) and t.shape}
    found = []
    for concat in graph.node:
        if concat.op_type != "Concat" or len(concat.input) < 2 or not all(name in made for name in concat.input):
            continue
        direct = [made[name] for name in concat.input]
        scalings = direct if all(node.op_type == "Mul" for node in direct) else []
        inner = [name for node in direct for name in (node.input if scalings else node.output) if name in by_output]
        parts = [by_output[name] for name in inner]
        factors = {name for node in scalings for name in node.input if name not in by_output}
        if len(parts) != len(direct) or len(factors) > 1 or not factors.isdisjoint(made):
            continue
        ids = {lookup.ids for lookup in parts}
        axis = next((attribute.i for attribute in concat.attribute if attribute.name == "axis"), 0)
        last = axis == -1 or axis == ranks.get(min(ids), -1)  # a look-up has one axis more than its ids
        once = [*inner, *(matrix.tensor.name for lookup in parts for matrix in lookup.matrices.values()), *concat.input]
        if len(ids) == 1 and last and all(uses[name] == 1 for name in once):
            found.append(_Joint(concat, parts, scalings))
    return found


def _check(parts: Sequence[TableLookup]) -> None:
    first = parts[0]
    for other in parts:
        alike = other.node.op_type == first.node.op_type and _attributes(other.node) == _attributes(first.node)
        if not alike or other.matrices.keys() != first.matrices.keys():
            raise PassError(
                f"{node_in_words(other.node)} is not like {node_in_words(first.node)}: one look-up cannot do both"
            )
        for index, matrix in other.matrices.items():
            tensor, model = matrix.tensor, first.matrices[index].tensor
            same = tensor.data_type == model.data_type and tensor.dims[0] == model.dims[0]
            if not same or is_external(tensor) != is_external(model):
                raise PassError(
                    f"{tensor.name!r} is {initializer_type(tensor)} and {model.name!r} {initializer_type(model)}; "
                    "tables of one dtype and number of rows are expected, stored in one way"
                )
            other.check_rows(matrix, matrix.columns)


def _attributes(node: NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _fuse(model: Model, matrices: Sequence[Matrix], files: NewFiles) -> TensorProto:
    """One tensor of the columns of all; an external one refers to its source where it is a whole one again."""
    count = sum(matrix.columns.count for matrix in matrices)
    tensor = matrices[0].resized(_fused_name(model.graph, matrices), count)
    if not is_external(matrices[0].tensor):
        tensor.raw_data = side_by_side([(matrix.inline_rows(), matrix.columns) for matrix in matrices]).tobytes()
        return tensor
    made = [made_from(model, matrix) for matrix in matrices]
    if len({(one.half, one.clip) for one in made}) > 1:
        raise PassError(f"{matrices[0].tensor.name!r} and its neighbours are not all rounded to float16")
    conversion = replace(made[0], parts=_joined([part for one in made for part in one.parts]))
    if not _return(tensor, conversion):
        files.add(model.converted, [(tensor, conversion)])
    return tensor


def _fused_name(graph: GraphProto, matrices: Sequence[Matrix]) -> str:
    """The name before a split, or a new one."""
    bases = {re.sub(r"\.layer_\d+(_\d+)?$", "", matrix.tensor.name) for matrix in matrices}
    return fresh(bases.pop() if len(bases) == 1 else f"{matrices[0].tensor.name}/fused", all_names(graph))


def _joined(parts: Sequence[SourcePart]) -> tuple[SourcePart, ...]:
    """Parts that continue each other become one."""
    joined: list[SourcePart] = []
    for part in parts:
        last = joined[-1] if joined else None
        continues = last is not None and (part.extent, part.columns.stored) == (last.extent, last.columns.stored)
        if last is not None and continues and part.columns.first == last.columns.first + last.columns.count:
            joined[-1] = replace(last, columns=replace(last.columns, count=last.columns.count + part.columns.count))
        else:
            joined.append(part)
    return tuple(joined)


def _return(tensor: TensorProto, conversion: Conversion) -> bool:
    """Let a tensor refer to its source again, if it is all of it as it is."""
    source = conversion.unchanged
    if source is not None:
        set_extent(tensor, source.location, source.offset, source.length)
    return source is not None


def _return_neighbours(model: Model) -> None:
    """What a split moved along goes back with the table."""
    used = set(model.used_weight_files().values())
    for tensor in tensors(model.proto):
        made = model.conversion(tensor) if is_external(tensor) else None
        if made is not None and made.unchanged is not None and made.unchanged.file in used and _return(tensor, made):
            del model.converted[tensor.name]


def _replace_lookups(graph: GraphProto, joint: _Joint, new: Sequence[TensorProto]) -> None:
    """Put one look-up, and one Mul where there are many, in place of the Concat and of what it joins."""
    taken = all_names(graph)
    gone = {node.output[0] for node in joint.nodes if node is not joint.concat}
    lookup = _first(joint.lookups[0].node, taken)
    for index, tensor in zip(joint.lookups[0].matrices, new, strict=True):
        lookup.input[index] = tensor.name
    nodes = [lookup]
    if joint.scalings:
        scaling = _first(joint.scalings[0], taken)
        rows = joint.lookups[0].node.output[0]
        scaling.input[:] = [lookup.output[0] if name == rows else name for name in scaling.input]
        nodes.append(scaling)
    nodes[-1].output[0] = joint.concat.output[0]
    replace_nodes(graph, joint.nodes, nodes)
    for index in range(len(graph.value_info) - 1, -1, -1):
        if graph.value_info[index].name in gone:
            del graph.value_info[index]


def _first(node: NodeProto, taken: set[str]) -> NodeProto:
    """A copy of a layer's node, named for all layers."""
    twin = copied(node)
    twin.name, output = (re.sub(r"/layer\.\d+$", "", name) for name in (node.name, node.output[0]))
    twin.output[0] = fresh(output, taken)
    return twin
