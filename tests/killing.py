"""Children that are forked from the test's process, and killed or told to stop while they write."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from limits import wait_until

from surgery.errors import FolderError
from surgery.files import atomic as staging
from surgery.graph import weight_writing as placement

CALLS = [
    (os, "copy_file_range"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
    (staging, "_exchange"),
]
"""What changes the disk."""


def child(work: Callable[[], None], before: Callable[[int], None] | None = None) -> int:
    """Fork; the child does `work` and exits with 0, 2 for a SurgeryError, 3 for anything else.

    It calls `before` with the number of each call that changes the disk, before that call.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        placement.CHUNK = 64 * 1024
        if before is not None:
            _before_each_call(before)
        work()
        code = 0
    except FolderError as error:
        sys.stderr.write(f"{error}\n")
        code = 2
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 3
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def _before_each_call(do: Callable[[int], None]) -> None:
    """Have `do` called before each call that changes the disk, with its number."""
    numbers = itertools.count()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **options: Any) -> Any:
            do(next(numbers))
            return call(*args, **options)

        return watching

    for module, name in CALLS:
        setattr(module, name, watched(getattr(module, name)))


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def ended(pid: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    try:
        wait_until(lambda: has_ended(pid), "the end of a child")
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def seen(path: Path, pid: int) -> None:
    wait_until(lambda: path.exists() or has_ended(pid), f"{path}, or the end of the child")
    assert path.exists(), "the child has ended"


def kills(work: Callable[[], None], each: int = 1) -> Iterator[None]:
    """Do `work` in a child that is killed before its first call that changes the disk, then the next (or only before
    `each` of so many), to the last."""
    for number in itertools.count(step=each):
        code = ended(
            child(work, lambda at, number=number: os.kill(os.getpid(), signal.SIGKILL) if at == number else None)
        )
        if code == 0:
            return
        assert code == -signal.SIGKILL
        yield
