"""Which tokens a proposal has: those that have to stay, those of the corpus, and the rest of some scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vocabularies import LINES, SIZE, small_export, small_tokenizer

import surgery
from surgery.errors import FolderError, RequestError
from surgery.source.bpe_tokenizer import BpeTokenizer
from surgery.source.corpus import held_out_lines, is_held_out, lines
from surgery.source.kept_tokens import KeptTokens
from surgery.source.proposed_tokens import propose, script_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BpeTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def counts(tokenizer: BpeTokenizer, *words: str) -> dict[int, int]:
    return {tokenizer.vocab[word]: 100 - place for place, word in enumerate(words)}


def test_a_proposal_is_closed_and_can_be_taken(tokenizer: BpeTokenizer) -> None:
    for size, scripts in ((None, []), (640, []), (1000, ["latin"]), (2400, ["cyrillic", "Han"])):
        found = propose(tokenizer, counts(tokenizer, "▁token", "▁the"), scripts, size)
        tokenizer.check(found.kept)
        assert size is None or len(found.kept) <= size + 15
        assert len(found.kept) % 16 == 0
        assert tokenizer.closed(found.kept.ids) == set(found.kept.ids)
        assert tokenizer.vocab["▁token"] in found.kept


def test_what_occurs_most_comes_first_and_scripts_fill_up(tokenizer: BpeTokenizer) -> None:
    words = [
        text for text in tokenizer.vocab if text.startswith("▁") and text[1:].isalpha() and text.isascii() is False
    ]
    latin = [text for text in words if all(script_of(letter) == "latin" for letter in text[1:])][:600]
    small = propose(tokenizer, counts(tokenizer, *latin), [], 512)
    assert tokenizer.vocab[latin[0]] in small.kept and tokenizer.vocab[latin[-1]] not in small.kept
    assert small.filled == 0
    filled = propose(tokenizer, {}, ["latin"], 1008)
    assert filled.counted == 0 and filled.filled > 500
    chosen = {tokenizer.texts[token] for token in filled.kept.ids if len(tokenizer.texts[token]) > 1}
    assert not any(script_of(letter) == "cyrillic" for text in chosen for letter in text if letter.isalpha())


def test_digits_punctuation_letters_and_what_must_stay(tokenizer: BpeTokenizer) -> None:
    unused = tokenizer.vocab[next(text for text in tokenizer.vocab if len(text) > 6 and text.isalpha())]
    found = propose(tokenizer, {}, ["cyrillic"], None, must=[unused]).kept
    for text in ("7", ",", "?", "▁", "\n\n", "ш", "a"):
        assert text not in tokenizer.vocab or tokenizer.vocab[text] in found, text
    assert unused in found and tokenizer.vocab["日"] not in found


def test_what_cannot_be_proposed_is_refused(tokenizer: BpeTokenizer) -> None:
    with pytest.raises(RequestError, match=r"no token is in the script 'latn' \(did you mean 'latin'\?\)"):
        propose(tokenizer, {}, ["latn"], None)
    with pytest.raises(RequestError, match=r"64 tokens are asked for; \d+ have to stay"):
        propose(tokenizer, {}, [], 50)


def test_a_tenth_of_a_corpus_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("".join(f"line {n}\n" for n in range(500)).encode() + b"\xff end")
    found = list(lines([tmp_path / "a", tmp_path / "a"]))
    assert len(found) == 1002 and found[500] == "\ufffd end"
    held = held_out_lines([tmp_path / "a", tmp_path / "a"], 10_000)
    assert 25 < len(held) < 90 and all(map(is_held_out, held)) and len(set(held)) == len(held)
    assert sum(map(len, held_out_lines([tmp_path / "a"], 100))) <= 100
    with pytest.raises(RequestError, match="is no file; a corpus is text files"):
        list(lines([tmp_path]))


def test_the_command_writes_a_list_that_repack_takes(tmp_path: Path) -> None:
    source = small_export(tmp_path / "source")
    corpus = tmp_path / "corpus"
    corpus.write_text("\n".join(f"{line} {n}" for n in range(60) for line in LINES))
    options = surgery.VocabularyOptions([corpus], ["latin"], 1200)
    found = surgery.vocabulary(source, tmp_path / "list", options)
    assert (found.tokens, found.source_tokens) == (1200, SIZE)
    assert found.needed + found.counted + found.filled <= 1200
    assert found.coverage.share == 1.0 and found.coverage.new_tokens == found.coverage.tokens > 100
    tables = ("model_embed_tokens_weight", "model_embed_tokens_per_layer_weight", "lm_head_MatMul_weight")
    assert tuple(found.bytes) == tables
    assert all(new * SIZE == old * 1200 for old, new in found.bytes.values())
    assert json.loads(json.dumps(found.to_dict()))["tokens"] == 1200
    kept = KeptTokens.read(tmp_path / "list")
    assert len(kept) == 1200 and '106\t"<turn|>"' in (tmp_path / "list").read_text()
    plan = surgery.plan_repack(source, surgery.RepackOptions(vocabulary=tmp_path / "list"))
    assert plan.files["vocabulary.txt"] is None
    with pytest.raises(FolderError, match="exists"):
        surgery.vocabulary(source, tmp_path / "list", options)
    with pytest.raises(RequestError, match="and none is given"):
        surgery.VocabularyOptions([])
