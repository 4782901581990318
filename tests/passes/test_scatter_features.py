"""scatter-features: placeholders read the encoders' features, bit for bit as numpy puts them there, or the run fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto
from onnx.helper import make_tensor_value_info
from places import TINY
from small import FLOAT, HIDDEN, INT64, Array, applied, embed_tokens, refused, run

from passes import ScatterFeatures
from passes.base import apply
from surgery.graph.model import Model

IMAGE, AUDIO = 29, 30
BOTH = ScatterFeatures(image=IMAGE, audio=AUDIO)
GRAPHS = TINY / "onnx"


def features(count: int, seed: int = 1, width: int = HIDDEN) -> Array:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def by_numpy(proto: ModelProto, ids: Array, images: Array, sounds: Array) -> Array:
    """The two-graph loop: what the card of the export does between the graphs."""
    embeds = run(proto, {"input_ids": ids})["inputs_embeds"]
    embeds[ids == IMAGE] = images
    embeds[ids == AUDIO] = sounds
    return embeds


@pytest.mark.parametrize(
    "ids",
    [
        [[1, IMAGE, IMAGE, IMAGE, 2, AUDIO, AUDIO, 3]],
        [[AUDIO, 5, IMAGE, AUDIO, IMAGE, 7, 8, IMAGE]],
        [[IMAGE, 1, 2, AUDIO], [3, IMAGE, AUDIO, AUDIO]],
        [[4, 5, 6]],
        [[9]],
        [[IMAGE]],
    ],
    ids=["runs", "mixed", "batch", "text", "decode", "an image and no word"],
)
def test_features_stand_where_numpy_puts_them(ids: list[list[int]], tmp_path: Path) -> None:
    tokens = np.array(ids, np.int64)
    images, sounds = features(int((tokens == IMAGE).sum())), features(int((tokens == AUDIO).sum()), 2)
    model, outcome = applied(tmp_path, embed_tokens(), BOTH)
    assert outcome.operators["ScatterND"] == 2
    given = {"input_ids": tokens, "image_features": images, "audio_features": sounds}
    found, before = run(model.proto, given), run(embed_tokens(), given)
    np.testing.assert_array_equal(found["inputs_embeds"], by_numpy(embed_tokens(), tokens, images, sounds), strict=True)
    np.testing.assert_array_equal(found["per_layer_inputs"], before["per_layer_inputs"], strict=True)


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_a_wrong_number_of_features_fails_and_writes_no_zeros(count: int, tmp_path: Path) -> None:
    model, _ = applied(tmp_path, embed_tokens(), ScatterFeatures(image=IMAGE))
    given = {"input_ids": np.array([[1, IMAGE, IMAGE, IMAGE]], np.int64), "image_features": features(count)}
    with pytest.raises(Exception, match="updates tensor should have shape equal to indices"):
        run(model.proto, given)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_placeholder_that_the_model_generates_keeps_its_embedding(rows: int, tmp_path: Path) -> None:
    """One token a row and no features: a step of decoding. A loop around the two graphs scatters nothing then."""
    model, _ = applied(tmp_path, embed_tokens(), BOTH)
    ids = np.array([[IMAGE], [AUDIO]][:rows], np.int64)
    given = {"input_ids": ids, "image_features": features(0), "audio_features": features(0)}
    expected = run(embed_tokens(), given)["inputs_embeds"]
    np.testing.assert_array_equal(run(model.proto, given)["inputs_embeds"], expected, strict=True)


def test_the_interface_gains_the_features_and_nothing_else(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, embed_tokens(), BOTH)
    assert [value.name for value in model.graph.input] == ["input_ids", "image_features", "audio_features"]
    assert [value.name for value in model.graph.output] == ["inputs_embeds", "per_layer_inputs"]
    assert [str(finding) for finding in outcome.findings] == [
        f"added image_features: graph input, FLOAT [n, {HIDDEN}], for each token {IMAGE} in turn",
        f"added audio_features: graph input, FLOAT [n, {HIDDEN}], for each token {AUDIO} in turn",
    ]


def test_a_second_run_finds_nothing_to_do(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, embed_tokens(), BOTH)
    again, (outcome,) = apply(model, [BOTH])
    assert not outcome.changed and again.proto == model.proto


def test_images_now_and_sound_later_is_both_at_once(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, embed_tokens(), ScatterFeatures(image=IMAGE))
    ids = np.array([[AUDIO, IMAGE, 3]], np.int64)
    given = {"input_ids": ids, "image_features": features(1), "audio_features": features(1, 2)}
    both, (outcome,) = apply(model, [BOTH])
    assert [finding.verb for finding in outcome.findings] == ["skipped", "added"]
    expected = by_numpy(embed_tokens(), ids, given["image_features"], given["audio_features"])
    np.testing.assert_array_equal(run(both.proto, given)["inputs_embeds"], expected)


def test_what_is_no_embedding_graph_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, embed_tokens(), ScatterFeatures(), "no placeholder token is given")
    refused(tmp_path, embed_tokens(), ScatterFeatures(image=7, audio=7), "image and audio are both token 7")
    unknown = embed_tokens()
    unknown.graph.output[0].CopyFrom(make_tensor_value_info("inputs_embeds", FLOAT, ["b", "s", "h"]))
    refused(tmp_path, unknown, BOTH, r"inputs_embeds is FLOAT \[b, s, h\]; floats .* with a number for the last")
    ranked = embed_tokens()
    ranked.graph.input[0].CopyFrom(make_tensor_value_info("input_ids", INT64, ["s"]))
    refused(tmp_path, ranked, BOTH, r"input_ids is INT64 \[s\]; token ids")
    taken = embed_tokens()
    taken.graph.node[0].output[0] = taken.graph.node[1].input[0] = "image_features"
    refused(tmp_path, taken, BOTH, "a value inside the graph is named 'image_features'")
    old = embed_tokens()
    old.opset_import[0].version = 15
    refused(tmp_path, old, BOTH, "needs opset 16, the model has 15")


@pytest.mark.parametrize("precision", ["", "_fp16", "_q4", "_q4f16", "_quantized"])
def test_every_precision_of_the_community_takes_features_of_float32(precision: str) -> None:
    model, _ = apply(Model.open(GRAPHS / f"embed_tokens{precision}.onnx"), [ScatterFeatures(image=113, audio=114)])
    declared = {value.name: value.type.tensor_type for value in model.graph.input}
    for name in ("image_features", "audio_features"):
        assert declared[name].elem_type == FLOAT and declared[name].shape.dim[1].dim_value == 64
