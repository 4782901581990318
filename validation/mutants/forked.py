"""Tests in a process that is forked from this one, which has imported what takes long: onnx, the runtimes, pytest.

Nothing of the project is imported here: the forked process takes it from the tree that it is given.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAVY = (
    "numpy", "onnx", "onnx.helper", "onnx.numpy_helper", "onnx.reference", "onnx.shape_inference", "onnx_graphsurgeon",
    "onnxruntime", "onnxruntime_genai", "pytest", "rich.console", "typer.testing", "huggingface_hub", "jinja2",
    "tokenizers", "safetensors.numpy",
)  # fmt: skip
OURS = ("surgery", "passes", "fixtures", "validation", "tests")
SILENT_SECONDS = 900
"""Time by the clock after which a process that no longer computes is given up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run: the first test that failed, or how the process ended; CPU seconds, children's too."""

    failed: str
    seconds: float


def import_what_takes_long() -> None:
    for name in HEAVY:
        importlib.import_module(name)


def run_tests(tree: Path, tests: Sequence[str], log: Path, cpu_seconds: int) -> Outcome:
    """Run pytest in a fork, up to the first failure. `log` gets what is printed."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        _child(tree, tests, log, cpu_seconds, writing)
    os.close(writing)
    status, usage = _waited(process)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        failed = pipe.read().strip()
    if os.WIFSIGNALED(status):
        failed = failed or f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    elif code := os.WEXITSTATUS(status):
        failed = failed or f"pytest ended with {code}"
    return Outcome(failed, usage.ru_utime + usage.ru_stime)


def _waited(process: int) -> tuple[int, resource.struct_rusage]:
    until = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < until:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            return status, usage
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    return status, usage


class _FirstFailure:
    """A plugin of pytest that says which test failed first."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self._pipe, f"{report.nodeid}\n".encode())

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            os.write(self._pipe, f"{report.nodeid} cannot be imported\n".encode())


def _child(tree: Path, tests: Sequence[str], log: Path, cpu_seconds: int, pipe: int) -> None:
    """The forked process; it does not return."""
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for target in (1, 2):
            os.dup2(file, target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        sys.path[:] = [
            str(tree),
            *(place for place in sys.path if place and Path(place) != Path.cwd() and not _ours(place)),
        ]
        import pytest

        arguments = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'pytest'}"]
        code = int(pytest.main([*arguments, *tests], plugins=[_FirstFailure(pipe)]))
    except BaseException as error:
        os.write(pipe, repr(error).encode())
    finally:
        sys.stdout.flush()
        os._exit(code)


def _ours(place: str) -> bool:
    """A folder of sys.path that has the project, of which the tree is a copy."""
    return (Path(place) / "surgery").is_dir()
