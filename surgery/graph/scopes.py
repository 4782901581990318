"""A graph and the graphs nested in it (the bodies of If, Loop and Scan): which names they define and read.

A name means the same value in a graph and in the bodies nested in it, unless the body defines that name itself: it then
hides the outer one. ONNX forbids such hiding (IR spec, "Names within a graph"), files contain it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies that a node's attributes hold."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every graph nested in it, outer ones first."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(body for node in current.node for body in subgraphs(node))


def defined_names(graph: GraphProto) -> set[str]:
    """Values that the graph itself defines: inputs, initializers and node outputs; not those of its subgraphs."""
    names = {value.name for value in graph.input}
    names.update(tensor.name for tensor in graph.initializer)
    names.update(sparse.values.name for sparse in graph.sparse_initializer)
    names.update(name for node in graph.node for name in node.output if name)
    return names


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


def reads(node: NodeProto) -> set[str]:
    """Names of every value that a node reads, through its inputs or from inside its subgraphs."""
    names = set(node.input)
    names.discard("")
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        names |= captured(node)
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
