"""How many real tokens each row has: counted once from the mask's values, read by every attention.

    attention_mask [B,T] -> ReduceSum(axis 1) -> Sub 1 -> Cast   row lengths less one, int32 [B,1]
                         -> Shape -> Gather 1 -> Cast            tokens of the longest row, int32 scalar

The form of ONNX Runtime GenAI's own builder. GroupQueryAttention takes the first as seqlens_k: where a row ends, and
so where its new rows belong; padding on the right lies behind the end and is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from surgery.graph.node_builder import INT32, NodeBuilder

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto

SCOPE = "/model/row_lengths"
IN_FRONT = "/model/padding"
"""Scope of the nodes that put padding in front of a row instead, for attention that takes the mask's length for all."""
Padding = Literal["front", "between", "behind", "none"]
"""Where the caches of a padded batch have its padding: in front of the row, where move-padding puts it; between its
prompt and its continuation, as the source's graphs take it; behind the row's end, as a graph that counts row lengths
takes it; or none, because each row is run by itself."""
MASK = "attention_mask"


@dataclass(frozen=True, slots=True)
class SequenceLengths:
    """`last` int32 [B,1]: real tokens of each row less one. `total` int32 []: tokens of the mask."""

    last: gs.Variable
    total: gs.Variable


def sequence_lengths(view: gs.Graph) -> SequenceLengths:
    """The nodes that count, at the beginning of the graph; those that an earlier pass added are taken again."""
    there = {tensor.name: tensor for node in view.nodes for tensor in node.outputs if tensor.name.startswith(SCOPE)}
    if f"{SCOPE}/last" in there:
        return SequenceLengths(there[f"{SCOPE}/last"], there[f"{SCOPE}/total"])
    mask = next(tensor for tensor in view.inputs if tensor.name == MASK)
    batch = mask.shape[0] if mask.shape else None
    make = NodeBuilder(SCOPE)

    def node(op: str, inputs: list[Any], name: str, dtype: Any, shape: list[Any], **attributes: int) -> gs.Variable:
        return make.into(make.variable(name, dtype, shape), op, inputs, f"{name}/{op}", **attributes)

    tokens = node("ReduceSum", [mask, make.constant([1])], "tokens", mask.dtype, [batch, 1], keepdims=1)
    one, axis = make.constant([1], mask.dtype, "constants/1"), make.constant(1, label="constants/axis_1")
    last = node("Sub", [tokens, one], "tokens_less_one", mask.dtype, [batch, 1])
    last = node("Cast", [last], "last", "int32", [batch, 1], to=INT32)
    shape = node("Shape", [mask], "mask_shape", "int64", [2])
    total = node("Gather", [shape, axis], "mask_width", "int64", [], axis=0)
    total = node("Cast", [total], "total", "int32", [], to=INT32)
    view.nodes[:0] = make.nodes
    return SequenceLengths(last, total)


def padding_of(graph: GraphProto) -> Padding:
    """Where the caches of a graph have a padded row's padding, by the nodes that passes have added."""
    scopes = {scope for node in graph.node for scope in (IN_FRONT, SCOPE) if node.name.startswith(f"{scope}/")}
    return "front" if IN_FRONT in scopes else "behind" if scopes else "between"
