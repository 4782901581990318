"""set-accuracy-level: in which type MatMulNBits multiplies on the CPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from passes.base import Finding, Numerics, Pass
from surgery.choices import AccuracyLevel
from surgery.errors import PassError, nearest
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute

if TYPE_CHECKING:
    from onnx import NodeProto

INT8 = Numerics(
    "lossy",
    {
        "logits": 3.0, "regrouped": 3.0, "caches": 1.5, "mean": 0.75, "kl": 0.25, "cosine": 0.97, "top1": 0.98, "top10": 0.98,
        "exact": 0.9, "first": 0.95, "error": 0.1, "mean_kl": 0.025, "near": 0.25,
    },
)  # fmt: skip
"""Activations in int8. The relative error is the measure that holds at every size: 0.025 to 0.055 in seven small
exports, 0.050 to 0.054 in E2B at full size, q2f16 and quantized; twice that passes. The mean KL is 0.0016 to 0.0117 in
the small ones, 0.0014 to 0.0018 at full size, where logits are flat. All positions keep the likeliest token, or one as
likely (surgery.verify.thresholds.NEAR): 84 to 98 of 100 the same one; and so all of the ten likeliest. Worst positions: 1.2 in the logits, 0.35 in the
mean, 0.13 in the KL, 0.0087 short of 1 in the cosine.

This says whether int8 is good enough, not whether the folder is the source: a zero point of one more in one product is
worth less than int8 itself in most layers (relative error at full size 0.051 to 0.057, but 0.21 in down_proj's 2 bits),
and a scale of a product before a normalisation is worth nothing. Equality, or the bounds of another order, find those,
without int8 (surgery.verify.accuracy)."""

_ATTRIBUTE = "accuracy_level"
_FAST_BITS = 4
"""ONNX Runtime's CPU provider has float32 kernels for codes of 4 bits alone. Of others it dequantises the whole weight
in each run: one product of one token, 1536 x 24576, takes 653 ms in 2 bits, 910 in 8, 4.3 in 4; 2.9, 8.8, 1.9 with
level 4. A prompt of 64 tokens takes as long as one token."""


@dataclass(frozen=True)
class SetAccuracyLevel(Pass):
    """Let quantised products multiply in int8 on the CPU: faster, and every number changes a little.

        before                                       after, level=4

        x float [B,S,K] -> MatMulNBits -> y          x float [B,S,K] -> MatMulNBits(accuracy_level=4) -> y

    With 4, ONNX Runtime's CPU kernels round each block of x to int8 on the way, and multiply integers; weights stay
    as they are. Other providers ignore the attribute. level=0 takes it away again, and gives the source's numbers.

    `products` is which get the level: `all`, or the `slow` ones, which have no level and other codes than those of 4
    bits, so that each run dequantises the whole weight. `but` names kinds that stay as they are, separated by spaces: a
    kind is a node's name with # for the layer's number.

    This pass is lossy. Operators of known runtimes have the attribute since ONNX Runtime 1.17, which is older than any
    that loads Gemma 4.

    Leaves alone: every other operator. Requires: a MatMulNBits. Ensures: each that is meant has the level.
    """

    name: ClassVar[str] = "set-accuracy-level"
    summary: ClassVar[str] = "quantised products multiply in int8 on the CPU: faster, and every number changes a little"
    numerics: ClassVar[Numerics] = INT8

    level: AccuracyLevel = "4"
    products: Literal["all", "slow"] = "all"
    but: str = ""

    def concerns(self, model: Model) -> list[NodeProto]:
        """The quantised products that are to get the level."""
        kept = set(self.but.split())
        return [
            node
            for node in quantised_products(model)
            if kind_of(node) not in kept and (self.products == "all" or is_slow(node))
        ]

    def requires(self, model: Model) -> None:
        products = quantised_products(model)
        if not products:
            operators = sorted({node.op_type for node in model.graph.node if "MatMul" in node.op_type})
            raise PassError(
                f"{model.path} has no MatMulNBits, whose accuracy level is to be {self.level}; its matrix products are "
                f"{', '.join(operators) or 'none'}",
                hint="take a quantised precision: q4, q4f16 or quantized",
            )
        kinds = {kind_of(node) for node in products}
        if unknown := [kind for kind in self.but.split() if kind not in kinds]:
            raise PassError(f"no MatMulNBits is of the kind {unknown[0]!r}{nearest(unknown[0], sorted(kinds))}")

    def run(self, model: Model) -> list[Finding]:
        chosen = self.concerns(model)
        wanted = int(self.level)
        others = [node for node in chosen if _level(node) != wanted]
        if not others:
            count = len(quantised_products(model))
            here = f"each of {count} has level {self.level}" if len(chosen) == count else "none of them is slow"
            return [Finding("skipped", "MatMulNBits", here)]
        for node in others:
            _set_level(node, wanted)
        meaning = {0: "the kernel's choice", 1: "float32", 4: "int8"}[wanted]
        counts = Counter(int_attribute(node, "bits", _FAST_BITS) for node in others)
        which = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(counts.items()))
        return [Finding("changed", f"{len(others)} MatMulNBits", f"{_ATTRIBUTE} is {self.level}, {meaning}; {which}")]

    def ensures(self, model: Model) -> None:
        for node in self.concerns(model):
            if (found := _level(node)) != int(self.level):
                raise PassError(f"{node.name!r} has {_ATTRIBUTE} {found}; {self.level} was to be set")


def quantised_products(model: Model) -> list[NodeProto]:
    """The MatMulNBits nodes of the main graph, in node order."""
    return [node for node in model.graph.node if node.op_type == "MatMulNBits"]


def is_slow(node: NodeProto) -> bool:
    """Whether the CPU provider dequantises the whole weight of a product in each run."""
    return _level(node) == 0 and int_attribute(node, "bits", _FAST_BITS) != _FAST_BITS


def kind_of(node: NodeProto) -> str:
    """What a product is for, in whichever layer: its node's name with # for numbers."""
    return re.sub(r"\d+", "#", node.name).replace(" ", "_")


def with_levels_of(model: Model, source: Model) -> Model:
    """A copy of a model whose quantised products have the levels of those of the same name in another; none where
    there is no such product."""
    levels = {node.name: _level(node) for node in quantised_products(source)}
    found = model.copy()
    for node in quantised_products(found):
        _set_level(node, levels.get(node.name, 0))
    return found


def _level(node: NodeProto) -> int:
    return int_attribute(node, _ATTRIBUTE, 0)


def _set_level(node: NodeProto, level: int) -> None:
    from onnx.helper import make_attribute

    kept = [attribute for attribute in node.attribute if attribute.name != _ATTRIBUTE]
    if level:
        kept.append(make_attribute(_ATTRIBUTE, level))
    held = [type(attribute).FromString(attribute.SerializeToString()) for attribute in kept]
    del node.attribute[:]
    node.attribute.extend(held)
