"""fold-logits-to-keep: each row's last real token, wherever its padding is; nothing of the old form is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, NodeProto
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array
from small import FLOAT, HIDDEN, INT32, INT64, VOCAB, Array, applied, decoder, embed_tokens, feeds, refused, run

from passes import FoldLogitsToKeep
from passes.base import apply
from surgery.graph.definitions import check_definitions
from surgery.graph.index import use_counts
from surgery.graph.renaming import rename
from surgery.graph.tensor_types import tensor_type

LAST, ALL = FoldLogitsToKeep(), FoldLogitsToKeep(keep="all")
SLICE = "/lm_head/num_logits_to_keep/Slice"


def node(proto: ModelProto, name: str) -> NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def given_for(mask: Array, past: int = 0) -> dict[str, Array]:
    given = feeds(mask, past)
    return given | run(embed_tokens(), given)


RAGGED = {
    "right-padded": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "left-padded": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]],
    "padded on both sides and inside": [[0, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 1, 0, 0]],
    "one row": [[1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("dtype", [INT64, INT32], ids=["int64", "int32"])
@pytest.mark.parametrize("name", RAGGED)
def test_each_row_gets_the_logits_of_its_last_real_token(name: str, dtype: int, tmp_path: Path) -> None:
    mask = np.array(RAGGED[name], dtype=np.int64 if dtype == INT64 else np.int32)
    proto = decoder(mask=dtype)
    model, _ = applied(tmp_path, proto, LAST)
    every = run(proto, given_for(mask))["logits"]
    found = run(model.proto, given_for(mask))["logits"]
    rows = np.arange(len(mask))
    last = np.array([max(i for i, real in enumerate(row) if real) for row in mask])
    assert found.shape == (len(mask), 1, VOCAB)
    np.testing.assert_allclose(found[:, 0], every[rows, last], rtol=0, atol=1e-6)
    assert not np.allclose(every[0, 0], every[0, -1]), "positions differ, or this test tests nothing"


@pytest.mark.parametrize(("total", "past"), [(7, 3), (7, 6)], ids=["chunk", "decode"])
def test_only_the_new_part_of_the_mask_counts(total: int, past: int, tmp_path: Path) -> None:
    mask = np.ones((1, total), np.int64)
    model, _ = applied(tmp_path, decoder(), LAST)
    every, found = run(decoder(), given_for(mask, past)), run(model.proto, given_for(mask, past))
    np.testing.assert_allclose(found["logits"], every["logits"][:, -1:], rtol=0, atol=1e-6)
    for name in every.keys() - {"logits"}:
        np.testing.assert_array_equal(found[name], every[name])


def test_padding_of_the_new_part_counts_and_not_that_of_the_past(tmp_path: Path) -> None:
    mask = np.array([[1, 1, 0, 1, 1, 0, 0]])
    model, _ = applied(tmp_path, decoder(), LAST)
    every, found = run(decoder(), given_for(mask, 3)), run(model.proto, given_for(mask, 3))
    np.testing.assert_allclose(found["logits"][:, 0], every["logits"][:, 1], rtol=0, atol=1e-6)


def test_a_row_without_a_real_token_does_not_fail(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), LAST)
    found = run(model.proto, given_for(np.array([[1, 1, 1], [0, 0, 0]])))
    assert np.isfinite(found["logits"]).all()


def test_keep_all_gives_every_token_bit_for_bit(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, decoder(), ALL)
    given = given_for(np.ones((2, 5), np.int64))
    np.testing.assert_array_equal(run(model.proto, given)["logits"], run(decoder(), given)["logits"])
    assert outcome.operators == {"Neg": -1, "Slice": -1, "Unsqueeze": -1}
    assert str(outcome.findings[-1]) == "changed logits: every token has them: [batch, sequence, vocab]"


@pytest.mark.parametrize(("step", "size"), [(LAST, 1), (ALL, "sequence_length")], ids=["last", "all"])
def test_sizes_are_declared_as_they_are_now(step: FoldLogitsToKeep, size: object, tmp_path: Path) -> None:
    proto = decoder()
    inner = make_tensor_value_info("/lm_head/scaled", FLOAT, ["batch_size", "num_logits_to_keep", VOCAB])
    proto.graph.value_info.append(inner)
    proto.graph.node[-1].output[0] = "/lm_head/scaled"
    proto.graph.node.append(make_node("Identity", ["/lm_head/scaled"], ["logits"], name="out"))
    model, _ = applied(tmp_path, proto, step)
    assert str(tensor_type(model.graph.output[0])) == f"FLOAT [batch_size, {size}, {VOCAB}]"
    assert "num_logits_to_keep" not in str(model.proto).replace("/num_logits_to_keep/", "")


@pytest.mark.parametrize("step", [LAST, ALL], ids=["last", "all"])
def test_logits_of_another_name_are_declared_too(step: FoldLogitsToKeep, tmp_path: Path) -> None:
    proto = decoder()
    rename(proto.graph, {"logits": "scores"})
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "rows"
    model, _ = applied(tmp_path, proto, step)
    size = 1 if step is LAST else "sequence_length"
    assert str(tensor_type(model.graph.output[0])) == f"FLOAT [batch_size, {size}, {VOCAB}]"


@pytest.mark.parametrize("step", [LAST, ALL], ids=["last", "all"])
def test_no_node_and_no_constant_of_the_old_form_is_left(step: FoldLogitsToKeep, tmp_path: Path) -> None:
    proto = decoder()
    model, _ = applied(tmp_path, proto, step)
    read = use_counts(model.graph)
    assert [n.name for n in model.graph.node if not any(output in read for output in n.output)] == []
    assert {t.name for t in model.graph.initializer} <= read.keys()
    assert "/model/constants/INT64/2147483647" not in {t.name for t in model.graph.initializer}
    assert not [value.name for value in model.graph.value_info if value.name not in read]
    assert not any(
        output.startswith("/lm_head/num_logits_to_keep") for n in model.graph.node for output in n.output[:1]
    ) or (
        step is LAST  # the Slice's own output keeps its name: its readers are as they were
    )


def test_constant_nodes_that_served_the_input_go_and_shared_ones_stay(tmp_path: Path) -> None:
    proto = decoder()
    graph = proto.graph
    cut = node(proto, SLICE)
    own = make_node("Constant", [], ["ends"], value=from_array(np.array([2**63 - 1])))
    shared = make_node("Constant", [], ["axes"], value_ints=[1])
    graph.node.insert(0, own)
    graph.node.insert(0, shared)
    cut.input[2], cut.input[3] = "ends", "axes"
    node(proto, "/model/masks/RowsColumn").input[1] = "axes"
    model, _ = applied(tmp_path, proto, LAST)
    assert [n.output[0] for n in model.graph.node if n.op_type == "Constant"] == ["axes"]


@pytest.mark.parametrize("step", [LAST, ALL], ids=["last", "all"])
def test_nodes_without_names_are_told_apart(step: FoldLogitsToKeep, tmp_path: Path) -> None:
    proto = decoder()
    for n in proto.graph.node:
        n.name = ""
    model, outcome = applied(tmp_path, proto, step)
    removed = sum(1 for finding in outcome.findings if finding.verb == "removed")
    assert removed == 4 and len(model.graph.node) >= len(proto.graph.node) - 3
    given = given_for(np.ones((1, 4), np.int64))
    np.testing.assert_allclose(run(model.proto, given)["logits"][:, -1], run(proto, given)["logits"][:, -1], atol=1e-6)


def test_a_second_run_and_a_graph_without_the_input_are_skipped(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), LAST)
    again, (outcome,) = (
        apply(
            model,
            [
                LAST,
            ],
        )
        if True
        else (model, ())
    )
    assert not outcome.changed and again.proto == model.proto
    _, outcome = applied(tmp_path, decoder(keep=False), ALL)
    assert [str(f) for f in outcome.findings] == ["skipped num_logits_to_keep: the graph does not take it"]


def test_findings_name_what_went_and_what_came(tmp_path: Path) -> None:
    _, outcome = applied(tmp_path, decoder(), LAST)
    assert [f"{f.verb} {f.subject}" for f in outcome.findings] == [
        "removed num_logits_to_keep",
        "removed Neg node '/lm_head/num_logits_to_keep/Neg'",
        "removed Unsqueeze node '/lm_head/num_logits_to_keep/Unsqueeze'",
        "removed Slice node '/lm_head/num_logits_to_keep/Slice'",
        "added 14 nodes",
    ]


# Forms that are not known


def test_a_mask_that_cannot_tell_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    rename(proto.graph, {"attention_mask": "mask"})
    proto.graph.input[1].CopyFrom(make_tensor_value_info("mask", FLOAT, ["b", "t"]))
    refused(
        tmp_path, proto, LAST, "keep=last finds each row's last token in attention_mask, which the graph does not take"
    )
    for dtype, shape, found in (
        (FLOAT, ["b", "t"], r"FLOAT \[b, t\]"),
        (INT64, ["b", 1, "s", "t"], r"INT64 \[b, 1, s, t\]"),
        (INT64, None, "INT64"),
    ):
        proto = decoder()
        proto.graph.input[1].CopyFrom(make_tensor_value_info("attention_mask", dtype, shape))
        refused(tmp_path, proto, LAST, rf"attention_mask is {found}; keep=last needs INT64 or INT32 \[batch, tokens\]")


def test_keep_all_needs_no_mask(tmp_path: Path) -> None:
    proto = decoder()
    rename(proto.graph, {"attention_mask": "mask"})
    assert applied(tmp_path, proto, ALL)[1].changed


def test_an_opset_without_the_operators_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    proto.opset_import[0].version = 14
    refused(tmp_path, proto, LAST, "keep=last needs opset 15, the model has 14")


@pytest.mark.parametrize(
    ("position", "values"), [(3, [2]), (3, [0, 1]), (2, [0]), (2, [-1]), (2, [5])], ids=["axis", "axes", "0", "-1", "5"]
)
def test_a_slice_of_something_else_is_refused(position: int, values: list[int], tmp_path: Path) -> None:
    proto = decoder()
    proto.graph.initializer.append(from_array(np.array(values, dtype=np.int64), "other"))
    node(proto, SLICE).input[position] = "other"
    refused(
        tmp_path, proto, LAST, f"Slice node '{SLICE}' does not keep the last tokens of axis 1, which num_logits_to_keep"
    )


def test_a_slice_with_steps_is_refused_unless_they_are_one(tmp_path: Path) -> None:
    for step, fine in (([1], True), ([-1], False)):
        proto = decoder()
        proto.graph.initializer.append(from_array(np.array(step, dtype=np.int64), "steps"))
        node(proto, SLICE).input.append("steps")
        if fine:
            assert applied(tmp_path, proto, LAST)[1].changed
        else:
            refused(tmp_path, proto, LAST, "does not keep the last tokens of axis 1")


def test_the_first_tokens_instead_of_the_last_are_refused(tmp_path: Path) -> None:
    proto = decoder()
    node(proto, "/lm_head/num_logits_to_keep/Neg").op_type = "Identity"
    refused(tmp_path, proto, LAST, "does not keep the last tokens of axis 1")


def test_the_input_as_the_end_of_a_slice_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    cut = node(proto, SLICE)
    cut.input[1], cut.input[2] = cut.input[2], cut.input[1]
    refused(tmp_path, proto, LAST, "does not keep the last tokens of axis 1")


def test_an_input_that_is_read_twice_or_not_at_all_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    proto.graph.node.append(make_node("Abs", ["num_logits_to_keep"], ["more"], name="more"))
    refused(
        tmp_path,
        proto,
        LAST,
        "'num_logits_to_keep' is read by Neg node .*, Abs node 'more'; one node on the way to a Slice",
    )
    proto = decoder()
    node(proto, "/lm_head/num_logits_to_keep/Neg").input[0] = "/model/constants/INT64/1"
    refused(
        tmp_path, proto, LAST, "'num_logits_to_keep' is read by nothing; one node on the way to a Slice is expected"
    )


def test_an_operator_that_is_not_known_on_the_way_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    node(proto, "/lm_head/num_logits_to_keep/Neg").op_type = "Abs"
    refused(tmp_path, proto, LAST, "num_logits_to_keep reaches Abs node .*; Neg, Unsqueeze and a Slice are expected")


def test_keep_all_refuses_readers_that_it_cannot_rewire(tmp_path: Path) -> None:
    proto = decoder()
    kept = f"{SLICE}/output_0"
    proto.graph.output.append(make_tensor_value_info(kept, FLOAT, ["batch_size", "num_logits_to_keep", HIDDEN]))
    refused(tmp_path, proto, ALL, f"keep=all would remove '{kept}', which is read by the interface")
    model, _ = applied(tmp_path, proto, LAST)
    assert str(tensor_type(model.graph.output[-1])) == f"FLOAT [batch_size, 1, {HIDDEN}]"
    check_definitions(model.proto)
