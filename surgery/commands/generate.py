"""gemma4-surgery generate: one answer, or a chat."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.commands.console import JobProgress, say, talk
from surgery.commands.help import ANSWER, ASKED, SOURCE
from surgery.commands.options import Ep
from surgery.errors import RequestError, printable
from surgery.files.safe_reading import read_regular
from surgery.printing import spoken

if TYPE_CHECKING:
    from surgery.jobs.generating import Answered, Chat

_MOST = 16 * 2**20
"""Characters of a prompt from stdin."""
_WORDS = "/clear begins anew, /bye or Ctrl-D ends; Ctrl-C ends an answer"
_TOOLS = "where it calls a tool, type what that returns, JSON or text; an empty line leaves it unanswered"


def generate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A GenAI folder, or one with two graphs (an export, a stripped one); or such a Hub repository.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="What to answer; - reads it from stdin; without it, a chat.", show_default=False
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", rich_help_panel=ASKED, metavar="TEXT", help="What the model is told before the first turn."
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", rich_help_panel=ASKED, help="A PNG or JPEG; repeatable. It stands where PROMPT says <|image|>."
        ),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(
            "--audio", rich_help_panel=ASKED, help="A WAV, FLAC or MP3. It stands where PROMPT says <|audio|>."
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens",
            rich_help_panel=ANSWER,
            min=1,
            help="The most tokens of an answer; default: 128, in a chat 1024.",
        ),
    ] = None,
    thinking: Annotated[
        bool,
        typer.Option(
            "--thinking/--no-thinking",
            show_default=False,
            rich_help_panel=ASKED,
            help="Let the model think first; the thoughts go to stderr.",
        ),
    ] = False,
    tools: Annotated[
        Path | None,
        typer.Option(
            "--tools", rich_help_panel=ASKED, metavar="FILE", help="Tools that the model may call: a list in JSON."
        ),
    ] = None,
    sample: Annotated[
        bool,
        typer.Option("--sample", rich_help_panel=ANSWER, help="Use the folder's sampling values instead of greedy."),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", rich_help_panel=ANSWER, help="Sample with this temperature, above 0."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", rich_help_panel=ANSWER, help="Sample among the k likeliest; 0: among all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", rich_help_panel=ANSWER, help="Sample among the likeliest of this share.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", rich_help_panel=ANSWER, min=0, help="Sample the same answer every time.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", rich_help_panel=ASKED, help="Give the prompt as it is, without the chat template.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", rich_help_panel=SOURCE, help="Of two graphs: which ones; default: the best for the provider."
        ),
    ] = None,
    ep: Ep = "auto",
) -> None:
    """Ask a folder, or chat with it, through the real runtime, or through two sessions where there are two graphs."""
    from surgery.jobs.generating import Chat

    chatting = prompt is None
    if prompt is None and not sys.stdin.isatty():
        raise RequestError(
            "no PROMPT is given, and stdin is no terminal to chat on", hint="- reads a prompt from stdin"
        )
    if prompt == "-":
        prompt = _from_stdin()
    with Chat(
        folder, new_tokens=new_tokens or (1024 if chatting else 128), sample=sample, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed, template=not raw, thinking=thinking,
        tools=_tools(tools) if tools else None, system=system, precision=precision,
        provider=ep, lasting=chatting, listener=JobProgress(),
    ) as chat:  # fmt: skip
        files = (image or (), audio or ())
        if prompt is not None:
            _answer(chat, prompt, *files)
            return
        say(f"chat       {_WORDS}")
        if tools:
            say(f"tools      {_TOOLS}")
        for turn in _turns(chat):
            heard: list[int] = []
            with _interrupts(heard):
                answer = _answer(chat, turn, *files, heard)
            files = ((), ())
            while tools and not heard and (results := _results(answer)):
                with _interrupts(heard):
                    answer = _answer(chat, results, told=heard)


def _answer(
    chat: Chat,
    asked: str | list[Any],
    images: Sequence[Path] = (),
    sounds: Sequence[Path] = (),
    told: Sequence[int] = (),
) -> str:
    """Write the answer to a text, or to what tools returned, as it comes, until one is `told` to stop, and then what it
    took."""
    thoughts = talk()

    def think(piece: str) -> None:
        thoughts.print(spoken(piece), end="", style="dim", markup=False, soft_wrap=True)

    answer: list[str] = []
    if isinstance(asked, str):
        said = chat.say(asked, images=images, sounds=sounds, thought=think)
    else:
        said = chat.say_results(asked, thought=think)
    with contextlib.closing(said) as pieces:
        for piece in pieces:
            answer.append(piece)
            sys.stdout.write(spoken(piece))
            sys.stdout.flush()
            if told:
                break
    sys.stdout.write("\n")
    sys.stdout.flush()
    if chat.answered is not None:
        say(_took(chat.answered))
    return "".join(answer)


def _results(answer: str) -> list[Any]:
    """What is typed for each tool that an answer calls: JSON, or text as it is; nothing where a line is left empty."""
    from surgery.runtime.tool_calls import tool_calls

    results: list[Any] = []
    try:
        calls = tool_calls(answer)
    except RequestError as error:
        say(f"tools      {error}")
        return []
    for call in calls:
        arguments = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items()
        )
        try:
            line = _typed(printable(f"{call.name}({arguments}) = "))
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return []
        try:
            results.append(json.loads(line))
        except (ValueError, RecursionError):
            results.append(line)
    return results


def _took(answered: Answered) -> str:
    kept = f", {answered.kept} of them kept from before" if answered.kept else ""
    rate = f", {answered.rate:.1f} a second" if answered.rate else ""
    return f"took       {answered.first:.2f} s to the first token of {answered.tokens}{rate}; prompt {answered.prompt}{kept}"


def _turns(chat: Chat) -> Iterator[str]:
    """What is typed, line by line, up to its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrows and history in `input`
    while True:
        try:
            line = _typed("> ")
        except EOFError:
            sys.stderr.write("\n")
            return
        except KeyboardInterrupt:
            say(f"\n{_WORDS}")
            continue
        if line == "/bye":
            return
        if line == "/clear":
            chat.clear()
        elif line:
            yield line


def _typed(prompt: str) -> str:
    """A line from the terminal. Raises EOFError and KeyboardInterrupt."""
    with _interrupted_typing():
        return input(prompt).strip() if sys.stdout.isatty() else _asked_beside(prompt)


def _asked_beside(prompt: str) -> str:
    """A line from the terminal where stdout goes elsewhere."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    if line := sys.stdin.readline():
        return line.strip()
    raise EOFError


@contextlib.contextmanager
def _interrupts(heard: list[int]) -> Iterator[None]:
    """Within, a Ctrl-C goes into the list; a second one does what it does without."""
    before = signal.getsignal(signal.SIGINT)

    def hear(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        heard.append(number)

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _interrupted_typing() -> Iterator[None]:
    """Within, a Ctrl-C is a KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tools(path: Path) -> Any:
    try:
        return json.loads(read_regular(path, _MOST))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None


def _from_stdin() -> str:
    text = sys.stdin.read(_MOST + 1)
    if len(text) > _MOST:
        raise RequestError(f"stdin has more than {_MOST:,} characters; a prompt is expected")
    if not text.strip():
        raise RequestError("stdin is empty; a prompt is expected")
    return text
