"""surgery.folder.publishing against a server on loopback, and the commands that push."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import command_line
import pytest
from hub_server import NOBODY, Answer, Hub, reach_nobody_by_default, serve
from places import TINY

from surgery.errors import PublishError
from surgery.folder.publishing import Destination, publish, require_login, uploads
from surgery.folder.text_only import build_text_only
from surgery.source.export import open_export
from surgery.source.hub import HubSource, fetch, list_files, plan_download

REPO = "somebody/tiny"


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    reach_nobody_by_default(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # the server speaks LFS
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub("", {}, token="secret", exists=False)) as served:
        yield served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    export = open_export(TINY)
    return build_text_only(export, export.pair("q4"), tmp_path_factory.mktemp("publish") / "out").folder


def to(hub: Hub, **changed: bool) -> Destination:
    return Destination(REPO, endpoint=hub.endpoint, **changed)


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def of_folder(folder: Path) -> dict[str, str]:
    return digests({name: (folder / name).read_bytes() for name in uploads(folder)})


def test_every_file_arrives_in_a_repository_made_for_it(hub: Hub, folder: Path) -> None:
    published = publish(folder, to(hub), "Upload q4")
    assert digests(hub.files) == of_folder(folder)
    assert hub.repo_id == REPO and not hub.private and hub.messages == ["Upload q4"]
    assert published.url.endswith(f"/{REPO}/commit/{hub.commit}")
    assert (published.files, published.size) == (len(hub.files), sum(map(len, hub.files.values())))
    large = {name for name in hub.files if name.endswith(("_data", "tokenizer.json"))}
    assert set(hub.objects) == {digests(hub.files)[name] for name in large}, "the others go in the commit"


def test_what_was_pushed_is_a_source(hub: Hub, folder: Path, tmp_path: Path) -> None:
    publish(folder, to(hub), "Upload q4")
    root = fetch(plan_download(list_files(HubSource(REPO, endpoint=hub.endpoint, cache=tmp_path)), "q4"))
    export = open_export(root)
    build_text_only(export, export.pair("q4"), tmp_path / "again")
    names = [name for name in of_folder(folder) if name not in ("README.md", "manifest.json")]
    assert {n: of_folder(tmp_path / "again")[n] for n in names} == {n: of_folder(folder)[n] for n in names}


def test_a_private_repository(hub: Hub, folder: Path) -> None:
    publish(folder, to(hub, private=True), "Upload q4")
    assert hub.private
    publish(folder, to(hub, private=True), "Upload q4 again")
    assert len(hub.messages) == 2


def test_nothing_is_sent_to_a_public_repository_where_a_private_one_is_asked_for(hub: Hub, folder: Path) -> None:
    hub.exists, hub.repo_id = True, REPO
    with pytest.raises(PublishError, match="exists and is public; nothing was uploaded"):
        publish(folder, to(hub, private=True), "Upload q4")
    assert not hub.files and not hub.objects


def test_other_files_of_the_repository_stay_and_large_ones_are_sent_once(hub: Hub, folder: Path) -> None:
    hub.exists, hub.repo_id, hub.files = True, REPO, {"mine.txt": b"mine"}
    publish(folder, to(hub), "one")
    sent = sum(line.startswith("PUT") for line in hub.log)
    publish(folder, to(hub), "two")
    assert hub.files["mine.txt"] == b"mine"
    assert sum(line.startswith("PUT") for line in hub.log) == sent == 3


def test_the_login_is_checked_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_login(to(hub)) == "somebody"
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(PublishError, match="does not accept the token") as refused:
        require_login(to(hub))
    assert "hf auth login" in str(refused.value.hint)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="there is no token to write to somebody/tiny"):
        require_login(to(hub))
    with pytest.raises(PublishError, match="no name of a repository"):
        require_login(Destination("a/b/c", endpoint=hub.endpoint))


@pytest.mark.parametrize(
    "part, answer, sentence",
    [
        ("POST /api/repos/create", Answer(401), "does not accept the token"),
        ("POST /api/repos/create", Answer(403), "may not write to somebody/tiny"),
        ("preupload", Answer(403), "may not write to somebody/tiny"),
        ("objects/batch", Answer(403), "may not write to somebody/tiny"),
        ("/commit/", Answer(403), "may not write to somebody/tiny"),
        ("preupload", Answer(400, body=b'{"error": "bad"}'), "was not written: .* refuses somebody/tiny"),
    ],
)
def test_a_refusal_is_a_sentence_and_the_folder_stays(
    hub: Hub, folder: Path, part: str, answer: Answer, sentence: str
) -> None:
    hub.faults[part] = answer
    before = of_folder(folder)
    with pytest.raises(PublishError, match=sentence) as refused:
        publish(folder, to(hub), "Upload q4")
    assert of_folder(folder) == before
    assert f"`hf upload {REPO} {folder}`" in str(refused.value.hint)


def test_no_network_is_a_sentence(folder: Path) -> None:
    with pytest.raises(PublishError, match=r"the connection to http://127\.0\.0\.1:9 failed"):
        require_login(Destination(REPO, endpoint=NOBODY))


# The commands


def command(hub: Hub, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return command_line.run(
        *words, "--ep", "cpu", cwd=cwd,
        HF_ENDPOINT=hub.endpoint, HF_TOKEN="secret", HF_HOME=str(cwd / "home"),
        HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
    )  # fmt: skip


def test_strip_and_push(hub: Hub, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "strip", str(TINY), "out", "--no-validate", "--push-to", REPO, "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["published"]["repository"] == REPO and hub.private
    assert digests(hub.files) == of_folder(tmp_path / "out")
    assert hub.messages == ["Upload q4, text only, as two graphs"]
    assert "upload     to somebody/tiny, as somebody" in done.stderr and "uploaded   " in done.stderr


def test_repack_and_push(hub: Hub, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "repack", str(TINY), "out", "--no-validate", "--push-to", REPO)
    assert done.returncode == 0, done.stderr
    assert digests(hub.files) == of_folder(tmp_path / "out")
    assert {"README.md", "genai_config.json", "model.onnx", "manifest.json"} <= hub.files.keys()


@pytest.mark.parametrize(
    "words",
    [
        ("strip",),
        ("repack", "--weights", "consolidate"),
        ("repack", "--precision", "fp32", "--to-fp16"),
        ("repack", "--modalities", "text,image,audio"),
    ],
    ids=" ".join,
)
def test_a_dry_run_lists_what_would_be_uploaded_and_asks_nothing(
    hub: Hub, tmp_path: Path, words: tuple[str, ...]
) -> None:
    name, *options = words
    dry = command(hub, tmp_path, name, str(TINY), "out", *options, "--push-to", REPO, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert not hub.log and not (tmp_path / "out").exists()
    found = json.loads(dry.stdout)
    assert found["push_to"] == REPO
    listed = {entry["file"]: entry["size"] for entry in found["writes"]}
    assert command(hub, tmp_path, name, str(TINY), "out", *options, "--no-validate").returncode == 0
    written = uploads(tmp_path / "out")
    assert sorted(listed) == sorted(written)
    assert {n: size for n, size in listed.items() if size is not None}.items() <= written.items()


def test_a_login_that_fails_keeps_the_folder_from_being_made(hub: Hub, tmp_path: Path) -> None:
    hub.token = "another"
    done = command(hub, tmp_path, "strip", str(TINY), "out", "--push-to", REPO)
    assert done.returncode == 2 and "does not accept the token" in done.stderr
    assert not (tmp_path / "out").exists()
    alone = command(hub, tmp_path, "strip", str(TINY), "out", "--private")
    assert alone.returncode == 2 and "--private is of the repository of --push-to" in alone.stderr
