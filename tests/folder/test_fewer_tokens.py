"""Folders of fewer tokens than their source: proven with its ids, and refused with one sentence where they cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import digests
from vocabularies import LINES, kept_of, small_export, written

import surgery
from passes.presets import compatible, pruned
from surgery.errors import ExportError, RequestError
from surgery.folder.building import build_folder
from surgery.folder.manifest import recorded_tokens
from surgery.runtime.sessions import Settings
from surgery.runtime.two_graphs import open_two_graphs
from surgery.source.bpe_tokenizer import BpeTokenizer
from surgery.source.export import open_export
from surgery.source.kept_tokens import VOCABULARY_FILE, KeptTokens
from surgery.source.pruned_export import filled, pruned_export, renumbered
from surgery.verify.bisect import find_divergence
from surgery.verify.prompts import Case
from surgery.verify.vocabulary_proof import vocabulary_gates


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("words") / "export")


@pytest.fixture(scope="module")
def tokenizer(words: Path) -> BpeTokenizer:
    return BpeTokenizer.read(words / "tokenizer.json")


@pytest.fixture(scope="module")
def kept(tokenizer: BpeTokenizer) -> KeptTokens:
    return kept_of(tokenizer, 801)


@pytest.fixture(scope="module")
def folder(words: Path, kept: KeptTokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("repacked")
    corpus = place / "corpus"
    corpus.write_text("\n".join([f"{line} {n}" for n in range(30) for line in LINES]))
    options = surgery.RepackOptions(vocabulary=written(kept, place / "list"), corpus=[corpus])
    made = surgery.repack(words, place / "out", options)
    assert made.proof is not None and made.proof.passed
    found = {gate.name: gate.detail for gate in made.proof.gates}
    assert "of its likeliest tokens are among the 816 that stay" in found["source runs with its own ids"]
    for name in ("GenAI's tokenizer agrees with tokenizers", "each token is the source's"):
        assert name in found
    assert "characters per token" in found["the corpus: other lines fall back to smaller pieces, and come back"]
    return place / "out"


def test_the_folder_says_what_stays(folder: Path, kept: KeptTokens) -> None:
    found = recorded_tokens(folder)
    assert found is not None and len(found) == 816 and set(kept.ids) < set(found.ids)
    said = json.loads((folder / "manifest.json").read_text())
    assert said["vocabulary"] == {"source": 2500, "kept": 816}
    assert f"prune-vocabulary{{keep={VOCABULARY_FILE}}}" in said["recipe"]
    assert "816 of the source's 2,500 tokens" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 816


def test_it_is_validated_against_the_source_again(folder: Path, words: Path, tmp_path: Path) -> None:
    """A list that names other tokens than the folder has is found out, and so is a tokenizer with two tokens exchanged."""
    pair = replace(open_export(words).pair("q4"), kept=recorded_tokens(folder))
    assert all(gate.passed for gate in vocabulary_gates(folder, words, pair.kept or KeptTokens.of([])))
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    content = json.loads((bad / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, other = [text for text in vocab if text.isalpha()][:2]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (bad / "tokenizer.json").write_text(json.dumps(content))
    failed = [gate.name for gate in vocabulary_gates(bad, words, pair.kept or KeptTokens.of([])) if not gate.passed]
    assert "each token is the source's" in failed
    assert "texts of tokens that stay become the same tokens" in failed


def test_diff_says_that_the_rows_are_equal(folder: Path, words: Path, tmp_path: Path) -> None:
    """A byte of one row that is not the source's is a changed weight."""
    found = surgery.diff(words, folder)
    rows = found.weights.vocabulary
    assert rows is not None and (rows.before, rows.after, len(rows.tensors)) == (2500, 816, 9) and rows.delta < 0
    assert "vocabulary: 2,500 -> 816, rows equal" in found.verdict and "weights" in found.differing
    assert not any(change.verb == "changed" for change in found.weights.changes)
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    with (bad / "model.onnx_data_1").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    found = surgery.diff(words, bad)
    assert found.weights.vocabulary is not None and len(found.weights.vocabulary.tensors) == 8
    assert [change.verb for change in found.weights.changes if change.verb == "changed"] == ["changed"]


def test_a_list_of_other_tokens_is_refused_by_validate_and_not_believed_by_diff(
    folder: Path, words: Path, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    found = recorded_tokens(folder)
    assert found is not None
    written(KeptTokens.of([*found.ids[:-1], 2_600]), bad / VOCABULARY_FILE)
    with pytest.raises(RequestError, match=r"keeps token 2600, and .* ends at token 2499"):
        surgery.validate(bad, words)
    assert surgery.diff(words, bad).weights.vocabulary is None
    gone = max(token for token in range(1500) if token not in found)
    written(KeptTokens.of([gone, *found.ids[:-1]]), bad / VOCABULARY_FILE)
    assert surgery.diff(words, bad).weights.vocabulary is None, "rows are others"


def test_a_bisection_reads_the_source_with_its_own_ids(folder: Path, words: Path) -> None:
    pair = open_export(words).pair("q4")
    case = Case("one", "", ((2, 300, 50, 700, 31),))
    found = find_divergence(
        replace(pair, kept=recorded_tokens(folder)), folder / "model.onnx", case, Settings(), steps=2
    )
    assert found is None, "each value is the source's, ids and logits included"
    assert find_divergence(pair, folder / "model.onnx", case, Settings(), steps=2) is not None


def test_dropped_merges_are_found_out(folder: Path, words: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    content = json.loads((bad / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-40]
    (bad / "tokenizer.json").write_text(json.dumps(content))
    kept = recorded_tokens(folder) or KeptTokens.of([])
    failed = [gate.name for gate in vocabulary_gates(bad, words, kept) if not gate.passed]
    assert failed == ["texts of tokens that stay become the same tokens"]


def test_a_row_of_another_token_fails_the_proof(words: Path, kept: KeptTokens, tmp_path: Path) -> None:
    """The proof runs the source with its own ids: a folder with another token's rows differs."""
    export = open_export(words)
    small, pair = pruned_export(export, export.pair("q4"), kept, _made(tmp_path / "side"))
    assert pair.kept is not None
    gone = max(token for token in range(1500) if token not in pair.kept)
    wrong = KeptTokens.of([gone, *(token for token in pair.kept.ids if token != gone + 1)])
    build_folder(small, pair, pruned(compatible(pair.embed), wrong), tmp_path / "out")
    report = surgery.validate(tmp_path / "out", words)
    assert "logits" in [gate.name for gate in report.failed]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_two_graphs_answer_with_the_new_ids(words: Path, kept: KeptTokens, tmp_path: Path) -> None:
    options = surgery.StripOptions(vocabulary=written(kept, tmp_path / "list"))
    made = surgery.strip(words, tmp_path / "out", options)
    assert made.proof is not None and made.proof.passed
    opened = open_two_graphs(tmp_path / "out")
    ids = opened.tokenizer.encode(LINES[0])
    assert max(ids) < 816 and opened.tokenizer.decode(ids) == LINES[0]
    files = {path.name: path.stat().st_size for path in (tmp_path / "out/onnx").glob("embed_*data*")}
    whole = {path.name: path.stat().st_size for path in (words / "onnx").glob("embed_*data*")}
    assert files == {name: size * 816 // 2500 for name, size in whole.items()}
    assert "prune-vocabulary" in json.loads((tmp_path / "out/manifest.json").read_text())["recipe"]
    plan = surgery.plan_strip(words, options)
    assert set(plan.files) >= {name for name in digests(tmp_path / "out")}


# What is refused, with nothing written

Damage = Callable[[Path, KeptTokens, BpeTokenizer], KeptTokens]


def edited(name: str, **values: Any) -> Damage:
    def damage(folder: Path, kept: KeptTokens, _: BpeTokenizer) -> KeptTokens:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for key, value in values.items():
            place = content
            *way, last = key.split("__")
            for step in way:
                place = place[step]
            place[last] = value
        (folder / name).write_text(json.dumps(content))
        return kept

    return damage


def template(text: str) -> Damage:
    def damage(folder: Path, kept: KeptTokens, _: BpeTokenizer) -> KeptTokens:
        (folder / "chat_template.jinja").write_text(text)
        return kept

    return damage


def lacking(text: str) -> Damage:
    return lambda _, kept, tokenizer: KeptTokens.of(t for t in kept.ids if t != tokenizer.vocab[text])


REFUSED: dict[str, tuple[Damage, str]] = {
    "bytes": (lacking("<0x7F>"), "lacks 1 bytes, the first of them token 365, '<0x7F>'"),
    "specials": (lacking("<turn|>"), "lacks 1 special tokens, the first of them token 106, '<turn|>'"),
    "ids": (lambda *_: KeptTokens.of([0, 2500]), "keeps token 2500, and .* ends at token 2499"),
    "kind": (edited("tokenizer.json", model__type="WordPiece"), "tokenizer of type WordPiece; one of type BPE"),
    "merges": (
        edited("tokenizer.json", model__merges=[["a", "zzzz"]]),
        "needs tokens that the vocabulary does not have",
    ),
    "configuration": (edited("config.json", video_token_id=2400), "video_token_id is token 2400, which does not stay"),
    "template": (template("{% if x == 2495 %}<|turn>{% endif %}"), "holds the number 2495, the id of"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(
    words: Path, kept: KeptTokens, tokenizer: BpeTokenizer, tmp_path: Path, what: str
) -> None:
    damage, sentence = REFUSED[what]
    source = Path(shutil.copytree(words, tmp_path / "source"))
    kept = damage(source, KeptTokens.of(t for t in kept.ids if t != 2400), tokenizer)
    options = surgery.RepackOptions(vocabulary=written(kept, tmp_path / "list"), validate=False)
    with pytest.raises((RequestError, ExportError), match=sentence):
        surgery.repack(source, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_corpus_is_for_a_vocabulary() -> None:
    with pytest.raises(RequestError, match="--corpus is text that a --vocabulary is proven with"):
        surgery.RepackOptions(corpus=[Path("text")])


# The side files


def test_every_id_of_a_configuration_gets_its_new_one(kept: KeptTokens) -> None:
    first, second, gone = kept.ids[40], kept.ids[41], next(t for t in range(2500) if t not in kept)
    found = renumbered(
        {
            "eos_token_id": [0, second], "boa_token_index": first, "pad_token_id": None, "vocab_size": 2500,
            "text_config": {"image_token_id": first, "vocab_size_per_layer_input": first + 1},
            "vision_config": {"vocab_size": 128}, "suppress_tokens": [gone, second], "bad_words_ids": [[first], [gone, 0]],
            "added_tokens_decoder": {str(first): {"content": "a"}, str(gone): {"content": "b"}}, "top_k": 64,
        },
        kept,
        "config.json",
    )  # fmt: skip
    assert found == {
        "eos_token_id": [0, 41], "boa_token_index": 40, "pad_token_id": None, "vocab_size": len(kept),
        "text_config": {"image_token_id": 40, "vocab_size_per_layer_input": 41},
        "vision_config": {"vocab_size": 128}, "suppress_tokens": [41], "bad_words_ids": [[40]],
        "added_tokens_decoder": {"40": {"content": "a"}}, "top_k": 64,
    }  # fmt: skip


def test_whole_groups_stay(kept: KeptTokens, tokenizer: BpeTokenizer) -> None:
    found = filled(kept, tokenizer, 2500)
    assert len(found) % 16 == 0 and set(kept.ids) <= set(found.ids)
    assert tokenizer.closed(found.ids) == set(found.ids)
    assert filled(found, tokenizer, 2500) == found
