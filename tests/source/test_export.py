"""Exports whose graphs differ in precision, as config.json's transformers.js_config.dtype says: folders and repositories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from folders import repack
from hub_server import Hub, reach_nobody_by_default, serve

import fixtures
from surgery.compare.subjects import open_subjects
from surgery.errors import ExportError
from surgery.folder.inspection import ExportInspection, inspect_path
from surgery.folder.text_only import build_text_only
from surgery.source.export import open_export
from surgery.source.hub import HubSource, fetch, list_files, plan_download

REPO = "onnx-community/tiny-gemma-4-qat-mobile-ONNX"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qat")
    fixtures.build("tiny-e2b-qat", "q2f16", root)
    return root


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def source(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubSource]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    reach_nobody_by_default(monkeypatch)
    with serve(Hub.of(built, REPO)) as served:
        yield HubSource(REPO, endpoint=served.endpoint, cache=tmp_path / "cache")


def declare(folder: Path, dtype: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["transformers.js_config"]["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def rename(folder: Path, role: str, old: str, new: str) -> None:
    """Give a graph another precision by name; its data file keeps the name that the graph knows."""
    (folder / "onnx" / f"{role}{old}.onnx").rename(folder / "onnx" / f"{role}{new}.onnx")


def names(export_folder: Path) -> dict[str, str]:
    pair = open_export(export_folder).pair("q2f16")
    return {"embed": pair.embed.name, **{modality: path.name for modality, path in pair.encoders.items()}}


def test_each_graph_is_of_the_precision_that_the_configuration_says(folder: Path) -> None:
    pair, reason = open_export(folder).best("cpu")
    assert (pair.precision, dict(pair.others)) == ("q2f16", {"vision_encoder": "fp16"})
    assert reason == "q2f16: the only one that the export holds"
    assert pair.encoder("image").name == "vision_encoder_fp16.onnx"
    assert pair.encoder("audio").name == "audio_encoder_q2f16.onnx"


def test_embeddings_may_be_of_another_precision_too(folder: Path) -> None:
    rename(folder, "embed_tokens", "_q2f16", "_quantized")
    declare(folder, {"embed_tokens": "q8", "decoder_model_merged": "q2f16", "audio_encoder": "q2f16"})
    assert names(folder) == {"embed": "embed_tokens_quantized.onnx", "audio": "audio_encoder_q2f16.onnx"}


def test_the_map_is_for_its_own_decoder_alone(folder: Path) -> None:
    declare(folder, {"decoder_model_merged": "q4", "embed_tokens": "fp16", "vision_encoder": "fp16"})
    assert names(folder) == {"embed": "embed_tokens_q2f16.onnx", "audio": "audio_encoder_q2f16.onnx"}


@pytest.mark.parametrize("dtype", ["q2f16", None, 7, ["q2f16"], {}, {"decoder_model_merged": 7}, {"model": "q4"}])
def test_anything_but_a_map_of_graphs_says_nothing(dtype: object, folder: Path) -> None:
    declare(folder, dtype)
    assert names(folder) == {"embed": "embed_tokens_q2f16.onnx", "audio": "audio_encoder_q2f16.onnx"}


def test_a_map_that_names_a_graph_which_is_not_there(folder: Path) -> None:
    declare(folder, {"embed_tokens": "q4", "decoder_model_merged": "q2f16"})
    with pytest.raises(ExportError, match="embed_tokens of precision 'q4' and decoder_model_merged of precision 'q2f16', "
                                          r"as config.json \(transformers.js_config.dtype\) says"):  # fmt: skip
        open_export(folder)
    for command in ("repack", "strip"):
        refused(command, folder, "embed_tokens of precision 'q4'")


def refused(command: str, folder: Path, sentence: str, *words: str) -> None:
    """One sentence, and nothing is written."""
    there = sorted(folder.parent.iterdir())
    done = run(command, str(folder), str(folder.parent / "out"), *words)
    assert (done.returncode, done.stdout) == (2, "")
    (error,) = (part for part in done.stderr.splitlines() if part.startswith("error: "))
    assert sentence in error
    assert sorted(folder.parent.iterdir()) == there


def test_an_encoder_that_is_not_there(folder: Path) -> None:
    (folder / "onnx" / "vision_encoder_fp16.onnx").unlink()
    pair = open_export(folder).pair("q2f16")
    with pytest.raises(ExportError, match=r"no vision_encoder of precision 'fp16', as config.json \(transf.*\) says, "):
        pair.encoder("image")
    refused("repack", folder, "no vision_encoder of precision 'fp16'", "--modalities", "text,image")


def test_a_precision_that_only_some_graphs_have(folder: Path) -> None:
    sentence = "has no precision 'fp16' (did you mean 'q2f16'?); it holds q2f16"
    refused("repack", folder, sentence, "--precision", "fp16")


def test_inspect_shows_the_graphs_of_all_precisions(folder: Path) -> None:
    found = inspect_path(folder)
    assert isinstance(found, ExportInspection)
    shown = found.to_dict()
    assert shown["other_precisions"] == {"vision_encoder": "fp16"}
    assert shown["vision_encoder"]["path"].endswith("vision_encoder_fp16.onnx")
    assert shown["precisions"]["q2f16"] == sum(path.stat().st_size for path in (folder / "onnx").iterdir())
    assert "vision_encoder in fp16, shown below" in run("inspect", str(folder)).stdout


def test_strip_leaves_a_configuration_that_says_what_is_there(folder: Path, tmp_path: Path) -> None:
    export = open_export(folder)
    build_text_only(export, export.pair("q2f16"), tmp_path / "one")
    assert settings(tmp_path / "one")["dtype"] == "q2f16"
    assert settings(tmp_path / "one")["kv_cache_dtype"] == {"q2f16": "float16"}
    rename(folder, "embed_tokens", "_q2f16", "_quantized")
    declare(folder, {"embed_tokens": "q8", "decoder_model_merged": "q2f16"})
    export = open_export(folder)
    build_text_only(export, export.pair("q2f16"), tmp_path / "two")
    assert settings(tmp_path / "two")["dtype"] == {"embed_tokens": "q8", "decoder_model_merged": "q2f16"}
    assert names(tmp_path / "two") == {"embed": "embed_tokens_quantized.onnx"}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["transformers.js_config"]
    return found


def test_diff_finds_the_precision_that_a_folder_was_made_from(folder: Path, tmp_path: Path) -> None:
    repack(folder, tmp_path / "out", "q2f16")
    before, _ = open_subjects(folder, tmp_path / "out")
    assert [part.model.path.name for part in before.parts] == [
        "embed_tokens_q2f16.onnx",
        "decoder_model_merged_q2f16.onnx",
    ]


# Repositories


def test_the_plan_has_the_graphs_that_the_configuration_names(source: HubSource) -> None:
    planned = plan_download(list_files(source), "q2f16", ("image", "audio"))
    graphs = sorted(entry.file.name for entry in planned.files if entry.file.name.endswith(".onnx"))
    assert graphs == [
        "onnx/audio_encoder_q2f16.onnx",
        "onnx/decoder_model_merged_q2f16.onnx",
        "onnx/embed_tokens_q2f16.onnx",
        "onnx/vision_encoder_fp16.onnx",
    ]


def test_text_alone_fetches_no_encoder(source: HubSource) -> None:
    planned = plan_download(list_files(source), "q2f16")
    assert not [entry.file.name for entry in planned.files if "encoder" in entry.file.name]
    assert open_export(fetch(planned)).best("cpu")[0].encoders == {}


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (
            "embed_tokens_q2f16.onnx",
            "has no embed_tokens of precision 'q2f16' and decoder_model_merged of precision 'q2",
        ),
        (
            "vision_encoder_fp16.onnx",
            "has no vision_encoder of precision 'fp16', as config.json .* says; it holds none",
        ),
    ],
)
def test_what_a_repository_lacks(
    removed: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach_nobody_by_default(monkeypatch)
    (folder / "onnx" / removed).unlink()
    with serve(Hub.of(folder, REPO)) as served:
        listing = list_files(HubSource(REPO, endpoint=served.endpoint, cache=tmp_path / "cache"))
        with pytest.raises(ExportError, match=message):
            plan_download(listing, "q2f16", ("image",))
