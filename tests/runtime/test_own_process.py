"""A process of its own: what it tells comes back as it was, and every way to die is one sentence."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import started_processes
from limits import FOR_EVER, Impatient, wait_until
from places import ROOT

from surgery.errors import FolderError, ProcessEnded, RequestError
from surgery.files.json_values import typed
from surgery.runtime.own_process import MEMORY, SECONDS, Limits, Tell, ask, run

LIMITS = Limits(2 * 2**30, FOR_EVER)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: memory is limited, and a process has a parent")


@pytest.fixture(autouse=True)
def _started() -> Iterator[None]:
    with started_processes():
        yield


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    values: tuple[float, ...]
    of: Mapping[str, int]
    inner: Found | None = None


def counted(tell: Tell, upto: int) -> Found:
    print("no word, but native libraries print")
    for number in range(upto):
        tell(number)
    tell(None)
    return Found("n\n\x1b", (1.5, float("inf")), {"upto": upto}, Found("inner", (), {}))


def test_words_and_the_result_come_back_as_they_were() -> None:
    words: list[int] = []
    found = run(counted, 3, answer=Found, limits=LIMITS, told=words.append)
    assert words == [0, 1, 2]
    assert found == Found("n\n\x1b", (1.5, float("inf")), {"upto": 3}, Found("inner", (), {}))


def test_a_long_result_comes_whole() -> None:
    assert len(run(long, answer=str, limits=LIMITS)) == 5_000_000


def long(_: Tell) -> str:
    return "x" * 5_000_000


@pytest.mark.parametrize("value", [{"name": 5, "values": [], "of": {}}, [], {"name": "", "values": "ab", "of": {}}])
def test_what_is_not_of_the_type_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="is no "):
        typed(Found, value)


def refuses(_: Tell) -> None:
    raise FolderError("a sentence", hint="a hint")


def has_a_defect(_: Tell) -> None:
    raise KeyError("x")


def crashes(_: Tell) -> None:
    ctypes.string_at(0)


def aborts(_: Tell) -> None:
    os.write(2, b"thread '<unnamed>' panicked at \x1b[31mhere\n")
    os.abort()


class PanicException(BaseException):
    """What pyo3 makes of a panic: no Exception."""


def panics(_: Tell) -> None:
    raise PanicException("retry-limit-in-match over")


def allocates(_: Tell) -> None:
    bytearray(3 * 2**30)


def leaves(_: Tell) -> None:
    os._exit(7)


def hangs(_: Tell) -> None:
    signal.pause()


def hurries(tell: Tell) -> None:
    tell("go", 0.5)
    signal.pause()


def test_an_error_of_ours_is_the_same_error() -> None:
    with pytest.raises(FolderError, match="a sentence") as caught:
        run(refuses, answer=type(None), limits=LIMITS)
    assert caught.value.hint == "a hint"
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        run(has_a_defect, answer=type(None), limits=LIMITS)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (crashes, r"ended by the signal SIGSEGV; it may have needed more than 2\.1 GB"),
        (aborts, r"SIGABRT.*panicked at \\x1b\[31mhere"),
        (panics, "PanicException: retry-limit-in-match over"),
        pytest.param(allocates, r"more than 2\.1 GB of memory were needed", marks=linux),
        (leaves, "ended with exit code 7, without a result"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_way_to_die_is_a_sentence(function: Callable[[Tell], None], sentence: str) -> None:
    with pytest.raises(ProcessEnded, match=sentence) as caught:
        run(function, answer=type(None), limits=LIMITS)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("function", [hangs, hurries])
def test_silence_has_an_end(function: Callable[[Tell], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queue.SimpleQueue", Impatient)
    limits = Limits(None, 0.5 if function is hangs else FOR_EVER)
    with pytest.raises(ProcessEnded, match=r"stopped: 0\.5 seconds went by without a result"):
        run(function, answer=type(None), limits=limits)


def tells_who_it_is(tell: Tell) -> None:
    tell(os.getpid())
    signal.pause()


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[-1][:3]


@linux
def test_who_stops_listening_ends_it() -> None:
    words = ask(tells_who_it_is, answer=type(None), limits=LIMITS)
    process = next(words)
    assert alive(process)
    words.close()
    wait_until(lambda: not alive(process), "the end of the process")


@linux
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_process_that_started_it(way: int) -> None:
    """However that ends: a runtime that holds gigabytes is not left behind."""
    code = (
        "import test_own_process as t\n"
        "for process in t.ask(t.tells_who_it_is, answer=type(None), limits=t.LIMITS): print(process, flush=True)"
    )
    path = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, ROOT / "tests", ROOT))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        parent.send_signal(way)
    wait_until(lambda: not alive(process), "the end of the process")


def leaves_a_file(tell: Tell) -> None:
    tell(tempfile.mkdtemp())
    os.abort()


def test_no_temporary_file_stays() -> None:
    places: list[str] = []
    with pytest.raises(ProcessEnded, match="SIGABRT"):
        run(leaves_a_file, answer=type(None), limits=LIMITS, told=places.append)
    assert len(places) == 1 and not Path(places[0]).exists()


def environment(_: Tell) -> str:
    return os.environ.get("ORT_LOAD_CONFIG_FROM_MODEL", "none")


def test_a_graph_brings_no_session_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    assert run(environment, answer=str, limits=LIMITS) == "none"


def test_limits_follow_the_model_and_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECONDS, raising=False)
    monkeypatch.delenv(MEMORY, raising=False)
    small = Limits.of("cpu", tmp_path)
    with (tmp_path / "model.onnx_data").open("wb") as file:
        file.truncate(10 * 10**9)
    large = Limits.of("cpu", tmp_path)
    assert large.memory is not None and small.memory is not None
    assert large.memory - small.memory == 40 * 10**9 and large.seconds == small.seconds + 600
    assert Limits.of("cuda", tmp_path).memory is None
    monkeypatch.setenv(SECONDS, "7.5")
    monkeypatch.setenv(MEMORY, "2")
    assert Limits.of("cpu", tmp_path) == Limits(2 * 10**9, 7.5)
    for wrong in ("no", "-1", "nan", "inf", "0"):
        monkeypatch.setenv(SECONDS, wrong)
        with pytest.raises(RequestError, match=f"{SECONDS} is '{wrong}'; a number above 0 is expected"):
            Limits.of("cpu", tmp_path)


def tunables(_: Tell) -> str:
    return os.environ.get("GLIBC_TUNABLES", "")


@linux
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_large_memory_has_large_pages(given: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert run(tunables, answer=str, limits=LIMITS) == found
