"""Proof of a vocabulary of fewer tokens: the folder's tokenizer against the source's, both read by `tokenizers`.

    a text whose tokens all stay    the same tokens, under their new ids
    any other text                  smaller pieces, none unknown, that come back as the source's would
    the real runtime                the same ids and the same text as `tokenizers` from the folder's file

Texts: the shipped prompts, a line for each token that stays, texts put together of such tokens at random, Unicode of
every block and other trouble; and a corpus where one is given.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.runtime.genai import encode, open_tokenizer
from surgery.runtime.sessions import one_line
from surgery.runtime.tokenizer import open_tokenizers
from surgery.source.kept_tokens import VOCABULARY_FILE, KeptTokens
from surgery.verify.prompt_file import shipped_texts
from surgery.verify.report import Gate, Section

SECTION: Section = "vocabulary"
FILE = "tokenizer.json"
_MADE, _LENGTH = 200, 40
"""Texts that are put together at random, and the tokens of each."""
_PIECE = 96
"""Characters of a text that the runtime is given: 0.18.0 cuts a word behind 101 letters, whatever its tokens."""
_MOST_FOR_GENAI = 2000
"""Texts that the runtime tokenizes: it takes them one by one."""

ADVERSARIAL = (
    "", " ", "  ", " " * 17, "\t\n\r\n \n\n\n", "a\u0300\u0301\u0302e\u0304", "\ufeffbom", "\u200b\u200d\u2060\u00ad",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇺🇳", "\u202eabc\u202c", "ﷺ ﷽", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\U0001f9ff\U000e0041\U0010fffd",
    "▁ ▁▁ a▁b", "<0xE2><0x96><0x81>", "<0x00>", "<unk>x<pad>", "x" * 300, "ab" * 150, "0123456789" * 12,
    "Zażółć gęślą jaźń", "Ωμέγα ѲѢѮ", "한국어 조선말", "ཨོཾ་མ་ཎི་པདྨེ་ཧཱུྃ", "ꙮ𓀀𐎀𒀀", "e\u0301 é ﬁ ½ ² Ⅷ ① ㍿", "\x01\x02\x1b[31m\x7f",
    "\u0378\ue000\ufffd",
)  # fmt: skip
"""Texts that tokenizers stumble over; without half a surrogate pair, which is no text."""


@dataclass(frozen=True)
class _Compared:
    """What both tokenizers make of a text."""

    text: str
    old: list[int]
    new: list[int]

    def stays(self, kept: set[int]) -> bool:
        return kept.issuperset(self.old)


def vocabulary_gates(
    folder: Path, source: Path, kept: KeptTokens, corpus: Sequence[str] = (), genai: Any = None
) -> list[Gate]:
    """The gates of a folder with `kept` tokens of the export whose files lie in `source`. `genai` is the runtime's
    tokenizer of the folder, where it has one; `corpus` are further texts."""
    try:
        return list(_gates(folder, source, kept, corpus, genai))
    except SurgeryError as error:
        return [Gate(SECTION, "tokenizers can be read", False, detail=str(error))]


def _gates(folder: Path, source: Path, kept: KeptTokens, corpus: Sequence[str], genai: Any) -> Iterator[Gate]:
    theirs, ours = open_tokenizers(source / FILE), open_tokenizers(folder / FILE)
    yield _list(folder, kept)
    yield _tokens(theirs, ours, kept)
    yield _added(theirs, ours, kept)
    stay = set(kept.ids)
    texts = [*shipped_texts().values(), *ADVERSARIAL, *_unicode(), *_lines(theirs, kept), *_made(theirs, kept)]
    found = list(_compared(theirs, ours, dict.fromkeys(texts)))
    yield _one_to_one(found, kept, stay, "texts of tokens that stay become the same tokens")
    yield _falls_back(found, theirs, ours, kept, "other texts fall back to smaller pieces, and come back")
    if corpus:
        lines = list(_compared(theirs, ours, dict.fromkeys(corpus)))
        yield _one_to_one(lines, kept, stay, "the corpus: lines of tokens that stay become the same tokens")
        yield _falls_back(
            lines, theirs, ours, kept, "the corpus: other lines fall back to smaller pieces, and come back"
        )
    if genai is not None:
        step = max(1, len(found) // _MOST_FOR_GENAI)
        sample = [*texts[: len(ADVERSARIAL) + 40], *list(dict.fromkeys(texts))[::step], *corpus[:200]]
        yield _runtime(sample, genai, folder, source, theirs, ours)


def inside_gate(kept: KeptTokens, inside: Counter[bool]) -> Gate:
    """How often the source, which runs with its own ids, would itself have said a token that stays. It does not fail:
    where it would not have, its likeliest token among those that stay is what the folder is held to."""
    detail = f"{inside[True]:,} of {inside.total():,} of its likeliest tokens are among the {len(kept):,} that stay"
    return Gate("numbers", "source runs with its own ids", True, detail=detail)


def _compared(theirs: Any, ours: Any, texts: Sequence[str] | dict[str, None]) -> Iterator[_Compared]:
    listed = list(texts)
    old, new = (each.encode_batch(listed, add_special_tokens=False) for each in (theirs, ours))
    for text, one, other in zip(listed, old, new, strict=True):
        yield _Compared(text, list(one.ids), list(other.ids))


def _list(folder: Path, kept: KeptTokens) -> Gate:
    """The list in the folder is the one that it was made with."""
    name = "the list of tokens is the one that was asked for"
    try:
        found = KeptTokens.read(folder / VOCABULARY_FILE)
    except SurgeryError as error:
        return Gate(SECTION, name, False, detail=str(error))
    return Gate(SECTION, name, found.ids == kept.ids, len(kept), len(found), f"{len(found):,} tokens")


def _tokens(theirs: Any, ours: Any, kept: KeptTokens) -> Gate:
    """Each new id is the text that the old one is, and no text has another id."""
    faults = [
        f"token {new} is {ours.id_to_token(new)!r}, and {old} of the source {theirs.id_to_token(old)!r}"
        for new, old in enumerate(kept.ids)
        if ours.id_to_token(new) != theirs.id_to_token(old)
    ]
    size, named = ours.get_vocab_size(), sum(theirs.id_to_token(old) is not None for old in kept.ids)
    faults += [f"it has {size} tokens, {named} of which are to stay"] if size != named else []
    count = f"{len(kept):,} of {theirs.get_vocab_size():,}"
    return Gate(SECTION, "each token is the source's", not faults, 0, len(faults), "; ".join(faults[:3]) or count)


def _added(theirs: Any, ours: Any, kept: KeptTokens) -> Gate:
    """Special and other added tokens: their texts, and how they are looked for."""
    wanted = {kept.new(token): str(entry) for token, entry in theirs.get_added_tokens_decoder().items()}
    wanted.pop(None, None)
    found = {token: str(entry) for token, entry in ours.get_added_tokens_decoder().items()}
    faults = [
        f"token {token} is {found.get(token, 'none')}, and {wanted.get(token, 'none')} is expected"
        for token in sorted(wanted.keys() | found.keys(), key=str)
        if wanted.get(token) != found.get(token)
    ]
    return Gate(
        SECTION, "special tokens are the source's", not faults, 0, len(faults), "; ".join(faults[:3]) or f"{len(found)}"
    )


def _one_to_one(found: Sequence[_Compared], kept: KeptTokens, stay: set[int], name: str) -> Gate:
    inside = [each for each in found if each.stays(stay)]
    faults = [f"{each.text[:40]!r}" for each in inside if each.new != [kept.new(token) for token in each.old]]
    tokens = sum(len(each.old) for each in inside)
    detail = "; ".join(faults[:3]) or f"{len(inside):,} of {len(found):,} texts, {tokens:,} tokens"
    return Gate(SECTION, name, not faults, 0, len(faults), detail)


def _falls_back(found: Sequence[_Compared], theirs: Any, ours: Any, kept: KeptTokens, name: str) -> Gate:
    """No id is unknown or outside of the vocabulary, unless the source itself does not know the text."""
    unknown_of = _unknown(theirs)
    unknown = kept.new(unknown_of) if unknown_of is not None else None
    back, forth = (each.decode_batch(ids, skip_special_tokens=False) for each, ids in (
        (theirs, [each.old for each in found]), (ours, [each.new for each in found])))  # fmt: skip
    faults = []
    for each, theirs_again, ours_again in zip(found, back, forth, strict=True):
        known = unknown_of not in each.old
        if any(token >= len(kept) for token in each.new) or (known and unknown in each.new):
            faults.append(f"{each.text[:40]!r} has a token that is unknown")
        elif known and ours_again != theirs_again:
            faults.append(f"{each.text[:40]!r} comes back as {ours_again[:40]!r}")
    old, new = (sum(len(ids) for ids in lists) for lists in ([e.old for e in found], [e.new for e in found]))
    letters = sum(len(each.text) for each in found)
    detail = f"{len(found):,} texts, {letters / max(1, old):.2f} characters per token, {letters / max(1, new):.2f} here"
    return Gate(SECTION, name, not faults, 0, len(faults), "; ".join(faults[:3]) or detail)


def _unknown(tokenizer: Any) -> int | None:
    """The id of the token for what is unknown."""
    token = getattr(tokenizer.model, "unk_token", None)
    found: int | None = tokenizer.token_to_id(token) if token else None
    return found


def _runtime(texts: Iterable[str], genai: Any, folder: Path, source: Path, theirs: Any, ours: Any) -> Gate:
    """GenAI's own tokenizer reads the folder's file as `tokenizers` does; where it does not, that is no fault if it reads the
    source's file in another way too."""
    name, faults, count = "GenAI's tokenizer agrees with tokenizers", [], 0
    unknown = _unknown(ours)
    special = {token for token, entry in ours.get_added_tokens_decoder().items() if entry.special}
    for text in dict.fromkeys(whole[at : at + _PIECE] for whole in texts for at in range(0, len(whole), _PIECE)):
        wanted = list(ours.encode(text, add_special_tokens=False).ids)
        if not text or unknown in wanted or "\0" in text:
            continue
        count += 1
        try:
            found = encode(genai, text)
            again = genai.decode(np.array(found, np.int32))
        except Exception as error:  # the runtime's exceptions share no base class of their own
            faults.append((text, one_line(error)))
            continue
        if found != wanted:
            faults.append((text, f"is {found[:8]} there, {wanted[:8]} here"))
        elif special.isdisjoint(wanted) and again != (back := ours.decode(wanted, skip_special_tokens=True)):
            faults.append((text, f"comes back as {again[:40]!r} there, {back[:40]!r} here"))
    elsewhere = _read_otherwise([text for text, _ in faults], folder, source, theirs) if faults else set()
    own = [fault for fault in faults if fault[0] not in elsewhere]
    words = "; ".join(f"{text[:40]!r} {fault}" for text, fault in own[:3])
    also = f", {len(faults) - len(own)} of them as it reads the source's" if len(faults) > len(own) else ""
    return Gate(SECTION, name, not own, 0, len(own), words or f"{count:,} texts{also}")


def _read_otherwise(texts: Sequence[str], folder: Path, source: Path, theirs: Any) -> set[str]:
    """Those texts of which the runtime makes other tokens, or another text, with the source's file as well."""
    found = set()
    with TemporaryDirectory() as place, contextlib.suppress(SurgeryError, OSError):
        for path in (folder / "genai_config.json", folder / "tokenizer_config.json", source / FILE):
            shutil.copyfile(path, Path(place) / path.name)
        genai = open_tokenizer(Path(place), "cpu")
        for text in texts:
            wanted, ids = list(theirs.encode(text, add_special_tokens=False).ids), encode(genai, text)
            if ids != wanted or genai.decode(np.array(ids, np.int32)) != theirs.decode(wanted):
                found.add(text)
    return found


def _lines(theirs: Any, kept: KeptTokens) -> list[str]:
    """The text of each token that stays."""
    alone: list[str] = theirs.decode_batch([[token] for token in kept.ids], skip_special_tokens=False)
    return [text for text in alone if "\ufffd" not in text]


def _made(theirs: Any, kept: KeptTokens) -> list[str]:
    """Texts of tokens that stay, at random, the same each time."""
    chosen = random.Random(len(kept))
    rows = [chosen.choices(kept.ids, k=_LENGTH) for _ in range(_MADE)]
    made: list[str] = theirs.decode_batch(rows, skip_special_tokens=True)
    return made


def _unicode() -> list[str]:
    """Letters of every block of 256, each beside its neighbours."""
    blocks = (range(start, start + 256, 23) for start in range(0, 0x30000, 256) if not 0xD800 <= start <= 0xDFFF)
    return ["".join(map(chr, block)) for block in blocks]
