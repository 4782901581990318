"""Documents are run: the example of docs/writing-passes.md is a pass, code runs, and pages show what the commands print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from exhaustive import in_full
from places import ROOT

from passes.base import Pass, apply
from surgery.graph.model import Model

TINY = ROOT / "fixtures" / "tiny-e2b" / "onnx" / "decoder_model_merged_q4.onnx"


def example_pass() -> type[Pass]:
    text = (ROOT / "docs" / "writing-passes.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.S)
    assert block, "writing-passes.md has no example"
    scope: dict[str, object] = {"__name__": "example"}
    exec(compile(block[1], "writing-passes.md", "exec", dont_inherit=True), scope)  # the document is the test
    found = scope["PinBatch"]
    assert isinstance(found, type)
    return found


def test_worked_example_pins_the_batch() -> None:
    model = Model.open(TINY)
    pinned, outcomes = apply(model, [example_pass()()])
    assert outcomes[0].changed
    assert all(value.type.tensor_type.shape.dim[0].dim_value == 1 for value in pinned.graph.output)
    assert "batch_size" in str(model.graph.input), "the model that was given stays as it was"


def test_worked_example_finds_nothing_to_do_the_second_time() -> None:
    pinned, _ = apply(Model.open(TINY), [example_pass()()])
    _, outcomes = apply(pinned, [example_pass()()])
    assert not outcomes[0].changed and outcomes[0].findings[0].verb == "skipped"


def test_code_that_applies_passes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in TINY.parent.glob("decoder_model_merged_q4.onnx*"):
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / TINY.name).rename(tmp_path / "decoder.onnx")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "passes.md").read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "passes.md", "exec", dont_inherit=True), {})
    assert Model.open("renamed.onnx").graph.input[0].name == "inputs_embeds"


README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
MADE = {"out/": (), "out-int8/": ("--preset", "fast", "--prefill", "int8")}
"""Folders that commands read, and how they are made."""
SESSION = re.compile(r"(?<=<!-- output -->\n)```console\n\$ (?P<command>.*?)\n(?P<shown>.*?)```", re.S)


def sessions() -> list[tuple[Path, str, str]]:
    """(page, command, output) of each console block that is marked as true output."""
    found = [(page, match["command"], match["shown"]) for page in PAGES for match in SESSION.finditer(page.read_text())]
    assert found, "no page shows output"
    return found


def takes_long(command: str) -> bool:
    """Whether it runs every prompt."""
    return "validate" in command and "--quick" not in command


@pytest.mark.parametrize(
    "page, command, shown",
    [in_full(*each) if takes_long(each[1]) else each for each in sessions()],
    ids=[f"{page.stem}: {command}" for page, command, _ in sessions()],
)
def test_pages_show_true_output(
    page: Path, command: str, shown: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    printed = run_in_example(command, tmp_path)
    if pytestconfig.getoption("--update-docs"):
        write_back(page, command, printed)
    else:
        assert comparable(printed) == comparable(shown), "pytest --update-docs writes what the command prints now"


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def run_in_example(command: str, folder: Path) -> str:
    """What a command prints in a folder that holds the small export, and its result where the command reads one."""
    shutil.copytree(ROOT / "fixtures" / "tiny-e2b", folder / "fixtures" / "tiny-e2b")
    command, *filters = command.split(" | ")
    words = command.removeprefix("gemma4-surgery ").split()
    for made, options in MADE.items():
        if made in words and "repack" not in words:
            unproven = [] if words[0] == "diff" else ["--no-validate"]  # the report shows what the proof measured
            first = run("repack", "fixtures/tiny-e2b", made, "--ep", "cpu", *options, *unproven, cwd=folder)
            assert first.returncode == 0, first.stderr
    ran = run(*words, cwd=folder)
    assert ran.returncode == (1 if words[0] == "diff" else 0), ran.stderr
    for each in filters:
        ran = subprocess.run(each.split(), input=ran.stdout, capture_output=True, text=True, check=True)
    return ran.stdout


def write_back(page: Path, command: str, printed: str) -> None:
    lines = "\n".join(line.rstrip() for line in printed.strip().splitlines())

    def fill(match: re.Match[str]) -> str:
        return f"```console\n$ {command}\n{lines}\n```" if match["command"] == command else match[0]

    page.write_text(SESSION.sub(fill, page.read_text()))


def comparable(text: str) -> list[str]:
    """Lines without trailing blanks; seconds and versions, which differ between machines, as words."""
    text = re.sub(r"\d+(\.\d+)? s\b", "TIME", text)
    text = re.sub(r"\d+\.\d+\.\d+", "VERSION", text)
    return [line.rstrip() for line in text.strip().splitlines()]


def test_readme_commands_are_where_the_continuous_integration_looks() -> None:
    text = README.read_text()
    for name in ("main-job", "tests"):
        assert re.search(rf"<!-- ci: {name} -->\n```sh\n.*?\n```", text, re.S), name


def test_the_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "fixtures" / "tiny-e2b", tmp_path / "fixtures" / "tiny-e2b")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
    assert len(blocks) >= 5
    exec(compile("".join(blocks), "docs/library.md", "exec", dont_inherit=True), {"__name__": "page"})


def test_the_picture_shows_the_graphs_of_today() -> None:
    drawn = subprocess.run(
        [sys.executable, "-c", "import before_after; print(before_after.picture(), end='')"],
        cwd=ROOT / "docs", env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert drawn.stdout == (ROOT / "docs" / "before-after.svg").read_text(encoding="utf-8")
