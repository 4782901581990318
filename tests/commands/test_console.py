"""What is printed where a program reads along: the log of a job, a terminal, a pipe that takes JSON."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from onnx import ModelProto, helper
from places import ROOT, TINY

from surgery.errors import ExportError, printable
from surgery.printing import json_text, plain

ODD = "a\n::warning::b\r\x9b31m\u202eabc\u2066\u200b\ud800"


def test_a_name_stays_on_its_line() -> None:
    for text in (printable(ODD), plain(ODD).plain, str(ExportError(ODD))):
        assert text.isprintable() and "\\n::warning::" in text and "\\u202e" in text
    assert plain("a\nb\n").plain == "a\\nb\n"


def test_json_has_no_character_that_drives_a_terminal() -> None:
    text = json_text({"name": ODD})
    assert all(line.isprintable() for line in text.splitlines()) and json.loads(text) == {"name": ODD}
    assert "é" in json_text("é")


def test_an_error_keeps_the_password_of_an_address() -> None:
    error = ExportError("https://me:p@ss@host/x failed", hint="see http://token@host and http://host/?a=b@c")
    assert str(error) == "https://***@host/x failed" and error.hint == "see http://***@host and http://host/?a=b@c"


def test_nothing_in_the_log_of_a_job_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GitHub's runner takes a line that begins with :: as a command, after spaces, too, and ##[ anywhere."""
    before = TINY / "onnx" / "embed_tokens_q4.onnx"
    proto = ModelProto.FromString(before.read_bytes())
    for length in range(40, 140):
        name = f"{'x' * length} ::stop-commands::y{'::add-mask::z' * 20}##[error]"
        proto.graph.node.append(helper.make_node("Identity", ["input_ids"], [name], name=name))
    after = tmp_path / "after.onnx"
    after.write_bytes(proto.SerializeToString())
    begins = re.compile(r"^ *::|##\[", re.MULTILINE)
    words = ("diff", str(before), str(after), "--full")
    assert begins.search(run(*words).stdout), "otherwise this test tests nothing"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    done = run(*words, fresh=True)  # into a pipe, as the log of a job is
    assert done.returncode == 1 and "stop-commands" in done.stdout and not begins.search(done.stdout + done.stderr)


def test_every_command_can_be_quiet(tmp_path: Path) -> None:
    words = ("repack", str(TINY), "out", "--no-validate", "--ep", "cpu", "--json")
    assert "source     " in run(*words, cwd=tmp_path).stderr
    done = run(*words, "--force", "-q", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)["folder"] == "out"
    refused = run("repack", "nowhere", "out2", "-q", cwd=tmp_path)
    assert refused.returncode == 2 and "nowhere does not exist" in refused.stderr


def test_a_full_disk_and_a_cut_pipe_are_trouble_and_no_result() -> None:
    command = shlex.join([sys.executable, str(ROOT / "cli.py"), "inspect", str(TINY)])
    full = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True, check=False)
    assert full.returncode == 2 and full.stderr == "error: No space left on device\n"
    script = f"{command} | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    cut = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert cut.returncode in (0, 2) and cut.stderr == ""


@pytest.mark.parametrize(("columns", "widest"), [(60, 60), (400, 120)])
def test_help_uses_the_width_of_the_terminal(columns: int, widest: int) -> None:
    shown = run("repack", "--help", COLUMNS=str(columns)).stdout
    longest = max(map(len, shown.splitlines()))
    assert widest - 20 < longest <= widest and "-q, --quiet" in shown
