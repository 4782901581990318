"""What fused attention is made of: the operator's inputs by place, its window, and key and value inputs without
rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from surgery.architecture import Layer
from surgery.attention.kv_wiring import attention_nodes
from surgery.graph.node_builder import NodeBuilder
from surgery.graph.nodes import int_attribute, node_in_words

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, NodeProto

OPERATOR = "GroupQueryAttention"
DOMAIN = "com.microsoft"
QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LAST, TOTAL = range(7)
"""Its inputs. LAST is seqlens_k, the tokens of each row less one; TOTAL the tokens of the longest row."""
BIAS = 10

"""The oldest ONNX Runtime that must run a KV-shared layer: one that reads another layer's cache and adds no rows.

From 1.31 it needs no present outputs. 1.27 to 1.30 need them named, copy the cache into them, and die of a segmentation
fault without. Older versions do not know such a node.
"""


def window_of(node: NodeProto) -> int | None:
    """Tokens that a fused node sees by its own window; None for all."""
    window = int_attribute(node, "local_window_size", -1)
    return window if window > 0 else None


def window_faults(graph: GraphProto, layers: Sequence[Layer], source: str) -> Iterator[str]:
    """Fused layers whose node has another window than `source`, which the layers are from, says.

    A node without a window may get it from its bias: what that hides is numbers, and nothing is told of it here.
    """
    for layer, core in zip(layers, attention_nodes(graph), strict=False):
        node = core.node
        if node.op_type != OPERATOR:
            continue
        window, biased = window_of(node), len(node.input) > BIAS and bool(node.input[BIAS])
        if window != layer.window and not (window is None and biased):
            yield (
                f"layer {layer.index} sees {layer.window or 'all'} tokens by {source}, but local_window_size of "
                f"{node_in_words(node)} is {window or -1}"
            )


class NoRows:
    """Keys and values of a node that adds none: [batch, 0, width], one for each width and dtype.

    An input that is left out is read as a packed query: "Packed query hidden size must be divisible ...".
    """

    def __init__(self, make: NodeBuilder) -> None:
        self._make = make
        self._made: dict[tuple[int, object], gs.Variable] = {}

    def of(self, query: gs.Variable, width: int) -> gs.Variable:
        """Cut from a query [batch, tokens, at least width]."""
        key = (width, query.dtype)
        if key not in self._made:
            make = self._make.below(self._make.named(f"/model/no_rows/{width}"))
            bounds = {"starts": [0, 0], "ends": [0, width], "axes": [1, 2]}
            inputs = [query, *(make.constant(values, label=name) for name, values in bounds.items())]
            empty = make.variable("output_0", query.dtype, [query.shape[0] if query.shape else None, 0, width])
            self._made[key] = make.into(empty, "Slice", inputs)
        return self._made[key]
