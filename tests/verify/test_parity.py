"""Numbers over whole vocabularies and continuations, and the gates that hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import repack
from onnx import GraphProto, numpy_helper
from onnxruntime import OrtValue
from signing import sign

from passes.base import LOSSY
from surgery.errors import RequestError
from surgery.graph.model import Model
from surgery.runtime.decoding import Step
from surgery.runtime.sessions import Feed
from surgery.source.export import Export
from surgery.verify import Request, prove_folder
from surgery.verify.agreement import Agreement, Continuation, agreement_of
from surgery.verify.gates import parity_gates
from surgery.verify.parity import parity
from surgery.verify.prompt_file import read_prompts
from surgery.verify.prompts import Case
from surgery.verify.recording import Answer, Padding, Recording, StoredCache, record
from surgery.verify.report import Gate
from surgery.verify.thresholds import LEAST, Thresholds, default_thresholds

CASE = Case("case", "two rows", ((5, 6), (7, 8)))
LOOSE = default_thresholds("float32", [LOSSY])
SHORT = Case("short", "a short prompt", ((2, 10, 77, 31),))


def recording(*steps: np.ndarray, rows: int = 2) -> Recording:
    """An answer of steps [B, V], the prompt's first."""
    return Recording((Answer(CASE, 1, tuple(Step(step, rows) for step in steps), {}),))


def steps(count: int = 4, vocabulary: int = 50) -> list[np.ndarray]:
    numbers = np.random.default_rng(7)
    return [numbers.normal(0, 4, (2, vocabulary)).astype(np.float32) for _ in range(count)]


def compared(change: Callable[[list[np.ndarray]], object], rows: int = 2) -> Agreement:
    theirs, ours = steps(), steps()
    change(ours)
    return agreement_of(recording(*theirs), recording(*ours, rows=rows), {})


def test_equal_answers_are_equal_in_every_number() -> None:
    total = parity(compared(lambda ours: None))
    assert (total.exact, total.first, total.continuations, total.positions) == (2, 2, 2, 8)
    assert total.max_abs == total.mean_abs == total.kl == total.smallest_tolerance == 0
    assert total.cosine == total.top1 == total.top10 == 1
    assert str(total) == "exact match 2/2, first token 2/2, max |difference| 0, worst KL 0"


def test_a_token_that_differs_ends_the_agreement_of_its_row_alone() -> None:
    def change(ours: list[np.ndarray]) -> None:
        ours[2][1, 3] = 100

    found = compared(change)
    assert found.cases[0].continuations == (Continuation(0, 4, 4), Continuation(1, 4, 2))
    total = parity(found)
    assert (total.exact, total.first) == (1, 2) and total.top1 == 7 / 8
    found = compared(lambda ours: ours.__setitem__(0, -ours[0]))
    assert (parity(found).exact, parity(found).first) == (0, 0)


def test_each_position_has_its_own_numbers() -> None:
    def change(ours: list[np.ndarray]) -> None:
        ours[3][0, 17] += 0.5

    case = compared(change).cases[0]
    (apart,) = [position for position in case.positions if position.max_abs]
    assert (apart.step, apart.row, apart.token_id) == (3, 0, 17)
    assert apart.max_abs == pytest.approx(0.5) and apart.mean_abs == pytest.approx(0.01)
    x, y = (part.astype(np.float64) for part in (steps()[3][0], steps()[3][0] + 0.5 * (np.arange(50) == 17)))
    p, q = (np.exp(part) / np.exp(part).sum() for part in (x, y))
    assert apart.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-4)
    assert apart.cosine == pytest.approx(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), rel=1e-6)


@pytest.mark.parametrize(("instead", "near", "share"), [(10, 0.0, 0.9), (10, 0.25, 1.0), (40, 0.25, 0.9)])
def test_one_of_the_ten_likeliest_may_be_another_that_is_as_likely(instead: int, near: float, share: float) -> None:
    """Token 10 is hardly less likely than the tenth, token 40 by far."""
    theirs = np.where(np.arange(50) < 10, 10.0, -10.0)[None].repeat(2, axis=0).astype(np.float32)
    theirs[:, 10] = 9.0
    ours = theirs.copy()
    ours[:, 0], ours[:, instead] = -10, 11
    found = agreement_of(recording(theirs), recording(ours), {}, near=near)
    assert parity(found).top10 == pytest.approx(share)


def test_rows_of_other_groups_are_counted_apart() -> None:
    found = compared(lambda ours: ours[0].__iadd__(0.25), rows=1)
    assert found.max_abs == 0 and found.regrouped_max_abs == pytest.approx(0.25)
    assert parity(found).regrouped_max_abs == found.regrouped_max_abs


def failed(found: Agreement, thresholds: Thresholds = LOOSE) -> set[str]:
    return {gate.option for gate in parity_gates(found, thresholds) if not gate.passed}


def flip_one(ours: list[np.ndarray]) -> None:
    ours[0][0, 3] = ours[0][0].max() + 1e-3


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda ours: None, set()),
        (lambda ours: ours[1].__iadd__(0.01), {"mean"}),
        (lambda ours: ours[1].__imul__(2), {"mean", "kl"}),
        (flip_one, {"mean", "kl", "cosine", "top1", "exact", "first"}),
        (lambda ours: ours[3].__imul__(-1), {"mean", "kl", "cosine", "top1", "top10", "exact"}),
    ],
)
def test_each_gate_can_fail(change: Callable[[list[np.ndarray]], object], options: set[str]) -> None:
    """A doubled row moves no likeliest token: a gate on those alone would let it pass."""
    assert failed(compared(change)) == options


def test_a_gate_reads_as_it_was_measured() -> None:
    gates = {gate.option: gate for gate in parity_gates(compared(flip_one), LOOSE)}
    assert gates["first"].reading == "share 0.5, at least 0.98"
    assert gates["first"].detail == "1/2 continuations"
    assert gates["exact"].detail == "1/2 continuations; case row 0 parts after 0 of 4 tokens"
    assert "at most" in gates["kl"].reading and gates["kl"].detail == "at case case, step 0, row 0"
    assert {"kl", "mean"}.isdisjoint(LEAST)
    assert Gate("runtime", "og.Model loads the folder", True).reading == ""


def kept(array: np.ndarray, case: Case = CASE) -> Recording:
    """An answer with one cache."""
    cache = StoredCache(array.shape, array.dtype.str, array.tobytes().hex(), array)
    return Recording((replace(recording(*steps()).answers[0], case=case, caches={(0, "key"): cache}),))


@pytest.mark.parametrize(
    ("padding", "cache"), [("front", [9, 1, 2, 3]), ("between", [1, 2, 9, 3]), ("behind", [1, 2, 3, 9])]
)
def test_a_padded_row_is_compared_without_its_padding(padding: Padding, cache: list[int]) -> None:
    """Row 1 has two tokens, one of padding, and a decoded one."""

    class Known:
        def start(self, batch: int) -> Any:
            return {}

        def step(self, feed: Feed, before: Any, keep: int) -> tuple[np.ndarray, Any]:
            rows = np.array([[5, 6, 7, 8], cache], np.float32)[:, None, :, None]
            return np.zeros((2, 1, 4), np.float32), {(0, "key"): OrtValue.ortvalue_from_numpy(rows)}

    (answer,) = record(Known(), [replace(CASE, rows=((5, 6, 7), (1, 2)))], steps=1, padding=padding).answers
    values = answer.caches[0, "key"].values
    assert values is not None and values[:, 0, :, 0].tolist() == [[5, 6, 7, 8], [1, 2, 3, 0]]


@pytest.mark.parametrize(("padding", "expected"), [(0.0, 0.0), (0.25, 0.25), (np.nan, np.inf)])
def test_a_padded_cache_is_compared_without_its_padding(padding: float, expected: float) -> None:
    own = np.ones((2, 1, 3, 4), np.float32)
    padded = np.full((2, 2, 3, 8), padding, np.float32)
    padded[:, :1, :, :4] = own

    assert agreement_of(kept(own), kept(padded), {}).cache_max_abs == expected
    assert agreement_of(kept(padded), kept(own), {}).cache_max_abs == np.inf


@pytest.fixture
def folder(export: Export, tmp_path: Path) -> Path:
    return repack(export, tmp_path / "out", "fp16").folder


def scaled(folder: Path, factor: float) -> None:
    """Multiply what layer 4 hands on."""
    model = Model.open(folder / "model.onnx")
    node = next(each for each in model.graph.node if each.name == "/model/layers.4/layer_scalar/Mul")
    set_constant(model.graph, "factor", np.float16(factor))
    node.input[1] = "factor"
    (folder / "model.onnx").write_bytes(model.proto.SerializeToString())
    sign(folder)


def set_constant(graph: GraphProto, name: str, value: np.generic) -> None:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def watched(folder: Path, **thresholds: float) -> dict[str, Gate]:
    request = Request(cases=[SHORT], tokens=2, watch=True, thresholds=thresholds)
    report = prove_folder(folder, None, request=request)
    assert [peak.layer for peak in report.peaks] == list(range(-1, 10))
    assert report.to_dict()["peaks"][0]["headroom"] is not None
    return {gate.name: gate for gate in report.section("activations")}


def test_the_watch_measures_every_layer(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    gates = watched(folder)
    assert all(gate.passed for gate in gates.values()) and len(gates) == 3
    assert gates["residual stream fits float16"].found == pytest.approx(65504 / 16.8, rel=0.1)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before, "nothing is written"
    assert not watched(folder, headroom=1e4)["residual stream fits float16"].passed


def test_an_overflow_is_found_in_its_layer(folder: Path) -> None:
    scaled(folder, 60000)
    gates = watched(folder)
    assert not gates["residual stream is finite"].passed and not gates["residual stream fits float16"].passed
    assert gates["residual stream is finite"].detail.startswith("layer 4 has")


def test_what_is_near_the_limit_has_little_headroom(folder: Path) -> None:
    scaled(folder, 1500)
    gates = watched(folder)
    headroom = gates["residual stream fits float16"]
    assert gates["residual stream is finite"].passed and headroom.passed
    assert isinstance(headroom.found, float) and 1 < headroom.found < 4
    assert "layer" in headroom.detail and "float16" not in headroom.detail


def test_thresholds_of_the_user_replace_the_defaults(folder: Path, export: Export) -> None:
    scaled(folder, 1.01)
    request = Request(cases=[SHORT], tokens=2)
    report = prove_folder(folder, export.pair("fp16"), request=request)
    assert "logits" in {gate.option for gate in report.failed}
    wide = {"logits": 1e3, "caches": 1e3, "mean": 1e3, "kl": 1e3, "cosine": 0, "top1": 0, "top10": 0}
    report = prove_folder(
        folder, export.pair("fp16"), request=replace(request, thresholds={**wide, "exact": 0, "first": 0})
    )
    assert not [gate for gate in report.failed if gate.section in ("numbers", "parity")]
    assert report.settings["thresholds"]["logits"] == 1e3


def test_prompts_of_a_file_replace_the_shipped_ones(folder: Path, export: Export, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = (
        '{"text": "the sea", "name": "sea"}',
        '{"ids": [2, 9], "batch": [[2, 9, 9]]}',
        '{"ids": [2, 9], "batch": [[2, 9, 9]], "chunk": 2, "name": "pieces"}',
        f'{{"ids": {[9] * 300}, "name": "endless"}}',
    )
    path.write_text("\n".join(lines))
    request = Request(scope="light", tokens=2, prompts=read_prompts(path))
    report = prove_folder(folder, export.pair("fp16"), request=request)
    assert report.passed, report.failed
    names = {case.name for case in report.cases}
    assert {"sea", "line-2", "one-token"} <= names and not {"latin", "conversation", "any-ids"} & names
    assert "heavy, and a light check was asked for" in {
        case.reason for case in report.skipped if case.name == "endless"
    }
    path.write_text('{"text": "the sea", "name": "batch"}\n')
    with pytest.raises(RequestError, match="is named 'batch', as a built-in case is"):
        prove_folder(folder, None, request=Request(prompts=read_prompts(path)))


@pytest.mark.parametrize("tokens", [0, 65])
def test_tokens_have_bounds(tokens: int, folder: Path) -> None:
    with pytest.raises(RequestError, match="1 to 64 can be compared"):
        prove_folder(folder, None, request=Request(tokens=tokens))


def test_a_closing_check_is_small_and_has_a_dozen_prompts(folder: Path, export: Export) -> None:
    report = prove_folder(folder, export.pair("fp16"), request=Request(scope="closing"))
    assert report.passed, report.failed
    assert len(report.cases) >= 12 and report.parity and report.parity.positions < 170
    assert {"one-token", "conversation", "scripts", "past-the-window-in-chunks"} <= {c.name for c in report.cases}
