"""The products that give the logits: lm_head, found from the graph's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery.graph.index import producers

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

PRODUCTS = ("MatMulNBits", "MatMul", "FusedMatMul", "Gemm")
_BY_ELEMENT = {"Cast", "Clip", "DequantizeLinear", "Div", "Identity", "Mul", "QuantizeLinear", "Round", "Tanh"}
"""Operators between lm_head and the logits: a soft cap, a change of dtype, rounding to 8 bits."""


def output_products(graph: GraphProto) -> Iterator[tuple[NodeProto, list[NodeProto]]]:
    """The matrix products that give a graph output, up to operators that work element by element: each with those
    operators, the output's own first."""
    made = producers(graph)
    for output in graph.output:
        behind: list[NodeProto] = []
        node = made.get(output.name)
        while node is not None and node.op_type in _BY_ELEMENT:
            behind.append(node)
            node = next((made[name] for name in node.input if name in made), None)
        if node is not None and node.op_type in PRODUCTS:
            yield node, behind
