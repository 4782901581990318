"""Which tokens to keep: what every text may need, what a corpus uses most, and the rest of some scripts."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from surgery.errors import RequestError, nearest
from surgery.source.bpe_tokenizer import UNUSED, BpeTokenizer
from surgery.source.kept_tokens import GROUP, KeptTokens

_OTHER_NAMES = {"han": "cjk", "chinese": "cjk", "kanji": "cjk"}
_PLAIN = ("Nd", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sc", "Sm")
"""Unicode's categories of digits, punctuation, currencies and mathematics."""


@dataclass(frozen=True)
class ProposedTokens:
    """The proposal. `needed` of the tokens have to stay, `counted` are the corpus's, `filled` the rest of the scripts."""

    kept: KeptTokens
    needed: int
    counted: int
    filled: int


def propose(
    tokenizer: BpeTokenizer,
    counts: Mapping[int, int],
    scripts: Sequence[str],
    size: int | None,
    must: Iterable[int] = (),
) -> ProposedTokens:
    """Choose tokens by their counts over a corpus, until `size` of them are closed; all that occur where it is None.

    What stays anyway: special tokens and `must`, bytes, added tokens but reserved ones, digits and punctuation, and every
    letter of `scripts`. Where there is room left, the tokens of these scripts follow, the lowest ids first, as training
    found them. Raises RequestError for an unknown script, and for a size without room for what has to stay.
    """
    wanted = set(_known_scripts(tokenizer, scripts))
    added = {e["id"] for e in tokenizer.added if not UNUSED.fullmatch(e["content"])}
    single = {token for text, token in tokenizer.vocab.items() if len(text) == 1 and _is_plain(text, wanted)}
    found = tokenizer.closed(tokenizer.special | tokenizer.last_resort | added | single | set(must))
    needed = len(found)
    most = len(tokenizer.texts) if size is None else -(-size // GROUP) * GROUP
    if needed > most:
        raise RequestError(
            f"{most:,} tokens are asked for; {needed:,} have to stay: bytes, special tokens, digits, punctuation, letters",
            hint="ask for more, or for fewer scripts",
        )
    by_count = sorted((token for token in counts if counts[token]), key=lambda token: (-counts[token], token))
    _add(tokenizer, found, by_count, most)
    counted = len(found) - needed
    _add(tokenizer, found, (t for t in sorted(tokenizer.texts) if _is_of(tokenizer.texts[t], wanted)), most)
    filled = len(found) - needed - counted
    if size is None and len(found) % GROUP:
        most = min(most, -(-len(found) // GROUP) * GROUP)
        _add(tokenizer, found, sorted(tokenizer.texts), most)
    elif len(found) < most:
        _add(tokenizer, found, sorted(tokenizer.texts), -(-len(found) // GROUP) * GROUP)
    return ProposedTokens(KeptTokens.of(found), needed, counted, filled)


def _add(tokenizer: BpeTokenizer, found: set[int], tokens: Iterable[int], most: int) -> None:
    """Add tokens with what they are merged from, as long as they fit."""
    for token in tokens:
        if len(found) >= most:
            return
        if token not in found and token in tokenizer.texts:
            new = tokenizer.closed([token]) - found
            if len(found) + len(new) <= most:
                found |= new


def _known_scripts(tokenizer: BpeTokenizer, scripts: Sequence[str]) -> Iterator[str]:
    """The scripts by the names that letters have. Raises RequestError for one that no token is in."""
    known = {script_of(letter) for text in tokenizer.vocab if len(text) == 1 for letter in text if letter.isalpha()}
    for name in scripts:
        script = _OTHER_NAMES.get(name.lower(), name.lower())
        if script not in known:
            names = sorted(known)
            raise RequestError(
                f"no token is in the script {name!r}{nearest(name, names)}; there are {', '.join(names)}"
            )
        yield script


@cache
def script_of(letter: str) -> str:
    """The script of a letter: the first word of its Unicode name, `latin`, `cyrillic`, `cjk`."""
    return unicodedata.name(letter, "unknown").split()[0].split("-")[0].lower()


def _is_plain(letter: str, scripts: set[str]) -> bool:
    kind = unicodedata.category(letter)
    return letter.isascii() or kind in _PLAIN or (letter.isalpha() and script_of(letter) in scripts)


def _is_of(text: str, scripts: set[str]) -> bool:
    """Whether a token has letters, all of them in these scripts."""
    letters = [letter for letter in text if letter.isalpha()]
    return bool(letters) and all(script_of(letter) in scripts for letter in letters)
