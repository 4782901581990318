"""What a model answered to a set of prompts: compact, comparable and storable (surgery.verify.golden stores it).

The logits that are kept are those of each row's last real token, at the end of each piece of the prompt and
at each decode step. Caches are kept as they are after the last step: they hold the keys and values of every
token before it. Beyond a budget of bytes only a cache's SHA-256 is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgery.attention.kv_wiring import Slot
from surgery.attention.sequence_lengths import Padding
from surgery.runtime.decoding import DecodeLoop, Step
from surgery.runtime.sessions import Array, Runner, host
from surgery.verify.made_up_caches import made_up_caches, mask_of
from surgery.verify.prompts import Case

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
    """What a model answered to one case. The first `prefill` steps are the pieces of the prompt.

    In the caches the tokens of a padded row lie side by side, with zeros behind them, wherever the model has them. Of a
    case with a past they hold the tokens that were fed.
    """

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
    padding: Padding = "between",
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
        known = follow.answers[index].caches if follow is not None else None
        alone = padding == "none" and case.ragged
        run = _run_rows if alone else _run
        answer = run(runner, case, case.steps(steps), chosen, budget, padding, known)
        budget -= sum(cache.values.nbytes for cache in answer.caches.values() if cache.values is not None)
        answers.append(answer)
    return Recording(tuple(answers))


def _run(
    runner: Runner,
    case: Case,
    steps: int,
    chosen: Array | None,
    budget: int,
    padding: Padding,
    known: Mapping[Slot, StoredCache] | None,
) -> Answer:
    """`known` are the caches of the model that is followed, which tell what of this one's is no padding."""
    loop = DecodeLoop(runner, len(case.rows))
    if case.past:
        own = {found: cache.shape for found, cache in known.items()} if known is not None else None
        loop.begin(mask_of(case.past), made_up_caches(loop.cache, case, steps, padding, own))
    taken = list(loop.prompt(case.rows, case.pad, case.chunk))
    prefill = len(taken)
    for number in range(steps):
        taken.append(loop.append(taken[-1].greedy() if chosen is None else chosen[:, number]))
    caches = {found: host(value) for found, value in loop.cache.items()}
    if case.ragged or case.past:
        caches = {found: _packed(values, case, steps, padding) for found, values in caches.items()}
    return Answer(case, prefill, tuple(taken), _stored(caches, budget))


def _packed(values: Array, case: Case, steps: int, padding: Padding) -> Array:
    """What a cache holds of the tokens that were fed: each row's side by side, and zeros behind them."""
    width = max(len(row) for row in case.rows)
    packed = np.zeros((*values.shape[:2], width + steps, values.shape[3]), values.dtype)
    for row, tokens in enumerate(case.rows):
        real, past = len(tokens) + steps, case.past[row] if case.past else 0
        places = np.arange(past, past + real)
        if padding == "front":
            places = np.arange(values.shape[2] - real, values.shape[2])
        elif padding == "between":
            prompt = values.shape[2] - steps - width
            places = np.r_[prompt : prompt + len(tokens), prompt + width : prompt + width + steps]
        packed[row, :, :real] = values[row][:, places]
    return packed


def _run_rows(
    runner: Runner,
    case: Case,
    steps: int,
    chosen: Array | None,
    budget: int,
    padding: Padding,
    known: Mapping[Slot, StoredCache] | None,
) -> Answer:
    """A padded batch row by row, put together as a batch; each of its steps computes the rows of one."""
    answers, caches = [], []
    for index, row in enumerate(case.rows):
        taken = None if chosen is None else chosen[index : index + 1]
        one = replace(case, rows=(row,), past=case.past[index : index + 1], chunk=None)
        answer = _run(runner, one, steps, taken, budget, padding, known)
        answers.append(answer)
        caches.append(answer.caches)
    together = [
        Step(np.concatenate([step.logits for step in found]), found[0].computed_rows)
        for found in zip(*(answer.steps for answer in answers), strict=True)
    ]
    width = max(len(row) for row in case.rows) + steps
    whole = {found: _stacked([cache[found] for cache in caches], width) for found in caches[0]}
    kept = {found: values for found, values in whole.items() if values is not None}
    return Answer(case, 1, tuple(together), _stored(kept, budget))


def _stacked(rows: Sequence[StoredCache], tokens: int) -> Array | None:
    """Caches of one row each as one cache, shorter ones with zeros behind; None where one was not kept whole."""
    values = [row.values for row in rows if row.values is not None]
    if len(values) < len(rows):
        return None
    filled = [np.pad(one, ((0, 0), (0, 0), (0, tokens - one.shape[2]), (0, 0))) for one in values]
    stacked: Array = np.concatenate(filled)
    return stacked


def _stored(caches: Mapping[Slot, Array], budget: int) -> dict[Slot, StoredCache]:
    stored: dict[Slot, StoredCache] = {}
    for found, values in caches.items():
        fits = values.nbytes <= budget
        budget -= values.nbytes if fits else 0
        digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
        stored[found] = StoredCache(values.shape, values.dtype.str, digest, values if fits else None)
    return stored
