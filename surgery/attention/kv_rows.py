"""Where new rows go in a cache, and which rows a window shows: computed once, read by every layer.

past   [B,1]      max(0, tokens of the row - new tokens): where its new rows begin; 0 in a padded prompt
indices [B,K,S,3] (row, KV head, past + i), for ScatterND into [B,K,rows,size]
start  [1]        max(0, least past - window + 1), 0 without a window
end    [1]        tokens of the mask
last   [B,1]      int32, tokens of the row less one, counted from start;  total: int32 scalar, end - start
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.attention.sequence_lengths import SCOPE as LENGTHS
from surgery.attention.sequence_lengths import sequence_lengths

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

SCOPE = "/model/cache_rows"
_INT32, _INT64 = 6, 7


@dataclass(frozen=True, slots=True)
class WindowRows:
    """The rows of a cache that attention over a window reads."""

    start: gs.Tensor
    end: gs.Tensor
    last: gs.Variable
    total: gs.Variable


class KVRows:
    """Makes each value where it is first asked for; its nodes are appended to the list that is given."""

    def __init__(self, view: gs.Graph) -> None:
        self._lengths = sequence_lengths(view)
        tensors = view.tensors()
        self._tokens, self._width = tensors[f"{LENGTHS}/tokens"], tensors[f"{LENGTHS}/mask_width"]
        self._batch = self._tokens.shape[0] if self._tokens.shape else None
        self._constants: dict[str, gs.Constant] = {}
        self._indices: dict[int, gs.Variable] = {}
        self._views: dict[int | None, WindowRows] = {}
        self._end: gs.Variable | None = None
        self._past: gs.Variable | None = None
        self._sizes: tuple[gs.Variable, gs.Variable] | None = None

    def indices(self, kv_heads: int, rows: gs.Variable, added: list[gs.Node]) -> gs.Variable:
        """Places of new rows, from new keys [B,S,...]: int64 [B,kv_heads,S,3]."""
        import numpy as np

        if kv_heads not in self._indices:
            make = _Maker(f"{SCOPE}/indices_{kv_heads}", added)
            past = self._past_tokens(rows, added)
            batch, count = self._sizes_of(rows, added)
            zero, one = self.constant(0), self.constant(1)
            offsets = make("Range", [zero, make("Squeeze", [count], np.int64, []), one], np.int64, [None])
            places = make("Add", [past, offsets], np.int64, [self._batch, None])
            places = make("Unsqueeze", [places, self.constant([1, 3])], np.int64, [self._batch, 1, None, 1])
            row = make("Range", [zero, make("Squeeze", [batch], np.int64, []), one], np.int64, [self._batch])
            row = make("Reshape", [row, self.constant([-1, 1, 1, 1])], np.int64, [self._batch, 1, 1, 1])
            head = self.constant(np.arange(kv_heads).reshape(1, -1, 1, 1).tolist())
            target = make(
                "Concat", [batch, self.constant([kv_heads]), count, self.constant([1])], np.int64, [4], axis=0
            )
            shape = [self._batch, kv_heads, None]
            parts = [make("Expand", [part, target], np.int64, [*shape, 1]) for part in (row, head, places)]
            self._indices[kv_heads] = make("Concat", parts, np.int64, [*shape, 3], axis=3)
        return self._indices[kv_heads]

    def view(self, window: int | None, added: list[gs.Node]) -> WindowRows:
        """What is in view of a window, None for all rows. `indices` has to be asked for before."""
        import numpy as np

        if window not in self._views:
            make = _Maker(f"{SCOPE}/{'all' if window is None else f'window_{window}'}", added)
            if self._end is None:
                self._end = make("Unsqueeze", [self._width, self.constant([0])], np.int64, [1])
            if window is None:
                self._views[window] = WindowRows(self.constant([0]), self._end, self._lengths.last, self._lengths.total)
            else:
                assert self._past is not None
                least = make("ReduceMin", [self._past], np.int64, [1, 1], keepdims=1)
                least = make("Reshape", [least, self.constant([1])], np.int64, [1])
                first = make("Sub", [least, self.constant([window - 1])], np.int64, [1])
                start = make("Max", [first, self.constant([0])], np.int64, [1])
                start32 = make("Cast", [start], np.int32, [1], to=_INT32)
                last = make("Sub", [self._lengths.last, start32], np.int32, [self._batch, 1])
                total = make("Sub", [self._lengths.total, make("Squeeze", [start32], np.int32, [])], np.int32, [])
                self._views[window] = WindowRows(start, self._end, last, total)
        return self._views[window]

    def constant(self, values: Any) -> gs.Constant:
        """An int64 constant, one for each value."""
        import numpy as np
        import onnx_graphsurgeon as gs

        name = f"{SCOPE}/constants/{values}"
        if name not in self._constants:
            self._constants[name] = gs.Constant(name, np.array(values, np.int64))
        return self._constants[name]

    def _past_tokens(self, rows: gs.Variable, added: list[gs.Node]) -> gs.Variable:
        import numpy as np

        if self._past is None:
            make = _Maker(f"{SCOPE}/past", added)
            _, count = self._sizes_of(rows, added)
            tokens = self._tokens
            if tokens.dtype != np.int64:
                tokens = make("Cast", [tokens], np.int64, [self._batch, 1], to=_INT64)
            before = make("Sub", [tokens, count], np.int64, [self._batch, 1])
            self._past = make("Max", [before, self.constant(0)], np.int64, [self._batch, 1])
        return self._past

    def _sizes_of(self, rows: gs.Variable, added: list[gs.Node]) -> tuple[gs.Variable, gs.Variable]:
        """Rows of the batch and new tokens, int64 [1] each."""
        import numpy as np

        if self._sizes is None:
            make = _Maker(f"{SCOPE}/sizes", added)
            batch = make("Shape", [rows], np.int64, [1], start=0, end=1)
            self._sizes = batch, make("Shape", [rows], np.int64, [1], start=1, end=2)
        return self._sizes


class _Maker:
    """Appends nodes named by their scope, operator and number."""

    def __init__(self, scope: str, added: list[gs.Node]) -> None:
        self._scope = scope
        self._added = added
        self._count = 0

    def __call__(self, op: str, inputs: list[Any], dtype: Any, shape: list[Any], **attributes: int) -> gs.Variable:
        import onnx_graphsurgeon as gs

        self._count += 1
        label = f"{self._scope}/{op}_{self._count}"
        output = gs.Variable(f"{label}/output_0", dtype=dtype, shape=shape)
        self._added.append(gs.Node(op, label, dict(attributes), inputs=inputs, outputs=[output]))
        return output
