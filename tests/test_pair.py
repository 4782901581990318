"""surgery.pair and surgery.loop: the tokens of Hugging Face, alone, in chunks, in batches; and the step between."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from surgery.errors import ModelError, RequestError
from surgery.export import open_export
from surgery.loop import Loop, generate, prompt_feeds
from surgery.pair import Embeddings, PairModel
from surgery.runtime import Feed, Settings, host

FIXTURES = Path(__file__).parent.parent / "fixtures"
TINY = FIXTURES / "tiny-e2b"
PROMPTS = range(6)
TOKENS = 24


@pytest.fixture(scope="module")
def pair() -> PairModel:
    return PairModel.open(open_export(TINY).pair("fp32"), Settings())


@pytest.fixture(scope="module")
def reference() -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy continuation, by transformers 5.23."""
    with np.load(FIXTURES / "data" / "tiny_e2b_ref.npz") as stored:
        return [(stored[f"p{i}_ids"].tolist(), stored[f"p{i}_tokens"].tolist()) for i in PROMPTS]


def rows_of(generated: Iterable[tuple[int | None, ...]]) -> list[list[int | None]]:
    return [list(row) for row in zip(*generated, strict=True)]


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_the_tokens_are_those_of_hugging_face(
    pair: PairModel, reference: list[tuple[list[int], list[int]]], chunk: int | None
) -> None:
    for ids, tokens in reference:
        assert rows_of(generate(pair, [ids], new_tokens=TOKENS, chunk=chunk)) == [tokens]


def test_rows_of_a_padded_batch_do_not_touch_each_other(
    pair: PairModel, reference: list[tuple[list[int], list[int]]]
) -> None:
    """The window is 8 tokens, and the rows differ by up to 28."""
    prompts, tokens = zip(*reference, strict=True)
    assert rows_of(generate(pair, prompts, new_tokens=TOKENS)) == list(tokens)


def test_a_batch_in_chunks_is_refused(pair: PairModel) -> None:
    with pytest.raises(RequestError, match="there are 2"):
        next(generate(pair, [[2, 5], [2, 6]], new_tokens=1, chunk=1))


def test_a_row_ends_behind_a_stop_token_and_the_others_go_on(
    pair: PairModel, reference: list[tuple[list[int], list[int]]]
) -> None:
    (one, first), (other, second) = reference[2], reference[4]
    stop = first[5]
    assert stop not in second
    short = first.index(stop) + 1
    found = rows_of(generate(pair, [one, other], new_tokens=8, stop=[stop, 1]))
    assert found == [[*first[:short], *[None] * (8 - short)], second[:8]]
    assert rows_of(generate(pair, [one], new_tokens=8, stop=[stop])) == [first[:short]]


def test_more_tokens_go_behind_those_in_the_caches(
    pair: PairModel, reference: list[tuple[list[int], list[int]]]
) -> None:
    ids, tokens = reference[5]
    loop = Loop(pair, 1)
    for part in (ids[:10], ids[10:]):
        *_, step = loop.prompt([part])
    assert step.greedy().tolist() == tokens[:1]


def test_embed_and_decode_are_steps_of_their_own(pair: PairModel) -> None:
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


def test_other_embeddings_between_the_graphs_are_other_tokens(pair: PairModel) -> None:
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

    changed = rows_of(generate(pair.changing(change), [[2, 31, 77, 31]], new_tokens=4, chunk=3))
    assert changed == rows_of(generate(pair, [[2, 40, 77, 40]], new_tokens=4, chunk=3))
    assert changed != rows_of(generate(pair, [[2, 31, 77, 31]], new_tokens=4))
    assert seen[:2] == [([[2, 31, 77]], [[0, 1, 2]]), ([[31]], [[3]])]


def test_embeddings_of_another_size_are_refused_with_the_runtime_s_words(pair: PairModel) -> None:
    (feed,) = prompt_feeds([[2, 10]])
    wrong = {name: host(value)[:, :1] for name, value in pair.embed(feed.ids).items()}
    with pytest.raises(ModelError, match=r"cannot run .*decoder_model_merged\.onnx"):
        pair.decode(wrong, feed, pair.start(1), 1)
    with pytest.raises(ModelError, match="takes per_layer_inputs, which a text model is not known to take"):
        pair.decode({"inputs_embeds": wrong["inputs_embeds"]}, feed, pair.start(1), 1)
