"""Limits that a busy machine does not change: CPU time, memory, and an end to what waits for ever."""

from __future__ import annotations

import contextlib
import queue
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

FOR_EVER = 900.0
"""Seconds of the clock; what waits for longer would wait for ever, however busy the machine is."""


class TooLong(BaseException):
    """What ran took too long. Not an Exception, so that no `except` of ours can swallow it."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in the middle of what takes more CPU time, or waits for ever without taking any."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {seconds} s of CPU time" if number == signal.SIGPROF else "it waits for ever")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, FOR_EVER)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextlib.contextmanager
def memory_limit(beyond: int) -> Iterator[None]:
    """Let an allocation of more than `beyond` bytes fail: a MemoryError is no SurgeryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + beyond, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Impatient(queue.SimpleQueue[bytes]):
    """In place of queue.SimpleQueue: seconds are over at once, where nothing has come."""

    def get(self, block: bool = True, timeout: float | None = None) -> bytes:
        return super().get(block, timeout if timeout is None or timeout > 9 else 0)


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Wait for an event of another process."""
    limit = time.monotonic() + FOR_EVER
    while not happened():
        assert time.monotonic() < limit, f"it never happened: {what}"
        time.sleep(0.002)
