"""A function of ours in a process of its own, because what it renders, tokenizes and runs is not trusted.

    this process                                    the other one
    function, arguments, limits -- stdin --------->
    what it asks to hear, as lines of JSON ------->
                      <-------- stdout ------------ words as it goes, then its result or its error, as lines of JSON
                      <-------- stderr ------------ what native code prints; its end is quoted if the process dies

A graph can loop for ever, a chat template can ask for all memory, a tokenizer can crash its library. Here that ends as
ProcessEnded, in one sentence, and everything else goes on. The process has `Limits`; it ends with the one that started
it, however that ends; and nothing that it answers is more than data of the type that was asked for.

What is not limited: on CUDA, memory, because the driver reserves more address space than any bound; on macOS and
Windows, memory, because those systems have no such limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from surgery.choices import Provider
from surgery.errors import LONGEST, ProcessEnded, RequestError, SurgeryError, unforeseen
from surgery.files.json_values import typed

T = TypeVar("T")

STRICT = 60.0
"""Seconds for what takes a second or two: a chat template, a tokenizer."""
_PATIENCE, _PATIENCE_PER_GB, _MOST_PATIENCE = 600.0, 60.0, 3600.0
"""Seconds without a word: 4.9 GB on two slow cores are silent for 40 of them, while a graph is loaded."""
_MEMORY, _COPIES, _PER_CORE = 4 * 2**30, 4, 64 * 2**20
"""Bytes beside the weights; how often the weights may be held, in whatever types; stacks of the sessions' threads."""
SECONDS, MEMORY = "GEMMA4_SURGERY_SECONDS", "GEMMA4_SURGERY_MEMORY"
"""Environment variables in place of the defaults: seconds without a word, and GB."""
_STDERR = 4096
_KEPT_OUT = ("ORT_LOAD_CONFIG_FROM_MODEL",)
"""Environment variables that let a graph bring session options of its own."""

_TUNABLES, _LARGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
"""glibc asks the kernel for pages of 2 MB where memory is large, as Linux grants by default to who asks: products of one
token, which read each weight once, take 0.83 of the time."""


class Tell(Protocol):
    """Says a word to the process that started this one, a plain value; it then waits `seconds` at most for the next,
    or as long as its limits say. None is no word, and sets the time alone."""

    def __call__(self, value: Any, seconds: float | None = None) -> None: ...

    def hear(self) -> Any:
        """What was sent in answer to a word, a plain value; waits for it, and None is the end."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory` in bytes that the process may write to, None for any number; `seconds` that it may go without a word."""

    memory: int | None
    seconds: float

    @classmethod
    def of(cls, provider: Provider, *folders: Path) -> Limits:
        """What the models in these folders need at most. Raises RequestError for a variable that is no number."""
        held = sum(_bytes_in(place) for folder in folders for place in (folder, folder / "onnx"))
        memory: float = _MEMORY + _COPIES * held + _PER_CORE * (os.cpu_count() or 1)
        if found := _from_environment(MEMORY):
            memory = found * 1e9
        patience = min(_PATIENCE + _PATIENCE_PER_GB * held / 1e9, _MOST_PATIENCE)
        return cls(None if provider == "cuda" else int(memory), _from_environment(SECONDS) or patience)


def _from_environment(name: str) -> float | None:
    text = os.environ.get(name)
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if 0 < (found := float(text)) < 1e9:
            return found
    raise RequestError(f"{name} is {text!r}; a number above 0 is expected")


def _bytes_in(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except OSError:
        return 0


def run(
    function: Callable[..., T], *arguments: Any, answer: Any, limits: Limits, told: Callable[[Any], None] | None = None
) -> T:
    """Call `function(tell, *arguments)` in a process of its own, and give what it returns, of the type `answer`.

    `told` is called with each word. Raises ProcessEnded where the process dies, is silent for too long or runs out of
    memory, and the SurgeryError that the function raises.
    """
    words = ask(function, *arguments, answer=answer, limits=limits)
    while True:
        try:
            word = next(words)
        except StopIteration as end:
            result: T = end.value
            return result
        if told is not None:
            told(word)


def ask(function: Callable[..., T], *arguments: Any, answer: Any, limits: Limits) -> Generator[Any, Any, T]:
    """As `run`, but yields the words; what is sent into it in answer to one, the function hears. A caller that stops
    listening ends the process."""
    quoted, lines = bytearray(), queue.SimpleQueue[bytes]()
    with _started(limits) as process:
        assert process.stdin is not None and process.stdout is not None
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        if process.stderr is not None:
            threading.Thread(target=_keep_end, args=(process.stderr, quoted), daemon=True).start()
        _send(process.stdin, pickle.dumps((os.getpid(), limits)) + pickle.dumps((function, arguments)))
        seconds = limits.seconds
        while True:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                raise ProcessEnded(
                    f"the process was stopped: {seconds:g} seconds went by without a result",
                    hint=f"{SECONDS} sets another number",
                ) from None
            if not line:
                raise ProcessEnded(f"the process {_how(process.wait(), limits)}{_quote(quoted)}")
            kind, value, given = json.loads(line)
            seconds = limits.seconds if given is None else min(given, limits.seconds)
            if kind == "result":
                found: T = typed(answer, value)
                return found
            if kind == "word" and value is not None:
                if (sent := (yield value)) is not None:
                    _send(process.stdin, json.dumps(sent).encode() + b"\n")
            elif kind == "error":
                raise _error(*value)


@contextlib.contextmanager
def _started(limits: Limits) -> Iterator[subprocess.Popen[bytes]]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
    loud = bool(os.environ.get("GEMMA4_SURGERY_TRACEBACK"))
    # A process that is killed cannot remove its temporary files.
    with tempfile.TemporaryDirectory(prefix="gemma4-surgery-", ignore_cleanup_errors=True) as place:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], env={**_environment(), "TMPDIR": place},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None if loud else subprocess.PIPE,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]


def _environment() -> dict[str, str]:
    """This process's, but for what is kept out, and with large pages unless it says otherwise."""
    found = {name: value for name, value in os.environ.items() if name not in _KEPT_OUT}
    tunables = found.get(_TUNABLES, "")
    if sys.platform == "linux" and _LARGE_PAGES not in tunables:
        found[_TUNABLES] = f"{tunables}:{_LARGE_PAGES}=1".lstrip(":")
    return found


def _send(stream: IO[bytes], data: bytes) -> None:
    """A process that is dead does not read: what it said last tells why."""
    with contextlib.suppress(BrokenPipeError):
        stream.write(data)
        stream.flush()


def _read(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(b"")


def _keep_end(stream: IO[bytes], kept: bytearray) -> None:
    with stream:
        while data := os.read(stream.fileno(), _STDERR):
            kept += data
            del kept[:-_STDERR]


def _how(code: int, limits: Limits) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}, without a result"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else str(-code)
    memory = f"; it may have needed more than {limits.memory / 1e9:.1f} GB" if limits.memory else ""
    return f"was ended by the signal {name}" + (memory if name in ("SIGKILL", "SIGABRT", "SIGSEGV") else "")


def _quote(printed: bytearray) -> str:
    lines = printed.decode("utf-8", "replace").strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""


def _error(name: str, message: str, hint: str | None) -> Exception:
    kinds: tuple[type[SurgeryError], ...] = (SurgeryError, *SurgeryError.__subclasses__())
    for kind in kinds:
        if kind.__name__ == name:
            return kind(message, hint=hint)
    return RuntimeError(f"{name}: {message}")


def serve() -> None:
    """The other process: read what to do, do it, and end at once, without the farewells of native libraries."""
    words = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints is no word
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both; the one that started us decides

    def say(kind: str, value: Any, seconds: float | None = None) -> None:
        words.write(json.dumps([kind, value, seconds], default=_plain).encode() + b"\n")
        words.flush()

    class Words:
        def __call__(self, value: Any, seconds: float | None = None) -> None:
            say("word", value, seconds)

        def hear(self) -> Any:
            line = sys.stdin.buffer.readline()
            return json.loads(line) if line else None

    try:
        parent, limits = pickle.load(sys.stdin.buffer)
        _end_with(parent)
        _bound(limits)
        function, arguments = pickle.load(sys.stdin.buffer)
        say("result", function(Words(), *arguments))
    except SurgeryError as error:
        say("error", [type(error).__name__, str(error), error.hint])
    except MemoryError:
        say("error", ["ProcessEnded", f"more than {limits.memory / 1e9:.1f} GB of memory were needed", _more()])
    except (OSError, UnicodeEncodeError) as error:
        say("error", ["SurgeryError", str(unforeseen(error)), None])
    except Exception as error:
        traceback.print_exc()
        say("error", [type(error).__name__, str(error)[:LONGEST], None])
    except BaseException as error:  # what a library of another language makes of its own defects
        say("error", ["ProcessEnded", f"{type(error).__name__}: {error}"[:LONGEST], None])
    os._exit(0)


def _more() -> str:
    return f"{MEMORY} sets another number, in GB"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.item() if hasattr(value, "item") else str(value)


def _end_with(parent: int) -> None:
    """Let the kernel end this process with the one that started it."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _bound(limits: Limits) -> None:
    """RLIMIT_DATA counts what is written to, in contrast to RLIMIT_AS, which a mapped file of weights counts for
    too."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.memory is not None and sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        bound = limits.memory if hard == resource.RLIM_INFINITY else min(limits.memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
