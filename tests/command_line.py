"""The command as a user runs it, for tests: in a process of its own, with what it printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "fixtures" / "tiny-e2b"


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
