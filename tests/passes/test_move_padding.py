"""move-padding: in a padded batch every row is what it is alone, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small
from exhaustive import in_full
from onnx import TensorProto
from onnx.helper import make_graph, make_node, make_tensor_value_info
from onnx.numpy_helper import from_array

from passes import FoldLogitsToKeep, MergeEmbeddings, MovePadding
from passes.base import apply
from passes.presets import compatible
from surgery.choices import KVLayout, Target
from surgery.errors import PassError
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.runtime.decoding import DecodeLoop
from surgery.runtime.sessions import MergedModel, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export
from surgery.verify.genai_proof import GenAI
from tests.windows import export_with

STEPS = 24


def rows_of(*sizes: int) -> list[tuple[int, ...]]:
    numbers = np.random.default_rng(sizes)
    return [tuple(numbers.integers(4, 100, size).tolist()) for size in sizes]


def folder_of(
    export: Export, precision: str, folder: Path, layout: KVLayout = "aliased", target: Target = "genai-0.14"
) -> Path:
    pair = export.pair(precision)
    return build_folder(export, pair, compatible(pair.embed, layout, target), folder).folder


# The runtime


@pytest.mark.parametrize(
    ("name", "window", "layout", "target"),
    [
        ("tiny-e2b", 8, "aliased", "genai-0.14"),
        in_full("tiny-e2b", 32, "aliased", "genai-0.14"),
        in_full("tiny-e2b", 32, "unique", "genai-0.14"),
        ("tiny-e2b", 32, "aliased", "genai-0.12"),
        in_full("tiny-e4b", 8, "aliased", "genai-0.14"),
        ("tiny-31b", 8, "aliased", "genai-0.14"),
    ],
)
def test_the_runtime_continues_a_padded_row_as_it_does_alone(
    name: str, window: int, layout: KVLayout, target: Target, tmp_path: Path
) -> None:
    export = export_with(window, name, "fp32", tmp_path / "source")
    genai = GenAI(folder_of(export, "fp32", tmp_path / "out", layout, target), "cpu")
    for rows in (rows_of(3, 2 * window), rows_of(window - 2, 3 * window, 1), rows_of(window + 3, window + 40)):
        alone = [genai.generate([row], 0, STEPS)[0] for row in rows]
        together = genai.generate(rows, 0, STEPS)
        assert max(map(len, alone)) == STEPS
        for wanted, found in zip(alone, together, strict=True):
            assert found[: len(wanted)] == wanted


# The numbers


def in_a_batch(export: Export, precision: str, folder: Path, rows: list[tuple[int, ...]]) -> tuple[float, float]:
    """The largest |difference| of logits, from the source that is padded on the left, and from each row alone."""
    source = TwoGraphModel.open(export.pair(precision), Settings())
    together, left = (
        DecodeLoop(MergedModel(folder / "model.onnx", Settings()), len(rows)),
        DecodeLoop(source, len(rows)),
    )
    alone = [DecodeLoop(source, 1) for _ in rows]
    (step,), (same,) = together.prompt(rows), left.prompt(rows, side="left")
    wanted = np.concatenate([next(loop.prompt([row])).logits for loop, row in zip(alone, rows, strict=True)])
    apart = [0.0, 0.0]
    for _ in range(STEPS):
        for place, other in enumerate((same.logits, wanted)):
            apart[place] = max(apart[place], float(np.abs(step.logits.astype(np.float64) - other).max()))
        chosen = wanted.argmax(1)
        step, same = together.append(chosen), left.append(chosen)
        wanted = np.concatenate([loop.append(chosen[[i]]).logits for i, loop in enumerate(alone)])
    return apart[0], apart[1]


@pytest.mark.parametrize(
    ("name", "precision", "apart"),
    [
        ("tiny-e2b", "fp32", 1e-4), in_full("tiny-e2b", "q4", 1e-4), in_full("tiny-e2b", "fp16", 0.05),
        ("tiny-e2b", "q4f16", 0.05), in_full("tiny-e4b", "q4f16", 0.05), ("tiny-31b", "fp32", 1e-4),
    ],
)  # fmt: skip
def test_a_padded_batch_is_the_source_padded_on_the_left(
    name: str, precision: str, apart: float, tmp_path: Path
) -> None:
    """Bit by bit; and from each row alone it is no further than another order of sums."""
    export = export_with(8, name, precision, tmp_path / "source")
    folder = folder_of(export, precision, tmp_path / "out")
    for rows in (rows_of(3, 15), rows_of(5, 21, 30)):
        left, alone = in_a_batch(export, precision, folder, rows)
        assert left == 0
        assert alone <= apart


# The graph


@pytest.fixture
def model(tmp_path: Path) -> Model:
    embed = tmp_path / "embed.onnx"
    embed.write_bytes(small.embed_tokens().SerializeToString())
    return apply(small.opened(tmp_path, small.decoder()), [MergeEmbeddings(embed), FoldLogitsToKeep(keep="all")])[0]


RIGHT = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])


def logits(model: Model, mask: np.ndarray, past: int = 0) -> np.ndarray:
    """Of every token; positions count the real ones."""
    given = small.feeds(mask, past)
    given["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    return small.run(model.proto, given)["logits"]


def test_logits_of_every_token_come_in_the_order_of_the_tokens(model: Model) -> None:
    """Without a window the place of padding makes no difference to a token."""
    after, (outcome,) = apply(model, [MovePadding()])
    assert {finding.subject for finding in outcome.findings} == {
        "inputs_embeds", "per_layer_inputs", "position_ids", "attention_mask", "logits"
    }  # fmt: skip
    before, found = logits(model, RIGHT), logits(after, RIGHT)
    np.testing.assert_allclose(found[RIGHT == 1], before[RIGHT == 1], atol=1e-5)


def test_several_tokens_behind_a_padded_past_keep_their_order(model: Model) -> None:
    """GroupQueryAttention takes no batch of them; plain attention does. So the positions alone are computed."""
    after, _ = apply(model, [MovePadding()])
    graph = after.proto.graph
    needed = {next(n.output[0] for n in graph.node if n.op_type == "GatherND" and "position_ids" in n.input)}
    graph.output.append(make_tensor_value_info(*needed, TensorProto.INT64, None))
    del graph.output[:-1]
    for node in reversed(list(graph.node)):
        if needed.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            needed.update(node.input)
    mask = np.array([[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 1]])
    given = small.feeds(mask, 4) | {"position_ids": np.array([[4, 5, 6]] * 3)}
    (found,) = small.run(after.proto, given).values()
    assert found.tolist() == [[4, 5, 6], [6, 4, 5], [5, 4, 6]]


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((1, 6), np.int64),
        np.array([[1, 1, 0, 1, 0]]),
        np.ones((3, 4), np.int64),
        np.array([[0, 0, 1], [1, 1, 1]]),
    ],
    ids=["alone", "alone, with gaps", "of one length", "padded on the left"],
)
def test_what_has_nothing_to_move_stays_as_it_is(model: Model, mask: np.ndarray) -> None:
    after, _ = apply(model, [MovePadding()])
    assert np.array_equal(logits(after, mask), logits(model, mask))


def test_a_mask_of_int32_stays_one(tmp_path: Path) -> None:
    before = small.opened(tmp_path, small.decoder(mask=TensorProto.INT32))
    after, _ = apply(before, [MovePadding()])
    given = small.feeds(RIGHT.astype(np.int32)) | small.run(small.embed_tokens(), small.feeds(RIGHT))
    found, expected = (small.run(each.proto, given)["logits"] for each in (after, before))
    assert np.isfinite(found).all() and np.abs(found - expected)[1].max() < 1e-5


def test_a_second_run_finds_nothing_to_do(model: Model) -> None:
    _, outcomes = apply(model, [MovePadding(), MovePadding()])
    assert [str(finding) for finding in outcomes[1].findings] == [
        "skipped attention_mask: padding goes in front already"
    ]


def without(model: Model, name: str) -> None:
    place = next(index for index, value in enumerate(model.graph.input) if value.name == name)
    model.graph.initializer.append(from_array(np.ones((1, 3), np.int64), name))
    del model.graph.input[place]


def test_a_graph_without_a_mask_has_no_padding(model: Model) -> None:
    without(model, "attention_mask")
    _, (outcome,) = apply(model, [MovePadding()])
    assert [str(f) for f in outcome.findings] == ["skipped attention_mask: the graph takes no attention_mask"]


def rank(model: Model) -> None:
    (mask,) = (value for value in model.graph.input if value.name == "attention_mask")
    mask.type.tensor_type.shape.dim.add(dim_value=1)


def older(model: Model) -> None:
    model.proto.opset_import[0].version = 14


def captured(model: Model) -> None:
    body = make_graph([make_node("Identity", ["position_ids"], ["in_body"])], "body", [], [])
    model.graph.node.append(make_node("If", ["attention_mask"], ["x"], then_branch=body, else_branch=body))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (rank, "attention_mask is INT64 \\[batch_size, total_sequence_length, 1\\]; \\[batch, tokens\\] is expected"),
        (older, "it needs opset 15, the model has 14"),
        (captured, "position_ids is read inside of a subgraph"),
    ],
)
def test_what_cannot_be_moved_is_refused(change: Callable[[Model], None], sentence: str, model: Model) -> None:
    change(model)
    with pytest.raises(PassError, match=sentence):
        apply(model, [MovePadding()])
