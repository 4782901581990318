"""A graph as lists of numbers, for alignment: values and nodes without their names, and the two graphs of a pair
joined.

embed_tokens:  input_ids -> [ ... ] -> inputs_embeds          one scope: the decoder's input inputs_embeds
decoder:       inputs_embeds, attention_mask -> [ ... ]  =>   is the value that embed_tokens makes
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.graph.scopes import captured
from surgery.graph.tensor_types import TensorType, declared_types, initializer_type, tensor_type

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto

MISSING = -1
"""The value of an optional input or output that is left out."""

Names = dict[str, int]


@dataclass(slots=True)
class NumberedNode:
    """A node: its operator with its domain, its attributes as bytes, its values by number, its bodies by attribute."""

    proto: NodeProto
    role: str
    operator: str
    attributes: tuple[tuple[str, bytes], ...]
    inputs: list[int]
    outputs: list[int]
    bodies: tuple[tuple[str, GraphProto], ...]
    outer: Names
    """What the names of the graph around mean where the node stands; empty for a node without bodies."""


@dataclass(slots=True)
class Port:
    """A graph input or output: its value, and its declaration (None for a function's, which has no type)."""

    value: int
    name: str
    role: str
    declaration: ValueInfoProto | None

    @property
    def type(self) -> str:
        """The declared type in words; empty for a function's."""
        if self.declaration is None:
            return ""
        return str(tensor_type(self.declaration) or "not a tensor")


@dataclass(slots=True)
class Stored:
    """An initializer: its value and its tensor."""

    value: int
    tensor: TensorProto
    role: str


Label = Callable[[Stored], Hashable]
"""What a tensor holds: equal labels, equal content; None where that is not known."""


@dataclass
class NumberedGraph:
    """The nodes of one graph, body or function, or of a joined pair. `names` and `types` are by value number.

    `joined` are the decoder's inputs that the embedding graph computes: they are part of its interface, but what
    reads them reads the embedding graph's value. `captured` are a body's outer values, by name. `main` is the role of
    the last graph.
    """

    names: list[str] = field(default_factory=list)
    types: dict[int, TensorType] = field(default_factory=dict)
    items: list[NumberedNode] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    joined: list[Port] = field(default_factory=list)
    captured: Names = field(default_factory=dict)
    main: str = ""

    def value(self, name: str) -> int:
        """A new value of this name; its number."""
        self.names.append(name)
        return len(self.names) - 1

    def name(self, value: int) -> str | None:
        """The name of a value; None for MISSING."""
        return None if value == MISSING else self.names[value]


def of_graphs(parts: Iterable[tuple[str, GraphProto]]) -> NumberedGraph:
    """One scope of graphs of which each may take what those before it give; parts are (role, graph).

    The last one's outputs are the scope's: those of the others serve it.
    """
    scope = NumberedGraph()
    given: Names = {}
    for role, graph in parts:
        given.update((port.name, port.value) for port in scope.outputs)
        scope.outputs.clear()
        scope.main = role
        _add_graph(scope, role, graph, {}, given)
    return scope


def node_place(role: str, main: str) -> str:
    """Where a graph stands among a side's: `main`, whatever its name is, or its role."""
    return "main" if role == main else role


def of_body(role: str, graph: GraphProto) -> NumberedGraph:
    """The body of an If, Loop or Scan. What it reads from outside becomes values of its own, named in `captured`."""
    scope = NumberedGraph()
    _add_graph(scope, role, graph, {}, {})
    return scope


def of_function(role: str, function: FunctionProto) -> NumberedGraph:
    """The body of a function; its inputs and outputs have no types."""
    scope = NumberedGraph()
    names: Names = {}
    for name in function.input:
        scope.inputs.append(Port(_define(scope, names, name), name, role, None))
    _add_nodes(scope, role, function.node, names)
    for name in function.output:
        scope.outputs.append(Port(_read(scope, names, name), name, role, None))
    return scope


def _add_graph(scope: NumberedGraph, role: str, graph: GraphProto, names: Names, given: Mapping[str, int]) -> None:
    stored = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name in given:
            names[value.name] = given[value.name]
            scope.joined.append(Port(given[value.name], value.name, role, value))
        elif value.name not in stored:
            scope.inputs.append(Port(_define(scope, names, value.name), value.name, role, value))
    for tensor in graph.initializer:
        scope.stored.append(Stored(_define(scope, names, tensor.name), tensor, role))
    for value in graph.input:
        if value.name in stored:  # an initializer that may be overridden is part of the interface as well
            scope.inputs.append(Port(names[value.name], value.name, role, value))
    for sparse in graph.sparse_initializer:
        scope.stored.append(Stored(_define(scope, names, sparse.values.name), sparse.values, role))
    _add_nodes(scope, role, graph.node, names)
    for value in graph.output:
        scope.outputs.append(Port(_read(scope, names, value.name), value.name, role, value))
    for name, declared in declared_types(graph).items():
        if name in names:
            scope.types.setdefault(names[name], declared)
    for stored_one in scope.stored:
        scope.types[stored_one.value] = initializer_type(stored_one.tensor)


def _add_nodes(scope: NumberedGraph, role: str, nodes: Iterable[NodeProto], names: Names) -> None:
    for node in nodes:
        inputs = [_read(scope, names, name) if name else MISSING for name in node.input]
        attributes, bodies = [], []
        for attribute in node.attribute:
            if attribute.HasField("g"):
                bodies.append((attribute.name, attribute.g))
            bodies.extend((f"{attribute.name}[{index}]", graph) for index, graph in enumerate(attribute.graphs))
            if not attribute.HasField("g") and not attribute.graphs:
                attributes.append((attribute.name, attribute.SerializeToString(deterministic=True)))
        outer: Names = {}
        if bodies:
            outer = {name: _read(scope, names, name) for name in sorted(captured(node))}
        outputs = [_define(scope, names, name) if name else MISSING for name in node.output]
        operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        attributes.sort()
        scope.items.append(NumberedNode(node, role, operator, tuple(attributes), inputs, outputs, tuple(bodies), outer))


def _define(scope: NumberedGraph, names: Names, name: str) -> int:
    names[name] = scope.value(name)
    return names[name]


def _read(scope: NumberedGraph, names: Names, name: str) -> int:
    """The value of a name; of one that nothing before defined, a new value that comes from outside."""
    if name not in names:
        scope.captured[name] = _define(scope, names, name)
    return names[name]


def inline_content(tensor: TensorProto) -> bytes:
    """The content of an inline tensor, the same for every way in which ONNX stores it."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    if tensor.data_type == 8:  # STRING
        return b"\0".join(tensor.string_data)
    from onnx import numpy_helper

    try:
        return bytes(numpy_helper.to_array(tensor).tobytes())
    except (ValueError, TypeError):
        return bytes(tensor.SerializeToString(deterministic=True))
