"""Tokens counted over a corpus, by `tokenizers` in a process of its own: a tokenizer is not trusted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.runtime.own_process import Limits, Tell, run
from surgery.runtime.tokenizer import open_tokenizers
from surgery.source.corpus import held_out_lines, is_held_out, lines
from surgery.source.kept_tokens import KeptTokens

_BATCH = 2000
"""Lines that are tokenized at once."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Id -> how often it occurs."""

    counts: tuple[tuple[int, int], ...]


def count_tokens(tokenizer: Path, corpus: Sequence[Path]) -> TokenCounts:
    """The tokens of the part of a corpus that is not held out. Raises ProcessEnded, and what reading the files raises."""
    return run(_counted, tokenizer, list(corpus), answer=TokenCounts, limits=Limits.of("cpu"))


def _counted(tell: Tell, tokenizer: Path, corpus: Sequence[Path]) -> TokenCounts:
    found: Counter[int] = Counter()
    opened = open_tokenizers(tokenizer)
    for batch in _batches(line for line in lines(corpus) if not is_held_out(line)):
        for encoding in opened.encode_batch(batch, add_special_tokens=False):
            found.update(encoding.ids)
        tell(len(batch))
    return TokenCounts(tuple(sorted(found.items())))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def covered(
    tokenizer: Path, pruned: Mapping[str, Any], kept: KeptTokens, corpus: Sequence[Path], most: int
) -> tuple[int, int, int, int]:
    """Over the held-out part of a corpus, up to `most` characters: characters, the source's tokens for them, how many of those
    stay, and the tokens of the pruned tokenizer, which is the content of a file."""
    arguments = tokenizer, json.dumps(pruned), kept.ids, list(corpus), most
    return run(_covered, *arguments, answer=tuple[int, int, int, int], limits=Limits.of("cpu"))


def _covered(
    tell: Tell, tokenizer: Path, pruned: str, ids: Sequence[int], corpus: Sequence[Path], most: int
) -> tuple[int, int, int, int]:
    import tokenizers

    theirs, ours, stay = open_tokenizers(tokenizer), tokenizers.Tokenizer.from_str(pruned), set(ids)
    characters = old = inside = new = 0
    for batch in _batches(held_out_lines(corpus, most)):
        characters += sum(map(len, batch))
        for one, other in zip(*(t.encode_batch(batch, add_special_tokens=False) for t in (theirs, ours)), strict=True):
            old, new = old + len(one.ids), new + len(other.ids)
            inside += sum(token in stay for token in one.ids)
        tell(len(batch))
    return characters, old, inside, new
