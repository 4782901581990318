"""flatten-per-layer-inputs: rank 3 in the interface of both graphs, the same bytes between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small
from onnx.helper import make_tensor_value_info
from small import FLOAT, LAYERS, PER_LAYER, applied, decoder, embed_tokens, feeds, refused, run, run_pair

from passes import FlattenPerLayerInputs
from passes.base import apply
from surgery.graph.tensor_types import tensor_type


@pytest.mark.parametrize("batch, total, past", [(1, 6, 0), (1, 5, 2), (2, 4, 3)], ids=["prefill", "chunk", "decode"])
def test_the_pair_computes_what_it_did(batch: int, total: int, past: int, tmp_path: Path) -> None:
    embed, decode = (
        applied(tmp_path / "e", embed_tokens(), FlattenPerLayerInputs())[0],
        applied(tmp_path / "d", decoder(), FlattenPerLayerInputs())[0],
    )
    given = feeds(np.ones((batch, total), np.int64), past)
    truth, found = run_pair(embed_tokens(), decoder(), given), run_pair(embed.proto, decode.proto, given)
    between = run(embed.proto, given)["per_layer_inputs"]
    assert between.shape == (batch, total - past, LAYERS * PER_LAYER)
    assert between.tobytes() == run(embed_tokens(), given)["per_layer_inputs"].tobytes()
    for name, values in truth.items():
        np.testing.assert_array_equal(found[name], values, strict=True, err_msg=name)


def test_layers_and_size_keep_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "PER_LAYER", 6)  # not as many as layers
    decode = applied(tmp_path, decoder(), FlattenPerLayerInputs())[0].proto
    given = feeds(np.ones((1, 5), np.int64))
    embedded = run(embed_tokens(), given)
    flat = {**embedded, "per_layer_inputs": embedded["per_layer_inputs"].reshape(1, 5, -1)}
    expected = run(decoder(), given | embedded)["logits"]
    np.testing.assert_array_equal(run(decode, given | flat)["logits"], expected, strict=True)


def test_both_interfaces_declare_it_with_a_number_last_and_in_its_place(tmp_path: Path) -> None:
    embed, outcome = applied(tmp_path / "e", embed_tokens(), FlattenPerLayerInputs())
    decode, _ = applied(tmp_path / "d", decoder(), FlattenPerLayerInputs())
    flat = LAYERS * PER_LAYER
    assert str(tensor_type(embed.graph.output[1])) == f"FLOAT [batch, tokens, {flat}]"
    places = [value.name for value in decode.graph.input]
    assert places == [value.name for value in decoder().graph.input]
    assert str(tensor_type(decode.graph.input[places.index("per_layer_inputs")])) == (
        f"FLOAT [batch_size, sequence_length, {flat}]"
    )
    assert [str(finding) for finding in outcome.findings] == [
        f"changed per_layer_inputs: graph output, FLOAT [batch, tokens, {LAYERS}, {PER_LAYER}]; "
        f"it is [batch, tokens, {flat}] now"
    ]


@pytest.mark.parametrize("proto", [embed_tokens, decoder])
def test_a_second_run_finds_nothing_to_do(proto: object, tmp_path: Path) -> None:
    model, _ = applied(tmp_path, proto(), FlattenPerLayerInputs())  # type: ignore[operator]
    again, (outcome,) = apply(model, [FlattenPerLayerInputs()])
    assert not outcome.changed and again.proto == model.proto


def test_a_model_without_per_layer_inputs_is_left_alone(tmp_path: Path) -> None:
    _, outcome = applied(tmp_path, decoder(per_layer=False), FlattenPerLayerInputs())
    assert not outcome.changed and outcome.findings[0].reason == "the graph neither takes nor gives it"


@pytest.mark.parametrize("shape", [["b", "s", LAYERS, "size"], ["b", "s", "layers", PER_LAYER], ["b", "s"], None])
def test_unknown_sizes_are_refused(shape: list[str | int] | None, tmp_path: Path) -> None:
    proto = embed_tokens()
    proto.graph.output[1].CopyFrom(make_tensor_value_info("per_layer_inputs", FLOAT, shape))
    refused(
        tmp_path, proto, FlattenPerLayerInputs(), r"\[batch, sequence, layers, size\] with numbers for layers and size"
    )
