"""Prompts as people write them: texts, conversations and ids in a file, made into cases with a folder's tokenizer.

A file whose name ends in `.jsonl` is JSON Lines, one object a line:

    {"text": "The tide turns at"}                              a text; the begin-of-sequence id is put before it
    {"messages": [{"role": "user", "content": "Why?"}]}        a conversation, through the folder's chat template
    {"ids": [2, 818, 5279]}                                    token ids, as they are

with any of these fields beside:

    "name": "tide"               what reports call it; `line-7` where there is none
    "covers": "an open end"      what it is there for
    "chunk": 64                  the prompt is fed in chunks of 64 tokens
    "batch": ["And", "Then"]     further rows of the same kind: texts, conversations or lists of ids

Any other file is plain text, one text a line. Blank lines are left out in both.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.errors import RequestError, nearest
from surgery.files.safe_reading import read_regular
from surgery.runtime.genai import Message
from surgery.verify.prompts import Case, ModelTokens, Skipped, TokenRow

SHIPPED = Path(__file__).with_name("prompts.jsonl")
HEAVY = 256
"""Tokens from which on a prompt is heavy."""
_MOST_BYTES = 64 * 2**20
_KINDS = ("text", "messages", "ids")
_BESIDE = ("name", "covers", "chunk", "batch")

PromptKind = Literal["text", "messages", "ids"]
Content = str | tuple[Message, ...] | TokenRow
Encode = Callable[[str], list[int]]
Converse = Callable[[Sequence[Message]], list[int]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One entry of a prompt file: `rows` are of one kind, several where it is a batch."""

    name: str
    covers: str
    kind: PromptKind
    rows: tuple[Content, ...]
    chunk: int | None = None


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file. Raises RequestError with file and line for what is none."""
    try:
        text = read_regular(path, _MOST_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist; a file of prompts is expected") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: byte {error.start} cannot be decoded") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    structured = path.suffix == ".jsonl"
    prompts = tuple(
        _prompt(line, f"{path}, line {number}", f"line-{number}")
        if structured
        else Prompt(f"line-{number}", "a line of text", "text", (line.removesuffix("\r"),))
        for number, line in lines
    )
    if not prompts:
        raise RequestError(f"{path} holds no prompt")
    _refuse_twins(prompts, path)
    return prompts


@functools.cache
def shipped() -> tuple[Prompt, ...]:
    """The prompts that come with the package."""
    return read_prompts(SHIPPED)


def shipped_texts() -> dict[str, str]:
    """The shipped prompts that are one text, by name."""
    return {prompt.name: prompt.rows[0] for prompt in shipped() if isinstance(prompt.rows[0], str)}


def _refuse_twins(prompts: Sequence[Prompt], path: Path) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.name in seen:
            raise RequestError(f"{path}: two prompts are named {prompt.name!r}")
        seen.add(prompt.name)


def _prompt(line: str, where: str, name: str) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where}: it is not JSON: {error}") from None
    except RecursionError:
        raise RequestError(f"{where}: it is nested too deeply") from None
    if not isinstance(found, dict):
        raise RequestError(f"{where}: an object is expected, {_short(found)} is found")
    known = [*_KINDS, *_BESIDE]
    for field in found:
        if field not in known:
            raise RequestError(f"{where}: {field!r} is no field{nearest(field, known)}; there are {', '.join(known)}")
    kinds: list[PromptKind] = [kind for kind in ("text", "messages", "ids") if kind in found]
    if len(kinds) != 1:
        raise RequestError(f"{where}: one of {', '.join(_KINDS)} is expected, {len(kinds)} are found")
    kind = kinds[0]
    more = found.get("batch", [])
    if not isinstance(more, list):
        raise RequestError(f"{where}: batch is a list of further rows, {_short(more)} is found")
    rows = tuple(_READERS[kind](row, where) for row in (found[kind], *more))
    chunk = found.get("chunk")
    if chunk is not None and (not _is_whole(chunk) or chunk < 1):
        raise RequestError(f"{where}: chunk is a number of tokens >= 1, {_short(chunk)} is found")
    return Prompt(
        _word(found.get("name", name), "name", where),
        _word(found.get("covers", kind), "covers", where),
        kind,
        rows,
        chunk,
    )


def _word(value: object, field: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{where}: {field} is {_short(value)}; a text is expected")
    return value


def _text(value: object, where: str) -> Content:
    return _word(value, "text", where)


def _messages(value: object, where: str) -> Content:
    if not isinstance(value, list) or not value:
        raise RequestError(f"{where}: messages is {_short(value)}; a list of role and content is expected")
    return tuple(_message(each, where) for each in value)


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        raise RequestError(f"{where}: a message is {_short(value)}; an object of role and content is expected")
    return _word(value["role"], "role", where), _word(value["content"], "content", where)


def _ids(value: object, where: str) -> Content:
    if not isinstance(value, list) or not value or not all(_is_whole(token) for token in value):
        raise RequestError(f"{where}: ids is {_short(value)}; a list of whole numbers is expected")
    return tuple(value)


_READERS: dict[PromptKind, Callable[[object, str], Content]] = {"text": _text, "messages": _messages, "ids": _ids}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


def cases_of(
    prompts: Sequence[Prompt], vocabulary: ModelTokens, encode: Encode | None, converse: Converse | None
) -> Iterator[Case | Skipped]:
    """Each prompt as a case, or the reason why it is none.

    `encode` turns text into ids, `converse` a conversation; None where the folder has no tokenizer or no template.
    """
    readers: dict[PromptKind, Callable[[Any], TokenRow] | None] = {
        "text": _reader_of_text(vocabulary, encode),
        "messages": (lambda messages: tuple(converse(messages))) if converse else None,
        "ids": tuple,
    }
    lacking = {
        "text": "the folder has no tokenizer that works",
        "messages": "the folder has no tokenizer with a chat template that works",
    }
    for prompt in prompts:
        read = readers[prompt.kind]
        if read is None:
            yield Skipped(prompt.name, lacking[prompt.kind])
            continue
        rows = tuple(read(row) for row in prompt.rows)
        heavy = max(len(row) for row in rows) > HEAVY
        yield Case(prompt.name, prompt.covers, rows, prompt.chunk, vocabulary.pad or 0, heavy)


def _reader_of_text(vocabulary: ModelTokens, encode: Encode | None) -> Callable[[str], TokenRow] | None:
    if encode is None:
        return None
    first: TokenRow = (vocabulary.bos,) if vocabulary.bos is not None else ()
    return lambda text: first + tuple(encode(text))
