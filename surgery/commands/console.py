"""Where words go: data to stdout, talk and progress to stderr."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from surgery.errors import SurgeryError, printable, unforeseen
from surgery.jobs.listener import Listener
from surgery.printing import json_text

if TYPE_CHECKING:
    from rich.console import Console


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


def data() -> Console:
    """Stdout; 120 columns where it is not a terminal, so that redirected tables do not depend on one."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def talk() -> Console:
    """Stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line of talk, never broken: a log is not a terminal."""
    talk().print(printable(text), markup=False, soft_wrap=True)


def say_data(text: str) -> None:
    """A line of data, never broken."""
    sys.stdout.write(f"{printable(text)}\n")


def print_json(value: object) -> None:
    """Data for programs, to stdout."""
    sys.stdout.write(json_text(value))


class JobProgress(Listener):
    """A progress bar over bytes on stderr; silent where stderr is not a terminal, but for sentences and stages."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = talk()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("weights", total=None, visible=False)

    def __enter__(self) -> JobProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def said(self, text: str) -> None:
        say(text)

    def started(self, total: int) -> None:
        self._progress.update(self._task, total=total, visible=True)

    def advanced(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def stage(self, text: str) -> None:
        """A log gets the stages without the cases."""
        self._progress.update(self._task, description=text, visible=True, total=None)
        if not self._progress.console.is_terminal and ":" not in text:
            say(f"proving    {text}")


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
    colour = git.run(Path(), "config", "--get-colorbool", "color.diff", str(shown).lower()).stdout.strip() == "true"
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() else None if sys.stdout.isatty() else 120
    return Console(highlight=False, force_terminal=colour, width=width)
