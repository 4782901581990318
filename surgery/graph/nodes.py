"""Nodes and small constants: what they say, and how they are put in each other's place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def node_in_words(node: NodeProto) -> str:
    """A node as people name it: its operator and its name."""
    return f"{node.op_type} node {node.name!r}" if node.name else f"unnamed {node.op_type} node -> {list(node.output)}"


def int_attribute(node: NodeProto, name: str, default: int) -> int:
    """An INT attribute of a node, or the default where it has none of this name."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


_Message = TypeVar("_Message")
"""Any protobuf message."""


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
