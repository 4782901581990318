"""The oldest runtimes that run a folder, read from its graph: what its model card asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.attention.gqa import OPERATOR, PAST_KEY
from surgery.choices import Target
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True, slots=True)
class MinimumVersions:
    """Versions as people write them. `onnxruntime` is None where every one that such a GenAI admits will do."""

    genai: str
    onnxruntime: str | None

    def __str__(self) -> str:
        if self.onnxruntime is None:
            return f"It needs onnxruntime-genai {self.genai} or later."
        return f"It needs onnxruntime-genai {self.genai} and onnxruntime {self.onnxruntime}, or later versions of both."


def minimum_versions(
    model: Model, target: Target, *, multimodal: bool, marks: bool = False, speculative: bool = False
) -> MinimumVersions:
    """What `model`, made for `target`, can run on; `docs/validation/runtimes.md` has every cell behind it.

    `multimodal` is whether images or sound go in, `marks` whether the configuration has ids of tool calls, and
    `speculative` whether it has speculation.

    GenAI reads the head size of each cache from 0.14 on, the number of KV heads from 0.15 on, which also has the
    multimodal class, and ids of tool calls. A KV-shared layer without present outputs needs ONNX Runtime 1.31: 1.27 to
    1.30 die of it. Tables of 2 bits need 1.27.
    """
    kv_heads = {layer.kv_heads for layer in model.require_architecture().kv_sources}
    reading = "0.15" if multimodal or marks or len(kv_heads) > 1 else "0.14"
    reading = "0.18" if speculative else reading
    genai = "0.12" if target == "genai-0.12" else reading
    inputs = {value.name for value in model.graph.input}
    kv_shared_layers = [
        node
        for node in model.graph.node
        if node.op_type == OPERATOR and len(node.input) > PAST_KEY and node.input[PAST_KEY] not in inputs
    ]
    if any(len(node.output) == 1 for node in kv_shared_layers):
        return MinimumVersions(genai, "1.31")
    return MinimumVersions(genai, "1.27" if kv_shared_layers or any(map(_has_two_bits, model.graph.node)) else None)


def _has_two_bits(node: NodeProto) -> bool:
    return node.op_type == "GatherBlockQuantized" and int_attribute(node, "bits", 4) == 2
