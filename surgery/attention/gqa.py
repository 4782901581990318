"""What fused attention is made of: the operator's inputs by place, and key and value inputs without rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.graph.protos import fresh

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

OPERATOR = "GroupQueryAttention"
DOMAIN = "com.microsoft"
QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LAST, TOTAL = range(7)
"""Its inputs. LAST is seqlens_k, the tokens of each row less one; TOTAL the tokens of the longest row."""
BIAS = 10

"""The oldest ONNX Runtime that must run a borrower: one that reads another layer's cache and adds no rows.

From 1.31 it needs no present outputs. 1.27 to 1.30 need them named, copy the cache into them, and die of a segmentation
fault without. Older versions do not know such a node.
"""


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
