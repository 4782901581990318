"""surgery.runtime.sampling against the logits processors of Hugging Face, and draws against the shares they are drawn by."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from places import DATA

from surgery.errors import ModelError, RequestError
from surgery.runtime.decoding import Step
from surgery.runtime.sampling import Sampler, Sampling, candidates, read_sampling

REFERENCE = DATA / "sampling_ref.npz"
GEMMA = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}


@pytest.mark.parametrize("index", range(9))
def test_the_probabilities_are_those_of_hugging_face(index: int) -> None:
    with np.load(REFERENCE) as stored:
        temperature, top_k, top_p, penalty = stored["cases"][index]
        wanted, logits, seen = stored[f"probabilities_{index}"], stored["logits"], stored["seen"]
    sampling = Sampling(True, temperature, int(top_k), top_p, penalty)
    for row in range(3):
        ids, shares = candidates(logits[row], set(seen[row].tolist()), sampling)
        found = np.zeros(len(logits[row]))
        found[ids] = shares
        if row == 1:  # four equal tokens: which of them top_p leaves out is the sort's choice
            np.testing.assert_allclose(np.sort(found), np.sort(wanted[row]), atol=2e-6)
        else:
            assert set(ids) == set(np.flatnonzero(wanted[row]))
            np.testing.assert_allclose(found, wanted[row], atol=2e-6)


def test_draws_come_as_often_as_their_shares_say() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    sampler = Sampler(Sampling(True, seed=7), [[]])
    drawn = [int(sampler(Step(logits, 1))[0]) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.025)


def test_a_seed_makes_the_same_draws_and_another_one_does_not() -> None:
    logits = np.random.default_rng(1).normal(size=(2, 50)).astype(np.float16)

    def draws(seed: int) -> list[list[int]]:
        sampler = Sampler(Sampling(True, seed=seed), [[1], [2]])
        return [sampler(Step(logits, 2)).tolist() for _ in range(20)]

    assert draws(5) == draws(5) != draws(6)


def test_greedy_takes_the_penalty_into_account() -> None:
    step = Step(np.array([[1.0, 2.0, 1.9]], np.float32), 1)
    greedy = Sampling()
    assert [Sampler(greedy, [[1]])(step).tolist(), step.greedy().tolist()] == [[1], [1]]
    penalizing = Sampler(replace(greedy, repetition_penalty=1.5), [[0]])
    assert [penalizing(step).tolist() for _ in range(3)] == [[1], [2], [1]], "a chosen token is less likely afterwards"


def test_logits_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(ModelError, match="NaN"):
        Sampler(Sampling(), [[1]])(Step(np.array([[0.0, np.nan]], np.float32), 1))


def test_generation_config_is_read() -> None:
    assert read_sampling(GEMMA) == Sampling(True, 1.0, 64, 0.95)
    assert read_sampling({"temperature": None, "max_length": 3}) == Sampling()
    assert read_sampling({"temperature": 1, "top_p": 1}) == Sampling()


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"temperature": 0}, "temperature is 0; a number from 1e-06 to 1e+06"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": 1e-60}, "temperature is 1e-60; a number from"),
        ({"top_k": 2**40}, "top_k is 1099511627776; a whole number from 0 to 2147483647"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5; a whole number"),
        ({"do_sample": 1}, "do_sample is 1; true or false"),
        ({"repetition_penalty": "x"}, "repetition_penalty is 'x'; a number"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=re.escape(sentence)):
        read_sampling(values)
