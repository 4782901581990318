"""The check of a graph after an edit: one definition of each value, in front of all that read it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from surgery.errors import ModelError
from surgery.graph.nodes import node_in_words
from surgery.graph.scopes import subgraphs

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


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
