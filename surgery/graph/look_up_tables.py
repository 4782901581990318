"""Products that ONNX Runtime's CPU provider can compute with look-up tables (LUT), and the session option for it.

A MatMulNBits of 2 bits in float32 with accuracy level 4: sums of the possible products of a few activations, rounded to
int8, are looked up by the codes. Without the option, in float16, and where the processor lacks the instructions, it
multiplies integers instead. The option alone would round activations of products without a level as well, so that it
goes with the level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.graph.nodes import int_attribute
from surgery.graph.tensor_types import declared_types

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx import GraphProto, NodeProto

    from surgery.graph.tensor_types import TensorType

OPTION, SETTING = "mlas.use_lut_gemm", "1"
BITS = 2


def of_tables(node: NodeProto, dtype: str, types: Mapping[str, TensorType]) -> bool:
    """Whether a node is a product that the level allows tables for, with activations of a dtype."""
    return (
        node.op_type == "MatMulNBits"
        and int_attribute(node, "bits", 4) == BITS
        and int_attribute(node, "accuracy_level", 0) == 4
        and node.input[0] in types
        and types[node.input[0]].dtype == dtype
    )


def has_lut_products(graph: GraphProto) -> bool:
    """Whether a session of this graph is to have the option."""
    types = declared_types(graph)
    return any(of_tables(node, "FLOAT", types) for node in graph.node)
