"""What is printed where a program reads along: the log of a job, a terminal, a pipe that takes JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import run
from onnx import ModelProto, helper
from places import TINY

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
