"""host-embeddings: lookups are annotated for the CPU, the decoder is not, and every number stays.

docs/validation/cuda-placement.md holds what the real CUDA provider does with such graphs.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime_genai as og
import pytest
from folders import repack
from places import TINY
from typer.testing import CliRunner

from passes import HostEmbeddings, MergeEmbeddings
from passes.base import apply
from passes.presets import compatible, fast, kept_in_host_memory
from passes.recipe import parse, recipe_text
from surgery.attention.sequence_lengths import NEW_COLUMNS
from surgery.commands.app import app
from surgery.cuda.layering import CPU, KEY, OPTION, SETTING, stays_on_cpu
from surgery.cuda.prediction import Copy, predict, require_cuda
from surgery.errors import PassError
from surgery.folder.building import build_folder, plan
from surgery.graph.model import Model
from surgery.runtime.sessions import MergedModel, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import open_export
from surgery.verify.agreement import agreement_of
from surgery.verify.prompts import Case
from surgery.verify.recording import record

EXPORT = open_export(TINY)
ROWS = ["/model/embed_tokens/Gather/output_0", "/model/embed_tokens_per_layer/Gather/output_0"]


def merged(precision: str = "q4f16") -> Model:
    pair = EXPORT.pair(precision)
    return apply(Model.open(pair.decoder), [MergeEmbeddings(pair.embed)])[0]


@pytest.mark.parametrize("precision", ["fp16", "q4f16"])
def test_lookups_and_their_row_numbers_stay_and_the_rows_alone_cross(precision: str) -> None:
    plain = merged(precision)
    model, (outcome,) = apply(plain, [HostEmbeddings()])
    kept = [node for node in model.graph.node if stays_on_cpu(node)]
    lookup = "Gather" if precision == "fp16" else "GatherBlockQuantized"
    assert sorted(node.op_type for node in kept) == sorted(
        [lookup, lookup, "Less", "Equal", "Equal", "Not", "Not", "And", "And", "Where"]
    )
    assert str(outcome.findings[0]) == "changed 10 nodes: they look tokens up, and stay on the CPU"
    assert sum("bytes stay in host memory" in str(finding) for finding in outcome.findings) == 2
    before, after = predict(plain), predict(model)
    assert {each.node for each in after.on("cpu")} == {each.node for each in before.on("cpu")} | {n.name for n in kept}
    assert {*after.copies} - {*before.copies} == {Copy(name, "cuda") for name in ROWS}
    require_cuda(model)


def test_second_run_finds_nothing_to_do_and_another_annotation_is_replaced() -> None:
    model = merged()
    lookup = next(node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    lookup.metadata_props.add(key=KEY, value="other")
    once, _ = apply(model, [HostEmbeddings()])
    assert [(e.key, e.value) for n in once.graph.node if n.name == lookup.name for e in n.metadata_props] == [
        (KEY, CPU)
    ]
    _, (again,) = apply(once, [HostEmbeddings()])
    assert str(again.findings[0]) == "skipped 2 tables: their lookups are to stay on the CPU already"


def test_decoder_alone_has_no_table() -> None:
    _, (outcome,) = apply(Model.open(EXPORT.pair("q4f16").decoder), [HostEmbeddings()])
    reason = "none is looked up by what the graph takes in; merge-embeddings brings the tables"
    assert [str(finding) for finding in outcome.findings] == [f"skipped tables: {reason}"]


def test_nodes_without_metadata_are_refused() -> None:
    model = merged()
    model.proto.ir_version = 9
    with pytest.raises(PassError, match="has IR version 9; nodes have metadata from 10 on"):
        apply(model, [HostEmbeddings()])


def test_numbers_stay_and_the_folder_tells_the_runtime(tmp_path: Path) -> None:
    pair = EXPORT.pair("q4f16")
    recipe = (*compatible(pair.embed), *kept_in_host_memory(True))
    build_folder(EXPORT, pair, recipe, tmp_path / "out", provider="cuda")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"][OPTION] == SETTING
    cases, settings = [Case("one", "", ((2, 5, 9, 30, 31, 7, 8, 9, 10),))], Settings(threads=1)
    theirs = record(TwoGraphModel.open(pair, settings), cases, steps=4)
    ours = record(MergedModel(tmp_path / "out" / "model.onnx", settings), cases, steps=4, follow=theirs)
    found = agreement_of(theirs, ours, {})
    assert (found.max_abs, found.cache_max_abs) == (0, 0)
    runtime = og.Config(str(tmp_path / "out"))
    runtime.clear_providers()
    assert og.Model(runtime), "GenAI takes the key"


def test_folder_without_annotation_has_no_such_key(tmp_path: Path) -> None:
    repack(EXPORT, tmp_path / "out", "q4f16", provider="cuda")
    assert OPTION not in (tmp_path / "out" / "genai_config.json").read_text()


def test_command_appends_it_behind_what_changes_the_tables(tmp_path: Path) -> None:
    arguments = ["repack", str(TINY), str(tmp_path / "out"), "--ep", "cuda", "--no-validate", "--embed-device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--preset", "fast", "--per-layer-table", "split"])
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert recipe.endswith(",split-per-layer-table,host-embeddings") and recipe_text(parse(recipe)) == recipe
    model = Model.open(tmp_path / "out" / "model.onnx")
    assert sum(node.op_type == "GatherBlockQuantized" and stays_on_cpu(node) for node in model.graph.node) == 11
    assert predict(model).faults == ()


def test_command_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    arguments = ["repack", str(TINY), str(tmp_path / "out"), "--embed-device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--ep", "cpu"])
    assert result.exit_code != 0 and not (tmp_path / "out").exists()
    assert "on the CPU all is in host memory" in str(result.exception)
    result = CliRunner().invoke(app, [*arguments, "--ep", "cuda", "--modalities", "text,image"])
    assert "the embeddings are a graph of their own" in str(result.exception)


# CUDA graph capture


def test_capture_is_foretold_from_what_crosses() -> None:
    pair = EXPORT.pair("q4f16")
    quick = fast(pair.embed, "cuda")
    found = [
        predict(plan(pair, EXPORT, recipe)[0]) for recipe in (quick, compatible(pair.embed), (*quick, HostEmbeddings()))
    ]
    said = [each.capture for each in found]
    assert [each.ready_for_capture for each in found] == [True, False, False]
    assert said[0] == "CUDA graph capture: yes, no value crosses between the memories"
    crossing = "/model/padding/alone/output_0"
    assert said[1] == f"CUDA graph capture: no, {crossing!r} crosses between the memories, and 3 more"
    assert said[2] == f"CUDA graph capture: no, {ROWS[0]!r} crosses between the memories, and 1 more"
    assert "because of these nodes" in predict(Model.open(EXPORT.pair("q4").decoder)).capture


def test_a_node_that_reads_the_mask_by_its_width_is_named() -> None:
    pair = EXPORT.pair("q4f16")
    model, _ = plan(pair, EXPORT, fast(pair.embed, "cuda"))
    next(node for node in model.graph.node if node.name == f"{NEW_COLUMNS}/Slice").name = "/mask/Slice"
    found = predict(model)
    assert found.can_be_captured and not found.ready_for_capture
    assert "'/mask/Slice' is not known to read such a mask right" in found.capture
