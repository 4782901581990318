"""Templates, tokenizers and graphs that loop, allocate or crash: each command ends soon, in one sentence, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import command_line
import pytest
from limits import FOR_EVER, Impatient
from onnx import TensorProto, helper
from places import ROOT, TINY
from signing import sign

from surgery.graph.model import Model
from surgery.printing import spoken
from surgery.runtime.own_process import MEMORY, SECONDS, Limits
from surgery.verify import prove_folder
from surgery.verify.contained import TOKENIZER, contained

TEMPLATES = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}"
    "{% endfor %}{{ messages[0].content }}",
    "allocates": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "recurses": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "is long": "a" * 100_000_000,
}
LONG, SHORT = str(FOR_EVER / 2), "0.5"
"""Seconds without a word: for what comes to its end by itself; for what has none, and is told in the same words wherever
it is stopped."""


def run(*words: str | Path, seconds: str = LONG, fresh: bool = False) -> tuple[int, str]:
    """Exit code, and all that is printed. A command that does not end fails the test."""
    done = command_line.run(*words, fresh=fresh, **{SECONDS: seconds, MEMORY: "2"})
    assert "defect" not in done.stderr and "Traceback" not in done.stderr and "panicked" not in done.stderr
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "out"
    assert run("repack", TINY, out, "--precision", "q4", "--no-validate")[0] == 0
    return out


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "folder"))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export of one precision."""
    other = shutil.ignore_patterns("*fp16*", "*q4f16*", "*quantized*", "*encoder*")
    return Path(shutil.copytree(TINY, tmp_path / "export", ignore=other))


def staged(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name not in ("folder", "export"))


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_chat_template_ends(form: str, folder: Path, export: Path, tmp_path: Path) -> None:
    for place in (folder, export):
        (place / "chat_template.jinja").write_text(TEMPLATES[form])
    sign(folder)
    seconds = SHORT if form == "loops" else LONG
    assert run("generate", folder, "hello", seconds=seconds)[0] == 2
    assert run("strip", export, tmp_path / "out", seconds=seconds)[0] in (1, 2)
    if form == "recurses":
        assert run("generate", export, "hello", fresh=True)[0] == 2
        assert run("validate", folder, "--quick")[0] == 1
        assert run("repack", export, tmp_path / "out")[0] == 1
    assert staged(tmp_path) == []


def endless(path: Path) -> None:
    """Put a Loop without an end behind the logits."""
    model = Model.open(path)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "finite"
    kind = next(value for value in model.graph.output if value.name == "logits").type
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still_on"]),
            helper.make_node("Identity", ["round"], ["next_round"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_value_info("round", kind),
        ],
        [
            helper.make_tensor_value_info("still_on", TensorProto.BOOL, []),
            helper.make_value_info("next_round", kind),
        ],
    )
    model.graph.initializer.append(helper.make_tensor("for_ever", TensorProto.BOOL, [], [True]))
    model.graph.node.append(helper.make_node("Loop", ["", "for_ever", "finite"], ["logits"], body=body))
    path.write_bytes(model.proto.SerializeToString())


def test_an_endless_loop_ends(folder: Path, export: Path, tmp_path: Path) -> None:
    endless(folder / "model.onnx")
    endless(export / "onnx" / "decoder_model_merged_q4.onnx")
    sign(folder)
    for words in (("generate", folder, "hello"), ("generate", export, "hello"), ("bench", folder, "--contexts", "4")):
        code, told = run(*words, seconds=SHORT, fresh=words[0] == "bench")
        assert code == 2 and "seconds went by without a result" in told
    code, told = run("validate", folder, seconds=SHORT)
    assert code == 1 and "the proof comes to its end: at '" in told
    assert run("strip", export, tmp_path / "out", seconds=SHORT)[0] == 1
    assert staged(tmp_path) == []


class Patience:
    """In place of Limits: the stage that comes after the tokenizer's words is stopped soon, the others never."""

    def __init__(self) -> None:
        self.memory, self.stages = 2 * 10**9, list[str]()

    @property
    def seconds(self) -> float:
        return 0.5 if TOKENIZER in self.stages else FOR_EVER

    def __reduce__(self) -> tuple[type[Limits], tuple[int, float]]:
        return Limits, (self.memory, FOR_EVER)


def test_a_proof_that_has_no_end_names_the_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless(folder / "model.onnx")
    patience = Patience()
    monkeypatch.setattr(Limits, "of", lambda *_: patience)
    monkeypatch.setattr("queue.SimpleQueue", Impatient)
    report = contained(prove_folder, sign(folder), None, "cpu", patience.stages.append)
    (gate,) = report.failed
    assert gate.detail.startswith("at 'generation") and "seconds went by without a result" in gate.detail


def test_a_command_that_is_told_to_stop_does_not_wait_for_its_process(folder: Path) -> None:
    endless(folder / "model.onnx")
    command = [sys.executable, str(ROOT / "cli.py"), "generate", str(folder), "hello"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None and running.stderr.readline().startswith("runs ")
        running.terminate()
        assert running.wait(timeout=FOR_EVER) == 128 + signal.SIGTERM


def test_a_tokenizer_that_panics_is_a_sentence(export: Path) -> None:
    tokenizer = json.loads((export / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    (export / "tokenizer.json").write_text(json.dumps({**tokenizer, "pre_tokenizer": split}))
    code, told = run("generate", export, "x" * 64)
    assert code == 2 and "error: PanicException: Onig" in told


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_side_file_is_capped(name: str, export: Path, folder: Path, tmp_path: Path) -> None:
    """Of 20 GB that take no room on the disk; they were copied."""
    for place in (export, folder):
        with (place / name).open("wb") as file:
            file.truncate(20 * 10**9)
    before = os.times()
    for words in (
        ("repack", export, tmp_path / "out"),
        ("strip", export, tmp_path / "out"),
        ("generate", folder, "hello"),
    ):
        code, told = run(*words)
        assert code == 2 and f"{name}" in told and "it has 20,000,000,000 bytes, and at most" in told
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 60
    assert staged(tmp_path) == []


@pytest.mark.parametrize("word", ["\x1b[2J", "\x9b31m", "\u202e", "\u2066", "\r", "\x00", "\u2028", "\ud800"])
def test_an_answer_does_not_drive_the_terminal(word: str) -> None:
    assert spoken(f"a{word}b") == f"a{ascii(word)[1:-1]}b"


@pytest.mark.parametrize("text", ["two\n\tlines", "می\u200cخواهم", "👩\u200d🚀", "20\u00a0000\u202fm", "a\\nb"])
def test_an_answer_is_left_as_people_write(text: str) -> None:
    assert spoken(text) == text


def test_generate_says_it_so(folder: Path) -> None:
    word = "\x1b[2J"
    text = (folder / "tokenizer.json").read_text()
    assert "ε" in text, "what this model says to everything"
    (folder / "tokenizer.json").write_text(text.replace("ε", json.dumps(word)[1:-1]))
    code, told = run("generate", folder, "hello", "--new-tokens", "3")
    assert code == 0 and "\\x1b[2J" in told and "\x1b" not in told
