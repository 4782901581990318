"""Who makes each value of a graph, and who reads it; linear in the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.graph.scopes import reads

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


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
