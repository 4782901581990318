"""What a model answered to a set of prompts: compact, comparable and storable (surgery.verify.golden stores it).

The logits that are kept are those of each row's last real token, at the end of each piece of the prompt and
at each decode step. Caches are kept as they are after the last step: they hold the keys and values of every
token before it. Beyond a budget of bytes only a cache's SHA-256 is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.errors import ModelError
from surgery.runtime import Array, Cache, Feed, Runner
from surgery.verify.prompts import Case
from surgery.wiring import Slot

CACHE_BUDGET = 512 * 2**20
"""Bytes of caches that one recording keeps whole."""


@dataclass(frozen=True, slots=True)
class Step:
    """The answer to one piece of tokens: `logits` [B, V] in the graph's dtype, and how many rows it computed.

    The number matters because a matrix product of other dimensions may add in another order.
    """

    logits: Array
    computed_rows: int

    def greedy(self) -> Array:
        """The likeliest token of each row, the lowest id among equals; int64 [B]."""
        tokens: Array = np.argmax(self.logits.astype(np.float32), axis=1)
        return tokens


@dataclass(frozen=True, slots=True)
class StoredCache:
    """A cache's shape, dtype and SHA-256, and its values unless the budget was spent."""

    shape: tuple[int, ...]
    dtype: str
    digest: str
    values: Array | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to one case. The first `prefill` steps are the pieces of the prompt."""

    case: Case
    prefill: int
    steps: tuple[Step, ...]
    caches: Mapping[Slot, StoredCache]

    def tokens(self) -> Array:
        """The greedy continuation, int64 [B, 1 + steps]: after the prompt and after each decode step."""
        return np.stack([step.greedy() for step in self.steps[self.prefill - 1 :]], axis=1)


@dataclass(frozen=True, slots=True)
class Recording:
    """The answers of one model, in the order of the cases."""

    answers: tuple[Answer, ...]


def record(
    runner: Runner,
    cases: Sequence[Case],
    *,
    steps: int = 8,
    follow: Recording | None = None,
    budget: int = CACHE_BUDGET,
    progress: Callable[[str], None] | None = None,
) -> Recording:
    """Run every case: its prompt, then `steps` decode steps, greedily.

    With `follow` the decode steps take the tokens that the other model chose, so that a small difference at
    one step does not make the next ones incomparable. Raises ModelError where the graph fails.
    """
    answers: list[Answer] = []
    for index, case in enumerate(cases):
        if progress is not None:
            progress(case.name)
        chosen = follow.answers[index].tokens() if follow is not None else None
        answer = _run(runner, case, steps, chosen, budget)
        budget -= sum(cache.values.nbytes for cache in answer.caches.values() if cache.values is not None)
        answers.append(answer)
    return Recording(tuple(answers))


def _run(runner: Runner, case: Case, steps: int, chosen: Array | None, budget: int) -> Answer:
    cache = runner.start(len(case.rows))
    taken: list[Step] = []
    feed = None
    for feed in pieces(case):
        step, cache = _step(runner, feed, cache)
        taken.append(step)
    assert feed is not None  # a case has tokens
    prefill = len(taken)
    mask = feed.mask
    for number in range(steps):
        tokens = taken[-1].greedy() if chosen is None else chosen[:, number]
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        positions = mask.sum(axis=1, keepdims=True) - 1
        step, cache = _step(runner, Feed(tokens[:, None], mask, positions), cache)
        taken.append(step)
    return Answer(case, prefill, tuple(taken), _stored(cache, budget))


def pieces(case: Case) -> Iterator[Feed]:
    """The prompt as it is fed: padded on the right, in pieces of `chunk` tokens, masks up to each piece."""
    length = case.longest
    ids = np.full((len(case.rows), length), case.pad, np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(case.rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    size = case.chunk or length
    for start in range(0, length, size):
        end = min(start + size, length)
        yield Feed(ids[:, start:end], mask[:, :end], positions[:, start:end])


def _step(runner: Runner, feed: Feed, cache: Cache) -> tuple[Step, Cache]:
    """One run. All logits are asked for where a row's last token is not at the last position."""
    length = feed.ids.shape[1]
    real = feed.mask[:, -length:]
    logits, cache = runner.step(feed, cache, keep=1 if real.all() else 0)
    computed = logits.shape[0] * logits.shape[1]
    if logits.shape[1] == 1:
        return Step(logits[:, 0].copy(), computed), cache
    if logits.shape[1] != length:
        raise ModelError(f"logits have {logits.shape[1]} tokens where the model was fed {length}")
    last = (real * np.arange(length)).max(axis=1)
    return Step(logits[np.arange(len(last)), last], computed), cache


def _stored(cache: Cache, budget: int) -> dict[Slot, StoredCache]:
    stored: dict[Slot, StoredCache] = {}
    for found, values in cache.items():
        fits = values.nbytes <= budget
        budget -= values.nbytes if fits else 0
        digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
        stored[found] = StoredCache(values.shape, values.dtype.str, digest, values if fits else None)
    return stored
