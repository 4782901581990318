"""review of repositories that mean harm: names that no checkout would make, and configuration that runs programs."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from limits import FOR_EVER, Impatient, cpu_limit
from places import TINY
from repositories import GRAPH, change, commit, git, pointer

from surgery.compare import Comparison, Subject, commits
from surgery.compare.comparison import Aspect
from surgery.compare.markdown import to_markdown
from surgery.errors import RepositoryError
from surgery.runtime.own_process import Tell


def stored(folder: Path, kind: str, data: bytes) -> str:
    """The hash of an object that git would not make by itself, but keeps, fetches and clones."""
    done = subprocess.run(
        ["git", "hash-object", "-t", kind, "-w", "--literally", "--stdin"],
        cwd=folder, input=data, capture_output=True, check=True, timeout=FOR_EVER,
    )  # fmt: skip
    return done.stdout.decode().strip()


def tree(folder: Path, entries: dict[str, tuple[str, str]]) -> str:
    """A tree of `entries`, name -> (mode, hash), whatever the names are."""
    lines = [f"{mode} {name}\0".encode() + bytes.fromhex(hash_) for name, (mode, hash_) in entries.items()]
    return stored(folder, "tree", b"".join(lines))


def committed(folder: Path, entries: dict[str, tuple[str, str]], parent: str = "") -> str:
    words = ["commit-tree", tree(folder, entries), "-m", "by hand", *(("-p", parent) if parent else ())]
    return git(folder, *words).strip()


def models(folder: Path, base: str = "HEAD~", head: str = "HEAD") -> list[commits.Reviewed]:
    """What `review_commits` returns, made in this process, which a test can change."""
    return [one for one in commits.differing(folder, base, head) if isinstance(one, commits.Reviewed)]


def three_models(repository: Path) -> None:
    """Copies a, models and z of one model, which the last commit changed."""
    for folder in ("a", "z"):
        (repository / folder).mkdir()
        for path in (repository / "models").iterdir():
            (repository / folder / path.name).write_bytes(path.read_bytes())
    commit(repository, "three")
    for folder in ("a", "models", "z"):
        change(repository / folder / GRAPH, "/more")
    commit(repository, "changed")


@pytest.mark.parametrize("name", ["..", ".git", ".GIT", ".", "", "/abs", "../..", "a/../../..", "..\\..", "C:"])
def test_a_name_that_no_file_can_have_is_refused(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The folder of a model holds an entry by this name, and in that the file that the attack wants written."""
    graph = (repository / "models" / GRAPH).read_bytes()
    commits = []
    for content in (b"one", b"two"):
        blobs = {
            "genai_config.json": ("100644", stored(repository, "blob", b"{}")),
            "model.onnx": ("100644", stored(repository, "blob", graph)),
        }
        evil = {"planted.onnx": ("100644", stored(repository, "blob", content))}
        folder = tree(repository, blobs | {name: ("40000", tree(repository, evil))})
        commits.append(committed(repository, {"out": ("40000", folder)}, *commits[-1:]))
    scratch = tmp_path / "a" / "b" / "c"
    scratch.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(scratch))
    done = run("review", *commits, cwd=repository)
    said = "not compared: no file can have this name" if name else "empty filename in tree entry"  # that is git's
    assert done.returncode == 2 and said in done.stdout + done.stderr
    assert [path for path in tmp_path.rglob("planted*")] == []
    assert "Traceback" not in done.stderr


def test_names_that_differ_in_case_alone_and_names_that_are_too_long(repository: Path) -> None:
    (repository / "models" / ("x" * 200 + ".onnx_data")).write_bytes(b"1")
    commit(repository, "long")
    name = "y" * 5000 + ".onnx"
    head = git(repository, "rev-parse", "HEAD").strip()
    commits = [
        committed(repository, {name: ("100644", stored(repository, "blob", content))}, head) for content in (b"1", b"2")
    ]
    done = run("review", *commits, cwd=repository)
    assert done.returncode == 2 and "File name too long" in " ".join(done.stdout.split())


def test_nothing_that_the_repository_configures_is_run(repository: Path, tmp_path: Path) -> None:
    """A checkout that was unpacked from an archive: filters, monitors, hooks, pagers, transports."""
    sign = tmp_path / "it-ran"
    touch = f"touch {sign}"
    (repository / ".gitattributes").write_text("* filter=evil diff=evil\n")
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "attributes").write_text("* filter=evil diff=evil\n")
    (repository / ".lfsconfig").write_text("[lfs]\n\turl = https://user:secret@example.org/\n")
    change(repository / "models" / GRAPH, "/again")
    commit(repository, "changed")
    for key in ("filter.evil.smudge", "filter.evil.process", "diff.evil.textconv", "diff.evil.command"):
        git(repository, "config", key, touch)
    for key in ("core.fsmonitor", "core.sshCommand", "core.pager", "diff.external", "alias.rev-parse", "alias.ls-tree"):
        git(repository, "config", key, touch)
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 1 and "nodes: 1 added" in done.stdout, done.stdout + done.stderr
    assert not sign.exists()


def test_nothing_is_fetched_for_an_object_that_is_missing(repository: Path, tmp_path: Path) -> None:
    sign = tmp_path / "it-ran"
    blob = git(repository, "rev-parse", f"HEAD:models/{GRAPH}").strip()
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    for key, value in (
        ("core.repositoryFormatVersion", "1"),
        ("extensions.partialClone", "origin"),
        ("remote.origin.promisor", "true"),
        ("remote.origin.url", f"ext::sh -c 'touch {sign}'"),
        ("protocol.ext.allow", "always"),
    ):
        git(repository, "config", key, value)
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 2 and f"the clone does not hold blob {blob}" in " ".join(done.stdout.split())
    missing = run("review", "0" * 39 + "1", cwd=repository)
    assert missing.returncode == 2 and "is no commit of this clone" in missing.stderr
    assert not sign.exists()


def test_a_graph_of_lfs_that_is_not_what_its_pointer_says(repository: Path) -> None:
    """.git/lfs is as much a stranger's as the rest: a file in it counts if it has the pointer's digest."""
    graph = repository / "models" / GRAPH
    content = graph.read_bytes()
    graph.write_text(pointer(content))
    commit(repository, "a pointer")
    digest = hashlib.sha256(content).hexdigest()
    place = repository / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
    place.parent.mkdir(parents=True)
    place.write_bytes(content + b" ")
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 2 and "models/" + GRAPH in done.stdout and "is not an ONNX model" in done.stdout
    place.write_bytes(content)
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 0 and done.stdout == "no model differs\n", done.stdout


@pytest.mark.parametrize("kept", ["as a blob", "in Git LFS"])
def test_large_weights_are_told_apart_by_git_and_not_by_the_manifest(
    repository: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """A pull request that flips every weight, and leaves manifest.json and report.json as they were."""
    folder = repository / "out"
    done = run("repack", str(TINY), str(folder))
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(commits, "QUICK_BYTES", 200_000)
    contents = {path: path.read_bytes() for path in folder.glob("*.onnx_data*")}

    def keep(flip: int) -> None:
        for path, content in contents.items():
            data = bytes(byte ^ flip for byte in content)
            path.write_bytes(data if kept == "as a blob" else pointer(data).encode())

    keep(0)
    commit(repository, "first")
    (folder / "genai_config.json").write_text((folder / "genai_config.json").read_text() + "\n\n")
    commit(repository, "nothing but space")
    assert models(repository) == []
    keep(255)
    commit(repository, "flipped")
    (found,) = models(repository)
    assert found.comparison and found.comparison.weights.uncompared == 93 and found.fails(["weights"])
    assert [file.same for file in found.comparison.weights.files if file.kind == "data"] == [False, False]
    assert found.comparison.numbers is None


def test_one_poisoned_model_does_not_silence_the_others(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_models(repository)
    really = commits.compare

    def poisoned(before: Subject, after: Subject, **options: Any) -> Comparison:
        if before.label.startswith("a/"):
            raise RuntimeError("a\nmine")
        return really(before, after, **options)

    def unprintable(comparison: Comparison, most: int) -> str:
        if comparison.before.label.startswith("models/"):
            raise RuntimeError("another")
        return to_markdown(comparison, most)

    monkeypatch.setattr(commits, "compare", poisoned)
    monkeypatch.setattr(commits, "to_markdown", unprintable)
    text = commits.review_markdown(models(repository))
    assert (
        f"### a/{GRAPH}: not compared: a defect of gemma4-surgery: RuntimeError: a\\\\nmine".replace("_", "\\_") in text
    )
    assert f"### models/{GRAPH}: a defect of gemma4-surgery: RuntimeError: another".replace("_", "\\_") in text
    assert "nodes: 1 added" in text.partition("### z/")[2]


def test_what_another_process_tells_is_what_this_one_finds(repository: Path) -> None:
    three_models(repository)
    found = commits.review_commits(repository, "HEAD~")
    assert len(found) == 3 and found == models(repository)


def dies(tell: Tell, folder: Path, base: str, head: str, ignore: Collection[Aspect], first: int) -> None:
    """As `commits._tell`, but models end it: `models` dies, `z` loops, and what is behind it is never reached."""
    for one in commits.differing(folder, base, head, ignore, first):
        tell(one, 2 if one == ("z/" + GRAPH,) * 2 else FOR_EVER)
        if one == ("models/" + GRAPH,) * 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        while one == ("z/" + GRAPH,) * 2:
            pass


@pytest.mark.parametrize("most", [1, 3])
def test_a_model_that_ends_the_process_does_not_silence_the_others(
    most: int, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_models(repository)
    monkeypatch.setattr(commits, "_tell", dies)
    monkeypatch.setattr("queue.SimpleQueue", Impatient)
    monkeypatch.setattr(commits, "MOST_ENDS", most)
    found = commits.review_commits(repository, "HEAD~")
    problems = ["None", "the process was ended by the signal SIGSEGV"]
    problems += (
        ["the process was stopped: 2 seconds"] if most == 3 else ["1 models ended the process that compared them"]
    )
    assert [str(one.problem)[: len(text)] for one, text in zip(found, problems, strict=True)] == problems
    text = commits.review_markdown(found)
    assert "nodes: 1 added" in text and "models/" in text


def test_a_repository_of_any_number_of_files_is_one_sentence(repository: Path) -> None:
    """Ten trees, each of which holds the one below ten times."""
    entry = ("100644", stored(repository, "blob", b"x"))
    for _ in range(9):
        hash_ = tree(repository, {f"{name:0100}": entry for name in range(10)})
        entry = ("40000", hash_)
    head = committed(repository, {"bomb": entry})
    with cpu_limit(20), pytest.raises(RepositoryError, match="git ls-tree lists more than 134,217,728 bytes of names"):
        models(repository, head, head)


def test_many_files_of_one_folder_cost_no_product(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,100 changed files, each of which may be the data of 700 graphs."""
    heads = []
    for content in (b"1", b"2"):
        data, graph = (("100644", stored(repository, "blob", each)) for each in (content, b"x"))
        files = {f"weights{n:04}": data for n in range(2100)}
        heads.append(committed(repository, files | {f"x{n:04}.onnx": graph for n in range(700)}))
    monkeypatch.setattr(commits, "_reviewed", lambda _r, _t, pair, _i: commits.Reviewed(*pair, problem="found"))
    with cpu_limit(15):
        assert len(models(repository, *heads)) == 700
