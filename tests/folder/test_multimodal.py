"""The folder for text, images and sound: GenAI's own processor and pipeline on a real PNG and WAV, against the loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from exhaustive import in_full
from onnx.helper import make_graph, make_node
from onnx.numpy_helper import from_array
from places import TINY
from signing import sign

import fixtures
from fixtures.precision import Reading
from passes.presets import compatible, fast, multimodal
from passes.recipe import Recipe, recipe_text
from surgery.choices import Modality
from surgery.compare import compare, open_subjects
from surgery.compare.folder_report import planned_report
from surgery.errors import ExportError, FolderError, RequestError, SurgeryError
from surgery.folder.building import Repacked, build_folder
from surgery.folder.inspection import FolderInspection, inspect_path
from surgery.folder.multimodal import GraphPlan, check_export, most_patches, read_modalities
from surgery.runtime.conversation import ChatSettings, Turn, open_conversation
from surgery.runtime.genai import GenAI
from surgery.source.export import EMBED, ENCODERS, Export, GraphPair, open_export
from surgery.verify import Request, prove_folder
from surgery.verify.media_samples import sample_picture, sample_sound
from surgery.verify.report import Gate, Report

DATA = TINY.parent / "data"
BOTH: tuple[Modality, ...] = ("image", "audio")


def write(
    export: Export, target: Path, precision: str = "q4", modalities: Sequence[Modality] = BOTH, layout: str = "aliased"
) -> Repacked[None]:
    pair = export.pair(precision)
    decoder, parts, recorded = recipes_of(export, pair, modalities, layout)
    return build_folder(export, pair, decoder, target, media=parts, recipe_text=recorded)


def recipes_of(
    export: Export, pair: GraphPair, modalities: Sequence[Modality] = BOTH, layout: str = "aliased"
) -> tuple[Recipe, list[GraphPlan], dict[str, str]]:
    tokens = {modality: export.placeholder(modality) for modality in modalities}
    recipe = fast(pair.embed) if layout == "fast" else compatible(pair.embed, layout)  # type: ignore[arg-type]
    recipes = multimodal(recipe, tokens, export.architecture.hidden_size, most_patches(export))
    sources = {EMBED: pair.embed, **{ENCODERS[modality]: pair.encoder(modality) for modality in modalities}}
    parts = [GraphPlan(role, path, recipes[role]) for role, path in sources.items()]
    return recipes["decoder_model_merged"], parts, {role: recipe_text(recipe) for role, recipe in recipes.items()}


def proven(folder: Path, source: GraphPair, **request: object) -> Report:
    return prove_folder(sign(folder), source, request=Request(**{"scope": "light", **request}))  # type: ignore[arg-type]


def media_gates(report: Report) -> dict[str, Gate]:
    return {gate.name: gate for gate in report.section("media")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The q4 folder; a test that changes it takes a copy."""
    target = tmp_path_factory.mktemp("media") / "out"
    write(open_export(TINY), target)
    return target


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "mine"))


def test_every_gate_passes_at_no_difference_with_24_tokens(folder: Path) -> None:
    report = proven(folder, open_export(TINY).pair("q4"), scope="full", tokens=24)
    assert report.passed, report.failed
    gates = media_gates(report)
    assert list(gates) == [
        "padding of an image leaves no tokens", "image", "audio", "image and audio", "two images",
        "two images of different sizes", "image, in chunks", "a wrong number of images is an error",
    ]  # fmt: skip
    prompts = [gate for gate in gates.values() if gate.option == "logits"]
    assert len(prompts) == 6 and all(gate.found == 0 and gate.threshold == 0 for gate in prompts)
    assert all(gate.detail.startswith("24 tokens after") for gate in prompts)


@pytest.mark.parametrize("precision", [*map(in_full, ("fp32", "fp16")), "q4f16", in_full("quantized")])
def test_every_precision_passes(precision: str, tmp_path: Path) -> None:
    write(open_export(TINY), tmp_path / "out", precision, layout="unique")
    report = proven(tmp_path / "out", open_export(TINY).pair(precision))
    assert report.passed, report.failed
    assert {"image", "image and audio", "two images of different sizes"} <= media_gates(report).keys()


def test_fast_attention_passes(tmp_path: Path) -> None:
    write(open_export(TINY), tmp_path / "out", layout="fast")
    report = proven(tmp_path / "out", open_export(TINY).pair("q4"), scope="full")
    assert report.passed, report.failed
    assert len(media_gates(report)) == 8


def test_the_runtime_gives_the_logits_of_transformers(source: Path, tmp_path: Path) -> None:
    """Gemma4ForConditionalGeneration with the fixture's text weights, on the same PNG and WAV; its towers' features are
    put in as constants (validation/reference_media.py). The prompt's ids come from GenAI's own processor.
    """
    with np.load(DATA / "tiny_e2b_media_ref.npz") as stored:
        expected = {name: stored[name] for name in stored.files}
    for modality, stem in ENCODERS.items():
        constant = expected[f"{modality}_features"]
        path = source / "onnx" / f"{stem}.onnx"
        model = onnx.load(path, load_external_data=False)
        model.graph.CopyFrom(
            make_graph(
                [make_node("Identity", ["features"], [f"{modality}_features"])],
                "constant",
                model.graph.input,
                model.graph.output,
                [from_array(constant, "features")],
            )
        )
        onnx.save(model, path)
    write(open_export(source), tmp_path / "out", "fp32")
    (tmp_path / "a.png").write_bytes(sample_picture(96, 64))
    (tmp_path / "b.wav").write_bytes(sample_sound(1.0))
    genai = GenAI(tmp_path / "out", "cpu")
    text = "<bos><|turn>user\n<|image|><|audio|>hello, what is this?<turn|>\n<|turn>model\n"
    prepared = genai.prepare(text, [tmp_path / "a.png"], [tmp_path / "b.wav"])
    np.testing.assert_array_equal(prepared.arrays["input_ids"][0], expected["ids"])
    logits, tokens = genai.continued(prepared, len(expected["tokens"]))
    np.testing.assert_allclose(logits, expected["prefill_logits"], atol=1e-4)
    assert tokens == expected["tokens"].tolist()


def test_images_without_sound(tmp_path: Path) -> None:
    write(open_export(TINY), tmp_path / "out", modalities=("image",))
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["speech"] == {"config_filename": ""}
    assert not (tmp_path / "out" / "audio_encoder.onnx").exists()
    report = proven(tmp_path / "out", open_export(TINY).pair("q4"))
    assert report.passed, report.failed
    assert "image" in media_gates(report) and "image and audio" not in media_gates(report)


def test_an_export_that_masks_no_placeholder_gets_masks(tmp_path: Path) -> None:
    """The reference reads row 0 there as transformers does, so that a missing mask would be a difference."""
    fixtures.build("tiny-e2b", "fp32", tmp_path / "source", reading=Reading(mask_placeholders=False))
    export = open_export(tmp_path / "source")
    write(export, tmp_path / "out", "fp32")
    gates = media_gates(proven(tmp_path / "out", export.pair("fp32")))
    assert len(gates) == 5 and all(gate.passed for gate in gates.values())


def test_what_the_folder_holds(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"model.onnx", "embed_tokens.onnx", "vision_encoder.onnx", "audio_encoder.onnx", "README.md"} <= names
    assert (folder / "processor_config.json").read_bytes() == (TINY / "processor_config.json").read_bytes()
    image = json.loads((folder / "image_processor.json").read_text())["processor"]["transforms"][1]["operation"]
    assert image["attrs"] == {"patch_size": 16, "max_soft_tokens": 70, "pooling_kernel_size": 3}
    mel = json.loads((folder / "audio_processor.json").read_text())["feature_extraction"]["sequence"][1]["operation"]
    assert (mel["attrs"]["frame_length_ms"], mel["attrs"]["hop_length_ms"]) == (20.0, 10.0)
    for sentence in ("several images", "no video", "at most one sound"):
        assert sentence in (folder / "README.md").read_text()
    for stem in ("decoder_model_merged", "embed_tokens", "vision_encoder", "audio_encoder"):
        data = f"{'model' if stem == 'decoder_model_merged' else stem}.onnx_data"
        assert (folder / data).read_bytes() == (TINY / "onnx" / f"{stem}_q4.onnx_data").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["recipe"]["embed_tokens"] == (
        "scatter-features{image=113,audio=114},mask-media-ids{image=113,audio=114},flatten-per-layer-inputs"
    )
    assert {"onnx/vision_encoder_q4.onnx", "onnx/audio_encoder_q4.onnx"} <= manifest["source"]["files"].keys()


def test_encoders_that_fit_are_as_they_were(folder: Path) -> None:
    for stem in ENCODERS.values():
        theirs = onnx.load(TINY / "onnx" / f"{stem}_q4.onnx", load_external_data=False)
        for tensor in theirs.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{stem}.onnx_data"
        assert onnx.load(folder / f"{stem}.onnx", load_external_data=False) == theirs


def test_inspect_shows_all_graphs(folder: Path) -> None:
    found = inspect_path(folder)
    assert isinstance(found, FolderInspection)
    assert [graph.path.name for graph in found.graphs] == [
        "model.onnx", "embed_tokens.onnx", "audio_encoder.onnx", "vision_encoder.onnx",
    ]  # fmt: skip
    assert {"vision", "speech", "embedding"} <= found.to_dict().keys()


def test_diff_compares_all_graphs_and_a_plan_is_what_comes_of_it(folder: Path) -> None:
    found = compare(*open_subjects(TINY, folder))
    roles = ["vision_encoder", "audio_encoder", "embed_tokens", "decoder"]
    assert [graph.role for graph in found.before.graphs] == [graph.role for graph in found.after.graphs] == roles
    added = {c.operator for group in found.nodes.groups for c in group.changes if c.verb == "added"}
    assert {"ScatterND", "NonZero"} <= added and "Compress" not in added
    export = open_export(TINY)
    decoder, parts, _ = recipes_of(export, export.pair("q4"))
    planned = planned_report(export, export.pair("q4"), decoder, media=parts)
    assert planned.after.graphs == found.after.graphs


# The gates fail


def failed(folder: Path) -> dict[str, Gate]:
    report = proven(folder, open_export(TINY).pair("q4"))
    return {gate.name: gate for gate in report.failed if gate.section != "manifest"}


def test_another_vision_encoder_fails_the_prompts_with_images_alone(mine: Path) -> None:
    data = mine / "vision_encoder.onnx_data"
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
    found = failed(mine)
    assert {"image", "image and audio"} <= found.keys() and not any(g.section == "numbers" for g in found.values())
    assert isinstance(found["image"].found, float) and found["image"].found > 0


def test_features_that_are_almost_the_same_fail_though_no_token_differs(mine: Path) -> None:
    path = mine / "vision_encoder.onnx"
    model = onnx.load(path, load_external_data=False)
    (maker,) = [node for node in model.graph.node if "image_features" in node.output]
    maker.output[list(maker.output).index("image_features")] = "image_features/own"
    model.graph.initializer.append(from_array(np.float32(1.00001), "almost_one"))
    model.graph.node.append(make_node("Mul", ["image_features/own", "almost_one"], ["image_features"]))
    onnx.save(model, path)
    gate = failed(mine)["image"]
    assert isinstance(gate.found, float) and 0 < gate.found < 0.01 and "tokens after" in gate.detail


def test_an_encoder_that_keeps_padding_fails(mine: Path) -> None:
    path = mine / "vision_encoder.onnx"
    model = onnx.load(path, load_external_data=False)
    strip = next(node for node in model.graph.node if node.op_type == "Compress")
    strip.op_type = "Identity"
    del strip.input[1:], strip.attribute[:]
    onnx.save(model, path)
    found = failed(mine)
    assert found["padding of an image leaves no tokens"].detail == "3 tokens in place of 2"
    assert "two images of different sizes" in found and "image" not in found


def test_features_that_are_dropped_without_a_word_fail(mine: Path) -> None:
    """An embedding graph that writes as many features as there are placeholders, whatever their number."""
    path = mine / "embed_tokens.onnx"
    model = onnx.load(path, load_external_data=False)
    scatter = next(node for node in model.graph.node if node.name.endswith("image/ScatterND"))
    scatter.op_type = "Identity"
    del scatter.input[1:]
    onnx.save(model, path)
    found = failed(mine)
    assert "a wrong number of images is an error" in found and "image" in found


def test_per_layer_inputs_of_rank_four_fail_in_the_structure(mine: Path) -> None:
    path = mine / "embed_tokens.onnx"
    model = onnx.load(path, load_external_data=False)
    dims = model.graph.output[1].type.tensor_type.shape.dim
    dims[2].dim_value = 10
    dims.add().dim_value = 32
    onnx.save(model, path)
    fault = failed(mine)["interface is what the configuration names"]
    assert "per_layer_inputs is FLOAT [batch_size, sequence_length, 10, 32] in the embedding" in fault.detail


def test_one_merged_graph_is_what_bisect_and_watch_look_into(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"look into one merged graph, and .* has 4 graphs"):
        proven(folder, open_export(TINY).pair("q4"), bisect=True)


# Mistakes of the user's


@pytest.mark.parametrize(
    "modalities, sentence",
    [
        ("text,picture", "--modalities has 'picture'; text, image, audio are known"),
        ("image", "--modalities has no text"),
        ("text,audio", "loads no folder without a vision encoder"),
    ],
)
def test_modalities_that_no_folder_has(modalities: str, sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        read_modalities(modalities)


def test_modalities_are_read() -> None:
    assert read_modalities("text") == ()
    assert read_modalities(" audio, text ,image") == BOTH


def changed(source: Path, name: str, **values: object) -> Export:
    path = source / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return open_export(source)


def test_exports_that_lack_something_are_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    def refused(sentence: str, export: Export) -> None:
        with pytest.raises(SurgeryError, match=sentence):
            write(export, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    mel = json.loads((TINY / "processor_config.json").read_text())["feature_extractor"]
    refused("dither is 0.5, which GenAI's log-mel has no form for",
            changed(source, "processor_config.json", feature_extractor={**mel, "dither": 0.5}))  # fmt: skip
    for key in ("per_bin_mean", "per_bin_stddev"):
        refused(f"{key} is .*, which GenAI's log-mel has no form for",
                changed(source, "processor_config.json", feature_extractor={**mel, key: [0.5]}))  # fmt: skip
    refused(
        "no processor_config.json with 'image_processor'", changed(source, "processor_config.json", image_processor=1)
    )
    refused("config.json has no image_token_id", changed(source, "config.json", image_token_id=None))
    for name in ("config.json", "processor_config.json"):
        shutil.copyfile(TINY / name, source / name)
    (source / "onnx" / "audio_encoder_q4.onnx").unlink()
    refused("no audio_encoder of precision 'q4' beside", open_export(source))
    both = json.loads((TINY / "config.json").read_text())["text_config"]
    export = changed(source, "config.json", text_config={**both, "use_bidirectional_attention": "vision"})
    with pytest.raises(ExportError, match="tokens of an image see each other"):
        check_export(export, BOTH)


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("mel_floor", {}, "a number from 0 to 1"), ("min_frequency", "x", "a number from 0"),
        ("frame_length", 10**30, "a whole number from 1 to 1048576"), ("fft_overdrive", [], "true or false"),
    ],
)  # fmt: skip
def test_what_a_processor_cannot_be_told_is_one_sentence(key: str, value: object, wanted: str, source: Path) -> None:
    mel = json.loads((TINY / "processor_config.json").read_text())["feature_extractor"]
    export = changed(source, "processor_config.json", feature_extractor={**mel, key: value})
    with pytest.raises(ExportError, match=f"processor_config.json: feature_extractor: {key} is .*; {wanted}"):
        check_export(export, ("audio",))
    check_export(changed(source, "processor_config.json", feature_extractor={**mel, "mel_floor": None}), ("audio",))


def test_the_most_patches_are_those_before_pooling(source: Path) -> None:
    said = json.loads((TINY / "processor_config.json").read_text())["image_processor"]
    pooled = {**said, "max_soft_tokens": 35, "pooling_kernel_size": 3}
    assert most_patches(changed(source, "processor_config.json", image_processor=pooled)) == 315


def test_an_encoder_of_another_width_names_its_file(source: Path, tmp_path: Path) -> None:
    path = source / "onnx" / "vision_encoder_q4.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 65
    onnx.save(model, path)
    with pytest.raises(SurgeryError, match=r"vision_encoder_q4.onnx: fit-encoder: image_features is FLOAT \[.*, 65\]"):
        write(open_export(source), tmp_path / "out")


# generate


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files")
    (place / "a.png").write_bytes(sample_picture(96, 64))
    (place / "b.wav").write_bytes(sample_sound(0.5))
    return place


def said(folder: Path, prompt: str, **given: tuple[Path, ...]) -> str:
    turn = Turn(prompt, **{kind: tuple(map(str, files)) for kind, files in given.items()})
    return "".join(piece.text for piece in open_conversation(folder, ChatSettings(12)).answer(turn))


def test_answer_reads_files_where_the_prompt_says_so(folder: Path, files: Path) -> None:
    given = {"images": (files / "a.png",), "sounds": (files / "b.wav",)}
    found = said(folder, "hello", **given)
    assert found and found == said(folder, "<|image|><|audio|>hello", **given)
    assert found != said(folder, "hello")


def test_a_later_turn_sees_the_image_of_an_earlier_one(folder: Path, files: Path) -> None:
    """The runtime takes images once: the whole conversation goes in anew."""
    going = open_conversation(folder, ChatSettings(5))
    list(going.answer(Turn("hello", images=(str(files / "a.png"),))))
    first = going.counts
    list(going.answer(Turn("the world")))
    assert going.counts.kept == 0 and going.counts.prompt > first.prompt + first.answer


def test_files_that_cannot_be_read_are_named(folder: Path, files: Path, tmp_path: Path) -> None:
    image, sounds = (files / "a.png",), (files / "b.wav",)
    with pytest.raises(RequestError, match=r"nowhere\.png does not exist"):
        said(folder, "hello", images=(files / "nowhere.png",))
    with pytest.raises(RequestError, match=r"the prompt has 2 <\|image\|> for 1 files"):
        said(folder, "<|image|><|image|>", images=image)
    with pytest.raises(RequestError, match=r"b\.wav is no PNG or JPEG picture: it begins with RIFF"):
        said(folder, "hello", images=sounds)
    with pytest.raises(RequestError, match="2 sounds are given; the runtime takes one"):
        said(folder, "hello", sounds=sounds * 2)
    with pytest.raises(
        FolderError, match=r"tiny-e2b has no genai_config\.json; images and sound are for GenAI folders"
    ):
        said(TINY, "hello", images=image)
    write(open_export(TINY), tmp_path / "out", modalities=("image",))
    with pytest.raises(FolderError, match="out takes no audio"):
        said(tmp_path / "out", "hello", sounds=sounds)
