"""What a model answered to a set of prompts: compact, comparable and storable (surgery.verify.golden stores it).

The logits that are kept are those of each row's last real token, at the end of each piece of the prompt and
at each decode step. Caches are kept as they are after the last step: they hold the keys and values of every
token before it. Beyond a budget of bytes only a cache's SHA-256 is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.loop import Loop, Step
from surgery.runtime import Array, Cache, Runner, host
from surgery.verify.prompts import Case
from surgery.wiring import Slot

CACHE_BUDGET = 512 * 2**20
"""Bytes of caches that one recording keeps whole."""


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
    loop = Loop(runner, len(case.rows))
    taken = list(loop.prompt(case.rows, case.pad, case.chunk))
    prefill = len(taken)
    for number in range(steps):
        taken.append(loop.append(taken[-1].greedy() if chosen is None else chosen[:, number]))
    return Answer(case, prefill, tuple(taken), _stored(loop.cache, budget))


def _stored(cache: Cache, budget: int) -> dict[Slot, StoredCache]:
    stored: dict[Slot, StoredCache] = {}
    for found, value in cache.items():
        values = host(value)
        fits = values.nbytes <= budget
        budget -= values.nbytes if fits else 0
        digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
        stored[found] = StoredCache(values.shape, values.dtype.str, digest, values if fits else None)
    return stored
