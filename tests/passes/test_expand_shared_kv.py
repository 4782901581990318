"""expand-shared-kv: KV-shared layers get pairs that alias their source layer's; a config that contradicts the wiring is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto
from onnx.helper import make_attribute, make_node, make_tensor_value_info
from small import FLOAT, LAYERS, OWNER, applied, decoder, embed_tokens, feeds, refused, run

from passes import ExpandSharedKV
from passes.base import apply
from surgery.errors import PassError
from surgery.graph.model import Model
from surgery.graph.nodes import copied
from surgery.graph.renaming import rename
from surgery.graph.tensor_types import tensor_type

S, F = "sliding_attention", "full_attention"


def test_aliases_equal_their_owners_and_all_else_is_bit_for_bit(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, decoder(), ExpandSharedKV())
    given = feeds(np.ones((1, 6), np.int64), 2, layers=(0, 1, 2, 3))
    given |= run(embed_tokens(), given)
    truth, found = run(decoder(), given), run(model.proto, given)
    for name, values in truth.items():
        np.testing.assert_array_equal(found[name], values)
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            np.testing.assert_array_equal(found[f"present.{layer}.{kind}"], truth[f"present.{OWNER[layer]}.{kind}"])
    assert outcome.operators == {"Identity": 4}


def test_a_borrowers_past_is_declared_and_not_read(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), ExpandSharedKV())
    given = feeds(np.ones((1, 6), np.int64), 2, layers=(0, 1, 2, 3))
    given |= run(embed_tokens(), given)
    other = given | {name: values + 1 for name, values in given.items() if name.startswith("past_key_values.2")}
    np.testing.assert_array_equal(run(model.proto, given)["logits"], run(model.proto, other)["logits"])


def test_the_interface_is_in_layer_order_with_the_owners_types(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, decoder(), ExpandSharedKV())
    order = [f"{n}.{kind}" for n in range(LAYERS) for kind in ("key", "value")]
    assert [v.name for v in model.graph.input if v.name.startswith("past")] == [f"past_key_values.{x}" for x in order]
    assert [v.name for v in model.graph.output if v.name.startswith("present")] == [f"present.{x}" for x in order]
    types = {v.name: tensor_type(v) for v in (*model.graph.input, *model.graph.output)}
    assert types["past_key_values.3.key"] == types["past_key_values.1.key"]
    assert str(types["present.3.value"]) == "FLOAT [batch_size, 1, total_sequence_length, 16]"
    assert [str(f) for f in outcome.findings] == [
        "added present.2.key|value: alias of layer 0's, FLOAT [batch_size, 1, total_sequence_length, 8]",
        "added present.3.key|value: alias of layer 1's, FLOAT [batch_size, 1, total_sequence_length, 16]",
    ]


def test_what_was_there_is_as_it_was(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), ExpandSharedKV())
    graph = decoder().graph
    assert list(model.graph.node)[: len(graph.node)] == list(graph.node)
    assert list(model.graph.initializer) == list(graph.initializer)
    assert list(model.graph.value_info) == list(graph.value_info)
    assert list(model.graph.input)[: len(graph.input)] == list(graph.input)


@pytest.mark.parametrize("dtype", [10, 16, 17], ids=["float16", "bfloat16", "float8"])
def test_caches_of_other_dtypes_keep_them(dtype: int, tmp_path: Path) -> None:
    proto = decoder()
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.elem_type = dtype
    model, _ = applied(tmp_path, proto, ExpandSharedKV())
    added = [v for v in (*model.graph.input, *model.graph.output) if ".3." in v.name]
    assert len(added) == 4 and {v.type.tensor_type.elem_type for v in added} == {dtype}


def test_a_second_run_finds_nothing_to_do(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), ExpandSharedKV())
    again, (outcome,) = apply(model, [ExpandSharedKV()])
    assert not outcome.changed and again.proto == model.proto
    assert [str(f) for f in outcome.findings] == ["skipped KV-shared layers: each has its pair already"]


def test_a_model_without_borrowers_is_left_alone(tmp_path: Path) -> None:
    from onnx.helper import make_node
    from torture import model as plain

    inputs = [make_tensor_value_info(n, FLOAT, ["b", "s", 8]) for n in "qkv"]
    inputs += [make_tensor_value_info(f"past_key_values.0.{k}", FLOAT, ["b", 1, "t", 8]) for k in ("key", "value")]
    outputs = [make_tensor_value_info(f"present.0.{k}", FLOAT, ["b", 1, "t", 8]) for k in ("key", "value")]
    inputs += [make_tensor_value_info(n, TensorProto.INT32, []) for n in ("last", "total")]
    names = ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "last", "total"]
    node = make_node("GroupQueryAttention", names, ["y", "present.0.key", "present.0.value"], domain="com.microsoft")
    config = {"num_hidden_layers": 1, "layer_types": [F], "global_head_dim": 8, "num_kv_shared_layers": 0}
    _, outcome = applied(tmp_path, plain([node], inputs=inputs, outputs=outputs), ExpandSharedKV(), **config)
    assert [str(f) for f in outcome.findings] == ["skipped KV-shared layers: every layer has its own cache"]


# Refusals


def test_an_owner_by_config_that_the_wiring_does_not_confirm_names_the_layer(tmp_path: Path) -> None:
    refused(tmp_path, decoder(), ExpandSharedKV(), r"layer 2 reads the cache of layer 1 by config\.json \(past_key_values\.1\.key -> present\.1\.key\), "
        r"but '/model/layers\.2/attn/manual/Softmax' reads past_key_values\.0\.key -> present\.0\.key", layer_types=[S, F, F, F])  # fmt: skip
    refused(tmp_path, decoder(), ExpandSharedKV(), r"layer 2 has its own cache by config\.json .*, but .* reads past_key_values\.0\.key", num_kv_shared_layers=1)  # fmt: skip


def test_a_borrower_of_the_wrong_owner_in_the_graph_names_the_layer(tmp_path: Path) -> None:
    proto = decoder()
    for node in proto.graph.node:
        if node.name.startswith("/model/layers.2/attn/manual/Mixed"):
            node.input[1] = "present.1.value"
    refused(
        tmp_path,
        proto,
        ExpandSharedKV(),
        r"layer 2 reads the cache of layer 0 by config\.json \(past_key_values\.0\.value",
    )


def test_too_few_attention_cores(tmp_path: Path) -> None:
    sentence = r"the graph has 4 attention cores, but config\.json has 5 layers; KV source layers cannot be checked"
    refused(tmp_path, decoder(), ExpandSharedKV(), sentence, num_hidden_layers=5, layer_types=[S, F, S, F, F])


def test_attention_that_reads_no_cache_names_the_layer(tmp_path: Path) -> None:
    proto = decoder()
    for node in proto.graph.node:
        if node.name == "/model/layers.3/attn/manual/key_t":
            node.input[0] = "/model/layers.3/attn/q_proj/MatMul/output_0"
    refused(
        tmp_path,
        proto,
        ExpandSharedKV(),
        r"layer 3: no key cache was found behind '/model/layers\.3/attn/manual/Softmax'; present\.1\.key",
    )


def test_an_interface_of_other_names_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    rename(proto.graph, {"past_key_values.0.key": "past_key_0"})
    refused(
        tmp_path,
        proto,
        ExpandSharedKV(),
        r"layer 0 has its own cache by config\.json .*, but .* reads past_key_0 -> present\.0\.key",
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"head_dim": 4}, r"past_key_values\.0\.key has head size 8, but config\.json gives 4"),
        ({"global_head_dim": 4}, r"past_key_values\.1\.key has head size 16, but config\.json gives 4"),
        ({"num_key_value_heads": 2}, r"past_key_values\.0\.key has KV heads 1, but config\.json gives 2"),
    ],
)
def test_sizes_that_contradict_the_config(config: dict[str, object], sentence: str, tmp_path: Path) -> None:
    refused(tmp_path, decoder(), ExpandSharedKV(), sentence, **config)


def test_without_a_config_the_hint_says_what_to_give(tmp_path: Path) -> None:
    model = Model(decoder(), tmp_path / "a.onnx")
    with pytest.raises(
        PassError, match=r"layers and head sizes come from the architecture, and no config\.json was found"
    ):
        apply(model, [ExpandSharedKV()])


def test_half_a_pair_in_the_interface_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    proto.graph.input.append(make_tensor_value_info("past_key_values.2.key", FLOAT, ["b", 1, "t", 8]))
    refused(tmp_path, proto, ExpandSharedKV(), r"layer 2 has past_key_values\.2\.key but not past_key_values\.2\.value")


# KV-shared layers that make the rows once more


def recomputing(**changes: Any) -> ModelProto:
    """Layer 2 reads layer 0's cache with a GroupQueryAttention that appends the same rows to the same past, made by nodes
    and weights of its own names. Nothing reads its presents: ONNX Runtime's CPU provider leaves the past out where they have
    no names (1.31.1). `changes` are attributes of it."""
    proto = decoder()
    nodes = {node.name: node for node in proto.graph.node}
    source = nodes["/model/layers.0/attn/GroupQueryAttention"]
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    inputs = list(source.input)
    made = []
    for index, kind in ((1, "k"), (2, "v")):
        before = nodes[f"/model/layers.0/attn/{kind}_proj/MatMul"]
        twin = copied(weights[before.input[1]])
        twin.name = f"again.{kind}"
        proto.graph.initializer.append(twin)
        made.append(make_node("MatMul", [before.input[0], twin.name], [f"again/{kind}"], name=f"again/{kind}"))
        inputs[index] = f"again/{kind}"
    flat = nodes["/model/layers.2/attn/manual/Flat"]
    inputs[0] = nodes["/model/layers.2/attn/q_reshape"].input[0]
    fused = copied(source)
    fused.name = "/model/layers.2/attn/GroupQueryAttention"
    fused.input[:] = inputs
    fused.output[:] = [*flat.output, "unread/key", "unread/value"]
    for attribute in fused.attribute:
        if attribute.name in changes:
            attribute.CopyFrom(make_attribute(attribute.name, changes[attribute.name]))
    gone = ("/model/layers.2/attn/manual", "/model/layers.2/attn/q_reshape", "/model/layers.2/attn/q_transpose")
    kept = [node for node in proto.graph.node if not node.name.startswith(gone)]
    place = next(index for index, node in enumerate(kept) if node.name == "/model/layers.2/attn/o_proj/MatMul")
    held = [copied(node) for node in [*kept[:place], *made, fused, *kept[place:]]]
    del proto.graph.node[:]
    proto.graph.node.extend(held)
    return proto


def test_rows_that_are_made_once_more_are_the_source_layers(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, recomputing(), ExpandSharedKV())
    given = feeds(np.ones((1, 6), np.int64), 2, layers=(0, 1, 2, 3))
    given |= run(embed_tokens(), given)
    truth, found = run(recomputing(), given), run(model.proto, given)
    np.testing.assert_array_equal(found["logits"], truth["logits"])
    assert np.abs(truth["logits"] - run(decoder(), given)["logits"]).max() < 1e-5
    for kind in ("key", "value"):
        np.testing.assert_array_equal(found[f"present.2.{kind}"], truth[f"present.0.{kind}"])
    assert outcome.operators == {"Identity": 4}


def other_weight(proto: ModelProto) -> None:
    twin = next(tensor for tensor in proto.graph.initializer if tensor.name == "again.k")
    twin.raw_data = bytes(len(twin.raw_data))


def other_rows(proto: ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.name == "again/v")
    node.input[0] = next(node for node in proto.graph.node if node.name == "/model/layers.1/attn/q_proj/MatMul").input[
        0
    ]


def other_past(proto: ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.name == "/model/layers.2/attn/GroupQueryAttention")
    node.input[3] = "past_key_values.1.key"


@pytest.mark.parametrize("damage", [other_weight, other_rows, other_past])
def test_rows_that_are_others_are_refused(damage: Callable[[ModelProto], None], tmp_path: Path) -> None:
    proto = recomputing()
    damage(proto)
    refused(tmp_path, proto, ExpandSharedKV(), r"layer 2 reads the cache of layer 0 by config\.json")


def test_other_rotation_is_refused_and_another_window_is_its_own_affair(tmp_path: Path) -> None:
    refused(tmp_path, recomputing(kv_num_heads=2), ExpandSharedKV(), r"layer 2 reads the cache of layer 0")
    applied(tmp_path, recomputing(scale=0.5), ExpandSharedKV())
