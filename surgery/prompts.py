"""The prompts that a model is proven with: each is there for one way in which a graph can be wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Encode = Callable[[str], list[int]]
Row = tuple[int, ...]

LONGEST = 600
"""The most tokens in a built-in prompt: past the window of 512, and still seconds on a CPU."""

QUESTION = "What is the height of the tide today, and when will it turn?"
TEXTS = {
    "latin": "The lighthouse keeper wrote down every ship that went by, and none of them ever came back.",
    "scripts": "hello, привет, سلام, 你好世界",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "persian": "هر که ناموخت از گذشت روزگار، نیز ناموزد ز هیچ آموزگار.",
    "chinese": "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "emoji": "🧭➡️ 👩🏽‍🔬 + 🧪 = 🎉? 🇳🇴🏳️‍🌈",
    "code": "def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\n\tfib(10)\n",
}
"""By what they cover. `latin` and `scripts` keep to letters that a toy tokenizer has too."""


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, or a batch of them.

    `rows` are token ids; rows of different length are padded on the right with `pad`. The prompt is fed in
    pieces of `chunk` tokens where that is given. `heavy` cases are left out of a light check.
    """

    name: str
    covers: str
    rows: tuple[Row, ...]
    chunk: int | None = None
    pad: int = 0
    heavy: bool = False

    @property
    def ragged(self) -> bool:
        return len({len(row) for row in self.rows}) > 1

    @property
    def longest(self) -> int:
        return max(len(row) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A case that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids that a model gives a meaning, and its sizes. `size` is in ids, `window` and `context` in tokens."""

    size: int
    context: int
    bos: int | None = None
    pad: int | None = None
    eos: tuple[int, ...] = ()
    image: int | None = None
    audio: int | None = None
    window: int | None = None


def built_in(
    vocabulary: Vocabulary, encode: Encode | None, converse: Encode | None, steps: int
) -> tuple[list[Case], list[Skipped]]:
    """The cases that fit a model, and those that do not, each with its reason.

    `encode` turns text into ids, `converse` a user's message into the ids of a conversation; None where the
    folder has no tokenizer or no template. A case needs room for `steps` more tokens in the context.
    """
    found = [*_of_ids(vocabulary), *_of_text(vocabulary, encode, converse)]
    return admissible(found, vocabulary, steps)


def admissible(found: Sequence[Case | Skipped], vocabulary: Vocabulary, steps: int) -> tuple[list[Case], list[Skipped]]:
    """Cases that the model can take, and the rest with the reason."""
    cases: list[Case] = []
    skipped: list[Skipped] = []
    for case in found:
        if isinstance(case, Skipped):
            skipped.append(case)
        elif fault := _fault(case, vocabulary, steps):
            skipped.append(Skipped(case.name, fault))
        else:
            cases.append(case)
    return cases, skipped


def _fault(case: Case, vocabulary: Vocabulary, steps: int) -> str | None:
    if not case.rows or not all(case.rows):
        return "a row has no tokens"
    outside = [token for row in case.rows for token in row if not 0 <= token < vocabulary.size]
    if -1 in outside:
        return "the tokenizer does not know all of its letters"  # GenAI's tokenizers give -1 for these
    if outside:
        return f"token id {outside[0]} is outside of the vocabulary of {vocabulary.size}"
    if case.longest + steps > vocabulary.context:
        return f"{case.longest} tokens and {steps} more do not fit the context of {vocabulary.context}"
    return None


def _of_ids(vocabulary: Vocabulary) -> Iterator[Case | Skipped]:
    ordinary = _ordinary(vocabulary)
    first: Row = (vocabulary.bos,) if vocabulary.bos is not None else ()
    pad = vocabulary.pad or 0
    last = vocabulary.size - 1
    words = first + ordinary(17)
    yield Case("one-token", "a prompt of length 1", (ordinary(1),))
    yield (Case("bos-only", "nothing but BOS", (first,)) if first else Skipped("bos-only", "no bos_token_id is given"))
    yield Case("any-ids", "ids without meaning", (words,))
    yield Case("lowest-ids", "the first rows of the embedding tables", ((*first, 0, 1, 2, 3, *ordinary(1)),))
    yield Case("highest-ids", "the last rows of the embedding tables", ((*first, last - 1, last, last - 1, last),))
    yield Case("repeated", "one token twelve times", (first + ordinary(1) * 12,))
    yield Case("pad-inside", "the pad id as a token like others", ((*first, *ordinary(3), pad, pad, *ordinary(3)),))
    for name, token in (("image", vocabulary.image), ("audio", vocabulary.audio)):
        if token is None:
            yield Skipped(f"{name}-placeholder", f"no {name}_token_id is given")
        else:
            row = (*first, *ordinary(2), token, token, token, *ordinary(2))
            yield Case(f"{name}-placeholder", "a placeholder's masked per-layer input", (row,))
    for chunk in (1, 3, 7):
        yield Case(f"chunks-of-{chunk}", "the prompt in pieces", (words,), chunk=chunk)
    yield Case("batch", "two rows of one length", (words[:9], first + ordinary(len(words[:9]) - len(first))))
    yield Case("ragged-batch", "two rows, the shorter padded on the right", (words[:5], words[3:14]), pad=pad)
    yield from _past_the_window(vocabulary, first, ordinary)


def _past_the_window(vocabulary: Vocabulary, first: Row, ordinary: Callable[[int], Row]) -> Iterator[Case | Skipped]:
    window = vocabulary.window
    if window is None or window >= LONGEST:
        why = "no window is known" if window is None else f"the window of {window} is longer than {LONGEST}"
        yield Skipped("past-the-window", why)
        return
    row = first + ordinary(min(window + 64, LONGEST) - len(first))
    yield Case("past-the-window", "more tokens than a sliding layer sees", (row,), heavy=True)
    chunk = max(2, window * 3 // 8)
    yield Case(
        "past-the-window-in-chunks",
        "a window that reaches back into a chunk",
        (row,),
        chunk=chunk,
        heavy=True,
    )


def _ordinary(vocabulary: Vocabulary) -> Callable[[int], Row]:
    """Ids without meaning, other ones at each call and the same ones in each run."""
    special = {vocabulary.bos, vocabulary.pad, vocabulary.image, vocabulary.audio, *vocabulary.eos, 0}
    numbers = random.Random(vocabulary.size)

    def take(count: int) -> Row:
        row: list[int] = []
        while len(row) < count:
            token = numbers.randrange(vocabulary.size)
            if token not in special or vocabulary.size <= len(special):
                row.append(token)
        return tuple(row)

    return take


def _of_text(vocabulary: Vocabulary, encode: Encode | None, converse: Encode | None) -> Iterator[Case | Skipped]:
    first: Row = (vocabulary.bos,) if vocabulary.bos is not None else ()
    if converse is None:
        yield Skipped("conversation", "the folder has no tokenizer with a chat template that works")
    else:
        yield Case("conversation", "the chat template", (tuple(converse(QUESTION)),))
    for name, text in TEXTS.items():
        if encode is None:
            yield Skipped(name, "the folder has no tokenizer that works")
        else:
            yield Case(name, f"text: {name}", (first + tuple(encode(text)),))
