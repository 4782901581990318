"""The QAT mobile exports through every preset and layout, each with its proof in the real runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run
from exhaustive import in_full
from folders import planned
from typer.testing import CliRunner

import fixtures
from fixtures.__main__ import parse_reading
from passes import TieLmHead
from passes.base import apply
from surgery.commands.app import app
from surgery.source.export import open_export
from surgery.verify import Request, prove_folder
from surgery.verify.prompts import Case, ModelTokens, of_ids
from surgery.verify.report import Report

READINGS = ("no-spread-scales", "quantized-activations", "rounded-activations")
NAMES = {"one-token", "highest-ids", "chunks-of-7", "ragged-batch", "cached-past-the-window"}
CASES = [
    case
    for case in of_ids(ModelTokens(size=100, context=256, bos=2, pad=0, window=8))
    if isinstance(case, Case) and case.name in NAMES
]
"""Products of 2 and of 8 bits take as long for one token as for a prompt: a few cases, of one way through the graphs each."""
FEW = {"top1": 0.5, "first": 0.5, "exact": 0.0}
"""Of a handful of positions each counts for much."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both tiny fixtures, and the smaller one in each reading."""
    root = tmp_path_factory.mktemp("qat")
    for name in ("tiny-e2b-qat", "tiny-e4b-qat"):
        fixtures.build(name, "q2f16", root / name)
    for reading in READINGS:
        fixtures.build("tiny-e2b-qat", "q2f16", root / reading, reading=parse_reading([reading]))
    return {path.name: path for path in root.iterdir()}


def proven(export: Path, out: Path, *words: str) -> Report:
    """Repack, and prove with the cases."""
    done = CliRunner().invoke(app, ["repack", str(export), str(out), "--no-validate", "--ep", "cpu", *words])
    assert done.exit_code == 0, done.output
    pair = open_export(export).pair("q2f16")
    report = prove_folder(out, pair, request=Request(scope="closing", cases=CASES, tokens=2, thresholds=FEW))
    assert report.passed, report.failed
    return report


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny-e2b-qat", ""),
        in_full("tiny-e4b-qat", "--kv-layout unique --per-layer-table split"),
        in_full("tiny-e2b-qat", "--modalities text,image,audio"),
        ("no-spread-scales", "--target genai-0.12 --weights consolidate"),
        in_full("quantized-activations", ""),
        in_full("rounded-activations", ""),
    ],
)
def test_bit_exact_where_it_is_promised(name: str, words: str, exports: dict[str, Path], tmp_path: Path) -> None:
    report = proven(exports[name], tmp_path / "out", *words.split())
    assert report.parity is not None and report.parity.max_abs == 0


@pytest.mark.parametrize(
    ("name", "words"), [in_full("tiny-e2b-qat", "--modalities text,image,audio"), ("quantized-activations", "")]
)
def test_fast(name: str, words: str, exports: dict[str, Path], tmp_path: Path) -> None:
    proven(exports[name], tmp_path / "out", "--preset", "fast", *words.split())


def test_strip(exports: dict[str, Path], tmp_path: Path) -> None:
    done = run("strip", str(exports["tiny-e2b-qat"]), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["tiny-e2b-qat", *READINGS[1:]])
def test_lm_head_shares_the_codes_of_the_table(name: str, exports: dict[str, Path]) -> None:
    """A block of the table is a row here, as one scale of lm_head is; rounding of the logits may stand in between."""
    model, _ = planned(exports[name], "q2f16")
    _, (outcome,) = apply(model, [TieLmHead()])
    assert [finding.subject for finding in outcome.findings] == ["lm_head_MatMul_weight_quant"]
    assert outcome.changed
