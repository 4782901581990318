"""Nodes that are to stay on the CPU although CUDA has kernels for them: ONNX Runtime's layering annotations.

A node says so in its metadata, `layer_ann`, and a session option says which annotation goes where. ONNX Runtime has
them from 1.26 on; without the option, and in older versions, the annotation is not looked at. GenAI's own builder uses
the same word for tables that stay in host memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.graph.metadata_props import properties, set_property

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

KEY, CPU = "layer_ann", "cpu_embedding"
OPTION, SETTING = "session.layer_assignment_settings", f"cpu(={CPU})"
"""A session option; it does nothing where no node has the annotation."""


def stays_on_cpu(node: NodeProto) -> bool:
    """Whether a node is annotated so."""
    return properties(node).get(KEY) == CPU


def keep_on_cpu(node: NodeProto) -> None:
    """Annotate a node, in place of an annotation that it may have."""
    set_property(node, KEY, CPU)


def has_layers(graph: GraphProto) -> bool:
    """Whether a node of the graph is to stay on the CPU."""
    return any(stays_on_cpu(node) for node in graph.node)
