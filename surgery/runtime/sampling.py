"""How a token is chosen from logits: the values of generation_config.json, in the order in which Hugging Face applies
them.

    logits -> repetition_penalty -> temperature -> top_k -> top_p -> one draw

Equal to the logits processors of transformers 5.23 (tests/runtime/test_sampling.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import ModelError, RequestError
from surgery.folder.genai_config import sampling_values
from surgery.runtime.decoding import Step
from surgery.runtime.sessions import Array


@dataclass(frozen=True, slots=True)
class Sampling:
    """Values as generation_config.json names them; the defaults are those of transformers 5.23 and GenAI.

    `top_k` 0 keeps all tokens. Without `seed` every run draws others. Greedy where `do_sample` is false; the repetition
    penalty, of each token that is in the prompt or was chosen, counts there too. Raises RequestError for a value that
    cannot be.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("repetition_penalty", self.repetition_penalty)):
            if not 0 < value < math.inf:
                raise RequestError(f"{name} is {value}; a number above 0 is expected")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; a number above 0, and 1 at most, is expected")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; a whole number from 0 is expected")
        if self.seed is not None and self.seed < 0:
            raise RequestError(f"seed is {self.seed}; a whole number from 0 is expected")


class Sampler:
    """Chooses tokens for the rows of one run, and remembers them."""

    def __init__(self, sampling: Sampling, rows: Sequence[Sequence[int]]) -> None:
        self._sampling = sampling
        self._seen = [set(row) for row in rows]
        self._numbers = np.random.default_rng(sampling.seed)

    def __call__(self, step: Step) -> Array:
        """A token for each row, int64 [B]. Raises ModelError for logits that are not numbers."""
        tokens = np.array(
            [self._choose(row, seen) for row, seen in zip(step.logits, self._seen, strict=True)], np.int64
        )
        for seen, token in zip(self._seen, tokens, strict=True):
            seen.add(int(token))
        return tokens

    def _choose(self, logits: Array, seen: set[int]) -> int:
        if np.isnan(logits).any():
            raise ModelError("the logits hold NaN: no token can be chosen")
        if not self._sampling.do_sample:
            return int(np.argmax(penalized(logits, seen, self._sampling)))
        ids, shares = candidates(logits, seen, self._sampling)
        place = int(np.searchsorted(np.cumsum(shares), self._numbers.random() * shares.sum(), side="right"))
        return int(ids[min(place, len(ids) - 1)])


def penalized(logits: Array, seen: set[int], sampling: Sampling) -> NDArray[np.float32]:
    """Logits [V] in float32, those of tokens that were there already made smaller."""
    scores = logits.astype(np.float32)
    if sampling.repetition_penalty != 1 and seen:
        there = np.fromiter(seen, np.int64)
        penalty = np.float32(sampling.repetition_penalty)
        scores[there] = np.where(scores[there] < 0, scores[there] * penalty, scores[there] / penalty)
    return scores


def candidates(logits: Array, seen: set[int], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, the least likely first, and their probabilities. Tokens equal to the k-th stay."""
    scores = penalized(logits, seen, sampling) / np.float32(sampling.temperature)
    ids = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
    ids = ids[np.argsort(scores[ids], kind="stable")]
    shares = _softmax(scores[ids])
    if sampling.top_p < 1:
        kept = np.cumsum(shares) > 1 - sampling.top_p
        kept[-1] = True
        ids, shares = ids[kept], shares[kept] / shares[kept].sum()
    return ids, shares


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    shares: NDArray[np.float64] = powers / powers.sum()
    return shares


def read_sampling(generation: Mapping[str, Any]) -> Sampling:
    """The values of generation_config.json; absent ones and null are defaults. Raises RequestError for others."""
    return Sampling(**sampling_values(generation))
