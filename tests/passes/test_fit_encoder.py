"""fit-encoder: what the runtime feeds comes in, what the encoder computed goes out, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, load
from onnx.helper import make_model, make_node, make_operatorsetid, make_tensor_value_info
from onnx.numpy_helper import from_array
from places import TINY
from small import Array, graph_of, refused, run

from passes import FitEncoder
from passes.base import Outcome, apply
from surgery.graph.model import Model
from surgery.graph.renaming import rename

GRAPHS = TINY / "onnx"
IMAGE, AUDIO = FitEncoder("image", 64, 630), FitEncoder("audio", 64)
FLOAT, HALF, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
MOST = 72


def encoder(name: str) -> ModelProto:
    """An encoder of the fixture with its weights inside, so that it can be changed and run from memory."""
    return load(GRAPHS / f"{name}_encoder.onnx")


def fitted(folder: Path, proto: ModelProto, step: FitEncoder) -> tuple[ModelProto, Outcome]:
    path = folder / "encoder.onnx"
    path.write_bytes(proto.SerializeToString())
    model, (outcome,) = apply(Model.open(path), [step])
    again, (second,) = apply(model, [step])
    assert not second.changed and again.proto == model.proto, "a second run finds nothing to do"
    return model.proto, outcome


def image(columns: int = 6, rows: int = 3, count: int = 1) -> dict[str, Array]:
    across, down = np.meshgrid(np.arange(columns), np.arange(rows))
    places = np.stack([across, down], -1).reshape(1, -1, 2).astype(np.int64)
    values = np.random.default_rng(5).random((count, columns * rows, 768), dtype=np.float32)
    return {"pixel_values": values, "pixel_position_ids": np.repeat(places, count, axis=0)}


def speech(frames: int = 50) -> dict[str, Array]:
    values = np.random.default_rng(6).standard_normal((1, frames, 128)).astype(np.float32)
    return {"input_features": values, "input_features_mask": np.ones((1, frames), np.bool_)}


def declare(graph: GraphProto, name: str, dtype: int, shape: list[int | str]) -> None:
    for value in (*graph.input, *graph.output):
        if value.name == name:
            value.CopyFrom(make_tensor_value_info(name, dtype, shape))


def interface(proto: ModelProto) -> dict[str, tuple[int, list[int | str]]]:
    def shape(value: ValueInfoProto) -> list[int | str]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    values = (*proto.graph.input, *proto.graph.output)
    return {value.name: (value.type.tensor_type.elem_type, shape(value)) for value in values}


@pytest.mark.parametrize("suffix", ["", "_fp16", "_q4", "_q4f16", "_quantized"])
def test_the_communitys_encoders_are_left_alone(suffix: str) -> None:
    for name, step in (("vision", IMAGE), ("audio", AUDIO)):
        _, (outcome,) = apply(Model.open(GRAPHS / f"{name}_encoder{suffix}.onnx"), [step])
        assert not outcome.changed and outcome.findings[0].reason == "the runtime feeds the encoder as it is"


def test_other_names_become_the_runtimes(tmp_path: Path) -> None:
    proto = encoder("vision")
    rename(proto.graph, {"pixel_values": "pixels", "pixel_position_ids": "image_position_ids", "image_features": "out"})
    found, outcome = fitted(tmp_path, proto, IMAGE)
    assert list(interface(found)) == ["pixel_values", "pixel_position_ids", "image_features"]
    assert [f.subject for f in outcome.findings] == ["pixels", "image_position_ids", "out"]
    np.testing.assert_array_equal(
        run(found, image())["image_features"], run(encoder("vision"), image())["image_features"]
    )


def test_features_in_rows_of_images_become_one_list(tmp_path: Path) -> None:
    """Without removal of padding an encoder gives [images, tokens, hidden]."""
    proto = encoder("vision")
    del proto.graph.node[-1]
    rows = proto.graph.node[-2]
    assert rows.op_type == "Reshape" and proto.graph.node[-1].op_type == "Reshape"
    projected = rows.input[0]
    proto.graph.node.append(make_node("Identity", [projected], ["image_features"]))
    declare(proto.graph, "image_features", FLOAT, ["num_images", "tokens", 64])
    found, outcome = fitted(tmp_path, proto, IMAGE)
    assert interface(found)["image_features"] == (FLOAT, ["num_image_tokens", 64])
    assert outcome.operators == {"Reshape": 1}
    features = run(found, image(count=2))["image_features"]
    np.testing.assert_array_equal(features, run(encoder("vision"), image(count=2))["image_features"], strict=True)


@pytest.mark.parametrize("name, step", [("vision", IMAGE), ("audio", AUDIO)])
def test_float16_at_the_interface_becomes_float32(name: str, step: FitEncoder, tmp_path: Path) -> None:
    proto, given = encoder(name), image() if name == "vision" else speech()
    values, features = step._inputs[0], step._features
    shapes = interface(proto)
    inner = {values: "/inner/values", features: "/inner/features"}
    rename(proto.graph, inner)
    proto.graph.node.insert(0, make_node("Cast", [values], [inner[values]], to=FLOAT))
    proto.graph.node.append(make_node("Cast", [inner[features]], [features], to=HALF))
    for value in (*proto.graph.input, *proto.graph.output):
        for new, old in inner.items():
            if value.name == old:
                value.CopyFrom(make_tensor_value_info(new, HALF, shapes[new][1]))
    found, outcome = fitted(tmp_path, proto, step)
    assert outcome.operators == {"Cast": 2} and interface(found) == shapes
    half = {**given, values: given[values].astype(np.float16)}
    expected = run(proto, half)[features].astype(np.float32)
    np.testing.assert_array_equal(run(found, given)[features], expected, strict=True)


def test_a_fixed_number_of_patches_is_filled_up(tmp_path: Path) -> None:
    proto = encoder("vision")
    declare(proto.graph, "pixel_values", FLOAT, ["num_images", MOST, 768])
    declare(proto.graph, "pixel_position_ids", INT64, ["num_images", MOST, 2])
    found, outcome = fitted(tmp_path, proto, FitEncoder("image", 64, MOST))
    assert outcome.operators["Pad"] == 2
    assert interface(found)["pixel_values"] == (FLOAT, ["num_images", "num_patches", 768])
    with pytest.raises(Exception, match="Got: 18 Expected: 72"):
        run(proto, image())
    for count, columns in ((1, 6), (2, 3), (1, 24)):
        given = image(columns, 3, count)
        features, expected = (run(model, given)["image_features"] for model in (found, encoder("vision")))
        assert features.shape == expected.shape
        np.testing.assert_allclose(features, expected, atol=1e-6)  # products of more rows add in another order


def test_what_fills_up_is_zeros_at_places_that_are_none(tmp_path: Path) -> None:
    """An encoder that gives back what it is fed: patches and their places, side by side, behind the others."""
    nodes = [
        make_node("Cast", ["pixel_position_ids"], ["places"], to=FLOAT),
        make_node("Concat", ["pixel_values", "places"], ["whole"], axis=2),
        make_node("Reshape", ["whole", "rows"], ["image_features"]),
    ]
    shapes = {"pixel_values": (FLOAT, ["n", 4, 2]), "pixel_position_ids": (INT64, ["n", 4, 2])}
    proto = make_model(graph_of(*nodes, inputs=shapes, outputs={"image_features": (FLOAT, ["m", 4])}), ir_version=10,
                       opset_imports=[make_operatorsetid("", 21)])  # fmt: skip
    proto.graph.initializer.append(from_array(np.array([-1, 4]), "rows"))
    found, _ = fitted(tmp_path, proto, FitEncoder("image", 4, 4))
    values, places = np.array([[[1, 2], [3, 4]]], np.float32), np.array([[[5, 6], [7, 8]]])
    given = run(found, {"pixel_values": values, "pixel_position_ids": places})["image_features"]
    np.testing.assert_array_equal(given, [[1, 2, 5, 6], [3, 4, 7, 8], [0, 0, -1, -1], [0, 0, -1, -1]])


def test_features_of_sound_may_have_three_axes(tmp_path: Path) -> None:
    proto = encoder("audio")
    rename(proto.graph, {"audio_features": "flat"})
    proto.graph.node.append(make_node("Unsqueeze", ["flat", "first"], ["audio_features"]))
    proto.graph.initializer.append(from_array(np.array([0]), "first"))
    proto.graph.output[0].CopyFrom(make_tensor_value_info("audio_features", FLOAT, [1, "tokens", 64]))
    found, outcome = fitted(tmp_path, proto, AUDIO)
    assert not outcome.changed and interface(found)["audio_features"] == (FLOAT, [1, "tokens", 64])


def test_a_name_that_an_inner_value_has_is_refused(tmp_path: Path) -> None:
    proto = encoder("vision")
    rename(proto.graph, {"pixel_values": "pixels"})
    rename(proto.graph, {proto.graph.node[0].output[0]: "pixel_values"})
    refused(tmp_path, proto, IMAGE, "a value inside the graph is named 'pixel_values', which the interface needs")


def test_a_mask_of_numbers_becomes_one_of_truth_values(tmp_path: Path) -> None:
    proto = encoder("audio")
    rename(proto.graph, {"input_features_mask": "/inner/mask"})
    proto.graph.input[1].CopyFrom(make_tensor_value_info("input_features_mask", INT64, ["batch_size", "num_frames"]))
    proto.graph.node.insert(0, make_node("Cast", ["input_features_mask"], ["/inner/mask"], to=BOOL))
    found, outcome = fitted(tmp_path, proto, AUDIO)
    assert outcome.operators == {"Cast": 1} and interface(found)["input_features_mask"][0] == BOOL
    expected = run(encoder("audio"), speech())["audio_features"]
    np.testing.assert_array_equal(run(found, speech())["audio_features"], expected, strict=True)


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    flat = encoder("vision")
    declare(flat.graph, "pixel_values", FLOAT, ["num_patches", 768])
    refused(
        tmp_path, flat, IMAGE, r"pixel_values is FLOAT \[num_patches, 768\]; \[images, patches, values of a patch\]"
    )
    few = encoder("vision")
    declare(few.graph, "pixel_values", FLOAT, ["num_images", 540, 768])
    refused(tmp_path, few, IMAGE, r"pixel_values is FLOAT \[num_images, 540, 768\]: an image may have 630 patches")
    wide = encoder("vision")
    refused(tmp_path, wide, FitEncoder("image", 128, 630), r"\[tokens, 128\] is expected, as wide as the text model")
    third = encoder("vision")
    third.graph.input.append(make_tensor_value_info("num_soft_tokens", INT64, ["num_images"]))
    refused(tmp_path, third, IMAGE, "this one takes pixel_values .* num_soft_tokens INT64")
    fixed = encoder("audio")
    declare(fixed.graph, "input_features", FLOAT, [1, 3000, 128])
    refused(tmp_path, fixed, AUDIO, "it takes 3000 frames and no other number")
    strange = encoder("audio")
    declare(strange.graph, "input_features_mask", BOOL, ["num_frames"])
    refused(tmp_path, strange, AUDIO, r"input_features_mask is BOOL \[num_frames\]; BOOL \[1, frames\] is expected")
    nameless = encoder("audio")
    rename(nameless.graph, {"audio_features": "hidden"})
    nameless.graph.output.append(make_tensor_value_info("more", FLOAT, [1]))
    nameless.graph.node.append(make_node("Identity", ["input_features"], ["more"]))
    refused(tmp_path, nameless, AUDIO, "audio_features are expected; the outputs are hidden, more")
