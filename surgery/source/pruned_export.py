"""An export with fewer tokens: its side files written anew with the new ids, in a folder that stands in for its own.

The graphs stay as they are; prune-vocabulary takes the rows from them, by the same list of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.architecture import MAX_JSON_BYTES, architecture, read_config
from surgery.errors import ExportError, RequestError
from surgery.files.safe_reading import read_inside
from surgery.source.bpe_tokenizer import BpeTokenizer
from surgery.source.export import MEDIA_FILES, Export, GraphPair
from surgery.source.kept_tokens import GROUP, VOCABULARY_FILE, KeptTokens

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", *MEDIA_FILES)
_ONE = re.compile(r".*_token_(id|ids|index)")
_SOME = {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"}
"""Settings that name tokens which need not be there."""
_SIZES = ("vocab_size", "vocab_size_per_layer_input")
_TOWERS = ("vision_config", "audio_config")
_BLOCK, _STRING, _NUMBER = (
    re.compile(r"{[{%].*?[%}]}", re.S),
    re.compile(r"'[^']*'|\"[^\"]*\""),
    re.compile(r"\b\d{3,9}\b"),
)


def pruned_export(export: Export, pair: GraphPair, kept: KeptTokens, place: Path) -> tuple[Export, GraphPair]:
    """The export and the pair as they are with the kept tokens alone; `place` is an empty folder for the side files.

    Raises RequestError for tokens that make no vocabulary of this export, ExportError for a tokenizer that is not BPE.
    """
    kept.check_size(export.architecture.vocab_size, f"{export.root}")
    templates, texts, size = dict(_templates(export)), dict[int, str](), export.architecture.vocab_size
    if path := export.file(TOKENIZER):
        tokenizer = BpeTokenizer.read(path)
        tokenizer.check(kept, templates.values())
        kept, texts = filled(kept, tokenizer, size), tokenizer.texts
        for name, template in templates.items():
            _refuse_literal_ids(name, template, tokenizer, kept)
        _write(place / TOKENIZER, tokenizer.pruned(kept), indent=None)
    said = f"{len(kept):,} of {size:,} tokens: a token's id here is its place, and this its id in the source"
    (place / VOCABULARY_FILE).write_text(kept.text(texts, [said]), encoding="utf-8")
    for name in _CONFIGS:
        if path := export.file(name):
            old = read_config(path)
            new = renumbered(old, kept, str(path))
            if name == "config.json":
                text = new.get("text_config")
                (text if isinstance(text, dict) else new)["vocab_size"] = len(kept)
            if new != old:
                _write(place / name, new)
    small = replace(export, instead=place)
    config = read_config(small.file("config.json") or export.root / "config.json")
    return replace(small, config=config, architecture=architecture(config)), replace(pair, kept=kept)


def tokens_of_templates(export: Export, tokenizer: BpeTokenizer) -> set[int]:
    """Added tokens that a chat template writes."""
    texts = [text for _, text in _templates(export)]
    return {entry["id"] for entry in tokenizer.added if any(entry["content"] in text for text in texts)}


def ids_of_settings(export: Export) -> set[int]:
    """The tokens that the configurations name, all of which have to stay."""
    return {token for name in _CONFIGS if (path := export.file(name)) for token in _named(read_config(path))}


def _named(values: Any, named: bool = False) -> Iterator[int]:
    """The ids in a configuration; `named` is whether the value has a key that says so."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key not in _TOWERS:
                yield from _named(value, bool(_ONE.fullmatch(key)))
    elif isinstance(values, list):
        for value in values:
            yield from _named(value, named)
    elif named and type(values) is int and values >= 0:
        yield values


def filled(kept: KeptTokens, tokenizer: BpeTokenizer, size: int) -> KeptTokens:
    """The tokens, and the first others that need no further ones, until whole groups of them stay."""
    stays, token = set(kept.ids), 0
    while len(stays) % GROUP and token < size:
        pieces = tokenizer.made_of(tokenizer.texts.get(token, ""))
        if token not in stays and all(tokenizer.vocab[piece] in stays for piece in pieces):
            stays.add(token)
        token += 1
    return KeptTokens.of(stays)


def vocabulary_size(export: Export) -> int:
    """How many tokens the export itself has, as its own config.json says."""
    return architecture(read_config(export.root / "config.json")).vocab_size


def renumbered(values: Mapping[str, Any], kept: KeptTokens, where: str) -> dict[str, Any]:
    """A configuration with the new ids and the new number of tokens. Raises RequestError for an id that does not
    stay."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in _TOWERS:
            found[key] = value
        elif key in _SIZES and type(value) is int:
            found[key] = kept.below(value)
        elif key == "added_tokens_decoder" and isinstance(value, Mapping):
            found[key] = {str(new): entry for token, entry in value.items() if (new := _new(token, kept)) is not None}
        elif _ONE.fullmatch(key):
            found[key] = _ids(value, kept, f"{where}: {key}")
        elif key in _SOME:
            found[key] = _those_that_stay(value, kept)
        elif isinstance(value, Mapping):
            found[key] = renumbered(value, kept, where)
        else:
            found[key] = value
    return found


def _new(token: str, kept: KeptTokens) -> int | None:
    return kept.new(int(token)) if token.isdecimal() and len(token) < 10 else None


def _ids(value: Any, kept: KeptTokens, where: str) -> Any:
    if isinstance(value, list):
        return [_ids(one, kept, where) for one in value]
    if type(value) is not int or value < 0:
        return value
    if (new := kept.new(value)) is None:
        raise RequestError(
            f"{where} is token {value}, which does not stay", hint=f"add {value} to the tokens that stay"
        )
    return new


def _those_that_stay(value: Any, kept: KeptTokens) -> Any:
    """Lists of ids, or of lists of ids: one that has a token which does not stay is left out."""
    if not isinstance(value, list):
        return value
    pairs = ((one, one if isinstance(one, list) else [one]) for one in value)
    stay = [one for one, ids in pairs if all(type(token) is int and token in kept for token in ids)]
    return [[kept.new(t) for t in one] if isinstance(one, list) else kept.new(one) for one in stay]


def _templates(export: Export) -> Iterator[tuple[str, str]]:
    """The chat template, where it is: the text by the name of its file."""
    if path := export.file(TEMPLATE):
        yield TEMPLATE, read_inside(path, export.root, MAX_JSON_BYTES).decode("utf-8", "replace")
    if path := export.file("tokenizer_config.json"):
        found = read_config(path).get("chat_template")
        if isinstance(found, str):
            yield path.name, found


def _refuse_literal_ids(name: str, text: str, tokenizer: BpeTokenizer, kept: KeptTokens) -> None:
    """Raise ExportError for a template that computes with the id of a token that gets another one."""
    added = {entry["id"]: entry["content"] for entry in tokenizer.added}
    for block in _BLOCK.findall(text):
        for number in map(int, _NUMBER.findall(_STRING.sub("", block))):
            if number in added and kept.new(number) != number:
                raise ExportError(
                    f"{name} holds the number {number}, the id of {added[number]!r}, which gets another one: "
                    "a template that names tokens by their text is expected"
                )


def _write(path: Path, value: Mapping[str, Any], indent: int | None = 2) -> None:
    separators = (",", ": " if indent else ":")
    path.write_text(
        json.dumps(value, indent=indent, separators=separators, ensure_ascii=False) + "\n", encoding="utf-8"
    )
