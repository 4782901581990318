"""Graphs that can be read and mean nothing: a pass refuses them in a sentence, or gives a sound graph."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import small
from limits import cpu_limit
from onnx import AttributeProto, ModelProto, TensorProto
from onnx.helper import make_node

from passes.base import apply
from passes.recipe import parse
from passes.registry import BUILT_IN
from surgery.errors import ModelError, SurgeryError
from surgery.graph.model import Model
from surgery.graph.operands import check_graph

Break = Callable[[ModelProto], None]
OPTIONS = {"scatter-features": "{image=5}", "mask-media-ids": "{image=5}", "fit-encoder": "{kind=image,hidden=16}"}
LATER = ["merge-embeddings,fold-logits-to-keep,rename-io,fuse-attention,slice-caches,to-fp16"]
RECIPES = [f"{name}{OPTIONS.get(name, '')}" for name in BUILT_IN] + LATER


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_export(tmp_path_factory.mktemp("broken") / "source")


def tried(proto: ModelProto, recipe: str, export: Path) -> None:
    """Whatever comes, it is a sentence or a graph that a second check takes."""
    embed = f"merge-embeddings{{embed={export / 'onnx/embed_tokens_q4.onnx'}}}"
    try:
        model = Model.from_proto(proto, export / "onnx/decoder_model_merged_q4.onnx", small.arch())
        check_graph(apply(model, parse(recipe.replace("merge-embeddings", embed)))[0])
    except SurgeryError as error:
        assert str(error).isprintable()


@functools.cache
def decoder() -> ModelProto:
    return small.decoder()


def changed(proto: ModelProto, rng: random.Random) -> None:
    """One change to one node, value or tensor, such that protobuf still reads the graph."""
    graph = proto.graph
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    value = rng.choice([*graph.input, *graph.output, *graph.value_info])
    names = [each.name for each in (*graph.input, *graph.initializer)]
    operators = [
        ("Constant", ""),
        ("Loop", ""),
        ("Attention", ""),
        *((node.op_type, node.domain) for node in graph.node),
    ]
    kind = rng.randrange(12)
    if kind == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(["", *names])
    elif kind == 1:
        del node.input[rng.randrange(len(node.input) + 1) :]
    elif kind == 2:
        node.input.extend(rng.choices(["", *names], k=3))
    elif kind == 3 and node.output:
        node.output[rng.randrange(len(node.output))] = ""
    elif kind == 4:
        node.output.insert(rng.randrange(len(node.output) + 1), "extra")
    elif kind == 5 and node.attribute:
        attribute = rng.choice(node.attribute)
        name = attribute.name
        attribute.Clear()
        attribute.name, attribute.type = name, rng.choice(AttributeProto.AttributeType.values())
    elif kind == 6:
        node.op_type, node.domain = rng.choice(operators)
    elif kind == 7:
        made = [name for name in node.output if name]
        graph.node.remove(node)
        graph.initializer.extend(TensorProto(name=n, data_type=1, dims=[1], raw_data=bytes(4)) for n in made)
    elif kind == 8:
        value.type.tensor_type.elem_type = rng.choice([0, 6, 7, 9, 10, 16, 99])
    elif kind == 9 and value.type.tensor_type.shape.dim:
        dims = value.type.tensor_type.shape.dim
        dims[rng.randrange(len(dims))].dim_value = rng.choice([0, 1, 3, -1, 2**62])
    elif kind == 10:
        tensor.data_type = rng.choice([0, 1, 7, 9, 10, 16, 22, 99])
    else:
        del tensor.dims[:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_change_anywhere_is_a_sentence_or_a_sound_graph(recipe: str, export: Path) -> None:
    for seed in range(6):
        proto = ModelProto()
        proto.CopyFrom(decoder())
        changed(proto, random.Random(f"{seed} {recipe}"))
        tried(proto, recipe, export)


# What has been found


def as_input(proto: ModelProto, name: str) -> None:
    """A value that a node gave comes from outside."""
    for node in proto.graph.node:
        node.output[:] = [f"was {name}" if each == name else each for each in node.output]
    proto.graph.input.extend(value for value in proto.graph.output if value.name == name)


def logits_from_outside(proto: ModelProto) -> None:
    as_input(proto, "logits")


def no_logits(proto: ModelProto) -> None:
    del proto.graph.output[0]


def embeddings_that_nothing_makes(proto: ModelProto) -> None:
    embeds = next(value for value in proto.graph.input if value.name == "inputs_embeds")
    proto.graph.input.remove(embeds)
    proto.graph.initializer.add(name="inputs_embeds", data_type=1, dims=[1, 1, 16], raw_data=bytes(64))


def one_core_less(proto: ModelProto) -> None:
    scores = next(node for node in proto.graph.node if node.name == "/model/layers.3/attn/manual/Scores")
    scores.op_type = "Add"


def one_core_more(proto: ModelProto) -> None:
    attended = make_node("Attention", ["inputs_embeds"] * 3, ["more"])
    proto.graph.node.append(attended)


def numbers_elsewhere(proto: ModelProto) -> None:
    constant = proto.graph.node.add(op_type="Constant", output=["far"])
    held = constant.attribute.add(name="value", type=AttributeProto.TENSOR).t
    held.data_type, held.data_location = TensorProto.FLOAT, TensorProto.EXTERNAL
    held.dims.append(1)
    held.external_data.add(key="location", value="far.onnx_data")


def float_of_another_dtype(proto: ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.INT64 and tensor.dims)
    tensor.data_type = TensorProto.FLOAT


def dtype_of_no_number(proto: ModelProto) -> None:
    next(value for value in proto.graph.input if value.name == "per_layer_inputs").type.tensor_type.elem_type = -1


def node_without_output(proto: ModelProto) -> None:
    del proto.graph.node[-1].output[:]
    del proto.graph.output[0]


def ring(proto: ModelProto) -> None:
    first, last = proto.graph.node[0], proto.graph.node[-2]
    first.input[0] = last.output[0]


FOUND = [
    logits_from_outside, no_logits, embeddings_that_nothing_makes, one_core_less, one_core_more, numbers_elsewhere,
    float_of_another_dtype, dtype_of_no_number, node_without_output, ring,
]  # fmt: skip


@pytest.mark.parametrize("break_it", FOUND)
def test_what_a_sweep_over_every_pass_has_found(break_it: Break, export: Path) -> None:
    for recipe in RECIPES:
        proto = ModelProto()
        proto.CopyFrom(decoder())
        break_it(proto)
        tried(proto, recipe, export)


# The check itself


def test_the_check_names_file_node_and_what_is_expected() -> None:
    proto = small.decoder()
    (cut,) = (node for node in proto.graph.node if node.op_type == "Slice" and "logits" in node.name)
    del cut.input[2:]
    with pytest.raises(
        ModelError, match=f"^a.onnx holds a broken graph: Slice node '{cut.name}' has 2 inputs; 3 to 5 "
    ):
        check_graph(Model(proto, Path("a.onnx")))


def test_the_check_is_linear_and_quick() -> None:
    """Twenty times the nodes of a decoder of 34 layers."""
    proto = small.decoder()
    last = "logits"
    for index in range(20_000):
        proto.graph.node.append(make_node("Add", [last, "nought"], [last := f"sum_{index}"], name=f"add_{index}"))
    with cpu_limit(3):
        check_graph(Model(proto, Path("a.onnx")))
