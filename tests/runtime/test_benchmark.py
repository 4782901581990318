"""bench: a folder and its source, each in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import run
from folders import repack
from places import TINY

from surgery.errors import FolderError
from surgery.runtime.benchmark import measure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(TINY, tmp_path_factory.mktemp("bench") / "out").folder


def test_both_sides_are_measured_at_each_context_that_fits(folder: Path) -> None:
    options = [
        "--against",
        str(TINY),
        "--ep",
        "cpu",
        "--contexts",
        "16,64,4096",
        "--new-tokens",
        "4",
        "--json",
        "--chunk",
        "24",
    ]
    done = run("bench", folder, *options)
    assert done.returncode == 0, done.stderr
    assert "skipped    prompts of 4,096 tokens: with 4 more they do not fit the model's 256" in done.stderr
    found = json.loads(done.stdout)
    assert [one["side"] for one in found] == ["folder", "source"]
    for one in found:
        assert [timing["context"] for timing in one["timings"]] == [16, 64], "4096 does not fit a context of 256"
        assert all(timing["decode_rate"] > 0 and timing["first_token_seconds"] > 0 for timing in one["timings"])
        assert 20e6 < one["peak_rss"] < 2e9


def test_a_context_that_does_not_fit_is_one_sentence(folder: Path) -> None:
    with pytest.raises(FolderError, match=r"takes 256 tokens: no context of \[1024\] fits"):
        measure(folder, None, contexts=[1024])


def test_what_the_runtime_says_is_passed_on(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    config = (broken / "genai_config.json").read_text()
    (broken / "genai_config.json").write_text(config.replace("gemma4_text", "nonesuch"))
    with pytest.raises(FolderError, match="the runtime says"):
        measure(broken, None, contexts=[8], new_tokens=2)
