"""The command in a process of its own: with limits on CPU time and memory, and a record of what it does to others.

A process is forked, so that the modules that all commands need are loaded once; whoever calls this has no threads. The
processes that the command itself starts for what is not trusted are forked from it, in place of new interpreters: they
are watched like the command, and everything else about them is as it is.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from places import ROOT

from surgery.errors import SurgeryError
from surgery.runtime import own_process

GIGABYTE = 1024**3
PROGRAMS = {"git", "ssh-keygen", Path(sys.executable).name}
"""What a command may start: git, and itself again."""
_PATHS: Mapping[str, Sequence[int]] = {
    "os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "os.setxattr": (0,),
}  # fmt: skip
"""Audit event of a change to the disk -> which of its arguments are paths."""
_STARTS = {"subprocess.Popen": 0, "os.system": 0, "os.exec": 0, "os.posix_spawn": 0}


@dataclass(frozen=True, slots=True)
class Limits:
    """`seconds` of CPU time, `patience` in seconds on the wall for one that sleeps, `memory` in bytes beyond what is used."""

    seconds: int = 20
    patience: int = 300
    memory: int = 3 * GIGABYTE


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended. `code` is its exit code, or minus the signal; `hung` if a limit of time ended it.

    `outside` are writes to other places than it was given, `started` programs and libraries that were none of its own.
    """

    code: int
    seconds: float
    memory: int
    out: str
    err: str
    hung: bool
    outside: tuple[str, ...] = ()
    started: tuple[str, ...] = ()

    @property
    def defect(self) -> str:
        """What is wrong with how it ended, whatever it was given; empty where nothing is."""
        if self.hung:
            return "a hang"
        if self.code not in (0, 1, 2):
            return f"ended with {self.code}"
        for text in (self.out, self.err):
            if odd := next((line for line in text.splitlines() if not line.isprintable()), None):
                return f"printed {odd[:80]!a}"
        if "a defect of gemma4-surgery" in self.out:  # where git shows it
            return next(line for line in self.out.splitlines() if "a defect of" in line)[:200]
        if "a defect of gemma4-surgery" in self.err or "Traceback" in self.err:
            return self.err.splitlines()[-2 if "hint:" in self.err else -1][:200]
        lines = self.err.splitlines()
        if self.code == 2 and not self.out and not any(line.startswith("error: ") for line in lines):
            return f"no sentence says why: {self.err[-80:]!a}"
        return next((f"a line of {len(line):,} characters" for line in lines if len(line) > 20_000), "")


def preload() -> None:
    """Load what every command needs, once for all of them."""
    import jinja2  # noqa: F401
    import onnx.reference  # noqa: F401
    import onnx_graphsurgeon  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxruntime_genai  # noqa: F401
    import tokenizers  # noqa: F401
    import typer

    import surgery
    from surgery.commands import app

    for module in pkgutil.walk_packages([*surgery.__path__], "surgery."):
        import_module(module.name)
    if isinstance(app.app, typer.Typer):
        app.app = typer.main.get_command(app.app)  # type: ignore[assignment]
    gc.freeze()


def rehearse(words: Sequence[str], cwd: Path) -> None:
    """Run a command in this very process, so that what it loads is there in each process that is forked afterwards."""
    from surgery.commands import app

    before = Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), forking():
            app.app(list(words), standalone_mode=False)
    except (SystemExit, SurgeryError):
        pass
    finally:
        os.chdir(before)
        gc.freeze()


def run(
    words: Sequence[str], cwd: Path, scratch: Path, writes: Sequence[Path] = (), limits: Limits | None = None
) -> Ran:
    """Run `gemma4-surgery WORDS` in `cwd`. It may write to `writes` and below `scratch`, which is its TMPDIR and HOME."""
    limits = limits or Limits()
    scratch.mkdir(parents=True, exist_ok=True)
    logs = {name: scratch / f"{os.getpid()}.{name}" for name in ("out", "err", "events")}
    child = os.fork()
    if child == 0:
        _become(words, cwd, scratch, [*writes, scratch], logs, limits)
    status, usage, late = _awaited(child, limits.patience)
    texts = {name: path.read_text(encoding="utf-8", errors="surrogateescape") for name, path in logs.items()}
    for path in logs.values():
        path.unlink()
    code = os.waitstatus_to_exitcode(status)
    events = [line.partition(" ")[::2] for line in texts["events"].splitlines()]
    return Ran(
        code=code,
        seconds=usage.ru_utime + usage.ru_stime,
        memory=usage.ru_maxrss * 1024,
        out=texts["out"],
        err=texts["err"],
        hung=late or code in (-signal.SIGXCPU, -signal.SIGKILL),
        outside=tuple(what for kind, what in events if kind == "wrote"),
        started=tuple(what for kind, what in events if kind == "started"),
    )


def _awaited(child: int, patience: int) -> tuple[int, Any, bool]:
    """Status and usage of a child; it is killed when it has taken too long on the wall."""
    end, pause = time.monotonic() + patience, 0.002
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage, False
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage, True
        time.sleep(pause)
        pause = min(pause * 1.2, 0.1)


def _become(
    words: Sequence[str], cwd: Path, scratch: Path, writes: Sequence[Path], logs: Mapping[str, Path], limits: Limits
) -> NoReturn:
    """In the child: the command, until it ends."""
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(logs[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        events = os.open(logs["events"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="strict", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.chdir(cwd)
        tempfile.tempdir = str(scratch)
        os.environ.update(HOME=str(scratch), TMPDIR=str(scratch), HF_HUB_OFFLINE="1", GIT_CONFIG_NOSYSTEM="1")
        os.environ["PYTHONPATH"] = str(ROOT)  # for processes that the command starts
        sys.dont_write_bytecode = True
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limits.memory, used + limits.memory))
        resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 2))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["gemma4-surgery", *words]
        _record(events, [os.path.abspath(path) for path in writes])
        from surgery.commands.app import main

        try:
            with forking():
                main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # what gets past `main` is the worst defect of all
        os.write(2, f"Traceback: {type(error).__name__}: {ascii(str(error))[:300]}\n".encode())
    finally:
        os._exit(code)


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Fork the processes of surgery.runtime.own_process."""
    started = own_process._started
    own_process._started = _started  # type: ignore[assignment]
    try:
        yield
    finally:
        own_process._started = started


@dataclass
class _Forked:
    """As much of subprocess.Popen as surgery.runtime.own_process uses."""

    pid: int
    stdin: io.FileIO
    stdout: io.FileIO
    stderr: io.FileIO
    code: int | None = None

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


@contextlib.contextmanager
def _started(limits: own_process.Limits) -> Iterator[_Forked]:
    """In place of own_process._started."""
    with tempfile.TemporaryDirectory(prefix="gemma4-surgery-", ignore_cleanup_errors=True) as place:
        pipes = [os.pipe() for _ in range(3)]
        ours, theirs = [(pipes[0][1], pipes[1][0], pipes[2][0]), (pipes[0][0], pipes[1][1], pipes[2][1])]
        child = os.fork()
        if child == 0:
            _become_own_process(theirs, ours, place)
        for end in theirs:
            os.close(end)
        process = _Forked(child, io.FileIO(ours[0], "w"), io.FileIO(ours[1]), io.FileIO(ours[2]))
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _become_own_process(ends: Sequence[int], others: Sequence[int], place: str) -> NoReturn:
    try:
        for other in others:
            os.close(other)
        for number, end in enumerate(ends):
            os.dup2(end, number)
        sys.stdin = os.fdopen(0)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
        os.environ["TMPDIR"] = tempfile.tempdir = place
        own_process.serve()
    finally:
        os._exit(1)


def _record(events: int, allowed: Sequence[str]) -> None:
    """Write a line to `events` for each change outside of `allowed`, and for each program that is started."""

    def note(kind: str, what: object) -> None:
        os.write(events, f"{kind} {what!a}\n".encode())

    def inside(path: str) -> bool:
        return any(path == one or path.startswith((f"{one}/", _beside(one))) for one in allowed) or path == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changed: Sequence[int] = _PATHS.get(event, ())
        if event == "open" and isinstance(arguments[2], int):
            changed = (0,) if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) else ()
        if event == "os.mkdir" and os.path.lexists(arguments[0]):
            changed = ()  # it will fail
        for at in changed:
            path = arguments[at]
            name = os.fsdecode(path) if isinstance(path, str | bytes) else ""
            if os.path.isabs(name) and not inside(os.path.normpath(name)):  # what is relative, the caller looks after
                note("wrote", f"{event} {name}")
        if event in _STARTS:
            program = os.path.basename(os.fsdecode(arguments[0]))
            if program not in PROGRAMS:
                note("started", f"{event} {program}")
        elif event == "ctypes.dlopen" and arguments[0] is not None and not _is_installed(os.fsdecode(arguments[0])):
            note("started", f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def _beside(target: str) -> str:
    """How the names begin under which something is written before it is `target`."""
    return os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.")


def _is_installed(library: str) -> bool:
    return "/" not in library or library.startswith((sys.prefix, sys.base_prefix, "/lib", "/usr"))
