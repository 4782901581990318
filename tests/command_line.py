"""The command as a user runs it, for tests: in a process of its own, with what it printed.

The process is forked from one that has everything loaded, and so are those that the command starts for what is not
trusted: a command then begins in milliseconds, where an interpreter that imports all of it takes a second. What a real
start is like is seen in tests of their own (tests/runtime/test_own_process.py, tests/commands/test_untrusted_content.py)
and with `fresh`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from places import ROOT

SECONDS = 120
"""For one command."""


def run(
    *words: str | Path, cwd: Path | None = None, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command with these environment variables more; `fresh` starts an interpreter for it."""
    environment, command = {**os.environ, **variables}, list(map(str, words))
    if fresh or not hasattr(os, "fork"):
        command = [sys.executable, str(ROOT / "cli.py"), *command]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    with tempfile.TemporaryDirectory() as place:
        logs = [Path(place) / name for name in ("out", "err")]
        asked = {
            "words": command,
            "cwd": str(cwd or Path.cwd()),
            "environment": environment,
            "logs": list(map(str, logs)),
        }
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(asked).encode() + b"\n")
        child = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            server.stdout.readline()
            raise subprocess.TimeoutExpired(command, SECONDS)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(log.read_text(encoding="utf-8") for log in logs))


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    """The process that commands are forked from; it ends before this one does."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    server = subprocess.Popen(
        [sys.executable, "-c", "import command_line; command_line.serve()"],
        bufsize=0, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.communicate)
    return server


def serve() -> None:
    """Fork a command for each line of standard input; tell its process, and its exit code when it has ended."""
    import confined

    confined.preload()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
        os.write(1, b"%d\n" % child)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _become(asked: dict[str, Any]) -> NoReturn:
    """In the child: the command, until it ends."""
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, log in enumerate(asked["logs"], 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600), number)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["cwd"])
        tempfile.tempdir = None
        sys.argv = [str(ROOT / "cli.py"), *asked["words"]]
        from confined import forking

        from surgery.commands.app import main

        try:
            with forking():
                main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(code)
