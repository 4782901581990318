"""Wall time and peak memory of a whole process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Run:
    """One process: wall time in seconds, peak resident memory in bytes."""

    seconds: float
    peak_rss: int


def run(command: Sequence[str], cwd: Path | None = None) -> Run:
    """Run a command to its end. Raises RuntimeError with its stderr if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    words = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}: {words.decode()[-2000:]}")
    return Run(seconds, usage.ru_maxrss * 1024)
