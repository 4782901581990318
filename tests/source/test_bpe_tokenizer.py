"""A tokenizer of fewer tokens: the same tokens for texts that they cover, smaller pieces for others, nothing unknown."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from vocabularies import LINES, kept_of, small_tokenizer

from surgery.errors import ExportError, RequestError
from surgery.source.bpe_tokenizer import BYTES, BpeTokenizer
from surgery.source.kept_tokens import KeptTokens
from surgery.verify.vocabulary_proof import ADVERSARIAL

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BpeTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def source(tokenizer: BpeTokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tokenizer.path))


def pruned(tokenizer: BpeTokenizer, kept: KeptTokens) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.pruned(kept)))


def encoded(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("size", [500, 1201, 2000])
def test_texts_of_kept_tokens_become_the_same_tokens(
    tokenizer: BpeTokenizer, source: tokenizers.Tokenizer, size: int
) -> None:
    kept = kept_of(tokenizer, size, seed=size)
    ours, chosen = pruned(tokenizer, kept), random.Random(1)
    rows = [chosen.choices(kept.ids, k=n % 12 + 1) for n in range(1500)]
    texts = source.decode_batch(rows, skip_special_tokens=False)
    inside = [(text, ids) for text in texts if kept_all(ids := encoded(source, text), kept)]
    assert sum(len(ids) for _, ids in inside) > 2000, "the sample says something"
    for text, ids in inside:
        assert encoded(ours, text) == [kept.new(token) for token in ids], text


def kept_all(ids: list[int], kept: KeptTokens) -> bool:
    return all(token in kept for token in ids)


def test_without_the_pieces_a_text_of_kept_tokens_becomes_others(
    tokenizer: BpeTokenizer, source: tokenizers.Tokenizer
) -> None:
    """What `closed` is for: the list without them differs."""
    longest = max((t for t in tokenizer.vocab if t.isalpha()), key=len)
    token = tokenizer.vocab[longest]
    must = tokenizer.special | tokenizer.last_resort
    letters = {tokenizer.vocab[letter] for letter in longest}
    assert encoded(source, longest) == [token]
    assert encoded(pruned(tokenizer, KeptTokens.of(must | letters | {token})), longest) != [0], "it can be read"
    bare, closed = KeptTokens.of(must | letters | {token}), KeptTokens.of(tokenizer.closed(must | {token}))
    assert len(encoded(pruned(tokenizer, bare), longest)) > 1
    assert encoded(pruned(tokenizer, closed), longest) == [closed.new(token)]


@pytest.mark.parametrize("twice", [0, 300])
def test_a_token_is_made_of_pieces_where_a_text_becomes_it(tokenizer: BpeTokenizer, tmp_path: Path, twice: int) -> None:
    """Merges that stand in the file twice have the rank of the last."""
    found = changed(
        tokenizer, tmp_path, lambda c: c["model"].update(merges=c["model"]["merges"][:twice] + c["model"]["merges"])
    )
    encoder = tokenizers.Tokenizer.from_file(str(found.path))
    added = {entry["content"] for entry in found.added}
    texts = [text for text in found.vocab if len(text) > 1 and text not in added and text not in BYTES]
    single = [encoded(encoder, text.replace("▁", " ")) == [found.vocab[text]] for text in texts]
    assert sum(single) > 1000
    assert [bool(found.made_of(text)) for text in texts] == single


def test_other_texts_fall_back_to_bytes_and_come_back(tokenizer: BpeTokenizer, source: tokenizers.Tokenizer) -> None:
    kept = KeptTokens.of(tokenizer.closed(tokenizer.special | tokenizer.last_resort))
    ours = pruned(tokenizer, kept)
    unknown = ours.token_to_id("<unk>")
    for text in (*ADVERSARIAL, *LINES):
        ids = encoded(ours, text)
        assert text == "▁ ▁▁ a▁b" or "<unk>" in text or unknown not in ids
        assert ours.decode(ids, skip_special_tokens=False) == source.decode(
            encoded(source, text), skip_special_tokens=False
        )
    assert len(encoded(ours, "булок")) == 10, "two bytes a letter"


def test_ids_are_dense_and_specials_keep_their_meaning(tokenizer: BpeTokenizer) -> None:
    kept = kept_of(tokenizer, 700)
    content = tokenizer.pruned(kept)
    assert sorted(content["model"]["vocab"].values()) == list(range(len(kept)))
    for entry in content["added_tokens"]:
        old = next(one for one in tokenizer.added if one["content"] == entry["content"])
        assert entry == {**old, "id": kept.new(old["id"])}
    assert content["post_processor"]["special_tokens"]["<bos>"]["ids"] == [kept.new(2)]
    texts = {text for merge in content["model"]["merges"] for text in (*merge, "".join(merge))}
    assert texts <= content["model"]["vocab"].keys()


def test_merges_as_strings_stay_strings(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    kept = kept_of(tokenizer, 700)
    old = changed(tokenizer, tmp_path, lambda c: c["model"].update(merges=[" ".join(m) for m in c["model"]["merges"]]))
    written = old.pruned(kept)["model"]["merges"]
    assert written == [" ".join(merge) for merge in tokenizer.pruned(kept)["model"]["merges"]]


def changed(tokenizer: BpeTokenizer, folder: Path, change: Change) -> BpeTokenizer:
    content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    change(content)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return BpeTokenizer.read(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["model"].update(type="Unigram"), "tokenizer of type Unigram; one of type BPE can be made smaller"),
        (lambda c: c.pop("model"), "of type None"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
        (lambda c: c["model"]["vocab"].update(twice=7), "with ids, each once"),
        (lambda c: c["model"]["vocab"].update(odd="7"), "with ids, each once"),
        (lambda c: c["added_tokens"][0].update(id=9), "added token '<pad>' is another one"),
    ],
)
def test_what_is_no_such_tokenizer_is_refused(
    tokenizer: BpeTokenizer, tmp_path: Path, change: Change, sentence: str
) -> None:
    with pytest.raises(ExportError, match=sentence):
        changed(tokenizer, tmp_path, change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["model"]["merges"].append(["zzz", "qqq"]), "needs tokens that the vocabulary does not have"),
        (lambda c: c["model"]["merges"].append("one two three"), "is no merge of two tokens"),
        (
            lambda c: c["post_processor"].update(type="BertProcessing"),
            "post_processor of type BertProcessing may hold ids",
        ),
    ],
)
def test_what_cannot_be_closed_is_refused(
    tokenizer: BpeTokenizer, tmp_path: Path, change: Change, sentence: str
) -> None:
    found = changed(tokenizer, tmp_path, change)
    with pytest.raises(ExportError, match=sentence):
        found.pruned(kept_of(tokenizer, 600))


def test_a_list_that_lacks_what_every_text_needs_is_refused(tokenizer: BpeTokenizer) -> None:
    run = tokenizer.vocab["\n" * 16]
    kept = kept_of(tokenizer, 1500, also=[run])
    tokenizer.check(kept)
    for text, sentence in (
        (BYTES[0xE2], r"lacks 1 bytes, the first of them token 464, '<0xE2>'"),
        ("<|turn>", "lacks 1 special tokens, the first of them token 105"),
        ("▁", "lacks 1 bytes"),
    ):
        with pytest.raises(RequestError, match=sentence):
            tokenizer.check(without(kept, tokenizer.vocab[text]))
    piece = next(p for t in kept.ids for p in tokenizer.made_of(tokenizer.texts[t]) if len(p) > 1)
    with pytest.raises(RequestError, match="which it is merged from"):
        tokenizer.check(without(kept, tokenizer.vocab[piece]))
    tokenizer.check(without(kept, run), ["{{ bos_token }}"])
    with pytest.raises(RequestError, match="tokens of the chat template"):
        tokenizer.check(without(kept, run), [f"a{tokenizer.texts[run]}b"])


def without(kept: KeptTokens, token: int) -> KeptTokens:
    return KeptTokens.of(one for one in kept.ids if one != token)


def test_letters_have_to_stay_where_there_are_no_bytes(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    found = changed(tokenizer, tmp_path, lambda c: c["model"].update(byte_fallback=False))
    with pytest.raises(RequestError, match=r"lacks \d+ single letters"):
        found.check(KeptTokens.of(tokenizer.special | tokenizer.last_resort))


def test_reserved_tokens_may_go_although_they_are_special(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    def reserve(content: dict[str, Any]) -> None:
        content["added_tokens"].append({**content["added_tokens"][0], "id": 9000, "content": "<unused7>"})

    found = changed(tokenizer, tmp_path, reserve)
    assert found.special == tokenizer.special
