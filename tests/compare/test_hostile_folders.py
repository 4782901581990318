"""diff of folders whose side files were written to harm: each comparison is drawn in every format, or refused."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from exhaustive import in_full, some
from places import TINY
from rich.console import Console

from surgery.compare import compare, open_subject
from surgery.compare.formats import FORMATS
from surgery.compare.provenance import read_validation
from surgery.compare.terminal import show_comparison
from surgery.errors import SurgeryError

ODD: list[Any] = [
    *(None, True, 0, -1, 10**400, 1e308, 1.5, "", "x", "\ud800", "\x00", "a" * 5000, "../../x", "/etc/passwd"),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": [1]}}),
]
"""What stands in the place of a value."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hostile") / "out"
    done = run("repack", str(TINY), str(out))
    assert done.returncode == 0, done.stderr
    return out


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def mutated(value: Any, rng: random.Random, at: tuple[str | int, ...]) -> Any:
    """A copy with one value, somewhere, that is another."""
    copy = json.loads(json.dumps(value))
    if not at:
        return rng.choice(ODD)
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    if isinstance(inner, dict) and rng.random() < 0.2:
        inner[rng.choice(["\ud800", "a" * 5000, "x\n::y"])] = inner.pop(at[-1])
    else:
        inner[at[-1]] = rng.choice(ODD)
    return copy


def drawn(before: Path, after: Path) -> None:
    found = compare(open_subject(before, "q4"), open_subject(after))
    for draw in FORMATS.values():
        draw(found).encode("utf-8")
    stream = io.StringIO()
    show_comparison(Console(file=stream, width=120), found, full=True)
    stream.getvalue().encode("utf-8")


NAMES = ["report.json", "genai_config.json", "manifest.json", "config.json"]


@pytest.mark.parametrize("each", [4, in_full(1)])
@pytest.mark.parametrize("name", NAMES)
def test_a_side_file_of_other_types_is_data_or_a_sentence(folder: Path, tmp_path: Path, name: str, each: int) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    value = json.loads((out / name).read_text())
    rng = random.Random(name)
    every = list(places(value))
    chosen = sorted(every, key=len)[:3] + rng.sample(every, 6)
    for at in chosen[::each]:
        (out / name).write_text(json.dumps(mutated(value, rng, at)))
        with contextlib.suppress(SurgeryError):
            drawn(TINY, out)


def test_a_validation_of_other_types_is_refused(tmp_path: Path) -> None:
    gate = {"section": "numbers", "name": "n", "passed": True, "threshold": 0, "found": 0}
    gate |= {"detail": "", "measure": "max |difference|", "option": ""}
    value = {"gates": [gate], "versions": {"numpy": "2"}, "parity": None}
    file = tmp_path / "validation.json"
    file.write_text(json.dumps(value))
    assert read_validation(file).exact
    rng = random.Random(1)
    for at in list(places(value)) * 20:
        file.write_text(json.dumps(mutated(value, rng, at)))
        with contextlib.suppress(SurgeryError):
            found = read_validation(file)
            assert all(
                isinstance(text, str) for gate in found.gates for text in (gate.section, gate.name, gate.reading)
            )
            json.dumps(found.summary)


@pytest.mark.parametrize(
    ("what", "name"),
    some(
        itertools.product(
            ["a pipe", "a loop", "a folder", "a device"],
            ["", "genai_config.json", "report.json", "manifest.json", "model.onnx", "tokenizer.json"],
        ),
        5,
    ),
)
def test_what_is_no_file_is_a_sentence_or_left_out(folder: Path, tmp_path: Path, name: str, what: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    place = out / name
    if not name:
        shutil.rmtree(out)
    else:
        place.unlink()
    if what == "a pipe":
        os.mkfifo(place)
    elif what == "a folder":
        place.mkdir()
    else:
        place.symlink_to(place if what == "a loop" else "/dev/zero")
    with contextlib.suppress(SurgeryError):
        drawn(TINY, out)


@pytest.mark.parametrize(
    "words",
    [
        ("diff", "NAME", "NAME"),
        ("diff", str(TINY), str(TINY), "--output", "NAME.md"),
        ("diff", str(TINY), str(TINY), "--check", "NAME.md"),
        ("inspect", "NAME"),
        ("git-textconv", "NAME"),
        ("comment", "me/models#7", "NAME"),
    ],
)
def test_a_name_of_5000_characters(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    done = run(*(word.replace("NAME", "a" * 5000) for word in words))
    assert done.returncode == (0 if words[0] == "git-textconv" else 2)
    assert "File name too long" in done.stdout + done.stderr and "defect" not in done.stdout + done.stderr


def test_a_report_that_is_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    os.mkfifo(tmp_path / "report.md")
    done = run("comment", "me/models#7", str(tmp_path / "report.md"))
    assert done.returncode == 2 and "not a regular file" in done.stderr
