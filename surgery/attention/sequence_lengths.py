"""How many real tokens each row has: counted once from the mask's values, read by every attention.

    attention_mask [B,T] -> ReduceSum(axis 1) -> Sub 1 -> Cast   row lengths less one, int32 [B,1]
                         -> Shape -> Gather 1 -> Cast            tokens of the longest row, int32 scalar

The form of ONNX Runtime GenAI's own builder. GroupQueryAttention takes the first as seqlens_k: where a row ends, and
so where its new rows belong; padding on the right lies behind the end and is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

SCOPE = "/model/row_lengths"
MASK = "attention_mask"
_INT32 = 6


@dataclass(frozen=True, slots=True)
class SequenceLengths:
    """`last` int32 [B,1]: real tokens of each row less one. `total` int32 []: tokens of the mask."""

    last: gs.Variable
    total: gs.Variable


def sequence_lengths(view: gs.Graph) -> SequenceLengths:
    """The nodes that count, at the beginning of the graph; those that an earlier pass added are taken again."""
    import numpy as np
    import onnx_graphsurgeon as gs

    there = {tensor.name: tensor for node in view.nodes for tensor in node.outputs if tensor.name.startswith(SCOPE)}
    if f"{SCOPE}/last" in there:
        return SequenceLengths(there[f"{SCOPE}/last"], there[f"{SCOPE}/total"])
    mask = next(tensor for tensor in view.inputs if tensor.name == MASK)
    batch = mask.shape[0] if mask.shape else None
    made: list[gs.Node] = []

    def constant(label: str, values: Any, dtype: Any) -> gs.Constant:
        return gs.Constant(f"{SCOPE}/constants/{label}", np.array(values, dtype=dtype))

    def node(
        op: str, inputs: list[gs.Tensor], name: str, dtype: object, shape: list[object], **attrs: object
    ) -> gs.Variable:
        output = gs.Variable(f"{SCOPE}/{name}", dtype=dtype, shape=shape)
        made.append(gs.Node(op, f"{SCOPE}/{name}/{op}", attrs=dict(attrs), inputs=inputs, outputs=[output]))
        return output

    tokens = node("ReduceSum", [mask, constant("[1]", [1], np.int64)], "tokens", mask.dtype, [batch, 1], keepdims=1)
    less_one = node("Sub", [tokens, constant("1", [1], mask.dtype)], "tokens_less_one", mask.dtype, [batch, 1])
    last = node("Cast", [less_one], "last", np.int32, [batch, 1], to=_INT32)
    shape = node("Shape", [mask], "mask_shape", np.int64, [2])
    width = node("Gather", [shape, constant("axis_1", 1, np.int64)], "mask_width", np.int64, [], axis=0)
    total = node("Cast", [width], "total", np.int32, [], to=_INT32)
    view.nodes[:0] = made
    return SequenceLengths(last, total)
