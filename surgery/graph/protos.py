"""Reading and renaming an ONNX graph, subgraphs included; every function is linear in the graph.

A name means the same value in a graph and in the bodies nested in it (If, Loop, Scan), unless the body
defines that name itself: it then hides the outer one. ONNX forbids such hiding (IR spec, "Names within a graph"),
files contain it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from surgery.errors import ModelError

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

_Message = TypeVar("_Message")
"""Any protobuf message."""

Dim = int | str | None
"""One dimension: a size, the name of a symbolic size, or unknown."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """A declared type: ONNX dtype name, and the dimensions, or None where the rank is unknown."""

    dtype: str
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return self.dtype
        return f"{self.dtype} [{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


def tensor_type(value: ValueInfoProto) -> TensorType | None:
    """The declared type of a tensor value, or None for sequences, maps, optionals and undeclared values."""
    from onnx import TensorProto

    if not value.type.HasField("tensor_type"):
        return None
    declared = value.type.tensor_type
    try:
        dtype = TensorProto.DataType.Name(declared.elem_type)
    except ValueError:
        dtype = f"DTYPE_{declared.elem_type}"
    if not declared.HasField("shape"):
        return TensorType(dtype, None)
    return TensorType(dtype, tuple(_dim(dim) for dim in declared.shape.dim))


def _dim(dim: object) -> Dim:
    kind = dim.WhichOneof("value")  # type: ignore[attr-defined]
    return getattr(dim, kind) if kind else None


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        yield from _attribute_graphs(attribute)


def _attribute_graphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def defined_names(graph: GraphProto) -> set[str]:
    """Values that the graph itself defines: inputs, initializers and node outputs; not those of its subgraphs."""
    names = {value.name for value in graph.input}
    names.update(tensor.name for tensor in graph.initializer)
    names.update(sparse.values.name for sparse in graph.sparse_initializer)
    names.update(name for node in graph.node for name in node.output if name)
    return names


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every graph nested in it, outer ones first."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(body for node in current.node for body in subgraphs(node))


def value_names(graph: GraphProto) -> set[str]:
    """Every name that a value has in the graph or in a graph nested in it. ONNX keeps node names apart from them."""
    names: set[str] = set()
    for scope in graphs(graph):
        names |= defined_names(scope)
        names.update(name for node in scope.node for name in node.input)
        names.update(value.name for value in (*scope.output, *scope.value_info))
    names.discard("")
    return names


def all_names(graph: GraphProto) -> set[str]:
    """Every name that a value or a node has in the graph or in a graph nested in it."""
    names = value_names(graph)
    names.update(node.name for scope in graphs(graph) for node in scope.node if node.name)
    return names


def captured(node: NodeProto) -> set[str]:
    """Names of outer values that the node's subgraphs read: also of one that a body reads first and hides later."""
    names: set[str] = set()
    for body in subgraphs(node):
        own = {value.name for value in body.input}
        own.update(tensor.name for tensor in body.initializer)
        own.update(sparse.values.name for sparse in body.sparse_initializer)
        for inner in body.node:
            names |= reads(inner) - own
            own.update(inner.output)
        names.update(value.name for value in body.output if value.name not in own)
    return names


def reads(node: NodeProto) -> set[str]:
    """Names of every value that a node reads, through its inputs or from inside its subgraphs."""
    names = {name for name in node.input if name}
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        names |= captured(node)
    return names


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    return {name: node for node in graph.node for name in node.output if name}


def use_counts(graph: GraphProto) -> dict[str, int]:
    """How many nodes and graph outputs read each value."""
    counts: dict[str, int] = {}
    for node in graph.node:
        for name in reads(node):
            counts[name] = counts.get(name, 0) + 1
    for value in graph.output:
        counts[value.name] = counts.get(value.name, 0) + 1
    return counts


def rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename the values of a graph: interface, initializers, nodes, value_info, and where subgraphs read them.

    A value that a subgraph defines under the same name is another value, and keeps its name.
    """
    if not names:
        return
    _rename_declarations(graph, names)
    for node in graph.node:
        _rename_list(node.input, names)
        _rename_list(node.output, names)
        for body in subgraphs(node):
            _rename_captured(body, names)


def rename_in_every_scope(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename values in a graph and in every graph nested in it, whichever of them defines the name; nodes too.

    The meaning stays as it was if no new name is in use: what hid an outer value hides it under the new name.
    """
    if not names:
        return
    for scope in graphs(graph):
        _rename_declarations(scope, names)
        for node in scope.node:
            _rename_list(node.input, names)
            _rename_list(node.output, names)
            if node.name in names:
                node.name = names[node.name]


def _rename_declarations(graph: GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name in names:
            value.name = names[value.name]
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        if tensor.name in names:
            tensor.name = names[tensor.name]
    for annotation in graph.quantization_annotation:
        if annotation.tensor_name in names:
            annotation.tensor_name = names[annotation.tensor_name]
        for entry in annotation.quant_parameter_tensor_names:
            if entry.value in names:
                entry.value = names[entry.value]


def _rename_list(values: MutableSequence[str], names: Mapping[str, str]) -> None:
    for index, name in enumerate(values):
        if name in names:
            values[index] = names[name]


def _rename_captured(body: GraphProto, names: Mapping[str, str]) -> None:
    """Rename what a body reads from outside, node by node: a name belongs to the body from where it defines it."""
    declared = [value.name for value in body.input]
    declared += [tensor.name for tensor in body.initializer]
    declared += [sparse.values.name for sparse in body.sparse_initializer]
    names = _without(names, declared)
    for node in body.node:
        _rename_list(node.input, names)
        for inner in subgraphs(node):
            _rename_captured(inner, names)
        names = _without(names, node.output)
    _rename_declarations(body, names)


def _without(names: Mapping[str, str], hidden: Iterable[str]) -> Mapping[str, str]:
    """`names` less those that are hidden; the same object where none is, so that bodies cost nothing extra."""
    found = {name for name in hidden if name in names}
    return {old: new for old, new in names.items() if old not in found} if found else names


def rename_dims(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename symbolic dimensions in the interface and the value_info of a graph and of its subgraphs."""
    if not names:
        return
    for scope in graphs(graph):
        for value in (*scope.input, *scope.output, *scope.value_info):
            if not value.type.HasField("tensor_type"):
                continue
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in names:
                    dim.dim_param = names[dim.dim_param]


def fresh(name: str, taken: set[str]) -> str:
    """`name`, or `name` with the first number that makes it free; the result is added to `taken`."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def copied(message: _Message) -> _Message:
    """A copy that outlives the list it was taken from."""
    twin = type(message)()
    twin.CopyFrom(message)  # type: ignore[attr-defined]
    return twin


def replace_nodes(graph: GraphProto, old: Iterable[NodeProto], new: Iterable[NodeProto]) -> None:
    """Put new nodes in the place of the last of the old ones."""
    gone = [next(index for index, node in enumerate(graph.node) if node is one) for one in old]
    after = [copied(node) for node in graph.node[max(gone) + 1 :]]
    del graph.node[max(gone) :]
    graph.node.extend(new)
    graph.node.extend(after)
    for index in sorted(gone, reverse=True)[1:]:
        del graph.node[index]


def declared_types(graph: GraphProto) -> dict[str, TensorType]:
    """The declared type of every value that has one: interface, value_info and initializers."""
    types: dict[str, TensorType] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        declared = tensor_type(value)
        if declared is not None:
            types[value.name] = declared
    for tensor in graph.initializer:
        types[tensor.name] = initializer_type(tensor)
    return types


def initializer_type(tensor: TensorProto) -> TensorType:
    from onnx import TensorProto

    try:
        dtype = TensorProto.DataType.Name(tensor.data_type)
    except ValueError:
        dtype = f"DTYPE_{tensor.data_type}"
    return TensorType(dtype, tuple(tensor.dims))


def check_definitions(proto: ModelProto) -> None:
    """Raise ModelError unless every value has one definition, and every reader comes after it.

    What `onnx.checker` would also check (schemas, shapes) is left out on purpose: it rejects
    SimplifiedLayerNormalization in the default domain, which the exporter writes and ONNX Runtime runs.
    """
    _check_graph(proto.graph, outer=())


def _check_graph(graph: GraphProto, outer: tuple[set[str], ...]) -> None:
    """`outer` holds the names of each scope around the graph, as far as they are defined where it stands."""
    own: set[str] = set()
    scopes = (own, *outer)
    for value in graph.input:
        _define(value.name, own, "graph input")
    initializers = [tensor.name for tensor in graph.initializer]
    initializers += [sparse.values.name for sparse in graph.sparse_initializer]
    _refuse_repeats(initializers)
    own.update(initializers)
    for node in graph.node:
        for name in node.input:
            if name and not _is_known(name, scopes):
                raise ModelError(f"{node_in_words(node)} reads {name!r}, which nothing before it defines")
        for body in subgraphs(node):
            _check_graph(body, scopes)
        for name in node.output:
            if name:
                _define(name, own, node)
    for value in graph.output:
        if not _is_known(value.name, scopes):
            raise ModelError(f"graph output {value.name!r} is defined by no node, input or initializer")
    _refuse_repeats(value.name for value in graph.output)


def _is_known(name: str, scopes: tuple[set[str], ...]) -> bool:
    return any(name in scope for scope in scopes)


def _define(name: str, own: set[str], by: str | NodeProto) -> None:
    if name in own:
        raise ModelError(
            f"value {name!r} is defined a second time by {by if isinstance(by, str) else node_in_words(by)}"
        )
    own.add(name)


def _refuse_repeats(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        _define(name, seen, "another entry of the same list")


def node_in_words(node: NodeProto) -> str:
    """A node as people name it: its operator and its name."""
    return f"{node.op_type} node {node.name!r}" if node.name else f"unnamed {node.op_type} node -> {list(node.output)}"


def int_attribute(node: NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def integers(tensor: TensorProto) -> list[int]:
    """The values of a small inline integer initializer, flat. Raises ModelError for an external or a damaged one."""
    from onnx import numpy_helper

    if tensor.data_location == 1:
        raise ModelError(f"initializer {tensor.name!r} is stored externally; a small inline constant is expected")
    try:
        return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]
    except ValueError as error:
        raise ModelError(f"initializer {tensor.name!r} does not hold what its shape says: {error}") from None
