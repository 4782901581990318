"""surgery.runtime.two_graphs and surgery.runtime.decoding: the tokens of Hugging Face, alone, in chunks, in batches; and the step between."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from folders import repack
from onnx import parser
from places import FIXTURES, TINY

from surgery.errors import ExportError, ModelError, RequestError
from surgery.runtime.conversation import ChatSettings, Turn, open_conversation
from surgery.runtime.decoding import DecodeLoop, generate_tokens, prompt_feeds
from surgery.runtime.sampling import Sampling
from surgery.runtime.sessions import Feed, OpenGraph, Settings, host
from surgery.runtime.two_graphs import Embeddings, TwoGraphFolder, TwoGraphModel, open_two_graphs
from surgery.source.export import open_export

PROMPTS = range(6)
TOKENS = 24


@pytest.fixture(scope="module")
def pair() -> TwoGraphModel:
    return TwoGraphModel.open(open_export(TINY).pair("fp32"), Settings())


@pytest.fixture(scope="module")
def reference() -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy continuation, by transformers 5.23."""
    with np.load(FIXTURES / "data" / "tiny_e2b_ref.npz") as stored:
        return [(stored[f"p{i}_ids"].tolist(), stored[f"p{i}_tokens"].tolist()) for i in PROMPTS]


def rows_of(generated: Iterable[tuple[int | None, ...]]) -> list[list[int | None]]:
    return [list(row) for row in zip(*generated, strict=True)]


def test_outputs_of_one_name_are_told(tmp_path: Path) -> None:
    graph = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (int64[B,S] input_ids) => (int64[B,S] found) { found = Identity (input_ids) }
    """)
    graph.graph.output.append(graph.graph.output[0])
    path = tmp_path / "twice.onnx"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(ModelError, match=r"twice\.onnx has 2 outputs, and gives 1: 'found' is there twice"):
        OpenGraph(path, Settings()).run({"input_ids": np.array([[2]])}, {})


def test_logits_that_numpy_does_not_have_are_told(tmp_path: Path) -> None:
    graph = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        decoder (float[batch, tokens, 4] hidden) => (bfloat16[batch, tokens, 4] logits) { logits = Cast <to: int = 16> (hidden) }
    """)
    (tmp_path / "decoder.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ModelError, match=r"output logits is tensor\(bfloat16\), which numpy does not have"):
        OpenGraph(tmp_path / "decoder.onnx", Settings())


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_the_tokens_are_those_of_hugging_face(
    pair: TwoGraphModel, reference: list[tuple[list[int], list[int]]], chunk: int | None
) -> None:
    for ids, tokens in reference:
        assert rows_of(generate_tokens(pair, [ids], new_tokens=TOKENS, chunk=chunk)) == [tokens]


def test_rows_of_a_padded_batch_do_not_touch_each_other(
    pair: TwoGraphModel, reference: list[tuple[list[int], list[int]]]
) -> None:
    """The window is 8 tokens, and the rows differ by up to 28."""
    prompts, tokens = zip(*reference, strict=True)
    assert rows_of(generate_tokens(pair, prompts, new_tokens=TOKENS)) == list(tokens)


def test_a_batch_in_chunks_is_refused(pair: TwoGraphModel) -> None:
    with pytest.raises(RequestError, match="there are 2"):
        next(generate_tokens(pair, [[2, 5], [2, 6]], new_tokens=1, chunk=1))


def test_a_row_ends_behind_a_stop_token_and_the_others_go_on(
    pair: TwoGraphModel, reference: list[tuple[list[int], list[int]]]
) -> None:
    (one, first), (other, second) = reference[2], reference[4]
    stop = first[5]
    assert stop not in second
    short = first.index(stop) + 1
    found = rows_of(generate_tokens(pair, [one, other], new_tokens=8, stop=[stop, 1]))
    assert found == [[*first[:short], *[None] * (8 - short)], second[:8]]
    assert rows_of(generate_tokens(pair, [one], new_tokens=8, stop=[stop])) == [first[:short]]


def test_more_tokens_go_behind_those_in_the_caches(
    pair: TwoGraphModel, reference: list[tuple[list[int], list[int]]]
) -> None:
    ids, tokens = reference[5]
    loop = DecodeLoop(pair, 1)
    for part in (ids[:10], ids[10:]):
        *_, step = loop.prompt([part])
    assert step.greedy().tolist() == tokens[:1]


def test_embed_and_decode_are_steps_of_their_own(pair: TwoGraphModel) -> None:
    (feed,) = prompt_feeds([[2, 10, 77, 31]])
    logits, cache = pair.step(feed, pair.start(1), 0)
    embedded = {name: host(value) for name, value in pair.embed(feed.ids).items()}
    assert {name: value.shape for name, value in embedded.items()} == {
        "inputs_embeds": (1, 4, 64),
        "per_layer_inputs": (1, 4, 10, 32),
    }
    again, _ = pair.decode(embedded, feed, pair.start(1), 0)
    assert np.array_equal(logits, again)
    assert all(host(value).shape[2] == 4 for value in cache.values())


def test_other_embeddings_between_the_graphs_are_other_tokens(pair: TwoGraphModel) -> None:
    """Where every 31 is given the embeddings of 40, the model answers as to 40."""
    meant = {name: host(value) for name, value in pair.embed(np.array([[40]])).items()}
    seen = []

    def change(feed: Feed, embedded: Embeddings) -> Embeddings:
        seen.append((feed.ids.tolist(), feed.positions.tolist()))
        changed = {name: np.array(pair_value) for name, pair_value in hosted(embedded).items()}
        for name, value in meant.items():
            changed[name][feed.ids == 31] = value[0, 0]
        return changed

    def hosted(embedded: Embeddings) -> dict[str, np.ndarray]:
        return {name: value if isinstance(value, np.ndarray) else host(value) for name, value in embedded.items()}

    changed = rows_of(generate_tokens(pair.changing(change), [[2, 31, 77, 31]], new_tokens=4, chunk=3))
    assert changed == rows_of(generate_tokens(pair, [[2, 40, 77, 40]], new_tokens=4, chunk=3))
    assert changed != rows_of(generate_tokens(pair, [[2, 31, 77, 31]], new_tokens=4))
    assert seen[:2] == [([[2, 31, 77]], [[0, 1, 2]]), ([[31]], [[3]])]


def test_embeddings_of_another_size_are_refused_with_the_runtime_s_words(pair: TwoGraphModel) -> None:
    (feed,) = prompt_feeds([[2, 10]])
    wrong = {name: host(value)[:, :1] for name, value in pair.embed(feed.ids).items()}
    with pytest.raises(ModelError, match=r"cannot run .*decoder_model_merged\.onnx"):
        pair.decode(wrong, feed, pair.start(1), 1)
    with pytest.raises(ModelError, match="takes per_layer_inputs, which a text model is not known to take"):
        pair.decode({"inputs_embeds": wrong["inputs_embeds"]}, feed, pair.start(1), 1)


# A folder that answers


@pytest.fixture(scope="module")
def opened() -> TwoGraphFolder:
    return open_two_graphs(TINY, "fp32")


def test_a_folder_brings_its_stop_tokens_and_its_sampling(opened: TwoGraphFolder) -> None:
    assert opened.stop == (1, 106, 50) and opened.pad == 0 and opened.context_length == 256
    assert opened.sampling == Sampling(True, 1.0, 64, 0.95)
    assert open_two_graphs(TINY).pair.precision == "q4"


def test_the_pieces_of_an_answer_are_its_text(opened: TwoGraphFolder) -> None:
    greedy = Sampling()
    prompt = opened.tokenizer.encode(opened.tokenizer.render([{"role": "user", "content": "hello"}]))
    (row,) = rows_of(opened.generate([prompt], new_tokens=20, sampling=greedy))
    pieces = list(opened.answer("hello", new_tokens=20, sampling=greedy))
    assert "".join(pieces) == opened.tokenizer.decode([token for token in row if token is not None])
    assert pieces == list(opened.answer([{"role": "user", "content": "hello"}], new_tokens=20, sampling=greedy))
    assert pieces != list(opened.answer("hello", new_tokens=20, sampling=greedy, template=False))


def test_the_prompt_of_a_conversation_is_that_of_the_real_runtime(opened: TwoGraphFolder) -> None:
    """The text that GenAI's own tokenizer and template engine make of the same files; see tests/test_fixtures.py."""
    rendered = opened.tokenizer.render([{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"}])
    assert rendered == "<bos><|turn>user\nhi<turn|>\n<|turn>model\nyes<turn|>\n<|turn>model\n"
    assert opened.tokenizer.encode(rendered)[:2] == [2, 105]


def test_a_prompt_has_to_fit_the_context(opened: TwoGraphFolder) -> None:
    assert len(list(opened.generate([[2] * 250], new_tokens=50, sampling=Sampling()))) <= 6
    with pytest.raises(RequestError, match="the prompt has 256 tokens, and the context 256"):
        opened.generate([[2] * 256])


def folder_with(tmp_path: Path, name: str, text: str | None) -> Path:
    shutil.copytree(TINY, tmp_path / "export", ignore=shutil.ignore_patterns("*fp16*", "*_q4*", "*quant*"))
    (tmp_path / "export" / name).unlink()
    if text is not None:
        (tmp_path / "export" / name).write_text(text)
    return tmp_path / "export"


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("tokenizer.json", None, r"has no tokenizer\.json"),
        ("tokenizer.json", "{}", r"tokenizer\.json cannot be used"),
        ("chat_template.jinja", None, "has no chat template"),
        ("chat_template.jinja", "{% if", "chat template cannot be used"),
        ("chat_template.jinja", "{{ raise_exception('no system role') }}", "no system role"),
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "chat template cannot be used: access to attribute"),
    ],
)
def test_a_damaged_text_file_is_a_sentence(tmp_path: Path, name: str, text: str | None, sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        list(open_two_graphs(folder_with(tmp_path, name, text)).answer("hello", new_tokens=1))


def test_both_kinds_of_folder_answer_the_same(tmp_path: Path) -> None:
    repack(TINY, tmp_path / "out")
    for settings in (ChatSettings(12), ChatSettings(12, template=False)):
        merged, two = (open_conversation(folder, settings) for folder in (tmp_path / "out", TINY))
        assert list(merged.answer(Turn("hello"))) == list(two.answer(Turn("hello")))
        assert "onnxruntime-genai" in merged.runs and "decoder_model_merged_q4.onnx" in two.runs
    with pytest.raises(RequestError, match="it has one precision"):
        open_conversation(tmp_path / "out", precision="q4")


@pytest.mark.parametrize("two_graphs", [True, False])
def test_a_seed_makes_an_answer_the_same(two_graphs: bool, tmp_path: Path) -> None:
    if not two_graphs:
        repack(TINY, tmp_path / "out")
    folder = TINY if two_graphs else tmp_path / "out"
    answers = [
        list(open_conversation(folder, ChatSettings(9, temperature=3.0, top_k=0, seed=seed)).answer(Turn("hello")))
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
