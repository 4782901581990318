"""`diff` and the reports of `repack`, as their user meets them: exit codes, formats, what is written and what is not."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import command_line
import onnx
import pytest
from hub_server import Hub, serve
from places import TINY
from typer.testing import CliRunner

from passes.presets import compatible
from passes.recipe import recipe_text
from surgery.commands.app import app
from surgery.compare import compare, open_subject, open_subjects, tensor_contents
from surgery.compare.comparison import ASPECTS, read_aspects
from surgery.compare.folder_report import folder_reports, planned_report
from surgery.compare.formats import is_current
from surgery.folder.building import build_folder
from surgery.folder.manifest import faults
from surgery.source.export import open_export

DECODER = TINY / "onnx" / "decoder_model_merged_q4.onnx"


run = partial(command_line.run, COLUMNS="120")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `repack` makes of the small export, with its reports; not proven, which test_repack does."""
    return reported(tmp_path_factory.mktemp("reported") / "out")


def reported(target: Path) -> Path:
    export = open_export(TINY)
    pair = export.pair("q4")
    recipe = compatible(pair.embed)
    build_folder(
        export, pair, recipe, target,
        recipe_text=recipe_text(compatible(Path("onnx/embed_tokens_q4.onnx"))),
        describe=lambda stage, outcomes, proof: folder_reports(stage, export, pair, outcomes, None),
    )  # fmt: skip
    return target


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """The decoder with one node renamed, its data file beside it."""
    model = onnx.load(DECODER, load_external_data=False)
    model.graph.node[3].name = "renamed"
    onnx.save(model, tmp_path / "renamed.onnx")
    shutil.copy(DECODER.with_name(f"{DECODER.name}_data"), tmp_path)
    return tmp_path / "renamed.onnx"


def test_exit_codes(renamed: Path, tmp_path: Path) -> None:
    assert run("diff", DECODER, DECODER, cwd=tmp_path).returncode == 0
    assert run("diff", DECODER, renamed, cwd=tmp_path).returncode == 1
    assert run("diff", DECODER, renamed, "--fail-on", "nodes,weights", cwd=tmp_path).returncode == 0


def test_what_counts(renamed: Path) -> None:
    sides = open_subject(DECODER), open_subject(renamed)
    found = compare(*sides)
    assert found.differing == ("names",) and found.fails(ASPECTS)
    assert found.fails(("names",)) and not found.fails(("nodes", "weights")) and not found.fails(())
    assert compare(*sides, ignore=("names",)).same
    assert read_aspects("nodes, interface") == ("interface", "nodes") and read_aspects("none") == ()


@pytest.mark.parametrize(("words", "sentence"), [
    (("absent.onnx", DECODER), "absent.onnx does not exist"),
    ((DECODER, DECODER, "--fail-on", "node"), "'node' is nothing that models differ in (did you mean 'nodes'?)"),
    ((DECODER, DECODER, "--output", "report.pdf"), "report.pdf has the suffix '.pdf'"),
    ((DECODER, DECODER, "--check", "report.md"), "report.md does not exist"),
    ((DECODER, DECODER, "--numbers", "config.json"), "config.json is not what validate --json prints"),
    ((TINY, DECODER, "--precision", "q5"), "has no precision 'q5'"),
])  # fmt: skip
def test_trouble_is_exit_code_2_and_a_sentence(words: tuple[str | Path, ...], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = run("diff", *words, cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_the_verdict_comes_first(renamed: Path, tmp_path: Path) -> None:
    first, second = run("diff", DECODER, renamed, cwd=tmp_path).stdout.splitlines()[:2]
    assert first == "decoder_model_merged_q4.onnx -> renamed.onnx: compatible"
    assert second.startswith("interface: unchanged · nodes: 1 renamed · weights: 0 changed")


def test_formats_of_continuous_integration(renamed: Path, tmp_path: Path) -> None:
    done = run("diff", DECODER, renamed, "--format", "github", "--policy", "any", GITHUB_ACTIONS="true")
    assert done.returncode == 1 and done.stdout.startswith(f"::error file={renamed},title=ONNX model::"), done.stdout
    done = run("diff", DECODER, renamed, "--fail-on", "none", "--output", str(tmp_path / "r.xml"))
    (test,) = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert done.returncode == 0 and test.get("name") == f"{DECODER} → {renamed}" and test[0].tag == "system-out"


def test_a_pair_against_its_folder_has_the_passes_as_reasons(folder: Path, tmp_path: Path) -> None:
    done = run("diff", TINY, folder, "--format", "json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    moved = [group for group in report["nodes"]["groups"] if group["changes"][0]["verb"] == "moved"]
    assert [(group["by"], len(group["changes"])) for group in moved] == [(["merge-embeddings"], 13)]
    assert all(reasons(change) for group in report["nodes"]["groups"] for change in group["changes"])
    assert all(reasons(change) for change in report["interface"])
    by_name = {change["after"]["name"]: change for change in report["interface"] if change["after"]}
    assert by_name["present.5.key"]["reasons"] == [
        {"by": "expand-shared-kv", "text": "alias of layer 3's, FLOAT [batch_size, 1, total_sequence_length, 16]"}
    ]
    assert [entry["name"] for entry in report["passes"]][:2] == ["merge-embeddings", "fold-logits-to-keep"]


def reasons(change: dict[str, Any]) -> list[str]:
    return [reason["by"] for reason in change["reasons"]]


def test_the_folder_holds_its_report_and_its_manifest_names_it(folder: Path, tmp_path: Path) -> None:
    assert not list(faults(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"report.md", "report.json"} <= set(manifest["files"])
    for name in ("report.md", "report.json"):
        assert run("diff", TINY, folder, "--check", folder / name, cwd=tmp_path).returncode == 0


def test_a_stale_report_is_exit_code_1(folder: Path, tmp_path: Path) -> None:
    stale = tmp_path / "report.md"
    stale.write_text((folder / "report.md").read_text().replace("13 moved", "12 moved"))
    done = run("diff", TINY, folder, "--check", stale, cwd=tmp_path)
    assert done.returncode == 1 and "is not the report of these two" in done.stderr
    assert run("diff", TINY, folder, "--output", stale, cwd=tmp_path).returncode == 1
    assert stale.read_bytes() == (folder / "report.md").read_bytes()


def test_the_report_of_a_large_repack_is_the_one_of_these_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data is read, once, and held to the manifest: a folder whose weights were changed has another report."""
    monkeypatch.setattr(tensor_contents, "QUICK_BYTES", 1000)
    out = reported(tmp_path / "out")
    words = ["diff", str(TINY), str(out), "--check", str(out / "report.md")]
    assert "known by the SHA-256 in manifest.json" in (out / "report.md").read_text()
    assert CliRunner().invoke(app, words).exit_code == 0
    data = out / "model.onnx_data"
    data.write_bytes(bytes(byte ^ 255 for byte in data.read_bytes()))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "is not the report of these two" in done.stderr


def test_a_record_of_another_graph_gives_no_reasons(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    model.producer_name = "somebody else"
    onnx.save(model, tmp_path / "out" / "model.onnx")
    report = json.loads(run("diff", TINY, "out", "--format", "json", cwd=tmp_path).stdout)
    assert not any(reasons(change) for change in report["interface"]) and report["passes"] == []


def test_a_dry_run_writes_nothing_and_prints_what_would_change(folder: Path, tmp_path: Path) -> None:
    done = run("repack", TINY, "out", "--dry-run", "--precision", "q4", "--json", cwd=tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    planned, written = json.loads(done.stdout)["report"], json.loads((folder / "report.json").read_text())
    for section in ("after", "interface", "layers", "metadata", "nodes", "config"):
        assert planned[section] == written[section], section
    assert planned["weights"]["changes"] == written["weights"]["changes"]


def test_a_plan_needs_no_data_files(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "bare", ignore=shutil.ignore_patterns("*_data"))
    export = open_export(tmp_path / "bare")
    found = planned_report(export, export.pair("q4"), compatible(export.pair("q4").embed))
    assert found.weights.uncompared == 0 and found.weights.unchanged == 345


def test_a_dry_run_of_a_repository_fetches_no_data_file_and_prints_both(tmp_path: Path) -> None:
    with serve(Hub.of(TINY, "onnx-community/tiny-gemma-4")) as hub:
        places = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
        done = run(
            "repack", "onnx-community/tiny-gemma-4", "out", "--dry-run", "--precision", "q4", cwd=tmp_path, **places
        )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "cache").rglob("*_data")) and not (tmp_path / "out").exists()
    assert "in all" in done.stdout and "to download" in done.stdout
    assert "embed_tokens_q4.onnx + onnx/decoder_model_merged_q4.onnx -> model.onnx: breaking" in done.stdout
    assert "13 moved" in done.stdout and "weights: 0 changed" in done.stdout and "not compared" not in done.stdout


def test_a_folder_for_images_is_compared_graph_by_graph(tmp_path: Path) -> None:
    done = run("repack", TINY, "out", "--modalities", "text,image", "--precision", "q4", "--no-validate", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = compare(*open_subjects(TINY, tmp_path / "out"))
    assert [graph.role for graph in found.after.graphs] == ["vision_encoder", "embed_tokens", "decoder"]
    assert [graph.role for graph in found.before.graphs] == ["vision_encoder", "embed_tokens", "decoder"]
    assert not any(change.verb == "moved" for change in found.nodes)
    (features,) = [c for c in found.interface if c.after and c.after.name == "image_features"]
    assert features.note.startswith("of embed_tokens") and features.reasons[0].by == "scatter-features"
    assert is_current(tmp_path / "out" / "report.json", found)
