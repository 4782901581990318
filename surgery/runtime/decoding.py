"""The loop: a prompt, whole or in chunks, then token by token, with caches, masks and positions from step to step.

Whatever runs a model token by token goes through here: generation, validation, bench and bisect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from surgery.errors import ModelError, RequestError
from surgery.runtime.sessions import Array, Feed, KVCaches, Runner


@dataclass(frozen=True, slots=True)
class Step:
    """The answer to one piece of tokens: `logits` [B, V] in the graph's dtype, and how many rows it computed.

    The logits are those of each row's last real token. The number of rows matters because a matrix product of other
    dimensions may add in another order.
    """

    logits: Array
    computed_rows: int

    def greedy(self) -> Array:
        """The likeliest token of each row, the lowest id among equals; int64 [B]."""
        tokens: Array = np.argmax(self.logits.astype(np.float32), axis=1)
        return tokens


PaddingSide = Literal["left", "right"]
Chooser = Callable[[Step], Array]
"""Chooses a token for each row: int64 [B]."""


class DecodeLoop:
    """A batch of rows under way in a model."""

    def __init__(self, runner: Runner, rows: int) -> None:
        self._runner = runner
        self._mask: Array = np.zeros((rows, 0), np.int64)
        self.cache: KVCaches = runner.start(rows)

    def begin(self, mask: Array, caches: KVCaches) -> None:
        """Take tokens as fed before: their mask, int64 [B, tokens], and what the caches hold of them."""
        self._mask, self.cache = mask, caches

    def prompt(
        self, rows: Sequence[Sequence[int]], pad: int = 0, chunk: int | None = None, side: PaddingSide = "right"
    ) -> Iterator[Step]:
        """Feed token ids, `chunk` at a time where that is given; rows of different length are padded on a side."""
        for feed in prompt_feeds(rows, pad, chunk, self._mask, side):
            yield self._feed(feed)

    def append(self, tokens: Array) -> Step:
        """Feed one token for each row, int64 [B]."""
        return self._feed(next_feed(self._mask, tokens))

    def _feed(self, feed: Feed) -> Step:
        length = feed.ids.shape[1]
        real = feed.mask[:, -length:]
        logits, self.cache = self._runner.step(feed, self.cache, keep_of(feed))
        self._mask = feed.mask
        computed = logits.shape[0] * logits.shape[1]
        if logits.shape[1] == 1:
            return Step(logits[:, 0].copy(), computed)
        if logits.shape[1] != length:
            raise ModelError(f"logits have {logits.shape[1]} tokens where the model was fed {length}")
        last = (real * np.arange(length)).max(axis=1)
        return Step(logits[np.arange(len(last)), last], computed)


def prompt_feeds(
    rows: Sequence[Sequence[int]],
    pad: int = 0,
    chunk: int | None = None,
    before: Array | None = None,
    side: PaddingSide = "right",
) -> Iterator[Feed]:
    """The prompt as it is fed: padded on one side, in chunks of `chunk` tokens, masks up to each chunk.

    `before` is the mask of what is in the caches already.
    """
    length = max(len(row) for row in rows)
    ids = np.full((len(rows), length), pad, np.int64)
    real = np.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[index, place], real[index, place] = row, 1
    mask = np.zeros((len(rows), 0), np.int64) if before is None else before
    size = chunk or length
    for start in range(0, length, size):
        feed = _behind(mask, ids[:, start : start + size], real[:, start : start + size])
        yield feed
        mask = feed.mask


def next_feed(mask: Array, tokens: Array) -> Feed:
    """One token for each row, behind those of `mask`."""
    return _behind(mask, tokens[:, None], np.ones((len(tokens), 1), np.int64))


def keep_of(feed: Feed) -> int:
    """How many tokens' logits are needed: one, or all (0) where a row ends before the others do."""
    return 1 if feed.mask[:, -1].all() else 0


def _behind(mask: Array, ids: Array, real: Array) -> Feed:
    """Positions count the real tokens of a row; those of padding do not matter, but are no number below 0."""
    positions = np.maximum(mask.sum(axis=1, keepdims=True) + np.cumsum(real, axis=1) - 1, 0)
    return Feed(ids, np.concatenate([mask, real], axis=1), positions)


def generate_tokens(
    runner: Runner,
    rows: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    choose: Chooser = Step.greedy,
    stop: Collection[int] = (),
    pad: int = 0,
    chunk: int | None = None,
) -> Iterator[tuple[int | None, ...]]:
    """Yield a token for each row, at most `new_tokens` times; None for a row that has ended.

    A row ends behind a token of `stop`, which is yielded. Shorter rows are padded on the left: the sliding layers
    count padding into their window, and what lies between a prompt and its continuation would push the prompt out.
    Raises RequestError for rows that cannot be fed, ModelError where the graph fails.
    """
    if not rows or not all(rows):
        raise RequestError("a prompt of one token or more is expected in each row")
    if chunk is not None and len(rows) > 1:  # "batch_size must be 1 when sequence_length > 1 and past context is given"
        raise RequestError(
            f"GroupQueryAttention takes one row alone in chunks, and there are {len(rows)}", hint="leave out the chunks"
        )
    loop = DecodeLoop(runner, len(rows))
    *_, step = loop.prompt(rows, pad, chunk, "left")
    ended = np.zeros(len(rows), bool)
    for left in reversed(range(new_tokens)):
        tokens = choose(step)
        yield tuple(None if over else int(token) for token, over in zip(tokens, ended, strict=True))
        ended |= np.isin(tokens, list(stop))
        if not left or ended.all():
            return
        step = loop.append(np.where(ended, pad, tokens))
