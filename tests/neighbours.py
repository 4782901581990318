"""Exports of neighbouring systems, by their interfaces: our own graphs under other inputs and outputs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto
from onnx.helper import make_node
from onnx.numpy_helper import from_array

from fixtures.build import graphs
from fixtures.precision import PRECISIONS, Reading
from fixtures.zoo import FIXTURES
from surgery.graph import copied

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-e2b"
INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def gemma3n(folder: Path) -> Path:
    """The interface of onnx-community/gemma-3n-E2B-it-ONNX: no attention_mask, no num_logits_to_keep, and a past and a
    present for every layer, borrowers included. Inside is tiny-e2b with heads of one size and random weights: how the
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


def _pass_a_cache_through(proto: ModelProto, layer: int, owner: int) -> None:
    graph = proto.graph
    for kind in ("key", "value"):
        past = copied(next(value for value in graph.input if value.name == f"past_key_values.{owner}.{kind}"))
        present = copied(next(value for value in graph.output if value.name == f"present.{owner}.{kind}"))
        past.name, present.name = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        graph.input.append(past)
        graph.output.append(present)
        graph.node.append(
            make_node("Identity", [f"present.{owner}.{kind}"], [present.name], f"{present.name}/Identity")
        )
