"""annotate-head-sizes: concrete sizes where they were symbolic, never in place of others; a table that reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx import ModelProto
from onnx.helper import make_tensor_value_info
from small import FLOAT, applied, arch, decoder, opened, refused

from passes import AnnotateHeadSizes, ExpandSharedKV
from passes.base import apply
from surgery.errors import ModelError, PassError
from surgery.graph.metadata_props import set_property
from surgery.graph.tensor_types import tensor_type
from surgery.source.layer_table import KEY, layer_table, read_layer_table


def symbolic(proto: ModelProto | None = None) -> ModelProto:
    """The decoder with symbolic KV heads in all caches, and unknown head sizes."""
    proto = proto or decoder()
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.shape.dim[1].dim_param = "kv_heads"
            value.type.tensor_type.shape.dim[3].Clear()
    return proto


def test_symbolic_and_unknown_sizes_become_concrete(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, symbolic(), AnnotateHeadSizes())
    types = {v.name: str(tensor_type(v)) for v in (*model.graph.input, *model.graph.output)}
    assert types["past_key_values.0.key"] == "FLOAT [batch_size, 1, past_sequence_length, 8]"
    assert types["present.1.value"] == "FLOAT [batch_size, 1, total_sequence_length, 16]"
    assert str(outcome.findings[0]) == (
        "changed past_key_values.0.key: FLOAT [batch_size, kv_heads, past_sequence_length, ?] "
        "is now FLOAT [batch_size, 1, past_sequence_length, 8]"
    )
    assert str(outcome.findings[-1]) == f"added metadata {KEY}: the table of 4 layers"


def test_concrete_sizes_are_left_alone_and_only_the_table_is_added(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, decoder(), AnnotateHeadSizes())
    assert [f"{f.verb} {f.subject}" for f in outcome.findings] == ["skipped 8 caches", f"added metadata {KEY}"]
    del model.proto.metadata_props[:]
    assert model.proto == decoder()


def test_a_second_run_finds_nothing_to_do(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, symbolic(), AnnotateHeadSizes())
    again, (outcome,) = apply(model, [AnnotateHeadSizes()])
    assert not outcome.changed and again.proto == model.proto
    assert {f.verb for f in outcome.findings} == {"skipped"}


def test_borrowers_get_their_owners_sizes_after_expanding(tmp_path: Path) -> None:
    model, _ = apply(opened(tmp_path, symbolic()), [ExpandSharedKV(), AnnotateHeadSizes()])
    types = {v.name: str(tensor_type(v)) for v in (*model.graph.input, *model.graph.output)}
    assert types["past_key_values.3.key"] == "FLOAT [batch_size, 1, past_sequence_length, 16]"


def test_an_older_table_is_replaced_and_other_metadata_stays(tmp_path: Path) -> None:
    proto = decoder()
    proto.metadata_props.add(key="mine", value="1")
    proto.metadata_props.add(key=KEY, value="old")
    model, outcome = applied(tmp_path, proto, AnnotateHeadSizes())
    assert [entry.key for entry in model.proto.metadata_props] == ["mine", KEY]
    assert str(outcome.findings[-1]) == f"changed metadata {KEY}: the table of 4 layers"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"head_dim": 4}, r"past_key_values\.0\.key has head size 8, but config\.json gives 4"),
        ({"num_key_value_heads": 2}, r"past_key_values\.0\.key has KV heads 1, but config\.json gives 2"),
    ],
)
def test_a_concrete_size_that_contradicts_the_config_is_refused(
    config: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    refused(tmp_path, decoder(), AnnotateHeadSizes(), sentence, **config)


def test_a_cache_of_a_layer_that_is_not_there_or_of_another_rank_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    proto.graph.input.append(make_tensor_value_info("past_key_values.4.key", FLOAT, ["b", 1, "t", 8]))
    refused(
        tmp_path, proto, AnnotateHeadSizes(), r"past_key_values\.4\.key names layer 4, but config\.json has 4 layers"
    )
    proto = decoder()
    proto.graph.output[1].CopyFrom(make_tensor_value_info("present.0.key", FLOAT, None))
    refused(
        tmp_path,
        proto,
        AnnotateHeadSizes(),
        r"present\.0\.key is FLOAT; rank 4, \[batch, kv heads, tokens, head size\]",
    )


def test_a_graph_without_caches_points_to_rename_io(tmp_path: Path) -> None:
    from torture import TRAPS

    with pytest.raises(PassError, match=r"no past_key_values\.N\.key is in the interface") as raised:
        applied(tmp_path, TRAPS["plain"](), AnnotateHeadSizes())
    assert raised.value.hint == "run rename-io first"


def test_the_table_reads_back(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), AnnotateHeadSizes())
    assert read_layer_table(model) == arch().layers
    table = json.loads(model.proto.metadata_props[0].value)
    assert table["version"] == 1
    assert table["layers"][3] == {
        "layer": 3, "attention": "full", "head_size": 16, "kv_heads": 1, "owner": 1, "window": None,
    }  # fmt: skip
    assert table["layers"][0]["window"] == 64


def test_no_table_is_none(tmp_path: Path) -> None:
    assert read_layer_table(opened(tmp_path, decoder())) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a layer table"), ("[]", "is not a layer table"), ("{}", "is not a layer table"),
        ('{"version": 2, "layers": []}', "has version 2; 1 is known"),
        ('{"version": "1", "layers": []}', "has version '1'; 1 is known"),
        ('{"version": 1, "layers": 3}', "is not a layer table"),
        ('{"version": 1, "layers": [{"layer": 0}]}', "is not a layer table"),
        (layer_table(arch().layers).replace('"full"', '"half"'), "is not a layer table"),
        (layer_table(arch().layers).replace('"head_size":8', '"head_size":"8"'), "is not a layer table"),
        (layer_table(arch().layers).replace('"window":64', '"window":""'), "is not a layer table"),
        (layer_table(arch().layers).replace('"owner":1', '"owner":true'), "is not a layer table"),
        (layer_table(arch().layers).replace('"owner":1', '"owner":9'), "is not a layer table"),
        ("[" * 100_000, "is not a layer table"),
    ],
)  # fmt: skip
def test_a_table_of_another_form_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    model = opened(tmp_path, decoder())
    set_property(model.proto, KEY, text)
    with pytest.raises(ModelError, match=f"metadata {KEY} {sentence}"):
        read_layer_table(model)
