"""The main job: from the committed export to a folder that the real runtime loads and generates from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
from exhaustive import in_full
from folders import digests, planned, repack
from generating import before_end, generated
from onnx.helper import make_node
from places import DATA, ROOT, TINY

import fixtures
from passes.presets import compatible
from surgery.attention.kv_rows import SCOPE as ROWS
from surgery.choices import KVLayout
from surgery.errors import ArchitectureError, ExportError, FolderError, ModelError, PassError, SurgeryError, WeightError
from surgery.folder.building import plan
from surgery.folder.genai_config import genai_config, shares_buffer
from surgery.graph.model import Model
from surgery.source.export import open_export

PRECISIONS = ("fp32", "fp16", "q4", "q4f16", "quantized")
LAYOUTS: tuple[KVLayout, ...] = ("aliased", "unique")


@pytest.mark.parametrize(
    ("fixture", "layout"),
    [
        ("tiny-e2b", "aliased"), ("tiny-31b", "unique"), ("tiny-26b-a4b", "aliased"), in_full("tiny-e2b", "unique"),
        in_full("tiny-e4b", "aliased"), in_full("tiny-e4b", "unique"), in_full("tiny-31b", "aliased"),
        in_full("tiny-12b", "aliased"), in_full("tiny-12b", "unique"), in_full("tiny-26b-a4b", "unique"),
    ],
)  # fmt: skip
def test_runtime_generates_the_tokens_of_transformers(fixture: str, layout: KVLayout, tmp_path: Path) -> None:
    fixtures.build(fixture, "fp32", tmp_path / "source")
    repack(tmp_path / "source", tmp_path / "out", "fp32", lambda embed: compatible(embed, layout))
    expected = np.load(DATA / f"{fixture.replace('-', '_')}_ref.npz")
    for prompt in range(6):
        wanted = [int(token) for token in expected[f"p{prompt}_tokens"].reshape(-1)]
        found = generated(tmp_path / "out", expected[f"p{prompt}_ids"].reshape(-1), len(wanted))
        assert found == before_end(wanted)


def test_steps_with_nothing_to_do_say_so(tmp_path: Path) -> None:
    """26B-A4B has neither per-layer inputs nor KV-shared layers, and its experts are none of our business."""
    fixtures.build("tiny-26b-a4b", "q4f16", tmp_path / "source")
    export = open_export(tmp_path / "source")
    pair = export.pair("q4f16")
    model, outcomes = plan(pair, export, compatible(pair.embed))
    said = {outcome.name: [str(finding) for finding in outcome.findings] for outcome in outcomes}
    assert said["expand-shared-kv"] == ["skipped KV-shared layers: every layer has its own cache"]
    assert not [line for line in said["merge-embeddings"] if "per_layer_inputs" in line]
    experts = [node for node in Model.open(pair.decoder).graph.node if "/moe/" in node.name]
    assert experts and [node for node in model.graph.node if "/moe/" in node.name] == experts


def test_fused_experts_are_left_as_they_are(tmp_path: Path) -> None:
    """No CPU kernel computes Gemma's QMoE (activation geglu, onnxruntime 1.31.1), so this compares the graph alone."""
    fixtures.build("tiny-26b-a4b", "q4", tmp_path / "source")
    export = open_export(tmp_path / "source")
    pair = export.pair("q4")
    decoder = Model.open(pair.decoder)
    for node in decoder.graph.node:
        if node.name.endswith("/moe/ReduceSum"):
            scope = node.name.removesuffix("/ReduceSum")
            node.op_type, node.domain, node.name = "QMoE", "com.microsoft", f"{scope}/QMoE"
            node.input[:] = [f"{scope}/experts/Reshape/output_0", f"{scope}/router/proj/MatMul/output_0"]
    fused = [node for node in decoder.graph.node if node.op_type == "QMoE"]
    decoder.save(pair.decoder, force=True)
    model, _ = plan(pair, export, compatible(pair.embed))
    assert len(fused) == 6 and [node for node in model.graph.node if node.op_type == "QMoE"] == fused


def test_runtime_generates_the_tokens_of_transformers_on_the_quantised_weights(tmp_path: Path) -> None:
    repack(TINY, tmp_path / "out")
    expected = np.load(DATA / "tiny_e2b_q4_ref.npz")
    for prompt in range(6):
        wanted = [int(token) for token in expected[f"p{prompt}_tokens"].reshape(-1)]
        found = generated(tmp_path / "out", expected[f"p{prompt}_ids"].reshape(-1), len(wanted))
        assert found == before_end(wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_interface_is_what_the_runtime_expects(precision: str, layout: KVLayout, tmp_path: Path) -> None:
    result = repack(TINY, tmp_path / "out", precision, lambda embed: compatible(embed, layout))
    model = Model.open(tmp_path / "out" / "model.onnx")
    layers = 10 if layout == "aliased" else 5
    caches = [f"{n}.{kind}" for n in range(layers) for kind in ("key", "value")]
    assert [value.name for value in model.graph.input] == [
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{cache}" for cache in caches)
    ]  # fmt: skip
    assert [value.name for value in model.graph.output] == ["logits", *(f"present.{cache}" for cache in caches)]
    assert model.check_weights() == sum(placed.size for placed in result.placed)
    assert result.costs[layout].pairs == layers


def test_source_is_untouched_and_no_weight_changes(source: Path, tmp_path: Path) -> None:
    before = digests(source)
    repack(source, tmp_path / "out")
    assert digests(source) == before
    written = digests(tmp_path / "out")
    for placed, name in (("", "decoder_model_merged_q4"), ("_1", "embed_tokens_q4")):
        assert written[f"model.onnx_data{placed}"] == before[f"onnx/{name}.onnx_data"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    repack(TINY, tmp_path / "one", "q4f16")
    repack(TINY, tmp_path / "two", "q4f16")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_link_shares_the_bytes(source: Path, tmp_path: Path) -> None:
    repack(source, tmp_path / "out", weights="link")
    placed = tmp_path / "out" / "model.onnx_data"
    assert placed.samefile(source / "onnx" / "decoder_model_merged_q4.onnx_data")


def test_folder_holds_the_text_model_and_the_tokenizer(tmp_path: Path) -> None:
    repack(TINY, tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "gemma4_text" and "vision_config" not in config and "text_config" not in config
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "GemmaTokenizer"
    settings = json.loads((out / "genai_config.json").read_text())
    assert settings["model"]["type"] == "gemma4_text"
    assert settings["model"]["eos_token_id"] == [1, 106, 50]
    assert settings["model"]["decoder"]["num_hidden_layers"] == 10
    assert not {"sliding_window", "layer_types"} & settings["model"]["decoder"].keys()
    assert settings["search"]["top_k"] == 64 and settings["search"]["past_present_share_buffer"] is False


def test_tokenizer_and_chat_template_work_in_the_runtime(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    repack(TINY, tmp_path / "out")
    tokenizer = og.Tokenizer(og.Model(str(tmp_path / "out")))
    reference = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for text in ("hello world", "  two  spaces", "привет", "<|turn>user\nhi<turn|>"):
        assert list(tokenizer.encode(text)) == reference.encode(text, add_special_tokens=False).ids
    templated = tokenizer.apply_chat_template('[{"role": "user", "content": "hi"}]', add_generation_prompt=True)
    assert templated.startswith("<bos><|turn>user\nhi<turn|>") and templated.endswith("<|turn>model\n")


def test_buffer_is_shared_only_where_grouped_query_attention_touches_every_cache(tmp_path: Path) -> None:
    fixtures.build("tiny-31b", "fp32", tmp_path / "source")
    model, _ = planned(tmp_path / "source", "fp32")
    assert not shares_buffer(model), "the full layers' attention is unfused"
    for node in list(model.graph.node):
        if node.op_type != "GroupQueryAttention":
            model.graph.node.remove(node)
    assert shares_buffer(model)
    past, present = (value.name for value in (model.graph.input[3], model.graph.output[1]))
    model.graph.node.append(make_node("Slice", [past, "from", "to"], ["some"]))
    assert not shares_buffer(model), "it counts from the buffer's end"
    model.graph.node[-1].CopyFrom(make_node("Slice", [past, "from", f"{ROWS}/rows"], ["some"]))
    assert shares_buffer(model)
    model.graph.node.append(make_node("Identity", ["some"], [present]))
    assert not shares_buffer(model)


def test_existing_folder_is_refused_and_replaced_with_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    repack(TINY, out, "fp32")
    with pytest.raises(FolderError, match="exists"):
        repack(TINY, out)
    assert "fp32" in (out / "manifest.json").read_text()
    repack(TINY, out, force=True)
    assert "fp32" not in (out / "manifest.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failing_check_leaves_nothing(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert (folder / "genai_config.json").is_file()
        raise FolderError("it does not generate")

    with pytest.raises(FolderError, match="does not generate"):
        repack(TINY, tmp_path / "out", check=check)
    assert list(tmp_path.iterdir()) == []


def test_disk_too_small_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(FolderError, match="1 bytes free, but 342,528 are needed"):
        repack(TINY, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage, error, sentence",
    [
        (lambda s: (s / "config.json").unlink(), ArchitectureError, "config.json is missing"),
        (lambda s: (s / "config.json").write_text("{"), ArchitectureError, "config.json is not JSON"),
        (lambda s: (s / "config.json").write_text('{"model_type": "llama"}'), ArchitectureError, "model_type is llama"),
        (lambda s: (s / "tokenizer.json").unlink(), ExportError, "has no tokenizer.json"),
        (lambda s: (s / "onnx" / "decoder_model_merged_q4.onnx_data").unlink(), WeightError, "is missing"),
        (lambda s: truncate(s / "onnx" / "decoder_model_merged_q4.onnx_data", 1000), WeightError, "has 1000 bytes"),
        (lambda s: truncate(s / "onnx" / "embed_tokens_q4.onnx_data", 10), WeightError, "has 10 bytes"),
        (lambda s: truncate(s / "onnx" / "decoder_model_merged_q4.onnx", 50_000), ModelError, "cut short"),
        (lambda s: truncate(s / "onnx" / "embed_tokens_q4.onnx", 0), ModelError, "0 bytes"),
        (lambda s: swap_layer_types(s / "config.json"), PassError, "layer 5 reads the cache of layer 2 by config.json"),
    ],
    ids=[
        "no config", "broken config", "other model", "no tokenizer", "no sidecar", "short sidecar", "short embed sidecar",
        "short decoder", "empty embed", "config against wiring",
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_writes_nothing(
    damage: object, error: type[SurgeryError], sentence: str, source: Path, tmp_path: Path
) -> None:
    damage(source)  # type: ignore[operator]
    with pytest.raises(error) as caught:
        repack(source, tmp_path / "out")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as handle:
        handle.truncate(size)


def swap_layer_types(path: Path) -> None:
    """A config whose layer 3 is full attention: its head size, and who owns the KV-shared layers' cache, contradict the graph."""
    config = json.loads(path.read_text())
    config["text_config"]["layer_types"][3] = "full_attention"
    path.write_text(json.dumps(config))


def test_missing_precision_names_those_that_exist() -> None:
    with pytest.raises(ExportError, match=r"no precision 'q4f61' \(did you mean 'q4f16'\?\); it holds fp32, fp16, q4"):
        open_export(TINY).pair("q4f61")


@pytest.mark.parametrize("folder, sentence", [("nowhere", "does not exist"), ("fixtures/data", "has no .onnx file")])
def test_folder_that_is_no_export_says_what_was_expected(folder: str, sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        open_export(ROOT / folder)


def test_flat_folder_is_an_export(source: Path, tmp_path: Path) -> None:
    for path in (source / "onnx").iterdir():
        path.rename(source / path.name)
    (source / "onnx").rmdir()
    repack(source, tmp_path / "out", "fp16")
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_best_precision_depends_on_the_provider(source: Path) -> None:
    assert open_export(source).best("cpu")[0].precision == "q4"
    assert open_export(source).best("cuda")[0].precision == "q4f16"
    for path in (source / "onnx").glob("*f16*"):
        path.unlink()
    for path in (source / "onnx").glob("*fp16*"):
        path.unlink()
    with pytest.raises(ExportError, match="CUDA needs q4f16 or fp16") as refused:
        open_export(source).best("cuda")
    assert refused.value.hint == "add --ep cpu, or --to-fp16"


def test_token_id_outside_the_vocabulary_is_refused(source: Path) -> None:
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 128]}')
    export = open_export(source)
    model, _ = planned(export)
    with pytest.raises(ArchitectureError, match="eos_token_id is 128; a token id from 0 to 127 is expected"):
        genai_config(model, export)
