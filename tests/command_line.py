"""The command as a user runs it, for tests: in a process of its own, with what it printed.

The process is forked from one that has everything loaded, and so are those that the command starts for what is not
trusted: a command then begins in milliseconds, where an interpreter that imports all of it takes a second. What a real
start is like is seen in tests of their own (tests/runtime/test_own_process.py, tests/commands/test_untrusted_content.py)
and with `fresh`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from limits import FOR_EVER
from once import passes_in_common
from places import ROOT, TINY
from quick_command import ask

from surgery.runtime import own_process

FORKS = hasattr(os, "pidfd_open")
"""Whether a command can be forked here."""
OWN_PROCESS = "own process"
"""In place of a command's first word: what surgery.runtime.own_process starts, with the paths of modules behind."""
_started = own_process._started


def run(
    *words: str | Path, cwd: Path | None = None, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command with these environment variables more; `fresh` starts an interpreter for it."""
    environment, command = {**os.environ, **variables}, list(map(str, words))
    if fresh or not FORKS:
        command = [sys.executable, str(ROOT / "cli.py"), *command]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=FOR_EVER
        )
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as null:
        streams = (null.fileno(), out.fileno(), err.fileno())
        line = ask(_server(), command, str(cwd or Path.cwd()), environment, streams)
        with line, line.makefile("rb") as answers:
            child = int(answers.readline())
            if not select.select([line], [], [], FOR_EVER)[0]:
                os.kill(child, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, FOR_EVER)
            code = int(answers.readline())
        return subprocess.CompletedProcess(command, code, *(_text(log.fileno()) for log in (out, err)))


def program() -> list[str]:
    """How another program, such as git, starts the command."""
    if not FORKS:
        return [sys.executable, str(ROOT / "cli.py")]
    return [sys.executable, "-IS", str(ROOT / "tests" / "quick_command.py"), _server()]


@contextlib.contextmanager
def served_processes() -> Iterator[None]:
    """Have the processes of surgery.runtime.own_process forked, too, where this process starts them."""
    started = own_process._started
    own_process._started = _served if FORKS else started  # type: ignore[assignment]
    try:
        yield
    finally:
        own_process._started = started


@contextlib.contextmanager
def started_processes() -> Iterator[None]:
    """Have them started as the program does it."""
    before = own_process._started
    own_process._started = _started
    try:
        yield
    finally:
        own_process._started = before


class _Served:
    """As much of subprocess.Popen as surgery.runtime.own_process uses."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        (stdin, self._in), (self._out, stdout), (self._err, stderr) = (os.pipe() for _ in range(3))
        streams = (stdin, stdout, stderr)
        self._line = ask(_server(), [OWN_PROCESS, *sys.path], str(Path.cwd()), environment, streams)
        self._answers = self._line.makefile("rb")
        for stream in streams:
            os.close(stream)
        self.stdin, self.stdout, self.stderr = io.FileIO(self._in, "w"), io.FileIO(self._out), io.FileIO(self._err)
        self._pid, self._code = int(self._answers.readline()), None

    def kill(self) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        if self._code is None:
            self._code = int(self._answers.readline())
            self._answers.close()
            self._line.close()
        return self._code


@contextlib.contextmanager
def _served(limits: own_process.Limits) -> Iterator[_Served]:
    """In place of own_process._started."""
    with tempfile.TemporaryDirectory(prefix="gemma4-surgery-", ignore_cleanup_errors=True) as place:
        process = _Served({**own_process._environment(), "TMPDIR": place})
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _text(log: int) -> str:
    return os.pread(log, os.fstat(log).st_size, 0).decode("utf-8").replace("\r\n", "\n")


@functools.cache
def _server() -> str:
    """The name of the process that commands are forked from; it ends with this one."""
    paths, name = os.pathsep.join([str(ROOT), str(ROOT / "tests")]), f"gemma4-surgery-tests-{os.getpid()}"
    server = subprocess.Popen(
        [sys.executable, "-c", f"import command_line; command_line.serve({name!r})"],
        bufsize=0, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.communicate)
    assert server.stdout is not None and server.stdout.readline()
    return name


def serve(name: str) -> None:
    """Fork a command for each that is asked for; tell its process, and its exit code when it has ended."""
    import confined

    confined.preload()
    words = (
        ("repack", str(TINY), "out", "--precision", "q4", "--no-validate"),
        ("diff", str(TINY), "out"),
        ("inspect", "out"),
    )
    with passes_in_common():
        with tempfile.TemporaryDirectory() as place:
            for each in words:
                confined.rehearse(each, Path(place))
        for module in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[module]  # it takes its settings from the environment when it is imported
        _answer(name)


def _answer(name: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen(64)
    os.write(1, b"ready\n")
    running: dict[int, tuple[int, socket.socket]] = {}
    while 0 not in (ready := select.select([0, listener, *running], [], [])[0]):
        for one in ready:
            if one is listener:
                line = listener.accept()[0]
                pid = _forked(line, [listener, *(other for _, other in running.values())])
                running[os.pidfd_open(pid)] = pid, line
            else:
                pid, line = running.pop(one)
                os.close(one)
                _tell(line, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                line.close()


def _tell(line: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody may wait for it any more
        line.sendall(b"%d\n" % number)


def _forked(line: socket.socket, others: Sequence[socket.socket]) -> int:
    """Start what a connection asks for, and tell the number of its process."""
    size, streams, _, _ = socket.recv_fds(line, 8, 3)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += line.recv(1 << 20)
    words, cwd, environment = json.loads(asked)
    child = os.fork()
    if child == 0:
        for one in (line, *others):
            one.close()
        _become(words, cwd, environment, streams)
    for stream in streams:
        os.close(stream)
    _tell(line, child)
    return child


def _become(words: Sequence[str], cwd: str, environment: dict[str, str], streams: Sequence[int]) -> NoReturn:
    """In the child: the command, until it ends."""
    code = 70
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, max(3, *streams) + 1)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        tempfile.tempdir = None
        if words[0] == OWN_PROCESS:
            sys.path[:] = words[1:]
            own_process._end_with = lambda parent: None  # who asked is not who forked, and ends it
            own_process.serve()
        sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.argv = [str(ROOT / "cli.py"), *words]
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
