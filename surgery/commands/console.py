"""Where words go: data to stdout, talk and progress to stderr."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from surgery.errors import SurgeryError, printable, unforeseen
from surgery.jobs.listener import Listener
from surgery.printing import json_text, size

if TYPE_CHECKING:
    from rich.console import Console


WIDEST = 160
"""Columns of a terminal that are used: nobody reads a sentence of 400."""
LOG_SECONDS = 30
"""Between two lines of one stage, where stderr is no terminal."""

_COMMAND = re.compile(r"^( *)::|##(?=\[)", re.MULTILINE)
"""How a line of a log begins, or goes on, that is a command to GitHub's runner."""


class _RunnersLog:
    """A stream into the log of a workflow, in which nothing is a command: a name may wrap into the start of a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_COMMAND.sub(lambda found: f"{found[0][:-1]}\u200b{found[0][-1]}", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_runners_log() -> None:
    """In a job of GitHub Actions, let no output be a command, but for what goes into a file."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                setattr(sys, name, _RunnersLog(stream))


_quiet = False


def be_quiet() -> None:
    """From here on, no talk."""
    global _quiet
    _quiet = True


def data() -> Console:
    """Stdout; 120 columns where it is not a terminal, so that redirected tables do not depend on one; and no more than
    WIDEST."""
    from rich.console import Console

    width = min(shutil.get_terminal_size().columns, WIDEST) if sys.stdout.isatty() else 120

    class Stdout(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich's own way out has the exit code of a gate that failed

    return Stdout(highlight=False, width=width)


def talk() -> Console:
    """Stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line of talk, never broken: a log is not a terminal."""
    if _quiet:
        return
    talk().print(printable(text), markup=False, soft_wrap=True)


def say_data(text: str) -> None:
    """A line of data, never broken."""
    sys.stdout.write(f"{printable(text)}\n")


def say_commands(lines: str) -> None:
    """Lines that GitHub's runner is to take as commands."""
    getattr(sys.stdout, "_stream", sys.stdout).write(lines)


def print_json(value: object) -> None:
    """Data for programs, to stdout."""
    sys.stdout.write(json_text(value))


class JobProgress(Listener):
    """What goes on, and for how long, on one line of a terminal that changes; elsewhere as lines: the beginning of each
    stage, and how far a long one has come.
    """

    def __init__(self) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = talk()
        self._live = console.is_terminal and not _quiet
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not self._live)
        self._task = self._progress.add_task("", total=None, visible=False)
        self._stage = self._doing = ""
        self._total = self._done = 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> JobProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def said(self, text: str) -> None:
        say(text)

    def started(self, total: int, doing: str = "writing") -> None:
        self._doing, self._total, self._done = doing, total, 0
        self._begin(doing)
        self._show(self._bytes())

    def advanced(self, count: int) -> None:
        self._done += count
        self._show(self._bytes())

    def stage(self, text: str) -> None:
        name, _, case = text.partition(": ")
        if not case:
            self._begin(f"proving {name}")
            if not self._live:
                say(f"proving    {name}")
        self._show(f"proving {text}")

    def _begin(self, stage: str) -> None:
        self._stage, self._began = stage, time.monotonic()
        self._told = self._began
        self._progress.reset(self._task, description=stage, total=None, visible=True)

    def _bytes(self) -> str:
        """`fetching 1.2 GB of 3.6 GB, 48 MB/s`; no rate of what is written, which a link or a cache makes a lie."""
        text = f"{self._doing} {size(self._done)} of {size(self._total)}"
        seconds = time.monotonic() - self._began
        return f"{text}, {size(self._done / seconds)}/s" if self._doing == "fetching" and seconds > 1 else text

    def _show(self, text: str) -> None:
        """On a terminal at once; in a log every half minute, with the seconds that the stage has taken."""
        self._progress.update(self._task, description=printable(text))
        now = time.monotonic()
        if not self._live and now - self._told >= LOG_SECONDS:
            self._told = now
            what, _, rest = text.partition(" ")
            say(f"{what:<10} {rest}, {now - self._began:.0f} s")


def program() -> list[str]:
    """How this program is run again, from any folder: the installed command, or a checkout's launcher."""
    script = Path(sys.argv[0]).absolute()
    return [sys.executable, str(script)] if script.suffix == ".py" else [str(script)]


@contextlib.contextmanager
def git_goes_on() -> Iterator[None]:
    """Say what went wrong where the answer would stand: git stops at a driver that fails, and the rest is not shown."""
    try:
        yield
    except SurgeryError as error:
        say_data(str(error))
    except Exception as error:
        say_data(str(unforeseen(error)))


def beside_git() -> Console:
    """Stdout as git has it: in colour where git's own diff is, as wide as the pager."""
    from rich.console import Console

    from surgery.compare import git_objects as git

    shown = sys.stdout.isatty() or "GIT_PAGER_IN_USE" in os.environ
    colour = git.run_git(Path(), "config", "--get-colorbool", "color.diff", str(shown).lower()).stdout.strip() == "true"
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() else None if sys.stdout.isatty() else 120
    return Console(highlight=False, force_terminal=colour, width=width)
