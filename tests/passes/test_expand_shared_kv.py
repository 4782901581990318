"""expand-shared-kv: KV-shared layers get pairs that alias their source layer's; a config that contradicts the wiring is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx.helper import make_tensor_value_info
from small import FLOAT, LAYERS, OWNER, applied, decoder, embed_tokens, feeds, refused, run

from passes import ExpandSharedKV
from passes.base import apply
from surgery.errors import PassError
from surgery.graph.model import Model
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
    names = ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value"]
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
            node.input[0] = "/model/layers.3/attn/q_transpose/output_0"
    q = next(n for n in proto.graph.node if n.name == "/model/layers.3/attn/q_transpose")
    q.input[0] = "/model/layers.3/attn/q_reshape/output_0"
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
