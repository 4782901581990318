"""What is printed where a program reads along: the log of a job, a terminal, a pipe that takes JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import typer
from command_line import run
from onnx import ModelProto, helper
from places import ROOT, TINY

import surgery
from surgery.commands.app import app
from surgery.commands.console import data
from surgery.commands.help import FEW
from surgery.commands.rendering import show_inspection
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


def helped(*words: str, columns: int = 80) -> str:
    shown = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=str(columns)), contextlib.redirect_stdout(shown):
        app([*words, "--help"], prog_name="gemma4-surgery", standalone_mode=False)
    return shown.getvalue()


SHOWN = [command.name for command in typer.main.get_command(app).commands.values() if not command.hidden]  # type: ignore[attr-defined]


@pytest.mark.parametrize("columns", [60, 80, 400])
def test_every_command_has_help_that_reads(columns: int) -> None:
    """Lines that fit, but for examples, which are copied; each option with a sentence, and examples that are commands."""
    for name in SHOWN:
        shown = helped(name, columns=columns)
        text, found, examples = shown.partition("\nExamples:\n")
        assert found and text.startswith(f"Usage: gemma4-surgery {name} "), shown
        assert max(map(len, text.splitlines())) <= min(columns, 120)
        assert name != "repack" or max(map(len, text.splitlines())) > min(columns, 120) - 20
        assert not re.search(r"^Usage.*[{}]|<(str|path|list|int)|^  [A-Z][\w.]* *$", text, re.MULTILINE), text
        for line in examples.splitlines():
            words = shlex.split(line.partition(" < ")[0])
            assert words[0] == "gemma4-surgery" and words[1] in SHOWN
            options = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
            options.make_parser(options.context_class(options)).parse_args(words[2:])


def test_options_stand_in_groups_where_there_are_many() -> None:
    shown = helped("repack")
    heads = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    assert heads == ["Arguments", "Source", "What is made", "What is written", "Where it runs", "General", "Examples"]
    assert re.findall(r"^(\w+):$", helped("passes"), re.MULTILINE) == ["Options", "Examples"]
    shown = helped(columns=60)
    assert all(re.search(rf"^  {name} +\w", shown, re.MULTILINE) for name in SHOWN)


def test_an_option_of_a_command_with_many_has_a_group() -> None:
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        if len(command.params) > FEW:
            loose = [one.name for one in command.params if one.param_type_name == "option" and not one.rich_help_panel]
            assert loose == [], command.name


def test_what_is_written_is_named(tmp_path: Path) -> None:
    decoder = str(TINY / "onnx" / "decoder_model_merged_q4.onnx")
    applied = run("apply", "annotate-head-sizes", decoder, "deep.onnx", cwd=tmp_path)
    assert applied.stderr.splitlines() == ["wrote      deep.onnx", "wrote      deep.onnx_data"]
    stripped = run("strip", str(TINY), "two", "--no-validate", "--ep", "cpu", cwd=tmp_path)
    assert "ready      two\n" in stripped.stdout
    (tmp_path / "texts.txt").write_text("Tides and boats.\n" * 20)
    listed = run("vocabulary", str(TINY), "--corpus", "texts.txt", "-o", "kept.txt", cwd=tmp_path)
    assert "wrote      kept.txt\n" in listed.stderr, listed.stderr
    made = run("repack", str(TINY), "out", "--no-validate", "--ep", "cpu", cwd=tmp_path)
    assert "ready      out (report.md" in made.stdout
    words = ("validate", "out", "--quick", "--tokens", "1", "--save-golden", "kept.safetensors", "--ep", "cpu")
    assert "wrote      kept.safetensors\n" in run(*words, cwd=tmp_path).stderr


def test_one_spelling_of_json(tmp_path: Path) -> None:
    """Every command that prints data prints it as JSON where --json is given."""
    talk = {"comment", "git-setup", "generate"}
    lacking = [
        command.name
        for command in typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
        if not command.hidden and not any("--json" in one.opts for one in command.params)
    ]
    assert set(lacking) == talk
    graph = TINY / "onnx" / "embed_tokens_q4.onnx"
    assert run("diff", graph, graph, "--json").stdout == run("diff", graph, graph, "--format", "json").stdout


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "widest"), [(60, 60), (400, 160)])
def test_a_table_fits_the_terminal_and_nothing_is_cut(
    columns: int, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    show_inspection(data(), surgery.inspect(TINY))
    data().print("a word and " * 99)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert max(map(len, shown.splitlines())) <= widest and "…" not in shown
