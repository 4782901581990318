"""Each gate over numbers fails for the one thing that it is there for, and the runtime's for what the runtime gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from surgery.attention.kv_wiring import Slot
from surgery.errors import ModelError
from surgery.runtime.decoding import Step
from surgery.runtime.genai import GenAI
from surgery.verify.agreement import Agreement, agreement_of, coarsest
from surgery.verify.fp16_headroom import LayerPeak
from surgery.verify.gates import accuracy_gates, activation_gates, number_gates
from surgery.verify.genai_proof import check_ends, check_generation, check_runs
from surgery.verify.prompts import Case
from surgery.verify.recording import Answer, Recording, StoredCache
from surgery.verify.thresholds import Thresholds, default_thresholds

Array = np.ndarray
EXACT = default_thresholds("float32")
FINITE, LOGITS, REGROUPED, TOKENS, CACHES, ALIASES = (
    "finite where the source is", "logits", "logits computed in other groups", "greedy tokens", "KV source layers' caches",
    "KV-shared layers' caches are their source layers'",
)  # fmt: skip
PLAIN = Case("plain", "", ((5, 6), (7, 8)))
PADDED = Case("padded", "", ((5, 6), (7,)))


def cache(values: Array, *, kept: bool = True) -> StoredCache:
    return StoredCache(values.shape, values.dtype.str, str(values.tobytes()), values if kept else None)


class Numbers:
    """What a model answers to two cases: three steps each, and the caches of layers 0 (owner) and 1, its alias."""

    def __init__(self) -> None:
        random = np.random.default_rng(3)
        self.logits = [[random.normal(0, 4, (2, 20)).astype(np.float32) for _ in range(3)] for _ in (PLAIN, PADDED)]
        self.rows = 2
        self.caches: dict[Slot, Array] = {
            (0, kind): random.normal(0, 1, (2, 1, 3, 4)).astype(np.float32) for kind in ("key", "value")
        }
        self.kept = True

    def recording(self, *, aliases: bool) -> Recording:
        caches: dict[Slot, Array] = dict(self.caches)
        if aliases:
            caches = {(1, slot[1]): array for slot, array in self.caches.items() if slot[0] == 0} | caches
        stored = {slot: cache(array, kept=self.kept) for slot, array in caches.items()}
        return Recording(
            tuple(
                Answer(case, 1, tuple(Step(step, self.rows) for step in steps), stored)
                for case, steps in zip((PLAIN, PADDED), self.logits, strict=True)
            )
        )


Change = Callable[[Numbers], object]


def compared(change: Change, tolerance: float = 0.0, source: Change = lambda numbers: None) -> Agreement:
    theirs, ours = Numbers(), Numbers()
    source(theirs)
    change(ours)
    return agreement_of(theirs.recording(aliases=False), ours.recording(aliases=True), {0: 0, 1: 0}, tolerance)


def failed(change: Change, thresholds: Thresholds = EXACT, source: Change = lambda numbers: None) -> set[str]:
    return {gate.name for gate in number_gates(compared(change, source=source), thresholds) if not gate.passed}


def add(case: int, step: int, row: int, by: float) -> Change:
    """Something more on the likeliest token, which it stays."""

    def change(numbers: Numbers) -> None:
        logits = numbers.logits[case][step][row]
        logits[logits.argmax()] += by

    return change


def another_token(numbers: Numbers) -> None:
    logits = numbers.logits[0][2][1]
    logits[(logits.argmax() + 1) % 20] = logits.max() + 1


def minus(numbers: Numbers) -> None:
    numbers.logits[0][1] *= -1


def in_a_batch(numbers: Numbers) -> None:
    numbers.rows = 4
    numbers.logits[0][0][0] += 0.5


def cached(by: float, kind: str = "key", layer: int = 0) -> Change:
    def change(numbers: Numbers) -> None:
        values = numbers.caches.setdefault((layer, kind), numbers.caches[0, kind].copy())  # type: ignore[index]
        values[1, 0, 2, 3] += np.float32(by)

    return change


def gone(kind: str) -> Change:
    return lambda numbers: numbers.caches.pop((0, kind))  # type: ignore[arg-type]


def reshaped(numbers: Numbers) -> None:
    numbers.caches = {slot: values.reshape(2, 1, 4, 3) for slot, values in numbers.caches.items()}


def padded_with(value: float) -> Change:
    """A head more in each cache, of this number."""

    def change(numbers: Numbers) -> None:
        numbers.caches = {
            slot: np.concatenate([values, np.full_like(values, value)], axis=1)
            for slot, values in numbers.caches.items()
        }

    return change


FAULTS: dict[str, tuple[Change, set[str]]] = {
    "nothing": (lambda numbers: None, set()),
    "the last case's last step's last row": (add(1, 2, 1, 0.25), {LOGITS}),
    "the first": (add(0, 0, 0, 0.25), {LOGITS}),
    "a sign": (minus, {LOGITS, TOKENS}),
    "another token": (another_token, {LOGITS, TOKENS}),
    "not a number": (add(0, 1, 1, float("nan")), {FINITE, LOGITS}),
    "infinity": (add(0, 1, 1, float("inf")), {FINITE, LOGITS}),
    "other groups": (in_a_batch, {REGROUPED}),
    "a key": (cached(0.5), {CACHES, REGROUPED}),
    "a value": (cached(0.5, "value"), {CACHES, REGROUPED}),
    "a cache that is not finite": (cached(float("nan")), {CACHES, REGROUPED}),
    "no key": (gone("key"), {CACHES, REGROUPED, ALIASES}),
    "an alias that is none": (cached(0.5, layer=1), {ALIASES}),
    "another shape": (reshaped, {CACHES, REGROUPED}),
    "padding of zeros": (padded_with(0), set()),
    "padding of other numbers": (padded_with(1), {CACHES, REGROUPED}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_gates_and_no_others(name: str) -> None:
    change, gates = FAULTS[name]
    assert failed(change) == gates


def test_a_layer_with_a_key_and_no_value() -> None:
    theirs, ours = Numbers(), Numbers()
    ours.caches[1, "key"] = ours.caches[0, "key"]
    found = agreement_of(theirs.recording(aliases=False), ours.recording(aliases=False), {0: 0, 1: 0})
    assert found.cases[0].alias_faults == ("layer 1 has no value",)
    orphan = agreement_of(theirs.recording(aliases=False), ours.recording(aliases=False), {0: 0, 1: 7})
    assert "layer 1's key: no KV source layer's cache is in the interface" in orphan.cases[0].alias_faults


def test_a_source_that_is_not_finite_is_told() -> None:
    broken = add(0, 1, 1, float("nan"))
    assert "source itself is finite" in failed(broken, source=broken)


def test_caches_that_were_not_kept_are_equal_by_their_digest_alone() -> None:
    def dropped(numbers: Numbers) -> None:
        numbers.kept = False

    def other(numbers: Numbers) -> None:
        dropped(numbers)
        cached(0.5)(numbers)

    assert failed(dropped) == set() and failed(other) == {CACHES, REGROUPED}


def test_each_limit_holds_its_own_number() -> None:
    lax = replace(EXACT, regrouped=9)
    assert failed(add(0, 0, 0, 0.25), lax) == {LOGITS}
    assert failed(cached(0.5), lax) == {CACHES}
    assert failed(in_a_batch, replace(EXACT, logits=9, caches=9, regrouped=0.1)) == {REGROUPED}


def test_another_token_is_forgiven_by_twice_the_tolerance_of_its_group() -> None:
    def change(numbers: Numbers) -> None:
        logits = numbers.logits[0][1][0]
        first, second = np.argsort(logits)[::-1][:2]
        logits[second] = logits[first] + np.float32(1e-3)

    theirs = Numbers()
    row = np.sort(theirs.logits[0][1][0])
    apart = float(row[-1] - row[-2])
    assert compared(change, tolerance=apart).cases[0].token_faults == 0
    assert compared(change, tolerance=apart / 4).cases[0].token_faults == 1
    ours = Numbers()
    change(ours)
    pair = theirs.recording(aliases=False), ours.recording(aliases=True)
    assert agreement_of(*pair, {0: 0, 1: 0}, 0.0, apart).cases[0].token_faults == 1, "not of another group"
    ours.rows = 4
    pair = theirs.recording(aliases=False), ours.recording(aliases=True)
    assert agreement_of(*pair, {0: 0, 1: 0}, 0.0, apart).cases[0].token_faults == 0


def test_recordings_of_other_cases_are_not_compared() -> None:
    whole = Numbers().recording(aliases=False)
    turned = Recording(whole.answers[::-1])
    with pytest.raises(ModelError, match="the recordings are not of the same cases"):
        agreement_of(whole, turned, {})


def test_float16_in_the_caches_alone_is_float16() -> None:
    numbers = Numbers()
    assert coarsest(numbers.recording(aliases=False)) == "float32"
    numbers.caches = {slot: values.astype(np.float16) for slot, values in numbers.caches.items()}
    assert coarsest(Numbers().recording(aliases=False), numbers.recording(aliases=False)) == "float16"


def test_an_accuracy_level_is_held_in_all_groups() -> None:
    gates = accuracy_gates(compared(in_a_batch), EXACT, "4", "measured")
    assert {gate.name for gate in gates if not gate.passed} >= {"logits at level 4"}
    assert all(gate.passed for gate in accuracy_gates(compared(lambda numbers: None), EXACT, "4", "measured"))


@pytest.mark.parametrize(
    ("dtype", "largest", "strange", "gates"),
    [
        ("float16", 100.0, 0, set()),
        ("float16", 65504.0, 0, {"residual stream fits float16"}),
        ("float32", 65504.0, 0, set()),
        ("float32", 100.0, 2, {"residual stream is finite"}),
    ],
)
def test_the_residual_stream(dtype: str, largest: float, strange: int, gates: set[str]) -> None:
    peaks = [LayerPeak(0, "x", dtype, 1.0, 0, "case"), LayerPeak(1, "y", dtype, largest, strange, "case")]
    assert {gate.name for gate in activation_gates(peaks, EXACT) if not gate.passed} == gates


# The runtime


class Runtime:
    """A GenAI that gives these tokens, and ends at these ids."""

    def __init__(self, tokens: Mapping[tuple[tuple[int, ...], ...], Sequence[Sequence[int]]], ends: set[int]) -> None:
        self._tokens = tokens
        self._ends = ends

    def generate(self, rows: tuple[tuple[int, ...], ...], pad: int, count: int, **options: Any) -> Any:
        return self._tokens[rows]

    def ends_with(self, token: int, forced: int) -> bool:
        return forced in self._ends


def spoken(*cases: Case) -> tuple[list[Answer], dict[tuple[tuple[int, ...], ...], list[list[int]]]]:
    """What a source answers, and the same as the runtime gives it."""
    numbers = Numbers()
    answers = [Answer(c, 1, tuple(Step(s[: len(c.rows)], 2) for s in numbers.logits[0]), {}) for c in cases]
    return answers, {answer.case.rows: answer.tokens().tolist() for answer in answers}


CASES = {
    "tokens are the source's": Case("one", "", ((5, 6),)),
    "tokens are the source's, prompt in chunks": Case("chunks", "", ((5, 6, 9),), chunk=2),
    "tokens are the source's, in a batch": PLAIN,
    "tokens are the source's for each row alone, in a padded batch": PADDED,
}


def spoken_faults(
    change: Callable[[list[list[int]]], object], eos: tuple[int, ...] = (), tolerance: float = 0.0
) -> set[str]:
    """The gates that fail where the runtime's tokens are changed, for each kind of case by itself."""
    found = set()
    for name, case in CASES.items():
        answers, tokens = spoken(case)
        change(tokens[case.rows])
        gates = check_generation(cast(GenAI, Runtime(tokens, set())), answers, eos, tolerance, tolerance)
        assert [gate.name for gate in gates] == [name]
        found |= {gate.name for gate in gates if not gate.passed}
    return found


def test_each_kind_of_case_is_held_to_its_tokens() -> None:
    assert spoken_faults(lambda rows: None) == set()
    assert spoken_faults(lambda rows: rows[-1].__setitem__(1, 0)) == set(CASES)
    assert spoken_faults(lambda rows: rows[-1].__delitem__(slice(1, None))) == set(CASES), "an early end"
    assert spoken_faults(lambda rows: rows[-1].__setitem__(1, 0), tolerance=100) == set()


def test_nothing_behind_the_end_is_compared() -> None:
    (answer,), _ = spoken(CASES["tokens are the source's"])
    second = int(answer.tokens()[0][1])
    change: Callable[[list[list[int]]], object] = lambda rows: rows[0].__delitem__(slice(1, None))  # noqa: E731
    answers, tokens = spoken(answer.case)
    change(tokens[answer.case.rows])
    (gate,) = check_generation(cast(GenAI, Runtime(tokens, set())), answers, (second,), 0.0, 0.0)
    assert gate.passed


def test_ends_are_forced_one_by_one() -> None:
    def faults(ends: set[int]) -> str:
        gate = check_ends(cast(GenAI, Runtime({}, ends)), (1, 106), 128)
        return "" if gate.passed else gate.detail

    assert faults({1, 106}) == ""
    assert faults({1}) == "106 does not" and faults({106}) == "1 does not"
    assert faults({0, 1, 106}) == "0 does too"


@pytest.mark.parametrize(("tokens", "passes"), [([3, 4], True), ([], False), ([3, 128], False)])
def test_without_a_source_tokens_are_of_the_vocabulary(tokens: list[int], passes: bool) -> None:
    case = CASES["tokens are the source's"]
    assert check_runs(cast(GenAI, Runtime({case.rows: [tokens]}, set())), [case], 2, 128).passed is passes
