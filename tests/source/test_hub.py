"""surgery.source.hub against a server on loopback, and against a cache without one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Answer, Hub, reach_nobody_by_default, serve
from places import ROOT, TINY

from surgery.errors import ArchitectureError, ExportError, ModelError, WeightError
from surgery.graph.external_data import is_external, set_location, tensors
from surgery.graph.model import Model
from surgery.source.export import open_export
from surgery.source.hub import Download, HubSource, HubUnreachable, fetch, hub_source, list_files, plan_download

pytest.importorskip("huggingface_hub")

REPO = "onnx-community/tiny-gemma-4"
GRAPHS = ["onnx/embed_tokens_q4.onnx", "onnx/decoder_model_merged_q4.onnx"]
SIDE = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
Q4 = sorted([*SIDE, *GRAPHS, *(f"{graph}_data" for graph in GRAPHS)])


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    reach_nobody_by_default(monkeypatch)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub.of(TINY, REPO)) as served:
        yield served


@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> HubSource:
    return HubSource(REPO, endpoint=hub.endpoint, cache=tmp_path / "cache")


def download(source: HubSource, precision: str = "q4") -> Download:
    return plan_download(list_files(source), precision)


def needed(planned: Download) -> list[str]:
    return sorted(entry.file.name for entry in planned.files)


def check(root: Path, precision: str = "q4") -> None:
    pair = open_export(root).pair(precision)
    assert Model.open(pair.embed).check_weights() > 0
    assert Model.open(pair.decoder).check_weights() > 0


# Which sources are on the Hub


@pytest.mark.parametrize("text", ["onnx-community/gemma-4-E2B-it-ONNX", "a/b", "A_b/c.d-e"])
def test_a_hub_id(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_source(text, "v1") == HubSource(text, "v1")


@pytest.mark.parametrize(
    "text",
    [
        "folder",
        "./a/b",
        "./a",
        "../a",
        "/a/b",
        "/a",
        "~/a",
        "a/b/c",
        "a/",
        "a/-b",
        "a--b/c",
        "a/b.git",
        "a\\b",
        "",
    ],
)
def test_a_local_path(text: str) -> None:
    assert hub_source(text) is None


def test_an_existing_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_source("owner/name") is None
    with pytest.raises(ExportError, match="local path"):
        hub_source("owner/name", "main")


def test_import_is_cheap() -> None:
    code = "import sys, surgery.source.hub; assert not {'huggingface_hub', 'onnx', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


# What is asked for


def test_the_plan_reads_the_graphs_and_nothing_large(hub: Hub, source: HubSource) -> None:
    planned = download(source)
    assert needed(planned) == Q4
    assert hub.fetched() == ["config.json", *GRAPHS]
    sizes = {name: len(hub.files[name]) for name in Q4}
    assert planned.total_bytes == sum(sizes.values())
    assert planned.missing_bytes == sum(size for name, size in sizes.items() if name not in hub.fetched())
    assert planned.listing.commit == COMMIT


def test_fetch_gets_each_file_once_from_one_commit(hub: Hub, source: HubSource) -> None:
    root = fetch(download(source))
    assert sorted(hub.fetched()) == Q4
    assert root.name == COMMIT
    later = [line for line in hub.log if "/resolve/" in line and "config.json" not in line.rpartition("/")[2]]
    assert all(f"/resolve/{COMMIT}/" in line for line in later)
    check(root)


def test_a_second_run_asks_what_the_revision_is_and_fetches_nothing(hub: Hub, source: HubSource) -> None:
    fetch(download(source))
    hub.log.clear()
    planned = download(source)
    assert planned.missing_bytes == 0
    check(fetch(planned))
    assert hub.log == [f"GET /api/models/{REPO}/revision/main", f"HEAD /{REPO}/resolve/main/config.json"]


def test_other_precisions_in_the_snapshot_do_not_confuse(hub: Hub, source: HubSource) -> None:
    for precision in ("q4f16", "fp32"):
        download(source, precision)  # graphs without their data
    check(fetch(download(source)))


def test_a_new_commit_with_the_same_weights_fetches_no_weights(hub: Hub, source: HubSource) -> None:
    fetch(download(source))
    hub.commit = "d00d" + "0" * 36
    hub.log.clear()
    planned = download(source)
    assert planned.missing_bytes == 0
    check(fetch(planned))
    assert hub.fetched() == []


def test_data_files_are_those_that_the_graph_names(hub: Hub, source: HubSource) -> None:
    move_data(hub, GRAPHS[1], "decoder_model_merged_q4.onnx_data_1")
    planned = download(source)
    assert "onnx/decoder_model_merged_q4.onnx_data_1" in needed(planned)
    check(fetch(planned))


def test_a_flat_repository(hub: Hub, source: HubSource) -> None:
    hub.files = {name.removeprefix("onnx/"): data for name, data in hub.files.items()}
    check(fetch(download(source)))


def test_a_revision_by_its_commit(hub: Hub, tmp_path: Path) -> None:
    source = HubSource(REPO, COMMIT, hub.endpoint, tmp_path)
    check(fetch(download(source)))
    assert sorted(hub.fetched()) == Q4


def test_a_mirror_that_hides_sizes(hub: Hub, source: HubSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "listing", lambda: bare_listing(hub))
    planned = download(source)
    assert [entry.file.size for entry in planned.files] == [None] * len(Q4)
    check(fetch(planned))


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    hub: Hub, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    with pytest.raises(ExportError, match="gated") as caught:
        list_files(source)
    assert "accept its licence" in str(caught.value.hint)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    check(fetch(download(source)))
    assert not [line for line in hub.log if line.startswith("LEAK")]


# What a repository may lack, or claim


def test_a_missing_precision_names_the_nearest(source: HubSource) -> None:
    with pytest.raises(ExportError, match=r"no precision 'q4f61' \(did you mean 'q4f16'\?\); it holds fp32, fp16, q4,"):
        download(source, "q4f61")


def test_a_repository_without_a_config(hub: Hub, source: HubSource) -> None:
    del hub.files["config.json"]
    with pytest.raises(ExportError, match=r"no config\.json"):
        list_files(source)
    assert hub.fetched() == []


def test_a_repository_without_graphs(hub: Hub, source: HubSource) -> None:
    hub.files = {"config.json": hub.files["config.json"], "model.safetensors": b""}
    with pytest.raises(ExportError, match=r"no embed_tokens\*\.onnx and decoder_model_merged"):
        download(source)


def test_another_family_is_refused_before_its_graphs_are_fetched(hub: Hub, source: HubSource) -> None:
    hub.files["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(ArchitectureError):
        download(source)
    assert hub.fetched() == ["config.json"]


def test_a_data_file_that_the_repository_lacks(hub: Hub, source: HubSource) -> None:
    del hub.files[f"{GRAPHS[1]}_data"]
    with pytest.raises(ExportError, match=r"has no onnx/decoder_model_merged_q4\.onnx_data, where .* stores weights"):
        download(source)


@pytest.mark.parametrize("location", ["../config.json", "/etc/passwd", "C:/x", "a/../../b"])
def test_a_graph_that_names_a_file_outside(location: str, hub: Hub, source: HubSource) -> None:
    move_data(hub, GRAPHS[1], location)
    with pytest.raises(WeightError, match="leads out of the model's folder"):
        download(source)


@pytest.mark.parametrize(
    "name", ["../evil.onnx_data", "/evil", "onnx/../../evil", "onnx/./embed_tokens_q4.onnx", "onnx\\x"]
)
def test_a_hostile_name_is_never_asked_for(name: str, hub: Hub, source: HubSource, tmp_path: Path) -> None:
    hub.files[name] = b"evil"
    check(fetch(download(source)))
    assert sorted(hub.fetched()) == Q4
    assert not list(tmp_path.rglob("evil*"))


def test_a_graph_that_is_a_pointer(hub: Hub, source: HubSource) -> None:
    hub.files[GRAPHS[0]] = b"version https://git-lfs.github.com/spec/v1\n"
    with pytest.raises(ModelError, match="not an ONNX model"):
        download(source)


# What can go wrong on the way


REFUSALS = {
    "no-such-repository": (
        Answer(404, "RepoNotFound"),
        f"no folder {REPO}, and http.* has no repository of this name",
    ),
    "no-such-revision": (Answer(404, "RevisionNotFound"), "has no branch, tag or commit 'v9'"),
    "gated-without-login": (Answer(401, "GatedRepo"), "is gated"),
    "gated-with-login": (Answer(403, "GatedRepo"), "is gated"),
    "bad-token": (Answer(401), "does not accept the token"),
    "no-access": (Answer(403), "gives no access"),
    "rate-limit": (
        Answer(429, headers={"Retry-After": "300"}),
        r"no more requests for 300 seconds \(HTTP 429\)",
    ),
    "trouble": (Answer(503), r"in trouble \(HTTP 503\)"),
    "proxy": (Answer(407), r"refuses .* \(HTTP 407 Proxy Authentication Required\)"),
    "login-page": (Answer(200, body=b"<html>Welcome to the hotel"), "does not answer as the Hub does"),
    "not-a-listing": (Answer(200, body=b"[]"), "does not answer as the Hub does"),
}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked once and answered is not waited for."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"it waits {seconds} s")

    monkeypatch.setattr("time.sleep", sleep)


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_sentence(case: str, hub: Hub, tmp_path: Path, at_once: None) -> None:
    hub.faults["/api/models"], expected = REFUSALS[case]
    with pytest.raises(ExportError, match=expected) as caught:
        list_files(HubSource(REPO, "v9", hub.endpoint, tmp_path))
    assert "\n" not in str(caught.value)
    assert len(hub.log) == 1, "asked once"


@pytest.mark.parametrize("answer", [Answer(503), Answer(429)])
def test_trouble_with_a_complete_cache_is_none(answer: Answer, hub: Hub, source: HubSource) -> None:
    fetch(download(source))
    hub.faults["/api/models"] = answer
    listing = list_files(source)
    assert isinstance(listing.unreachable, HubUnreachable)
    assert listing.commit == COMMIT
    check(fetch(plan_download(listing, "q4")))


def test_without_a_network(tmp_path: Path, at_once: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(HubUnreachable, match=r"the connection to .* failed .* and the cache holds nothing of"):
        list_files(HubSource(REPO, endpoint=endpoint, cache=tmp_path))


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    """The library's own patience is 10 seconds; what it is told to wait is looked at, not the clock."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.2)
    waits, real = set[float | None](), socket.socket.settimeout
    monkeypatch.setattr(socket.socket, "settimeout", lambda self, seconds: waits.add(seconds) or real(self, seconds))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(HubUnreachable, match="timed out"):
            list_files(HubSource(REPO, endpoint=endpoint, cache=tmp_path))
    assert waits - {None} == {0.2}


def test_a_cut_connection_is_resumed(hub: Hub, source: HubSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    name = f"{GRAPHS[1]}_data"
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cuts[name] = [5000]
    check(fetch(download(source)))
    assert hub.fetched().count(name) == 2
    assert "Range bytes=5000-" in hub.log


def test_a_connection_that_is_always_cut(hub: Hub, source: HubSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    name = f"{GRAPHS[1]}_data"
    hub.cuts[name] = [0] * 99
    planned = download(source)
    with pytest.raises(ExportError, match=r"the connection to .* failed"):
        fetch(planned)
    assert hub.fetched().count(name) < 10
    hub.cuts.clear()
    hub.log.clear()
    check(fetch(download(source)))
    assert hub.fetched() == [name], "files that were complete are kept"


def test_a_fetch_goes_on_where_another_run_stopped(
    hub: Hub, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    name = f"{GRAPHS[1]}_data"
    hub.cuts[name] = [*[0] * 98, 5000]
    planned = download(source)
    with pytest.raises(ExportError) as stopped:
        fetch(planned)
    assert "the next run goes on there" in stopped.value.__notes__[0]
    hub.cuts.clear()
    hub.log.clear()
    told: list[int] = []
    planned = download(source)
    check(fetch(planned, told.append, told.append))
    assert "Range bytes=5000-" in hub.log and hub.fetched() == [name]
    assert told[0] == len(hub.files[name]) - 5000 == sum(told[1:])
    blobs = planned.listing.root.parent.parent / "blobs"
    assert not [path.name for path in blobs.iterdir() if "." in path.name], "nothing but complete files stays"


def test_what_an_earlier_run_left_is_not_trusted(hub: Hub, source: HubSource) -> None:
    name = f"{GRAPHS[1]}_data"
    planned = download(source)
    blobs = planned.listing.root.parent.parent / "blobs"
    partial = blobs / f"{hub.sha256(name)}.gemma4-surgery"
    partial.write_bytes(bytes(5000))
    with pytest.raises(ExportError, match="one content, but another came"):
        fetch(planned)
    check(fetch(download(source)))


def test_a_size_that_is_not_the_listed_one(hub: Hub, source: HubSource) -> None:
    hub.sizes[f"{GRAPHS[0]}_data"] = 7
    with pytest.raises(ExportError, match=r"lists onnx/embed_tokens_q4\.onnx_data with 7 bytes, but [\d,]+ came"):
        fetch(download(source))


def test_a_damaged_file_in_the_cache_is_fetched_again(hub: Hub, source: HubSource) -> None:
    damaged = fetch(download(source)) / f"{GRAPHS[0]}_data"
    damaged.resolve().write_bytes(b"cut short")
    hub.log.clear()
    planned = download(source)
    assert planned.missing_bytes == len(hub.files[f"{GRAPHS[0]}_data"])
    check(fetch(planned))
    assert hub.fetched() == [f"{GRAPHS[0]}_data"]


def test_a_disk_with_too_little_space(hub: Hub, source: HubSource, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = download(source)
    hub.log.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ExportError, match=r"needs [\d,]+ more bytes") as caught:
        fetch(planned)
    assert "HF_HOME" in str(caught.value.hint)
    assert hub.log == []


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written")])
def test_a_cache_that_cannot_be_written(
    code: int, expected: str, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "/cache/blobs/x")

    planned = download(source)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    with pytest.raises(ExportError, match=expected) as caught:
        fetch(planned)
    assert "HF_HOME" in str(caught.value.hint)


# In a process of its own, with the environment that a user has


SCRIPT = f"""
import sys
from surgery.errors import SurgeryError
from surgery.source.export import open_export
from surgery.source.hub import fetch, hub_source, list_files, plan_download
from surgery.graph.model import Model
try:
    pair = open_export(fetch(plan_download(list_files(hub_source({REPO!r})), sys.argv[1]))).pair(sys.argv[1])
    print(Model.open(pair.embed).check_weights() + Model.open(pair.decoder).check_weights())
except SurgeryError as error:
    sys.exit(f"{{error}} | {{error.hint}}")
"""


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **settings}


def run(precision: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, precision]
    return subprocess.run(command, cwd=cwd, env=environment(**settings), capture_output=True, text=True, check=False)


def test_offline_uses_the_cache_and_asks_nothing(hub: Hub, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
    online = run("q4", tmp_path, **settings)
    assert (online.returncode, online.stderr) == (0, ""), "no progress bar where stderr is no terminal"
    hub.log.clear()
    offline = run("q4", tmp_path, **settings, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout, offline.stderr) == (0, online.stdout, "")
    assert hub.log == []


def test_offline_names_what_the_cache_lacks(hub: Hub, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
    nothing = run("q4", tmp_path, **settings, HF_HUB_OFFLINE="1")
    assert nothing.returncode == 1
    assert nothing.stderr.startswith(f"HF_HUB_OFFLINE is set, and the cache holds nothing of {REPO} | run once without")
    root = fetch(download(HubSource(REPO, endpoint=hub.endpoint, cache=tmp_path / "hf" / "hub")))
    (root / f"{GRAPHS[1]}_data").unlink()
    partial = run("q4", tmp_path, **settings, HF_HUB_OFFLINE="1")
    assert f"the cache of {REPO} has no {GRAPHS[1]}_data" in partial.stderr
    other = run("q4f16", tmp_path, **settings, HF_HUB_OFFLINE="1")
    assert f"the cache of {REPO} has no precision 'q4f16'; it holds q4 |" in other.stderr
    assert partial.stderr.count("\n") == other.stderr.count("\n") == 1


def move_data(hub: Hub, graph: str, location: str) -> None:
    """Let a graph keep its weights at `location`, and move them there where it is a name beside the graph."""
    from onnx import ModelProto

    proto = ModelProto.FromString(hub.files[graph])
    for tensor in tensors(proto):
        if is_external(tensor):
            set_location(tensor, location)
    hub.files[graph] = proto.SerializeToString()
    if "/" not in location:
        hub.files[f"onnx/{location}"] = hub.files.pop(f"{graph}_data")


def bare_listing(hub: Hub) -> bytes:
    return json.dumps(
        {"id": hub.repo_id, "sha": hub.commit, "siblings": [{"rfilename": name} for name in hub.files]}
    ).encode()


ODD: list[Any] = [
    *(None, True, -1, 10**400, 1.5, "", "\ud800", "a" * 5000, "../../x", "x\n::y"),
    [],
    {},
    [None],
    {"a": 1},
]


@pytest.mark.parametrize("seed", range(3))
def test_a_listing_of_other_types_is_a_sentence(seed: int, hub: Hub, source: HubSource) -> None:
    """Whatever stands in the place of a value: a listing of plain names and sizes, or one sentence."""
    rng, whole = random.Random(seed), json.loads(bare_listing(hub))
    for entry in whole["siblings"]:
        entry |= {"size": 5, "blobId": "ab", "lfs": {"sha256": "cd" * 32, "size": 5, "pointerSize": 5}}
    for _ in range(25):
        value = json.loads(json.dumps(whole))
        place = rng.choice([value, value["siblings"], *value["siblings"], *(e["lfs"] for e in value["siblings"])])
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place[key] = rng.choice(ODD)
        hub.faults["/api/models"] = Answer(200, body=json.dumps(value).encode())
        try:
            listing = list_files(source)
        except ExportError as error:
            assert str(error).isprintable()
            continue
        assert all(isinstance(file.name, str) and isinstance(file.blob, str | None) for file in listing.files.values())
        assert all(file.size is None or 0 <= file.size < 2**63 for file in listing.files.values())
