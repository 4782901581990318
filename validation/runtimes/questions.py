"""What a folder is asked, with the answers that the source pair gives.

Prompts are drawn until every greedy choice of the source is decided by more than MARGIN, so that the last bits, in
which versions of ONNX Runtime differ, cannot turn a token. None of the tokens ends the sequence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from passes.base import apply
from surgery.folder.opened import open_genai_folder
from surgery.graph.model import Model
from surgery.runtime.decoding import Step
from surgery.runtime.sessions import Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.verify.prompts import Case, TokenRow
from surgery.verify.recording import record
from validation.runtimes.subjects import Subject

STEPS = 6
"""Tokens generated at a time."""
MARGIN = 0.1
"""The least difference of the two highest logits. float16 logits of one graph differ by up to 0.05 between versions
of ONNX Runtime, float32 ones by 1e-5."""
PROMPT = 11
"""Tokens of a prompt: more than the fixtures' window of 8, fewer than two of them."""
CHUNK = 4
"""search.chunk_size: a prompt of 11 is fed as 4, 4 and 3 tokens. It is given in the configuration, because 0.14 takes no
notice of it among a generator's search options."""
MARGIN_IN_INT8 = 0.5
"""The same where products multiply in int8: a sum that differs in its last bit becomes the next whole number."""
TRIES = 400

_SEARCH = {"do_sample": False, "num_beams": 1, "min_length": 0, "repetition_penalty": 1.0, "max_length": 64}

_TEXTS = (
    "The lighthouse keeper wrote down every ship that went by, and none of them ever came back.",
    "  two spaces, a tab\tand a line's end\n\n\tfib(n - 1) + fib(n - 2)\n",
    "hello, привет, سلام, 你好世界",
)
"""In letters that the fixtures' tokenizer knows."""

OF_TEXT: Mapping[str, Mapping[str, Any]] = {
    "tokenizer": {"kind": "encode", "texts": _TEXTS},
    "chat template": {"kind": "render", "message": "What is the height of the tide today, and when will it turn?"},
}
"""Questions without an oracle of their own: the answers of the environment that runs the matrix are expected."""

Action = tuple[str, Any]


class Undecided(Exception):
    """The source's choice of a token is too close to call, or ends the sequence: another prompt is needed."""


@dataclass(frozen=True, slots=True)
class Question:
    """`asked` is what the probe reads; `expected` is the answer that makes a cell `ok`."""

    name: str
    asked: Mapping[str, Any]
    expected: Any


@dataclass(frozen=True, slots=True)
class Script:
    """What is done with one Generator, and the sequences it is to hold afterwards; `overlay` is of genai_config.json."""

    actions: Sequence[Action]
    expected: Sequence[TokenRow]
    overlay: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def asked(self) -> dict[str, Any]:
        overlay = json.dumps(self.overlay) if self.overlay else ""
        search = {**_SEARCH, "batch_size": len(self.expected)}
        return {"kind": "generate", "overlay": overlay, "search": search, "actions": self.actions}

    def in_chunks(self) -> Script:
        return replace(self, overlay={"search": {"chunk_size": CHUNK}})


class Source:
    """The source pair as an oracle, with the folder's accuracy level, and prompts of its vocabulary."""

    def __init__(self, subject: Subject) -> None:
        folder = open_genai_folder(subject.folder)
        self.size = folder.vocab_size
        self.pad = next(iter(folder.token_ids("pad_token_id")))
        self.bos = next(iter(folder.token_ids("bos_token_id")))
        self.eos = set(folder.token_ids("eos_token_id"))
        decoder = apply(Model.open(subject.pair.decoder), subject.level)[0] if subject.level else None
        self.margin = MARGIN_IN_INT8 if subject.level else MARGIN
        self._pair = TwoGraphModel.open(subject.pair, Settings(), decoder)

    def continued(self, *rows: TokenRow, eos: int | None = None) -> list[TokenRow]:
        """STEPS greedy tokens of each row by itself. Raises Undecided."""
        case = Case("prompt", "", rows, pad=self.pad)
        answer = record(self._pair, [case], steps=STEPS - 1, padding="none").answers[0]
        if min(_margin(step) for step in answer.steps) < self.margin:
            raise Undecided
        tokens = [tuple(int(token) for token in row) for row in answer.tokens()]
        if any(self.eos.union({eos}).intersection(row) or len(set(row)) < 2 for row in tokens):
            raise Undecided
        return tokens

    def padded(self, rows: Sequence[TokenRow]) -> list[TokenRow]:
        length = max(len(row) for row in rows)
        return [(*row, *[self.pad] * (length - len(row))) for row in rows]

    def draw(self, numbers: random.Random, length: int) -> TokenRow:
        """Ids without meaning behind BOS; never the pad id, by which GenAI tells where a row ends."""
        special = {self.bos, self.pad, *self.eos}
        ordinary = [token for token in range(self.size) if token not in special]
        return (self.bos, *numbers.choices(ordinary, k=length - 1))


def _margin(step: Step) -> float:
    """By how much the closest row prefers its likeliest token to the next one."""
    ordered = np.sort(step.logits.astype(np.float32), axis=1)
    return float((ordered[:, -1] - ordered[:, -2]).min())


def _generates(source: Source, numbers: random.Random) -> Script:
    prompt = source.draw(numbers, PROMPT)
    (tokens,) = source.continued(prompt)
    return Script([("append", [prompt]), ("generate", STEPS)], [prompt + tokens])


def _prompt_in_chunks(source: Source, numbers: random.Random) -> Script:
    return _generates(source, numbers).in_chunks()


def _batch(source: Source, numbers: random.Random) -> Script:
    return _rows(source, [source.draw(numbers, PROMPT) for _ in range(2)])


def _ragged_batch(source: Source, numbers: random.Random) -> Script:
    return _rows(source, [source.draw(numbers, PROMPT - 5), source.draw(numbers, PROMPT)])


def _batch_in_chunks(source: Source, numbers: random.Random) -> Script:
    return _batch(source, numbers).in_chunks()


def _ragged_batch_in_chunks(source: Source, numbers: random.Random) -> Script:
    return _ragged_batch(source, numbers).in_chunks()


def _rows(source: Source, rows: Sequence[TokenRow]) -> Script:
    padded = source.padded(rows)
    tokens = source.continued(*rows)
    expected = [row + continued for row, continued in zip(padded, tokens, strict=True)]
    return Script([("append", padded), ("generate", STEPS)], expected)


def _appends_after_the_end(source: Source, numbers: random.Random) -> Script:
    """A token that the source generates is declared end-of-sequence; GenAI leaves it out of a single row."""
    prompt = source.draw(numbers, PROMPT)
    (tokens,) = source.continued(prompt)
    ends = next((index for index in range(2, STEPS) if tokens[index] not in tokens[:index]), None)
    if ends is None:
        raise Undecided
    eos = tokens[ends]
    more = source.draw(numbers, 5)
    if eos in prompt + more:
        raise Undecided
    context = prompt + tokens[:ends] + more
    (after,) = source.continued(context, eos=eos)
    actions = [("append", [prompt]), ("generate", STEPS), ("append", [more]), ("generate", STEPS)]
    return Script(actions, [context + after], {"model": {"eos_token_id": [eos]}})


def _appends_in_the_middle(source: Source, numbers: random.Random) -> Script:
    prompt, more = source.draw(numbers, PROMPT), source.draw(numbers, 5)
    (tokens,) = source.continued(prompt)
    context = prompt + tokens[:4] + more
    (after,) = source.continued(context)
    actions = [("append", [prompt]), ("generate", 4), ("append", [more]), ("generate", STEPS)]
    return Script(actions, [context + after])


def _appends_in_the_middle_after_rewinding(source: Source, numbers: random.Random) -> Script:
    """The way round: the last token is not in the caches yet, so two are taken back and given again."""
    prompt, more = source.draw(numbers, PROMPT), source.draw(numbers, 5)
    (tokens,) = source.continued(prompt)
    context = prompt + tokens[:4] + more
    (after,) = source.continued(context)
    actions = [
        ("append", [prompt]),
        ("generate", 4),
        ("rewind", PROMPT + 2),
        ("append", [tokens[2:4] + more]),
        ("generate", STEPS),
    ]
    return Script(actions, [context + after])


def _rewinds_into_the_prompt(source: Source, numbers: random.Random) -> Script:
    return _rewinds(source, numbers, 5)


def _rewinds_to_the_start(source: Source, numbers: random.Random) -> Script:
    return _rewinds(source, numbers, 0)


def _rewinds(source: Source, numbers: random.Random, length: int) -> Script:
    prompt, more = source.draw(numbers, PROMPT), source.draw(numbers, PROMPT - length)
    source.continued(prompt)
    context = prompt[:length] + more
    (after,) = source.continued(context)
    actions = [("append", [prompt]), ("generate", STEPS), ("rewind", length), ("append", [more]), ("generate", STEPS)]
    return Script(actions, [context + after])


SCRIPTS: Mapping[str, Callable[[Source, random.Random], Script]] = {
    "generates": _generates,
    "prompt in chunks": _prompt_in_chunks,
    "batch of 2": _batch,
    "ragged batch of 2": _ragged_batch,
    "batch of 2, in chunks": _batch_in_chunks,
    "ragged batch of 2, in chunks": _ragged_batch_in_chunks,
    "appends after the end": _appends_after_the_end,
    "appends in the middle": _appends_in_the_middle,
    "appends in the middle, rewinding 2": _appends_in_the_middle_after_rewinding,
    "rewind_to(5)": _rewinds_into_the_prompt,
    "rewind_to(0)": _rewinds_to_the_start,
}


def make_questions(subject: Subject) -> list[Question]:
    """The rows of the matrix, in order. What `of_text` asks has no answer yet: the source pair has no tokenizer."""
    source = Source(subject)
    scripts = {name: decided(source, make) for name, make in SCRIPTS.items()}
    return [
        Question("loads", {"kind": "load"}, True),
        *(Question(name, script.asked(), [list(row) for row in script.expected]) for name, script in scripts.items()),
    ]


def decided(source: Source, make: Callable[[Source, random.Random], Script]) -> Script:
    """The first script that does not hang on a close call. Raises Undecided after TRIES of them."""
    for seed in range(TRIES):
        try:
            return make(source, random.Random(seed))
        except Undecided:
            continue
    raise Undecided(f"no prompt of {TRIES} has the margins")
