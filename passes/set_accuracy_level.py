"""set-accuracy-level: in which type MatMulNBits multiplies on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Numerics, Pass
from surgery.choices import AccuracyLevel
from surgery.errors import PassError
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute

if TYPE_CHECKING:
    from onnx import NodeProto

"""Of MatMulNBits: 0 leaves the choice to the kernel, 1 is float32, 4 is int8. 2 and 3, float16 and bfloat16, are no
levels of the CPU provider's kernels for float32."""

INT8 = Numerics(
    "lossy",
    {
        "logits": 3.0, "regrouped": 3.0, "caches": 1.5, "mean": 0.75, "kl": 0.25, "cosine": 0.97, "top1": 0.9, "top10": 0.9,
        "exact": 0.2, "first": 0.7,
    },
)  # fmt: skip
"""Activations in int8, five small models, 24 tokens: up to 1.4 in the logits, 0.57 in the caches, 0.35 in the mean, 0.095 in
the KL, 0.011 short of 1 in the cosine; top-1 0.957, top-10 0.959, exact 16 of 35, first 30 of 35. Twice that passes; a
fault is still outside: a doubled embedding scale is worth 11 in the logits, 8 in the KL."""

_ATTRIBUTE = "accuracy_level"


@dataclass(frozen=True)
class SetAccuracyLevel(Pass):
    """Let quantised products multiply in int8 on the CPU: faster, and every number changes a little.

        before                                       after, level=4

        x float [B,S,K] -> MatMulNBits -> y          x float [B,S,K] -> MatMulNBits(accuracy_level=4) -> y

    With 4, ONNX Runtime's CPU kernels round each block of x to int8 on the way, and multiply integers; weights stay
    as they are. Other providers ignore the attribute. level=0 takes it away again, and gives the source's numbers.

    This pass is lossy, and never part of a recipe unless it is asked for. Operators of known runtimes have the attribute
    since ONNX Runtime 1.17, which is older than any that loads Gemma 4.

    Leaves alone: every other operator. Requires: a MatMulNBits. Ensures: each has the level.
    """

    name: ClassVar[str] = "set-accuracy-level"
    summary: ClassVar[str] = "quantised products multiply in int8 on the CPU: faster, and every number changes a little"
    numerics: ClassVar[Numerics] = INT8

    level: AccuracyLevel = "4"

    def requires(self, model: Model) -> None:
        if not _products(model):
            operators = sorted({node.op_type for node in model.graph.node if "MatMul" in node.op_type})
            raise PassError(
                f"{model.path} has no MatMulNBits, whose accuracy level is to be {self.level}; its matrix products are "
                f"{', '.join(operators) or 'none'}",
                hint="take a quantised precision: q4, q4f16 or quantized",
            )

    def run(self, model: Model) -> list[Finding]:
        wanted = int(self.level)
        others = [node for node in _products(model) if int_attribute(node, _ATTRIBUTE, 0) != wanted]
        if not others:
            return [Finding("skipped", "MatMulNBits", f"each of {len(_products(model))} has level {self.level}")]
        for node in others:
            _set_level(node, wanted)
        meaning = {0: "the kernel's choice", 1: "float32", 4: "int8"}[wanted]
        return [Finding("changed", f"{len(others)} MatMulNBits", f"{_ATTRIBUTE} is {self.level}, {meaning}")]

    def ensures(self, model: Model) -> None:
        for node in _products(model):
            if (found := int_attribute(node, _ATTRIBUTE, 0)) != int(self.level):
                raise PassError(f"{node.name!r} has {_ATTRIBUTE} {found}; {self.level} was to be set")


def _products(model: Model) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MatMulNBits"]


def _set_level(node: NodeProto, level: int) -> None:
    from onnx.helper import make_attribute

    kept = [attribute for attribute in node.attribute if attribute.name != _ATTRIBUTE]
    if level:
        kept.append(make_attribute(_ATTRIBUTE, level))
    held = [type(attribute).FromString(attribute.SerializeToString()) for attribute in kept]
    del node.attribute[:]
    node.attribute.extend(held)
