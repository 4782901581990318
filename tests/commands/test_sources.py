"""Sources as people name them: Hub repositories, addresses, folders; and the source that a folder was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, reach_nobody_by_default, serve
from places import TINY

import fixtures
import surgery
from surgery.commands import app as commands
from surgery.commands import console
from surgery.errors import ExportError, FolderError, PassError, RequestError, RuntimeMissing
from surgery.files.atomic import staged_folder
from surgery.folder.inspection import ExportInspection, FolderInspection
from surgery.source.hub import HubSource, hub_source, list_files, plan_download
from surgery.verify.prompts import Case

REPO = "onnx-community/tiny-gemma-4"
REPACK = surgery.RepackOptions(validate=False, provider="cpu")


class Heard(surgery.Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def said(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with serve(Hub.of(TINY, REPO)) as hub:
        yield hub


@pytest.fixture
def hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The repository, with an empty cache, in a folder where nothing is."""
    reach_nobody_by_default(monkeypatch)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.endpoint)
    template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    served.log.clear()
    served.files = {path.relative_to(TINY).as_posix(): path.read_bytes() for path in TINY.rglob("*") if path.is_file()}
    return served


def weights(hub: Hub) -> list[str]:
    return [name for name in hub.fetched() if "_data" in name]


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("a/b@v1.0", "v1.0"),
        ("a/b@refs/pr/3", "refs/pr/3"),
        ("https://huggingface.co/a/b", None),
        ("https://huggingface.co/a/b/", None),
        ("https://hf.co/a/b?library=onnx#files", None),
        ("https://huggingface.co/a/b/tree/v1.0/onnx", "v1.0"),
        ("https://huggingface.co/a/b/blob/refs%2Fpr%2F3/config.json", "refs/pr/3"),
    ],
)
def test_a_repository_as_people_name_it(text: str, revision: str | None) -> None:
    assert hub_source(text) == HubSource("a/b", revision)


@pytest.mark.parametrize("text", ["https://example.org/a/b", "https://huggingface.co/datasets/a/b", "https://hf.co/a"])
def test_another_address_is_one_sentence(text: str) -> None:
    with pytest.raises(ExportError, match="is no address of a model on the Hub") as found:
        hub_source(text)
    assert "owner/name@revision" in str(found.value.hint)


def test_two_revisions_are_refused() -> None:
    assert hub_source("a/b@v1", "v1") == HubSource("a/b", "v1")
    with pytest.raises(ExportError, match="a/b@v1 names a revision, and v2 is asked for"):
        hub_source("a/b@v1", "v2")


def test_a_name_without_an_owner_is_told_of_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="gemma-4-E2B-it-ONNX does not exist") as found:
        surgery.repack("gemma-4-E2B-it-ONNX", "out", REPACK)
    assert "onnx-community/gemma-4-E2B-it-ONNX" in str(found.value.hint)


@pytest.fixture(scope="module")
def repacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a local export."""
    return surgery.repack(TINY, tmp_path_factory.mktemp("local") / "out", REPACK).folder


def test_what_is_repacked_already_is_told_what_to_do(hub: Hub, repacked: Path) -> None:
    with pytest.raises(ExportError, match="is a folder for ONNX Runtime GenAI already") as found:
        surgery.repack(repacked, "out", REPACK)
    assert f"gemma4-surgery generate {repacked}" in str(found.value.hint)
    hub.files = {path.name: path.read_bytes() for path in repacked.iterdir()}
    with pytest.raises(ExportError, match="is a folder for ONNX Runtime GenAI already") as found:
        surgery.repack(REPO, "out", REPACK)
    assert f"hf download {REPO}" in str(found.value.hint) and weights(hub) == []


def test_inspect_fetches_graphs_and_tells_the_sizes_that_are_listed(hub: Hub) -> None:
    found = surgery.inspect(REPO)
    local = surgery.inspect(TINY)
    assert isinstance(found, ExportInspection) and isinstance(local, ExportInspection)
    assert weights(hub) == [] and found.sizes == local.sizes
    assert set(found.roles) == {"embed_tokens", "decoder_model_merged", "vision_encoder", "audio_encoder"}
    for role in found.roles:
        told = [(file.location, file.size, file.here) for file in found.roles[role].weight_files]
        assert told == [(file.location, file.size, False) for file in local.roles[role].weight_files]
    assert all(graph.problem is None for graph in found.graphs) and found.export.name == f"{REPO}@{COMMIT}"


def test_diff_compares_repositories_by_the_digests_that_the_hub_lists(hub: Hub, repacked: Path) -> None:
    same = surgery.diff(f"{REPO}@main", f"{REPO}@{COMMIT}", precision="q4")
    assert same.same and same.before.label == f"{REPO}@main q4"
    to_folder = surgery.diff(REPO, repacked)
    assert not to_folder.weights.uncompared and not any(c.verb == "changed" for c in to_folder.weights.changes)
    hub.files["onnx/decoder_model_merged_q4.onnx_data"] = bytes(
        len(hub.files["onnx/decoder_model_merged_q4.onnx_data"])
    )
    other = surgery.diff(TINY, REPO, precision="q4")
    assert "weights" in other.differing
    assert weights(hub) == []


def test_a_repacked_folder_on_the_hub_is_compared_too(hub: Hub, repacked: Path) -> None:
    hub.files = {path.name: path.read_bytes() for path in repacked.iterdir()}
    found = surgery.diff(REPO, repacked, ignore=["files"])
    assert found.same and found.before.kind == "folder" and weights(hub) == []


def test_two_graphs_of_one_name_are_told_apart_by_their_folders(repacked: Path, tmp_path: Path) -> None:
    other = shutil.copytree(repacked, tmp_path / "other")
    found = surgery.diff(repacked, other)
    assert (found.before.label, found.after.label) == ("out/model.onnx", "other/model.onnx")
    found = surgery.diff(repacked / "model.onnx", tmp_path / "other" / "model.onnx")
    assert (found.before.label, found.after.label) == ("out/model.onnx", "other/model.onnx")


def test_a_folder_finds_its_repository_by_the_manifest(hub: Hub, tmp_path: Path) -> None:
    folder = surgery.repack(REPO, "out", REPACK).folder
    heard, request = Heard(), surgery.Request(cases=[Case("short", "a prompt", ((2, 10, 77, 31),))], tokens=1)
    hub.log.clear()
    report = surgery.validate(folder, provider="cpu", request=request, listener=heard)
    assert report.passed and report.parity is not None and report.parity.max_abs == 0
    assert heard.lines == [f"source     {REPO}@{COMMIT}, as manifest.json says, from the cache"] and hub.log == []
    shutil.rmtree(tmp_path / "cache")
    heard.lines.clear()
    report = surgery.validate(folder, provider="cpu", request=request, listener=heard)
    assert report.parity is None and heard.lines == [f"numbers    not compared: pass --against {REPO}@{COMMIT}"]
    report = surgery.validate(folder, REPO, provider="cpu", request=request)
    assert report.parity is not None and report.parity.max_abs == 0


def test_another_source_is_refused_at_once(hub: Hub, repacked: Path, tmp_path: Path) -> None:
    name = "onnx/decoder_model_merged_q4.onnx_data"
    hub.files[name] = bytes(len(hub.files[name]))
    with pytest.raises(ExportError, match=f"{REPO} is not what .* was made from: {name} is not the file"):
        surgery.validate(repacked, REPO)
    assert weights(hub) == []
    other = shutil.copytree(TINY, tmp_path / "other")
    (other / name).write_bytes(hub.files[name])
    with pytest.raises(ExportError, match=f"{name} is not the file") as found:
        surgery.bench(repacked, other)
    assert "the export that it was made from" in str(found.value.hint)
    (other / name).write_bytes(b"short")
    with pytest.raises(ExportError, match=f"{name} is not the file"):
        surgery.validate(repacked, other)


def test_generate_fetches_an_export(hub: Hub) -> None:
    assert "".join(surgery.generate(REPO, "hello", new_tokens=2, precision="q4"))
    assert len(weights(hub)) == 2


@pytest.fixture(scope="module")
def of_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = surgery.RepackOptions(validate=False, provider="cpu", modalities=("image", "audio"))
    return surgery.repack(TINY, tmp_path_factory.mktemp("media") / "out", options).folder


def test_a_repacked_repository_is_inspected_and_answers(hub: Hub, of_media: Path) -> None:
    hub.files = {path.name: path.read_bytes() for path in of_media.iterdir()} | {"other/weights.onnx_data": b"not ours"}
    found, local = surgery.inspect(REPO), surgery.inspect(of_media)
    assert isinstance(found, FolderInspection) and isinstance(local, FolderInspection) and weights(hub) == []
    assert set(found.others) == {"embedding", "vision", "speech"}
    for one, other in zip(found.graphs, local.graphs, strict=True):
        assert [(file.size, file.here) for file in one.weight_files] == [
            (file.size, False) for file in other.weight_files
        ]
        assert one.problem is None and one.layers == other.layers
    assert "".join(surgery.generate(REPO, "hello", new_tokens=3)) == "".join(
        surgery.generate(of_media, "hello", new_tokens=3)
    )
    assert len(weights(hub)) == 4
    request = surgery.Request(cases=[Case("short", "a prompt", ((2, 10, 77, 31),))], tokens=1)
    report = surgery.validate(REPO, TINY, provider="cpu", request=request)
    assert report.passed and report.parity is not None and report.parity.max_abs == 0
    assert "other/weights.onnx_data" not in hub.fetched()


def test_an_export_is_no_folder(hub: Hub) -> None:
    for job in (surgery.validate, surgery.bench):
        with pytest.raises(ExportError, match=f"{REPO} is an export, and a folder") as found:
            job(REPO, provider="cpu")
        assert f"repack {REPO} OUT" in str(found.value.hint)
    assert weights(hub) == []


def test_a_recording_brings_its_prompts_along(repacked: Path, tmp_path: Path) -> None:
    """The source's config.json names placeholders, which a folder for text does not: recorded with the one, and read
    without it, the prompts are the same."""
    kept = surgery.Request(scope="light", tokens=2, save_golden=tmp_path / "kept")
    assert surgery.validate(repacked, TINY, provider="cpu", request=kept).passed
    report = surgery.validate(repacked, provider="cpu", request=surgery.Request(golden=tmp_path / "kept"))
    assert report.passed and report.parity is not None and report.settings["tokens"] == 2
    assert {"image-placeholder", "audio-placeholder"} <= {case.name for case in report.cases}
    with pytest.raises(RequestError, match="holds continuations of 2 tokens, 3 are asked for"):
        surgery.validate(repacked, request=surgery.Request(golden=tmp_path / "kept", tokens=3))


def test_numbers_that_are_not_known_come_with_what_is_known_instead(repacked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repacked, tmp_path / "proven"))
    report = json.loads((folder / "report.json").read_text())
    numbers = {"origin": "a proof", "passed": True, "exact": True, "summary": "42 of 42 gates passed", "gates": []}
    (folder / "report.json").write_text(json.dumps({**report, "numbers": {**numbers, "recorded": False}}))
    against = "onnx/embed_tokens_q4.onnx + onnx/decoder_model_merged_q4.onnx"
    found = surgery.diff(TINY, folder, precision="fp32")
    assert found.numbers is None and found.proven == f"its author proved it against {against}: 42 of 42 gates passed"
    assert f"numbers not measured between these two ({found.proven})" in found.verdict
    assert surgery.diff(TINY, folder).proven == ""
    (folder / "model.onnx").write_bytes((repacked / "model.onnx").read_bytes() + b"\x3a\x00")
    assert surgery.diff(TINY / "onnx" / "decoder_model_merged_q4.onnx", folder / "model.onnx").proven == ""


# Before anything is fetched, and while it is


def missing(*_: object) -> None:
    raise RuntimeMissing("onnxruntime-genai is not installed")


def test_what_would_fail_in_the_end_is_refused_before_anything_is_asked(
    hub: Hub, repacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "diary.txt").touch()
    for target, options, message in (
        ("/proc/out", {}, "/proc/out cannot be written"),
        (repacked, {}, "out exists"),
        (foreign, {"force": True}, "holds diary.txt"),
    ):
        with pytest.raises(FolderError, match=message):
            surgery.repack(REPO, target, surgery.RepackOptions(provider="cpu", **options))
        with pytest.raises(FolderError, match=message):
            surgery.strip(REPO, target, surgery.StripOptions(provider="cpu", **options))
    with pytest.raises(RuntimeMissing, match="CUDA"):
        surgery.repack(REPO, "out", surgery.RepackOptions(provider="cuda"))
    monkeypatch.setattr("surgery.verify.closing_proof.load_genai", missing)
    monkeypatch.setattr("surgery.runtime.genai.load_genai", missing)
    with pytest.raises(RuntimeMissing) as found:
        surgery.repack(REPO, "out", surgery.RepackOptions(provider="cpu"))
    assert "--no-validate" in str(found.value.hint)
    for job in (surgery.validate, surgery.bench):
        with pytest.raises(RuntimeMissing):
            job(repacked, REPO, provider="cpu")
    assert hub.log == []


def test_what_a_pass_refuses_is_told_before_weights_are_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the dry run: no quantised product for an accuracy level; a mixture of experts in int8."""
    fixtures.build("tiny-26b-a4b", "q4", tmp_path / "experts")
    experts = Hub.of(tmp_path / "experts", REPO).files
    for commit, files, message, options in (
        (COMMIT, hub.files, "has no MatMulNBits", replace(REPACK, precision="fp32", accuracy_level="4")),
        ("e" * 40, experts, "is a mixture of experts", replace(REPACK, precision="q4", prefill="int8", preset="fast")),
    ):
        monkeypatch.setattr(hub, "commit", commit)
        hub.files = files
        with pytest.raises(PassError, match=message):
            surgery.repack(REPO, "out", options)
        with pytest.raises(PassError, match=message):
            surgery.plan_repack(REPO, options)
    assert weights(hub) == [] and not Path("out").exists()


@pytest.mark.parametrize(
    "options", [{}, {"per_layer_table": "split"}, {"speculative": True}, {"prefill": "int8"}], ids=str
)
def test_a_plan_of_fast_needs_no_weights_and_names_what_it_could_not_try(hub: Hub, options: dict[str, Any]) -> None:
    plan = surgery.plan_repack(REPO, replace(REPACK, precision="q4", preset="fast", **options))
    assert "tie-lm-head" in plan.untried
    assert weights(hub) == [] and {"fuse-attention", "slice-caches"} <= set(_changed(plan)), _changed(plan)


def _changed(plan: surgery.RepackPlan) -> list[str]:
    return [one.name for one in plan.report.passes if any(found.verb != "skipped" for found in one.findings)]


def test_there_is_room_for_what_is_fetched_and_for_its_copy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache and the folder are on one disk here: with room for one of the two, nothing is fetched."""
    planned = plan_download(list_files(HubSource(REPO)), "q4")
    hub.log.clear()
    free = planned.missing_bytes + planned.weight_bytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2 * free, free, free))  # type: ignore[attr-defined]
    told = rf"{REPO} needs {planned.missing_bytes:,} more bytes, its copy in .*out {planned.weight_bytes:,}, .* has {free:,}"
    for job in (
        lambda: surgery.repack(REPO, "out", REPACK),
        lambda: surgery.strip(REPO, "out", surgery.StripOptions(validate=False, provider="cpu", precision="q4")),
    ):
        with pytest.raises(ExportError, match=told) as found:
            job()
        assert "--weights link" in str(found.value.hint)
    assert weights(hub) == [] and not Path("out").exists()
    surgery.repack(REPO, "out", surgery.RepackOptions(validate=False, provider="cpu", weights="link"))


def test_what_is_fetched_and_proven_is_told_with_counts(hub: Hub, tmp_path: Path) -> None:
    class Counting(surgery.Listener):
        def __init__(self) -> None:
            self.totals: list[tuple[str, int]] = []
            self.counts: list[int] = []
            self.stages: list[str] = []

        def started(self, total: int, doing: str = "writing") -> None:
            self.totals.append((doing, total))

        def advanced(self, count: int) -> None:
            self.counts.append(count)

        def stage(self, text: str) -> None:
            self.stages.append(text)

    heard = Counting()
    surgery.repack(REPO, "out", REPACK, listener=heard)
    data = sum(len(hub.files[name]) for name in set(weights(hub)))
    (fetching, fetched), (writing, written) = heard.totals
    assert (fetching, writing) == ("fetching", "writing") and fetched >= data == written
    assert sum(heard.counts) == fetched + written
    cases = [Case("short", "a prompt", ((2, 10, 77, 31),)), Case("other", "a prompt", ((2, 10),))]
    surgery.validate("out", REPO, request=surgery.Request(cases=cases, tokens=1), listener=heard)
    assert {"source runs: 1 of 2, short", "merged graph runs: 2 of 2, other", "generation: 2 of 2, other"} <= {
        *heard.stages
    }


def test_a_log_gets_a_line_for_each_stage_and_for_a_long_one_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell() -> list[str]:
        with console.JobProgress() as progress:
            progress.started(3_600_000_000, "fetching")
            progress.advanced(1_200_000_000)
            progress.stage("source")
            progress.stage("source: 3 of 33, latin")
        return capsys.readouterr().err.splitlines()

    assert tell() == ["proving    source"]
    monkeypatch.setattr(console, "LOG_SECONDS", 0)
    assert "fetching   1.20 GB of 3.60 GB, 0 s" in tell() and "proving    source: 3 of 33, latin, 0 s" in tell()


def test_a_signal_says_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(code: int) -> None:
        raise KeyError(code)

    def told(command: Callable[[], None]) -> str:
        monkeypatch.setattr(commands, "app", command)
        monkeypatch.setattr(commands, "_leave", left)
        with pytest.raises(KeyError, match="130"):
            commands.main()
        return capsys.readouterr().err

    def stopped(**_: object) -> None:
        raise SystemExit(130)

    def writing(**_: object) -> None:
        with staged_folder(tmp_path / "out") as stage:
            (stage / "model.onnx").touch()
            raise SystemExit(130)

    monkeypatch.setattr("surgery.files.atomic.unwind_when_told_to_stop", lambda: None)
    assert told(stopped) == "\nstopped: nothing was written\n"
    assert told(writing) == f"\nstopped: {tmp_path / 'out'} was not written, and nothing of it was left\n"
    assert list(tmp_path.iterdir()) == []
