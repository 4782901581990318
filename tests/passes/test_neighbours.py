"""Exports of neighbouring systems: what is theirs is understood, and what the runtime cannot do with them is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import neighbours
import numpy as np
import onnxruntime_genai as og
import pytest
from exhaustive import in_full
from folders import planned, repack
from generating import before_end, generated
from onnx import ModelProto, TensorProto
from onnx.helper import make_tensor_value_info
from places import ROOT

import fixtures
from passes.presets import compatible, fast, per_layer_tables
from passes.recipe import Recipe, recipe_text
from surgery.architecture import architecture
from surgery.errors import ExportError
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.graph.renaming import rename
from surgery.source.export import open_export
from surgery.verify import Request, prove_folder

# Gemma 3n


def test_a_gemma3n_config_and_its_defaults() -> None:
    arch = architecture({"model_type": "gemma3n", "text_config": {"num_hidden_layers": 30, "hidden_size": 2048}})
    assert arch.family == "gemma3n" and arch.vocab_size == 262400 and arch.per_layer_input_size == 256
    assert [layer.index for layer in arch.layers if layer.attention == "full"] == [4, 9, 14, 19, 24, 29]
    assert {(layer.head_size, layer.kv_heads) for layer in arch.layers} == {(256, 2)}
    assert len(arch.kv_shared_layers) == 15 and arch.context_length == 32768


@pytest.fixture(scope="module")
def gemma3n(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return neighbours.gemma3n(tmp_path_factory.mktemp("gemma3n") / "source")


def test_of_the_passes_those_that_apply_to_gemma3n_apply(gemma3n: Path) -> None:
    model, outcomes = planned(gemma3n, "fp32")
    said = {outcome.name: outcome.findings[-1] for outcome in outcomes}
    assert said["merge-embeddings"].verb != "skipped"
    assert str(said["fold-logits-to-keep"]) == "skipped num_logits_to_keep: the graph does not take it"
    assert str(said["expand-shared-kv"]) == "skipped KV-shared layers: each has its pair already"
    inputs = {value.name for value in model.graph.input}
    assert {"input_ids", "position_ids", "past_key_values.9.value"} < inputs and "attention_mask" not in inputs


def test_genai_runs_gemma3n_under_another_name_and_every_gate_but_the_padded_batch_is_asked(
    gemma3n: Path, tmp_path: Path
) -> None:
    export = open_export(gemma3n)
    pair = export.pair("fp32")
    build_folder(export, pair, compatible(pair.embed), tmp_path / "out")
    report = prove_folder(tmp_path / "out", pair, provider="cpu", request=Request(scope="light"))
    assert report.passed
    assert {case.name: case.reason for case in report.skipped}["ragged-batch"].startswith(
        "the graph takes no attention"
    )
    settings = tmp_path / "out" / "genai_config.json"
    settings.write_text(settings.read_text().replace("gemma3_text", "gemma3n_text"))
    with pytest.raises(Exception, match=r"Unsupported model_type in config\.json: gemma3n_text"):
        og.Model(str(tmp_path / "out"))


# mobius


@pytest.mark.parametrize("flat_decoder", [in_full(True), False], ids=["rank 3 and 3", "rank 3 and 4"])
def test_the_split_form_is_a_source(flat_decoder: bool, tmp_path: Path) -> None:
    """Its graphs have inputs for images, which a merged graph for text gets none of, and data files of one name."""
    repack(neighbours.mobius(tmp_path / "source", flat_decoder=flat_decoder), tmp_path / "out", "split")
    model = Model.open(tmp_path / "out" / "model.onnx")
    assert not {value.name for value in model.graph.input} & {"image_features", "per_layer_inputs", "inputs_embeds"}
    assert [node.op_type for node in model.graph.node].count("Reshape") > 0
    with np.load(ROOT / "fixtures" / "data" / "tiny_e2b_ref.npz") as expected:
        for prompt in range(6):
            wanted = [int(token) for token in expected[f"p{prompt}_tokens"]]
            assert generated(tmp_path / "out", expected[f"p{prompt}_ids"], len(wanted)) == before_end(wanted)


@pytest.mark.parametrize("flat_decoder", [True, in_full(False)], ids=["rank 3 and 3", "rank 3 and 4"])
def test_the_split_form_is_proven_against_itself(flat_decoder: bool, tmp_path: Path) -> None:
    export = open_export(neighbours.mobius(tmp_path / "source", flat_decoder=flat_decoder))
    pair = export.pair("split")
    build_folder(export, pair, (*compatible(pair.embed), *per_layer_tables("split")), tmp_path / "out")
    report = prove_folder(tmp_path / "out", pair, provider="cpu", request=Request(scope="light"))
    assert report.passed


def test_a_package_without_a_decoder_is_no_split_form(tmp_path: Path) -> None:
    source = neighbours.mobius(tmp_path / "source")
    (source / "decoder" / "model.onnx").unlink()
    with pytest.raises(ExportError, match=r"has no \.onnx file"):
        open_export(source)


# Other inputs of the decoder


def renamed(proto: ModelProto) -> None:
    rename(proto.graph, {"attention_mask": "mask", "position_ids": "positions"})


def with_ids(proto: ModelProto) -> None:
    """The number of new tokens is that of the ids, which the decoder takes beside the embeddings."""
    proto.graph.input.append(make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]))
    for node in proto.graph.node:
        if node.name == "/model/shared_dims/root_input/Shape":
            node.input[0] = "input_ids"


@pytest.mark.parametrize(
    ("preset", "change"),
    [(compatible, renamed), (fast, with_ids), in_full(compatible, with_ids), in_full(fast, renamed)],
)
def test_a_decoder_with_other_token_inputs_is_repacked_and_proven(
    change: Callable[[ModelProto], None], preset: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    fixtures.build("tiny-e2b", "fp32", tmp_path / "source")
    pair = open_export(tmp_path / "source").pair("fp32")
    proto = ModelProto.FromString(pair.decoder.read_bytes())
    change(proto)
    pair.decoder.write_bytes(proto.SerializeToString())
    export = open_export(tmp_path / "source")
    recipe = preset(pair.embed)
    build_folder(export, pair, recipe, tmp_path / "out", recipe_text=recipe_text(recipe))
    report = prove_folder(tmp_path / "out", pair, provider="cpu", request=Request(scope="light"))
    assert [gate for gate in report.gates if not gate.passed and gate.section != "manifest"] == []
    assert report.parity is not None and report.parity.continuations
