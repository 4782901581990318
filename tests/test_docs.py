"""Documents are run: the worked example of CONTRIBUTING.md is a pass, and README.md shows what the commands print."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.engine import Pass, apply
from surgery.model import Model

ROOT = Path(__file__).parent.parent
TINY = ROOT / "fixtures" / "tiny-e2b" / "onnx" / "decoder_model_merged_q4.onnx"


def example_pass() -> type[Pass]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"```python\n(.*?)```", text, re.S)
    assert block, "CONTRIBUTING.md has no worked example"
    scope: dict[str, object] = {"__name__": "example"}
    exec(compile(block[1], "CONTRIBUTING.md", "exec"), scope)  # the document is the test
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


def readme_sessions() -> list[tuple[str, str]]:
    """(command, output) of each console block of the README that is marked as true output."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"<!-- output -->\n```console\n\$ (.*?)\n(.*?)```", text, re.S)
    assert blocks, "README.md shows no output"
    return blocks


@pytest.mark.parametrize("command, shown", readme_sessions(), ids=[command for command, _ in readme_sessions()])
def test_readme_shows_true_output(command: str, shown: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fixtures" / "tiny-e2b", tmp_path / "fixtures" / "tiny-e2b")
    program = [sys.executable, str(ROOT / "cli.py")]
    if "out" in command and "repack" not in command:
        setup = [*program, "repack", "fixtures/tiny-e2b", "out/", "--no-validate", "--ep", "cpu"]
        subprocess.run(setup, cwd=tmp_path, check=True, capture_output=True)
    words = command.replace("gemma4-surgery ", "", 1).split()
    ran = subprocess.run([*program, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stderr
    assert _timeless(ran.stdout) == _timeless(shown)


def _timeless(text: str) -> list[str]:
    """Lines without trailing blanks; versions and seconds, which differ between machines, as a mark."""
    text = re.sub(r"\d+(\.\d+)? s\b", "TIME", text)
    text = re.sub(r"\d+\.\d+\.\d+", "VERSION", text)
    return [line.rstrip() for line in text.strip().splitlines()]
