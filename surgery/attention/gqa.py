"""What fused attention is made of: the operator's inputs by place, its window, and key and value inputs without rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from surgery.architecture import Layer
from surgery.attention.kv_wiring import attention_nodes
from surgery.graph.nodes import int_attribute, node_in_words
from surgery.graph.renaming import fresh

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

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._made: dict[tuple[int, object], gs.Variable] = {}

    def of(self, query: gs.Variable, width: int, added: list[gs.Node]) -> gs.Variable:
        """Cut from a query [batch, tokens, at least width]; the node that cuts is appended to `added`."""
        import numpy as np
        import onnx_graphsurgeon as gs

        key = (width, query.dtype)
        if key not in self._made:
            label = fresh(f"/model/no_rows/{width}", self._taken)
            batch = query.shape[0] if query.shape else None
            self._made[key] = gs.Variable(f"{label}/output_0", dtype=query.dtype, shape=[batch, 0, width])
            bounds = [
                gs.Constant(fresh(f"{label}/{name}", self._taken), np.array(values, np.int64))
                for name, values in (("starts", [0, 0]), ("ends", [0, width]), ("axes", [1, 2]))
            ]
            added.append(gs.Node("Slice", label, inputs=[query, *bounds], outputs=[self._made[key]]))
        return self._made[key]
