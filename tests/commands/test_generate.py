"""generate: one answer, or a chat on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command_line import program, run
from limits import FOR_EVER, wait_until
from places import ROOT, TINY

from surgery import RepackOptions, repack
from surgery.commands.generate import _answer, _interrupted_typing, _interrupts
from surgery.jobs.generating import Answered

command = import_module("surgery.commands.generate")  # the name in its package is the function

TOOK = r"took       \d+\.\d\d s to the first token of 5, \d+\.\d a second; prompt 17"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("generate") / "out"
    repack(TINY, target, RepackOptions(validate=False, preset="fast"))
    return target


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *words: str | Path) -> None:
        master, slave = pty.openpty()
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self._master, self.shown = master, ""

    def until(self, pattern: str) -> str:
        """What is shown up to a text, which is then taken away."""
        ends = time.monotonic() + FOR_EVER
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < ends and self.process.poll() is None, self.shown
            if select.select([self._master], [], [], 0.2)[0]:
                self.shown += os.read(self._master, 4096).decode()
        self.shown, before = self.shown[found.end() :], self.shown[: found.end()]
        return before

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once the process waits for what is typed: `input` does not hear one that comes just before."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "the process waits")
        self.type("\x03")


def test_a_chat_goes_on_until_its_end(folder: Path) -> None:
    terminal = Terminal("generate", folder, "--new-tokens", "5")
    terminal.until("Ctrl-C ends an answer")
    terminal.until("> ")
    terminal.type("hello world\n")
    first = terminal.until(TOOK)
    terminal.until("> ")
    terminal.type("and er\n")
    assert "kept from before" in terminal.until(r"prompt \d+, \d+ of them kept from before")
    terminal.until("> ")
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.interrupt()
    terminal.until("Ctrl-C ends an answer")
    terminal.until("> ")
    terminal.type("/clear\n")
    terminal.until("> ")
    terminal.type("hello world\n")
    again = terminal.until(TOOK)
    answers = [[line for line in text.split("\r\n") if line and not line.startswith(("took", "hello", "> "))]
               for text in (first, again)]  # fmt: skip
    assert answers[0][-1] == answers[1][-1]
    terminal.until("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(timeout=FOR_EVER) == 0


class Slow:
    """A chat whose answer is interrupted after two pieces."""

    answered = Answered(7, 0, 2, 0.5, 1.0)

    def __init__(self, signals: int) -> None:
        self.closed, self._signals = False, signals

    def say(self, text: str, **_: object) -> Iterator[str]:
        try:
            for number in range(9):
                if number == 1:
                    for _ in range(self._signals):
                        os.kill(os.getpid(), signal.SIGINT)
                yield f"{text}{number} "
        finally:
            self.closed = True


def test_ctrl_c_ends_the_answer_and_not_the_session(capsys: pytest.CaptureFixture[str]) -> None:
    chat: Any = Slow(1)
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with _interrupts(heard):
        _answer(chat, "a", told=heard)
    shown = capsys.readouterr()
    assert chat.closed and shown.out == "a0 a1 \n"
    assert shown.err == "took       0.50 s to the first token of 2, 2.0 a second; prompt 7\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_session(capsys: pytest.CaptureFixture[str]) -> None:
    chat: Any = Slow(2)
    with pytest.raises(KeyboardInterrupt), _interrupted_typing(), _interrupts([]):  # a job in the background ignores it
        _answer(chat, "a")
    assert chat.closed


class Calling:
    """A chat that calls a tool twice, and then answers."""

    answered = None

    def __init__(self) -> None:
        self.given: list[Any] = []

    def say(self, text: str, **_: object) -> Iterator[str]:
        yield f'{text} <|tool_call>call:tide{{place:<|"|>Brest<|"|>}}<tool_call|>'
        yield "<|tool_call>call:moon{}<tool_call|>"

    def say_results(self, results: list[Any], **_: object) -> Iterator[str]:
        self.given.append(results)
        yield "high water at six"


@pytest.mark.parametrize(
    ("typed", "given"),
    [(['{"metres": 4.5}', "full"], [[{"metres": 4.5}, "full"]]), ([""], []), (["4", ""], [])],
    ids=["answered", "unanswered", "one unanswered"],
)
def test_what_a_tool_returns_is_typed(
    typed: list[str], given: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat: Any = Calling()
    asked, lines = [], iter(typed)
    monkeypatch.setattr(command, "_typed", lambda prompt: (asked.append(prompt), next(lines))[1])
    answer = _answer(chat, "when?")
    while results := command._results(answer):
        answer = _answer(chat, results)
    assert chat.given == given and asked[0] == 'tide(place="Brest") = ' and asked[1:] == ["moon() = "][: len(typed) - 1]
    assert ("high water" in capsys.readouterr().out) == bool(given)


def test_a_prompt_comes_from_stdin(folder: Path) -> None:
    command = [*program(), "generate", str(folder), "--new-tokens", "5"]
    told = [
        subprocess.run([*command, *words], input=text, capture_output=True, text=True, check=False)
        for words, text in ((["hello world"], ""), (["-"], "hello world"), (["-"], " \n"), ([], "hello"))
    ]
    assert told[0].stdout == told[1].stdout and told[0].returncode == 0
    assert re.fullmatch(TOOK, told[0].stderr.splitlines()[-1])
    assert told[2].returncode == 2 and "error: stdin is empty; a prompt is expected" in told[2].stderr
    assert told[3].returncode == 2 and "hint: - reads a prompt from stdin" in told[3].stderr


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--temperature", "0"), "error: temperature is 0.0; a number above 0 is expected"),
        (("--top-p", "2"), "error: top_p is 2.0"),
        (("--top-k", "-1"), "error: top_k is -1"),
        (("--system", "a", "--raw"), "error: a system message needs the chat template"),
        (("--thinking",), "has no thinking"),
        (("--precision", "q4"), "it has one precision"),
        (("--image", "a.png"), "takes no image"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_a_bad_option_is_a_sentence(words: tuple[str, ...], sentence: str, folder: Path) -> None:
    done = run("generate", folder, "hello", *words)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
