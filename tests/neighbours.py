"""Exports of neighbouring systems, by their interfaces: our own graphs under other inputs and outputs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array
from places import TINY

from fixtures.build import graphs
from fixtures.precision import PRECISIONS, Reading
from fixtures.zoo import FIXTURES
from surgery.graph.nodes import copied

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def gemma3n(folder: Path) -> Path:
    """The interface of onnx-community/gemma-3n-E2B-it-ONNX: no attention_mask, no num_logits_to_keep, and a past and a
    present for every layer, KV-shared layers included. Inside is tiny-e2b with heads of one size and random weights: how the
    other exporter writes Gemma 3n's layers is not known.
    """
    architecture = dataclasses.replace(FIXTURES["tiny-e2b"].architecture, global_head_dim=16)
    fixture = dataclasses.replace(FIXTURES["tiny-e2b"], architecture=architecture, checkpoint="")
    (folder / "onnx").mkdir(parents=True)
    for writer in graphs(fixture, PRECISIONS["fp32"], Reading(), fixture.weights()):
        writer.write(folder / "onnx")
    path = folder / "onnx" / "decoder_model_merged.onnx"
    proto = ModelProto.FromString(path.read_bytes())
    _without_mask_and_count(proto)
    for layer in range(architecture.num_owners, architecture.num_layers):
        _pass_a_cache_through(proto, layer, architecture.owner_of(layer))
    path.write_bytes(proto.SerializeToString())
    config = json.loads((TINY / "config.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if not k.startswith(("global", "num_global", "attention_k"))}
    text |= {"model_type": "gemma3n_text"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma3n", "text_config": text}))
    _side_files(folder)
    return folder


def _side_files(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)


def _without_mask_and_count(proto: ModelProto) -> None:
    """A mask of ones, as long as the past and the new tokens, and all logits: from inside the graph."""
    graph = proto.graph
    kept = [copied(value) for value in graph.input if value.name not in ("attention_mask", "num_logits_to_keep")]
    del graph.input[:]
    graph.input.extend(kept)
    graph.initializer.append(from_array(np.array(0), "num_logits_to_keep"))
    graph.initializer.append(from_array(np.array([1]), "one"))
    nodes = [
        make_node("Shape", ["inputs_embeds"], ["batch"], "mask/batch", start=0, end=1),
        make_node("Shape", ["inputs_embeds"], ["new"], "mask/new", start=1, end=2),
        make_node("Shape", ["past_key_values.0.key"], ["old"], "mask/old", start=2, end=3),
        make_node("Add", ["old", "new"], ["all"], "mask/all"),
        make_node("Concat", ["batch", "all"], ["mask_shape"], "mask/shape", axis=0),
        make_node("Expand", ["one", "mask_shape"], ["attention_mask"], "mask/ones"),
    ]
    held = [copied(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *held])
    for value in graph.output:
        if value.name == "logits":
            value.type.tensor_type.shape.dim[1].dim_param = "sequence_length"


def _pass_a_cache_through(proto: ModelProto, layer: int, kv_source: int) -> None:
    graph = proto.graph
    for kind in ("key", "value"):
        past = copied(next(value for value in graph.input if value.name == f"past_key_values.{kv_source}.{kind}"))
        present = copied(next(value for value in graph.output if value.name == f"present.{kv_source}.{kind}"))
        past.name, present.name = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        graph.input.append(past)
        graph.output.append(present)
        graph.node.append(
            make_node("Identity", [f"present.{kv_source}.{kind}"], [present.name], f"{present.name}/Identity")
        )


def mobius(folder: Path, *, flat_decoder: bool = True) -> Path:
    """The split form of mobius: `embedding` takes features of images too and gives per_layer_inputs of rank 3, each
    folder's data file is model.onnx.data, and the decoder keeps no count of logits. Inside is tiny-e2b.

    `flat_decoder` is as mobius has it; else the decoder takes rank 4, as the community's does.
    """
    fixture = FIXTURES["tiny-e2b"]
    writers = graphs(fixture, PRECISIONS["fp32"], Reading(), fixture.weights())
    for role, writer in zip(("embedding", "decoder"), writers, strict=True):
        (folder / role).mkdir(parents=True)
        writer.write(folder / role)
        (graph,) = (folder / role).glob("*.onnx")
        (data,) = (folder / role).glob("*_data")
        data.rename(folder / role / "model.onnx.data")
        proto = ModelProto.FromString(graph.read_bytes())
        graph.unlink()
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "model.onnx.data" if entry.key == "location" else entry.value
        if role == "embedding":
            _flat_output(proto)
            _image_features(proto, fixture.architecture.image_token_id)
        elif flat_decoder:
            _flat_input(proto, fixture.architecture.num_layers)
        (folder / role / "model.onnx").write_bytes(proto.SerializeToString())
    shutil.copyfile(TINY / "config.json", folder / "config.json")
    _side_files(folder)
    return folder


def _flat_output(proto: ModelProto) -> None:
    graph = proto.graph
    reshape = next(node for node in graph.node if "per_layer_inputs" in node.output)
    scaled = next(node for node in graph.node if reshape.input[0] in node.output)
    scaled.output[0] = "per_layer_inputs"
    graph.node.remove(reshape)
    output = next(value for value in graph.output if value.name == "per_layer_inputs")
    output.CopyFrom(make_tensor_value_info("per_layer_inputs", FLOAT, ["batch", "sequence", 320]))


def _flat_input(proto: ModelProto, layers: int) -> None:
    graph = proto.graph
    for node in graph.node:
        node.input[:] = ["per_layer_inputs_4d" if name == "per_layer_inputs" else name for name in node.input]
    graph.initializer.append(from_array(np.array([0, 0, layers, 32]), "per_layer_shape"))
    held = [copied(node) for node in graph.node]
    del graph.node[:]
    graph.node.append(make_node("Reshape", ["per_layer_inputs", "per_layer_shape"], ["per_layer_inputs_4d"], "unpack"))
    graph.node.extend(held)
    given = next(value for value in graph.input if value.name == "per_layer_inputs")
    given.CopyFrom(make_tensor_value_info("per_layer_inputs", FLOAT, ["batch", "sequence", 320]))


def _image_features(proto: ModelProto, token: int) -> None:
    """Rows of image_features replace the embeddings of image placeholders, counted row by row; the row of a placeholder
    without features is zero.
    """
    graph = proto.graph
    scaled = next(node for node in graph.node if "inputs_embeds" in node.output)
    scaled.output[0] = "text_embeds"
    for name, value in (("image_token", np.array(token)), ("axis", np.array(1)), ("last", np.array([-1]))):
        graph.initializer.append(from_array(value, name))
    graph.initializer.append(from_array(np.zeros((1, 64), np.float32), "dummy_row"))
    graph.input.append(make_tensor_value_info("image_features", FLOAT, ["num_image_tokens", 64]))
    graph.node.extend(
        [
            make_node("Equal", ["input_ids", "image_token"], ["is_image"], "is_image"),
            make_node("Cast", ["is_image"], ["ones"], "ones", to=INT64),
            make_node("CumSum", ["ones", "axis"], ["count"], "count"),
            make_node("Mul", ["count", "ones"], ["row"], "row"),
            make_node("Shape", ["image_features"], ["rows"], "rows", start=0, end=1),
            make_node("Min", ["row", "rows"], ["row_there"], "row_there"),
            make_node("Concat", ["dummy_row", "image_features"], ["with_dummy"], "with_dummy", axis=0),
            make_node("Gather", ["with_dummy", "row_there"], ["features"], "features"),
            make_node("Unsqueeze", ["is_image", "last"], ["everywhere"], "everywhere"),
            make_node("Where", ["everywhere", "features", "text_embeds"], ["inputs_embeds"], "inputs_embeds"),
        ]
    )
