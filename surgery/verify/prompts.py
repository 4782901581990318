"""The prompts that a model is proven with: each is there for one way in which a graph can be wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

TokenRow = tuple[int, ...]

BEYOND = 64
"""Tokens that the long prompts have more than the window."""
LONGEST = 600
"""The most tokens of a prompt that a repack ends with: past the window of 512, and still seconds on a CPU."""
CONTINUED = 24
"""Tokens that a padded batch is continued by where rows cross the window."""
_CACHED = ("cached-past-the-window", "cached-padded-batch")
_WHOLE = ("past-the-window", "past-the-window-in-chunks")

_MANY = ("many-tokens", "many-tokens-in-chunks", "many-tokens-in-a-batch", "many-tokens-padded")

CLOSING = frozenset(
    {
        "one-token", "lowest-ids", "highest-ids", "pad-inside", "image-placeholder", "audio-placeholder", "batch",
        "ragged-batch", "chunks-of-7", "past-the-window-in-chunks", *_CACHED, *_MANY, "conversation", "latin", "scripts", "persian",
        "chinese", "emoji", "code",
    }
)  # fmt: skip
"""The cases that a repack ends with: one for each way in which the passes could be wrong, none for a second time.

Left to a full check are further texts, which take the same way through the graphs; chunks of 1 and 3, which cost a run
per chunk; and the long prompt in one piece: in chunks it crosses the window too, and reads the caches besides. Where
the window is of 1,024 tokens the chunks are left to it as well: then made-up caches alone take the place of a prompt.
"""
GENERATED = frozenset({"one-token", "latin", "scripts", "conversation", "chunks-of-7", "batch", "ragged-batch", *_MANY})
"""Those of CLOSING that the real runtime generates from too: one for each way in which it feeds a graph. That the
graph answers as the source does, given what it is fed, the numbers have shown by then.
"""
_NOT_CLOSING = "left to validate, which runs every prompt"
Coverage = Literal["full", "closing", "light"]
"""Which cases are run: all; those of CLOSING; those of CLOSING that take no more than a few dozen tokens."""


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, or a batch of them.

    `rows` are token ids; rows of different length are padded on the right with `pad`. The prompt is fed in
    pieces of `chunk` tokens where that is given. `heavy` cases are left out of a light check.

    `past` is how many tokens of each row are in the caches already, with numbers that are made up; `window` is what
    they have to do with (surgery.verify.made_up_caches). `tokens` is the least length of the greedy continuation.
    """

    name: str
    covers: str
    rows: tuple[TokenRow, ...]
    chunk: int | None = None
    pad: int = 0
    heavy: bool = False
    past: tuple[int, ...] = ()
    window: int = 0
    tokens: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, those in the caches too."""
        past = self.past or (0,) * len(self.rows)
        return tuple(before + len(row) for before, row in zip(past, self.rows, strict=True))

    @property
    def run_tokens(self) -> int:
        """Tokens of a row that its longest run has."""
        longest = max(map(len, self.rows))
        return longest if self.chunk is None else min(self.chunk, longest)

    @property
    def ragged(self) -> bool:
        """Whether its rows have different lengths, so that a batch of them is padded."""
        return len(set(self.lengths)) > 1

    @property
    def longest(self) -> int:
        """Tokens of its longest row, those in the caches too."""
        return max(self.lengths)

    def steps(self, least: int) -> int:
        """Decode steps, where `least` are asked for."""
        return max(least, self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A case that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelTokens:
    """Ids that a model gives a meaning, and its sizes. `size` is in ids, `window` and `context` in tokens.

    `many` is from how many tokens on a run is computed in another way than one of a few, where it is.
    """

    size: int
    context: int
    bos: int | None = None
    pad: int | None = None
    eos: tuple[int, ...] = ()
    image: int | None = None
    audio: int | None = None
    window: int | None = None
    many: int | None = None


def within(scope: Coverage, cases: Sequence[Case | Skipped]) -> list[Case | Skipped]:
    """The cases of a scope; those that are left to a wider one as skipped."""
    if scope == "full":
        return list(cases)
    closing = [case if case.name in CLOSING else Skipped(case.name, _NOT_CLOSING) for case in cases]
    return without_heavy([_short(case) for case in closing]) if scope == "light" else [_short(case) for case in closing]


def _short(case: Case | Skipped) -> Case | Skipped:
    if isinstance(case, Skipped) or case.past or case.longest <= LONGEST:
        return case
    return Skipped(case.name, f"it has more than {LONGEST} tokens: validate runs it, and here caches take its place")


def without_heavy(cases: Iterable[Case | Skipped]) -> list[Case | Skipped]:
    """Heavy cases as skipped ones, with the reason."""
    reason = "heavy, and a light check was asked for"
    return [Skipped(case.name, reason) if isinstance(case, Case) and case.heavy else case for case in cases]


def admissible(
    found: Sequence[Case | Skipped], vocabulary: ModelTokens, steps: int
) -> tuple[list[Case], list[Skipped]]:
    """Cases that the model can take, and the rest with the reason. A case needs room for `steps` more tokens."""
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


def _fault(case: Case, vocabulary: ModelTokens, steps: int) -> str | None:
    if not case.rows or not all(case.rows):
        return "a row has no tokens"
    if case.ragged and case.chunk is not None:
        return "a padded batch is fed in one piece: a mask does not tell in which piece its padding was"
    outside = [token for row in case.rows for token in row if not 0 <= token < vocabulary.size]
    if -1 in outside:
        return "the tokenizer does not know all of its letters"  # GenAI's tokenizers give -1 for these
    if outside:
        return f"token id {outside[0]} is outside of the vocabulary of {vocabulary.size}"
    steps = case.steps(steps)
    if case.longest + steps > vocabulary.context:
        return f"{case.longest} tokens and {steps} more do not fit the context of {vocabulary.context}"
    return None


def of_ids(vocabulary: ModelTokens) -> Iterator[Case | Skipped]:
    """Cases made of ids: they need no tokenizer, and reach what no text reaches."""
    ordinary = _ordinary(vocabulary)
    first: TokenRow = (vocabulary.bos,) if vocabulary.bos is not None else ()
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
    crossed = CONTINUED if vocabulary.window and vocabulary.window < CONTINUED else 0
    rows = (words[:5], words[3:14])
    yield Case("ragged-batch", "two rows, the shorter padded on the right", rows, pad=pad, tokens=crossed)
    if vocabulary.many is not None:
        yield from _of_many(vocabulary.many, pad, first, ordinary)
    yield from _past_the_window(vocabulary, first, ordinary)


def _of_many(many: int, pad: int, first: TokenRow, ordinary: Callable[[int], TokenRow]) -> Iterator[Case]:
    """Each way in which a run of so many tokens is fed: alone, before one of a few, in a batch, and padded."""
    alone, pieces, together, padded = _MANY
    row = first + ordinary(2 * many + 1)
    yield Case(alone, "a run of many tokens", (row[: many + 1],))
    yield Case(pieces, "two runs of many tokens, and one of a few behind", (row,), chunk=many)
    yield Case(together, "two rows of many tokens", (row[: many + 1], row[many + 1 :]))
    yield Case(padded, "two rows of many tokens, the shorter padded", (row[: many + 4], row[: many // 2 + 1]), pad=pad)


def _past_the_window(
    vocabulary: ModelTokens, first: TokenRow, ordinary: Callable[[int], TokenRow]
) -> Iterator[Case | Skipped]:
    window, pad = vocabulary.window, vocabulary.pad or 0
    if window is None:
        yield from (Skipped(name, "no window is known") for name in (*_CACHED, *_WHOLE))
        return
    length, inside = window + BEYOND, max(window - 8, window // 2)
    alone, together = _CACHED
    yield Case(alone, "what a window hides, behind caches", (ordinary(5),), past=(length - 5,), window=window)
    yield Case(
        together, "rows that are past the window and get there, the shorter padded", (ordinary(1), ordinary(1)),
        pad=pad, past=(length - 1, inside), window=window, tokens=CONTINUED,
    )  # fmt: skip
    row, (whole, pieces) = first + ordinary(length - len(first)), _WHOLE
    yield Case(whole, "more tokens than a sliding layer sees", (row,), heavy=True)
    yield Case(pieces, "a window that reaches back into a chunk", (row,), chunk=max(2, window * 3 // 8), heavy=True)


def _ordinary(vocabulary: ModelTokens) -> Callable[[int], TokenRow]:
    """Ids without meaning, other ones at each call and the same ones in each run."""
    special = {vocabulary.bos, vocabulary.pad, vocabulary.image, vocabulary.audio, *vocabulary.eos, 0}
    numbers = random.Random(vocabulary.size)

    def take(count: int) -> TokenRow:
        row: list[int] = []
        while len(row) < count:
            token = numbers.randrange(vocabulary.size)
            if token not in special or vocabulary.size <= len(special):
                row.append(token)
        return tuple(row)

    return take
