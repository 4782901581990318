"""lut-products: products of 2 bits in float32, so that the CPU provider computes them with look-up tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from passes.base import REORDERED, Finding, Numerics, Pass
from surgery.errors import PassError
from surgery.graph.look_up_tables import of_tables
from surgery.graph.model import Model
from surgery.graph.node_builder import FLOAT, FLOAT16, NodeBuilder
from surgery.graph.nodes import node_in_words
from surgery.graph.scopes import all_names
from surgery.graph.tensor_types import declared_types

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import NodeProto

_SCALES = 2


@dataclass(frozen=True)
class LutProducts(Pass):
    """Compute the products of 2 bits in float32 where the graph is in float16: the CPU provider then has a faster kernel.

        before                                          after

        x f16 ------> MatMulNBits(bits=2) -> y f16      x f16 -> Cast -----> MatMulNBits(bits=2) f32 -> Cast -> y f16
        scales f16 -^                                   scales f16 -> Cast -^

    With level 4 and the session option mlas.use_lut_gemm, which `repack` writes into genai_config.json, ONNX Runtime
    looks sums of int8 products up by the codes. It has that for float32 alone. The scales are converted, exactly, when
    a session is opened; weights stay as they are. Caches, logits and all else stay in float16.

    The sums are another order's; the rounding to int8 is the level's.

    Leaves alone: products of other bits, without level 4, with zero points, an order of groups or a bias.
    Requires: nothing. Ensures: none that is meant is in float16.
    """

    name: ClassVar[str] = "lut-products"
    summary: ClassVar[str] = "products of 2 bits in float32, which the CPU computes with look-up tables: faster"
    numerics: ClassVar[Numerics] = REORDERED

    def concerns(self, model: Model) -> list[NodeProto]:
        """The products that are to be in float32."""
        types = declared_types(model.graph)
        return [
            node
            for node in model.graph.node
            if of_tables(node, "FLOAT16", types) and not any(node.input[_SCALES + 1 :])
        ]

    def run(self, model: Model) -> list[Finding]:
        chosen = {node.output[0] for node in self.concerns(model)}
        if not chosen:
            return [Finding("skipped", "MatMulNBits", "none of 2 bits with level 4 is in float16")]
        with model.edited() as view:
            nodes = NodeBuilder(taken=all_names(model.graph))
            casts: dict[str, gs.Variable] = {}
            for node in view.nodes:
                if node.op == "MatMulNBits" and node.outputs[0].name in chosen:
                    _in_float32(node, nodes, casts)
                else:
                    nodes.nodes.append(node)
            view.nodes = nodes.nodes
        return [Finding("changed", f"{len(chosen)} MatMulNBits", "2 bits; they compute in float32, between casts")]

    def ensures(self, model: Model) -> None:
        for node in self.concerns(model):
            raise PassError(f"{node_in_words(node)} is still in float16")


def _in_float32(node: gs.Node, make: NodeBuilder, casts: dict[str, gs.Variable]) -> None:
    """A product with a cast before each input that is not cast already, and one behind it."""
    for index in (0, _SCALES):
        given = node.inputs[index]
        if given.name not in casts:
            label = f"{given.name.removesuffix('/output_0')}/float32"
            casts[given.name] = make("Cast", [given], "float32", _shape(given), label, to=FLOAT)
        node.inputs[index] = casts[given.name]
    result = node.outputs[0]
    exact = make.variable(f"{node.name}/float32/output_0", "float32", _shape(result))
    node.outputs = [exact]
    make.nodes.append(node)
    make.into(result, "Cast", [exact], f"{node.name}/float16", to=FLOAT16)


def _shape(value: Any) -> Sequence[Any] | None:
    """Of a value or a weight; None where it is not known."""
    return list(value.shape) if value.shape is not None else None
