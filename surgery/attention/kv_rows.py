"""Where new rows go in a cache, and which rows a window shows: computed once, read by every layer.

past   [B,1]      max(0, tokens of the row - new tokens): where its new rows begin; 0 in a padded prompt
indices [B,K,S,3] (row, KV head, past + i), for ScatterND into [B,K,rows,size]
start  [1]        max(0, least past - window + 1), 0 without a window
end    [1]        tokens of the mask
last   [B,1]      int32, tokens of the row less one, counted from start;  total: int32 scalar, end - start
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.attention.sequence_lengths import SCOPE as LENGTHS
from surgery.attention.sequence_lengths import sequence_lengths
from surgery.graph.node_builder import INT32, INT64, NodeBuilder

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

SCOPE = "/model/cache_rows"


@dataclass(frozen=True, slots=True)
class WindowRows:
    """The rows of a cache that attention over a window reads."""

    start: gs.Tensor
    end: gs.Tensor
    last: gs.Variable
    total: gs.Variable


class KVRows:
    """Makes each value where it is first asked for."""

    def __init__(self, view: gs.Graph, make: NodeBuilder) -> None:
        self._lengths = sequence_lengths(view)
        tensors = view.tensors()
        self._tokens, self._width = tensors[f"{LENGTHS}/tokens"], tensors[f"{LENGTHS}/mask_width"]
        self._batch = self._tokens.shape[0] if self._tokens.shape else None
        self._make = make
        self.constant = make.below(SCOPE).constant
        self._indices: dict[int, gs.Variable] = {}
        self._views: dict[int | None, WindowRows] = {}
        self._end: gs.Variable | None = None
        self._past: gs.Variable | None = None
        self._sizes: tuple[gs.Variable, gs.Variable] | None = None

    def indices(self, kv_heads: int, rows: gs.Variable) -> gs.Variable:
        """Places of new rows, from new keys [B,S,...]: int64 [B,kv_heads,S,3]."""
        import numpy as np

        if kv_heads not in self._indices:
            make, constant = self._make.below(f"{SCOPE}/indices_{kv_heads}"), self.constant
            past = self._past_tokens(rows)
            batch, count = self._sizes_of(rows)
            zero, one = constant(0), constant(1)
            offsets = make("Range", [zero, make("Squeeze", [count], "int64", []), one], "int64", [None])
            places = make("Add", [past, offsets], "int64", [self._batch, None])
            places = make("Unsqueeze", [places, constant([1, 3])], "int64", [self._batch, 1, None, 1])
            row = make("Range", [zero, make("Squeeze", [batch], "int64", []), one], "int64", [self._batch])
            row = make("Reshape", [row, constant([-1, 1, 1, 1])], "int64", [self._batch, 1, 1, 1])
            head = constant(np.arange(kv_heads).reshape(1, -1, 1, 1).tolist())
            target = make("Concat", [batch, constant([kv_heads]), count, constant([1])], "int64", [4], axis=0)
            shape = [self._batch, kv_heads, None]
            parts = [make("Expand", [part, target], "int64", [*shape, 1]) for part in (row, head, places)]
            self._indices[kv_heads] = make("Concat", parts, "int64", [*shape, 3], axis=3)
        return self._indices[kv_heads]

    def view(self, window: int | None) -> WindowRows:
        """What is in view of a window, None for all rows. `indices` has to be asked for before."""
        if window not in self._views:
            make = self._make.below(f"{SCOPE}/{'all' if window is None else f'window_{window}'}")
            if self._end is None:
                self._end = make("Unsqueeze", [self._width, self.constant([0])], "int64", [1])
            if window is None:
                self._views[window] = WindowRows(self.constant([0]), self._end, self._lengths.last, self._lengths.total)
            else:
                assert self._past is not None
                least = make("ReduceMin", [self._past], "int64", [1, 1], keepdims=1)
                least = make("Reshape", [least, self.constant([1])], "int64", [1])
                first = make("Sub", [least, self.constant([window - 1])], "int64", [1])
                start = make("Max", [first, self.constant([0])], "int64", [1])
                start32 = make("Cast", [start], "int32", [1], to=INT32)
                last = make("Sub", [self._lengths.last, start32], "int32", [self._batch, 1])
                total = make("Sub", [self._lengths.total, make("Squeeze", [start32], "int32", [])], "int32", [])
                self._views[window] = WindowRows(start, self._end, last, total)
        return self._views[window]

    def _past_tokens(self, rows: gs.Variable) -> gs.Variable:
        if self._past is None:
            make = self._make.below(f"{SCOPE}/past")
            _, count = self._sizes_of(rows)
            tokens = self._tokens
            if tokens.dtype != "int64":
                tokens = make("Cast", [tokens], "int64", [self._batch, 1], to=INT64)
            before = make("Sub", [tokens, count], "int64", [self._batch, 1])
            self._past = make("Max", [before, self.constant(0)], "int64", [self._batch, 1])
        return self._past

    def _sizes_of(self, rows: gs.Variable) -> tuple[gs.Variable, gs.Variable]:
        """Rows of the batch and new tokens, int64 [1] each."""
        if self._sizes is None:
            make = self._make.below(f"{SCOPE}/sizes")
            batch = make("Shape", [rows], "int64", [1], start=0, end=1)
            self._sizes = batch, make("Shape", [rows], "int64", [1], start=1, end=2)
        return self._sizes
