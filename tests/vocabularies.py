"""A tokenizer of Gemma's structure in small, and lists of tokens to keep."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

from places import ROOT

from fixtures.build import build
from fixtures.gemma_tokenizer import gemma_tokenizer
from fixtures.zoo import FIXTURES
from surgery.source.bpe_tokenizer import BpeTokenizer
from surgery.source.kept_tokens import KeptTokens

SIZE = 2500
LINES = (
    "The tide turns at noon, and again at night.", "Größe, Straße, naïve café, Ångström", "съешь ещё этих булок",
    "今日は良い天気ですね。", "العربية من اليمين", "def f(x): return x ** 2  # sum", "हिन्दी में लिखा हुआ", "γειά σου κόσμε",
)  # fmt: skip


@cache
def tokenizer_text() -> str:
    """tokenizer.json of SIZE tokens, learnt from this project's pages and a few lines in other scripts."""
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    return json.dumps(gemma_tokenizer([*pages, *("\n".join(LINES) for _ in range(40))], SIZE), ensure_ascii=False)


def small_tokenizer(folder: Path) -> BpeTokenizer:
    path = folder / "tokenizer.json"
    path.write_text(tokenizer_text(), encoding="utf-8")
    return BpeTokenizer.read(path)


def kept_of(tokenizer: BpeTokenizer, size: int, seed: int = 0, also: Iterable[int] = ()) -> KeptTokens:
    """What has to stay, and others at random until `size` tokens are closed."""
    chosen = random.Random(seed)
    found = tokenizer.closed(tokenizer.special | tokenizer.last_resort | set(also))
    others = sorted(tokenizer.texts.keys() - found)
    while len(found) < size and others:
        new = found | tokenizer.closed([others.pop(chosen.randrange(len(others)))])
        found = new if len(new) <= size else found
    return KeptTokens.of(found)


def small_export(folder: Path) -> Path:
    """An export like tiny-e2b in q4, with random weights and the small tokenizer's vocabulary."""
    tokenizer = json.loads(tokenizer_text())["model"]["vocab"]
    tiny = FIXTURES["tiny-e2b"]
    ids = {"image_token_id": tokenizer["<|image|>"], "audio_token_id": tokenizer["<|audio|>"]}
    sized = replace(tiny.architecture, vocab_size=SIZE, **ids)
    with mock.patch.dict(FIXTURES, {"words": replace(tiny, name="words", architecture=sized, checkpoint="")}):
        build("words", "q4", folder)
    (folder / "tokenizer.json").write_text(tokenizer_text(), encoding="utf-8")
    return folder


def written(kept: KeptTokens, path: Path) -> Path:
    path.write_text(kept.text({}), encoding="utf-8")
    return path
