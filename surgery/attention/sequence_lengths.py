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
NEW_COLUMNS = "/model/new_columns"
"""Scope of the nodes that find the mask's columns of the new tokens."""
_START = f"{NEW_COLUMNS}/start/output_0"


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


def new_columns(make: NodeBuilder, mask: gs.Tensor, new: gs.Variable, past: gs.Tensor | None) -> gs.Variable:
    """The mask's columns of a step's new tokens: [B,S], S being `new`, int64 [1]. `past` is a cache, [batch, KV heads, rows, size].

    They are the last ones of a mask that ends with them. Under CUDA graph capture GenAI's mask is as wide as the buffer
    of the caches, and ends with zeros: what a step takes then is a prompt, in the first columns, or tokens of a row
    alone, which is real from the first column on. So the first ones tell the same. Shapes decide that, in host memory.
    """
    make = make.below(NEW_COLUMNS)
    width = make("Shape", [mask], "int64", [1], "mask_width", start=1, end=2)
    start = make("Sub", [width, new], "int64", [1], "last_ones")
    if past is not None:
        rows = make("Shape", [past], "int64", [1], "past_rows", start=2, end=3)
        whole = make("Equal", [width, rows], bool, [1], "as_wide_as_past")
        start = make("Where", [whole, make.constant([0]), start], "int64", [1], "start")
    end = make("Add", [start, new], "int64", [1], "end")
    return make("Slice", [mask, start, end, make.constant([1])], mask.dtype, [mask.shape[0], None], "Slice")


def reads_by_width(graph: GraphProto) -> str:
    """A node that reads the mask in a way that is not known to be right for one as wide as the caches; "" for none."""
    known = [f"{SCOPE}/"] + [f"{NEW_COLUMNS}/" for node in graph.node if _START in node.output]
    readers = (node for node in graph.node if MASK in node.input)
    return next((node.name or node.output[0] for node in readers if not node.name.startswith(tuple(known))), "")


def padding_of(graph: GraphProto) -> Padding:
    """Where the caches of a graph have a padded row's padding, by the nodes that passes have added."""
    scopes = {scope for node in graph.node for scope in (IN_FRONT, SCOPE) if node.name.startswith(f"{scope}/")}
    return "front" if IN_FRONT in scopes else "behind" if scopes else "between"
