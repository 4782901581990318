"""tokenizer.json of a BPE tokenizer, and the same with fewer tokens: merges closed, ids dense, bytes to fall back to.

A text is cut into letters, and pairs of neighbours are merged, the pair of the lowest rank first. Where every token of
a text stays, so do the pieces that it was merged from (`made_of`), and the merges among what stays keep their order: at
each step the lowest rank among them is the lowest of all, and the text becomes the same tokens. Any other text ends in
smaller pieces: in letters that stay, and in bytes for those that do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from surgery.architecture import read_config
from surgery.errors import ExportError, RequestError
from surgery.source.kept_tokens import KeptTokens

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
UNUSED = re.compile(r"<unused\d+>")
"""Reserved tokens, which a model has learnt nothing for: they may go although they are marked as special."""
Merge = tuple[str, str]


@dataclass(frozen=True)
class BpeTokenizer:
    """A tokenizer.json that holds a BPE model. `path` is what messages call it."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> BpeTokenizer:
        """Raises ExportError for a tokenizer that is not BPE, or one of another form than Gemma's."""
        content = read_config(path)
        model = content.get("model")
        kind = model.get("type", "BPE" if "merges" in model else None) if isinstance(model, Mapping) else None
        if not isinstance(model, Mapping) or kind != "BPE":
            raise ExportError(f"{path} holds a tokenizer of type {kind}; one of type BPE can be made smaller")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise ExportError(f"{path}: model.{key} is {model[key]!r}; a BPE tokenizer without it is expected")
        vocab, added = model.get("vocab"), content.get("added_tokens") or []
        if not isinstance(vocab, Mapping) or not _are_ids(vocab.values()) or len({*vocab.values()}) < len(vocab):
            raise ExportError(f"{path}: a vocabulary of tokens with ids, each once, is expected")
        for entry in added:
            text = entry.get("content") if isinstance(entry, Mapping) else None
            if (
                not isinstance(text, str)
                or not _are_ids([entry.get("id")])
                or vocab.get(text, entry["id"]) != entry["id"]
            ):
                raise ExportError(f"{path}: the added token {text!r} is another one in the vocabulary, or has no id")
        return cls(path, content)

    @property
    def vocab(self) -> Mapping[str, int]:
        """Token -> id, without the added tokens."""
        found: Mapping[str, int] = self.content["model"]["vocab"]
        return found

    @property
    def added(self) -> list[Mapping[str, Any]]:
        """Tokens that are found in a text before any merge."""
        return list(self.content.get("added_tokens") or [])

    @cached_property
    def texts(self) -> dict[int, str]:
        """Id -> token."""
        return {**{token: text for text, token in self.vocab.items()}, **{e["id"]: e["content"] for e in self.added}}

    @cached_property
    def merges(self) -> list[Merge]:
        """The merges, lowest rank first. Raises ExportError for one that is none, or gives no token."""
        found = []
        for merge in self.content["model"].get("merges", []):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise ExportError(f"{self.path}: {merge!r} is no merge of two tokens")
            if not all(text in self.vocab for text in (*pair, "".join(pair))):
                raise ExportError(f"{self.path}: the merge {merge!r} needs tokens that the vocabulary does not have")
            found.append((pair[0], pair[1]))
        return found

    @cached_property
    def _ranks(self) -> dict[Merge, int]:
        """Of a merge that is there twice, the last one's, as `tokenizers` has it."""
        return {merge: rank for rank, merge in enumerate(self.merges)}

    @property
    def falls_back(self) -> bool:
        """Whether a letter that the vocabulary lacks becomes its bytes."""
        return bool(self.content["model"].get("byte_fallback")) and all(text in self.vocab for text in BYTES)

    @cached_property
    def last_resort(self) -> frozenset[int]:
        """The tokens that any text may end in: bytes; every letter, where the tokenizer has not all bytes; and what the
        normalizer writes, which the decoder finds as a letter alone."""
        ends = BYTES if self.falls_back else [text for text in self.vocab if len(text) == 1]
        letters = {letter for text in _written(self.content.get("normalizer")) for letter in text}
        return frozenset(self.vocab[text] for text in (*ends, *sorted(letters)) if text in self.vocab)

    @cached_property
    def special(self) -> frozenset[int]:
        """Special tokens, and the one for what is unknown; not those that are reserved."""
        unknown = self.content["model"].get("unk_token")
        found = {entry["id"] for entry in self.added if entry.get("special") and not UNUSED.fullmatch(entry["content"])}
        return frozenset(found | {self.vocab[text] for text in [unknown] if text in self.vocab})

    def made_of(self, text: str) -> list[str]:
        """The tokens that letters are merged to on the way to a token, itself left out. Empty for one that no merge
        gives."""
        ranks, none, parts, found = self._ranks, len(self.merges), list(text), []
        while len(parts) > 1:
            pairs = [ranks.get(pair, none) for pair in pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] == none:
                return []  # no text ends in this token
            found += parts[best : best + 2]
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return found

    def closed(self, tokens: Iterable[int]) -> set[int]:
        """The tokens, and every token that they are merged from."""
        texts, found = self.texts, set(tokens)
        pieces = {piece for token in found if token in texts for piece in self.made_of(texts[token])}
        return found | {self.vocab[piece] for piece in pieces if piece in self.vocab}

    def check(self, kept: KeptTokens, named: Iterable[str] = ()) -> None:
        """Raise RequestError unless the tokens make a tokenizer: with what every text may end in, special tokens, and
        the pieces that merges need. `named` are texts, a chat template say, whose added tokens have to stay.
        """
        stays = set(kept.ids)
        in_texts = {e["id"] for e in self.added if any(e["content"] in text for text in named)}
        for needed, what in (
            (self.special, "special tokens"),
            (self.last_resort, "bytes" if self.falls_back else "single letters"),
            (in_texts, "tokens of the chat template"),
        ):
            if missing := sorted(needed - stays):
                token = missing[0]
                raise RequestError(
                    f"the vocabulary lacks {len(missing)} {what}, the first of them token {token}, {self.texts[token]!r}",
                    hint="gemma4-surgery vocabulary proposes a list that has them",
                )
        for token in kept.ids:
            for piece in self.made_of(self.texts.get(token, "")):
                if self.vocab[piece] not in stays:
                    raise RequestError(
                        f"the vocabulary keeps token {token}, {self.texts[token]!r}, and lacks {self.vocab[piece]}, "
                        f"{piece!r}, which it is merged from",
                        hint="gemma4-surgery vocabulary proposes a list that has it",
                    )

    def pruned(self, kept: KeptTokens) -> dict[str, Any]:
        """The content with the kept tokens alone, under their new ids. Raises ExportError for a part of it that is not
        known."""
        vocab = {text: new for text, token in self.vocab.items() if (new := kept.new(token)) is not None}
        written = zip(self.content["model"].get("merges", []), self.merges, strict=True)
        merges = [form for form, (one, other) in written if one in vocab and other in vocab and one + other in vocab]
        added = [{**entry, "id": new} for entry in self.added if (new := kept.new(entry["id"])) is not None]
        model = {
            **self.content["model"],
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        }
        found = {**self.content, "added_tokens": added, "model": model}
        if isinstance(padding := self.content.get("padding"), Mapping):
            found["padding"] = {**padding, "pad_id": self._new(kept, padding.get("pad_id"), "padding.pad_id")}
        if self.content.get("post_processor") is not None:
            found["post_processor"] = self._processor(self.content["post_processor"], kept)
        return found

    def _processor(self, processor: Mapping[str, Any], kept: KeptTokens) -> dict[str, Any]:
        """What puts special tokens around a text: their ids."""

        def new(token: Any) -> int:
            return self._new(kept, token, "post_processor")

        forms: dict[str, Callable[[], dict[str, Any]]] = {
            "ByteLevel": lambda: dict(processor),
            "Sequence": lambda: {
                **processor, "processors": [self._processor(one, kept) for one in processor["processors"]]
            },
            "TemplateProcessing": lambda: {
                **processor,
                "special_tokens": {
                    name: {**entry, "ids": [new(token) for token in entry["ids"]]}
                    for name, entry in processor["special_tokens"].items()
                },
            },
        }  # fmt: skip
        kind = str(processor.get("type"))
        if kind not in forms:
            raise ExportError(
                f"{self.path}: a post_processor of type {kind} may hold ids; {', '.join(forms)} are known"
            )
        return forms[kind]()

    def _new(self, kept: KeptTokens, token: Any, where: str) -> int:
        new = kept.new(token)
        if new is None:
            raise RequestError(f"{self.path}: {where} has token {token!r}, which does not stay")
        return new


def _are_ids(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _written(normalizer: Any) -> Iterator[str]:
    """What a normalizer puts in place of other letters, or in front."""
    if isinstance(normalizer, Mapping):
        for one in normalizer.get("normalizers", []):
            yield from _written(one)
        for key in ("content", "prepend"):
            if isinstance(text := normalizer.get(key), str):
                yield text
