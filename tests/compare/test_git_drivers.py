"""git shows what changed in an .onnx file, and two commits are reviewed: real repositories, asked by git itself."""

from __future__ import annotations

import hashlib
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import program, run
from places import TINY
from repositories import GRAPH, change, commit, git, pointer

from surgery.compare.git_setup import set_up

ATTRIBUTES = Path(".git/info/attributes")


def configure(folder: Path) -> None:
    """What git-setup does, and git starts a command that is loaded; test_show_and_log_have_the_text has a real start."""
    set_up("local", program(), folder)


def quicken(folder: Path, *scope: str) -> None:
    """Let git start a command that is loaded in place of the one that git-setup wrote."""
    for key, command in (("command", "git-diff"), ("textconv", "git-textconv")):
        git(folder, "config", *scope, f"diff.gemma4-surgery.{key}", shlex.join([*program(), command]))


def test_git_knows_nothing_of_a_graph_by_itself(repository: Path) -> None:
    assert "Binary files a/models" in git(repository, "diff", "HEAD~", "HEAD")


def test_show_and_log_have_the_text_of_the_graph(repository: Path) -> None:
    done = run("git-setup", cwd=repository)
    assert done.returncode == 0, done.stderr
    for words in (("show",), ("log", "-p", "-1"), ("diff", "--no-ext-diff", "HEAD~", "HEAD")):
        if words[0] == "log":
            quicken(repository)
        shown = git(repository, *words)
        assert "+  Identity /added (logits) -> /added/output_0" in shown
        changed = [line for line in shown.splitlines() if line.startswith(("-", "+")) and "axis=" in line]
        assert len(changed) == 2 and changed[0].endswith("axis=-1") and changed[1].endswith("axis=3")
        assert "@@ graph main_graph: nodes" in shown
    assert "file 228347 bytes, sha256 06525a13be41" in git(repository, "show", "HEAD~", "--", f"models/{GRAPH}")


def test_set_up_twice_and_taken_away(repository: Path) -> None:
    config = (repository / ".git" / "config").read_bytes()
    (repository / ATTRIBUTES).parent.mkdir(exist_ok=True)
    (repository / ATTRIBUTES).write_bytes(b"*.png\tdiff=exif\r\n*.txt text")
    first, second = run("git-setup", cwd=repository), run("git-setup", cwd=repository)
    assert "wrote " in first.stdout and "wrote " not in second.stdout and "there already" in second.stdout
    assert (repository / ATTRIBUTES).read_bytes() == b"*.png\tdiff=exif\r\n*.txt text\n*.onnx diff=gemma4-surgery\n"
    assert git(repository, "config", "--get-all", "diff.gemma4-surgery.command").count("\n") == 1
    for said in ("removed ", "nothing was there"):
        gone = run("git-setup", "--unset", cwd=repository)
        assert gone.returncode == 0 and said in gone.stdout
    assert (repository / ATTRIBUTES).read_bytes() == b"*.png\tdiff=exif\r\n*.txt text\n"
    assert (repository / ".git" / "config").read_bytes() == config
    assert "Binary files" in git(repository, "show")


def test_from_a_folder_below_the_top(repository: Path) -> None:
    assert run("git-setup", cwd=repository / "models").returncode == 0
    assert (repository / ATTRIBUTES).is_file()
    quicken(repository)
    assert "Identity /added" in git(repository / "models", "show")


def test_a_linked_working_copy_shares_the_configuration(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "-q", str(tmp_path / "linked"), "HEAD")
    assert run("git-setup", cwd=tmp_path / "linked").returncode == 0
    quicken(tmp_path / "linked")
    assert "Identity /added" in git(tmp_path / "linked", "show")
    assert "Identity /added" in git(repository, "show")


def test_for_the_user_everywhere(repository: Path, home: Path) -> None:
    done = run("git-setup", "--global", cwd=repository)
    assert done.returncode == 0, done.stderr
    assert (home / ".config/git/attributes").read_text() == "*.onnx diff=gemma4-surgery\n"
    assert ".gitattributes of this repository" in done.stdout, "its `binary` wins over the user's attributes"
    assert "Binary files" in git(repository, "show")
    (repository / ".gitattributes").unlink()
    quicken(repository, "--global")
    assert "Identity /added" in git(repository, "show")
    assert run("git-setup", "--global", "--unset", cwd=repository).returncode == 0
    assert git(repository, "config", "--global", "--get", "diff.gemma4-surgery.command", code=1) == ""


@pytest.mark.parametrize("words", [("git-setup",), ("git-setup", "--global"), ("git-setup", "--global", "--unset")])
def test_nothing_that_a_strangers_checkout_names_is_run(words: tuple[str, ...], repository: Path, home: Path) -> None:
    config = (repository / ".git/config").read_text()
    for key in ("core.fsmonitor", "core.pager", "alias.config", "diff.external", "core.sshCommand"):
        git(repository, "config", key, f"touch {home}/owned #")
    assert run(*words, cwd=repository).returncode == 0
    assert not (home / "owned").exists()
    (repository / ".git/config").write_text(config)


@pytest.mark.parametrize("place", ["info/attributes", "info", "config"])
def test_a_link_in_a_strangers_checkout_is_not_written_through(place: str, repository: Path, home: Path) -> None:
    there, mine = repository / ".git" / place, home / "mine"
    shutil.copytree(there, mine) if there.is_dir() else shutil.copyfile(there, mine) if there.exists() else mine.touch()
    shutil.rmtree(there) if there.is_dir() else there.unlink(missing_ok=True)
    there.parent.mkdir(exist_ok=True)
    there.symlink_to(mine)
    before = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    done = run("git-setup", cwd=repository)
    assert done.returncode == 2 and "is a link; a checkout of a stranger" in done.stderr
    assert [path.read_bytes() for path in home.rglob("*") if path.is_file()] == before


def test_the_users_own_attributes_file(tmp_path: Path, home: Path) -> None:
    git(tmp_path, "config", "--global", "core.attributesFile", "~/mine")
    assert run("git-setup", "--global", cwd=tmp_path).returncode == 0
    assert (home / "mine").read_text() == "*.onnx diff=gemma4-surgery\n"


def test_outside_of_a_repository(tmp_path: Path, home: Path) -> None:
    refused = run("git-setup", cwd=tmp_path)
    assert refused.returncode == 2 and "is in no git repository" in refused.stderr and "--global" in refused.stderr


def test_without_git(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = run("git-setup", cwd=tmp_path)
    assert refused.returncode == 2 and "git is not installed" in refused.stderr


def test_a_pointer_and_a_file_that_is_no_graph(repository: Path) -> None:
    configure(repository)
    graph = repository / "models" / GRAPH
    graph.write_text(pointer(b"some graph"))
    commit(repository, "a pointer")
    shown = git(repository, "show")
    digest = hashlib.sha256(b"some graph").hexdigest()
    assert f"+Git LFS pointer to 10 bytes, sha256 {digest}; git fetches the graph where git-lfs is set up" in shown
    graph.write_bytes(b"\x08\x0a\xff\xff not a graph")
    commit(repository, "damaged")
    shown = git(repository, "show")
    assert f"+{GRAPH} (16 bytes) is not an ONNX model, or is cut short" in shown and "/tmp/" not in shown


# git diff: the report


def test_diff_is_the_report(repository: Path) -> None:
    configure(repository)
    shown = git(repository, "diff", "HEAD~", "HEAD")
    assert shown.startswith(f"diff --git a/models/{GRAPH} b/models/{GRAPH}\n")
    assert "nodes: 1 added, 1 changed" in shown and "attribute axis: -1 -> 3" in shown
    assert "weights are compared by gemma4-surgery review BASE HEAD" in shown, "git gives the graph alone"
    assert "layers 0-3" in shown, "the architecture is found beside the graph"
    assert "\x1b[" not in shown and "\x1b[" in git(repository, "-c", "color.diff=always", "diff", "HEAD~", "HEAD")
    assert "nodes: 1 added" in git(repository, "show", "--ext-diff")
    git(repository, "diff", "--exit-code", "HEAD~", "HEAD", code=1)
    assert git(repository, "diff", "--quiet", "HEAD", "HEAD") == ""


def test_diff_of_the_working_copy_from_below(repository: Path) -> None:
    configure(repository)
    git(repository, "checkout", "-q", "HEAD~", "--", f"models/{GRAPH}")
    git(repository, "reset", "-q")
    shown = git(repository / "models", "diff")
    assert "nodes: 1 removed, 1 changed" in shown and "attribute axis: 3 -> -1" in shown


def test_diff_of_new_gone_and_renamed_graphs(repository: Path) -> None:
    configure(repository)
    graph = repository / "models" / GRAPH
    shutil.copy(graph, repository / "models" / "second.onnx")
    commit(repository, "new")
    assert "new graph: 423 nodes" in git(repository, "diff", "HEAD~", "HEAD")
    assert "deleted graph: 423 nodes" in git(repository, "diff", "HEAD", "HEAD~")
    git(repository, "rm", "-q", "models/second.onnx")
    commit(repository, "gone")
    git(repository, "mv", f"models/{GRAPH}", "models/other.onnx")
    change(repository / "models" / "other.onnx", "/again")
    commit(repository, "renamed")
    shown = git(repository, "diff", "-M", "HEAD~", "HEAD")
    assert f"diff --git a/models/{GRAPH} b/models/other.onnx" in shown and "nodes: 1 added" in shown


def test_diff_goes_on_after_what_cannot_be_read(repository: Path) -> None:
    configure(repository)
    (repository / "models" / GRAPH).write_bytes(b"\x08\x0a\xff\xff not a graph")
    (repository / "a.onnx").write_text(pointer(b"some graph"))
    (repository / "z.txt").write_text("the last file")
    commit(repository, "damaged")
    shown = git(repository, "diff", "HEAD~", "HEAD")
    assert f"models/{GRAPH} (16 bytes) is not an ONNX model" in shown and "/tmp/git-blob" not in shown
    assert "a.onnx is a Git LFS pointer to 10 bytes; git fetches the graph where git-lfs is set up" in shown
    assert "+the last file" in shown


def test_diff_of_a_path_that_is_not_merged(repository: Path) -> None:
    configure(repository)
    git(repository, "checkout", "-q", "-b", "side", "HEAD~")
    change(repository / "models" / GRAPH, "/other")
    commit(repository, "side")
    git(repository, "merge", "-q", "main", code=1)
    assert f"models/{GRAPH} is not merged yet" in git(repository, "diff", "--cached")
    git(repository, "diff")


def test_a_driver_that_is_called_by_hand(tmp_path: Path) -> None:
    done = run("git-diff", "a", "b", cwd=tmp_path)
    assert done.returncode == 0 and "is run by git" in done.stdout


# review: two commits


def test_review_compares_weights_and_finds_renames(repository: Path) -> None:
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 1, done.stderr
    assert "nodes: 1 added, 1 changed" in done.stdout and "weights: 0 changed" in done.stdout
    assert "1 model differs" in done.stdout
    git(repository, "mv", "models", "moved")
    data = repository / "moved" / f"{GRAPH}_data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    commit(repository, "another bit")
    done = run("review", "HEAD~", cwd=repository / "moved")
    assert f"models/{GRAPH} (before) -> moved/{GRAPH} (after): numbers changed" in done.stdout
    assert "weights: 1 changed" in done.stdout and "nodes: unchanged" in done.stdout


def test_review_finds_the_graphs_of_a_data_file_of_any_name(repository: Path) -> None:
    from onnx import ModelProto

    graph, data = (repository / "models" / name for name in (GRAPH, "weights.bin"))
    proto = ModelProto.FromString(graph.read_bytes())
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = data.name if entry.key == "location" else entry.value
    graph.write_bytes(proto.SerializeToString())
    graph.with_name(f"{GRAPH}_data").rename(data)
    commit(repository, "another name")
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    (repository / "models" / "notes.md").write_text("no data file")
    commit(repository, "another bit")
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 1, done.stderr
    assert "weights: 1 changed" in done.stdout and "1 model differs" in done.stdout


def test_review_of_what_is_new_gone_or_damaged(repository: Path) -> None:
    (repository / "models" / "new.onnx").write_bytes(b"not a graph")
    git(repository, "rm", "-q", f"models/{GRAPH}")
    commit(repository, "one came, one went")
    done = run("review", "HEAD~", "--format", "md", cwd=repository)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == "## ONNX models: Breaking: 1 is new, 1 is gone"
    (repository / "models" / "new.onnx").write_bytes(b"not a graph either")
    commit(repository, "damaged")
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 2
    assert "models/new.onnx: not compared: models/new.onnx (11 bytes) is not an ONNX model" in done.stdout
    nothing = run("review", "HEAD", cwd=repository)
    assert nothing.returncode == 0 and nothing.stdout == "no model differs\n"


def test_review_of_a_genai_folder(repository: Path, tmp_path: Path) -> None:
    for layout in ("aliased", "unique"):
        done = run("repack", str(TINY), str(repository / "out"), "--kv-layout", layout, "--no-validate", "--force")
        assert done.returncode == 0, done.stderr
        commit(repository, layout)
    done = run("review", "HEAD~", "--format", "md", cwd=repository)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[0] == "## ONNX models: Breaking: 1 model differs"
    assert "### out (before) -\\> out (after): breaking" in done.stdout and "interface: 20 removed" in done.stdout
    (repository / "out" / "chat_template.jinja").write_text("another")
    commit(repository, "a side file")
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 1 and "files: 1 differ" in done.stdout, done.stdout + done.stderr


def test_review_of_files_in_lfs(repository: Path) -> None:
    """Pointers in git, and the graphs where git-lfs, which need not be installed, keeps what it fetched."""
    graph = repository / "models" / GRAPH
    (repository / ".gitattributes").write_text("*.onnx filter=lfs diff=lfs -text\n*.onnx_data filter=lfs -text\n")
    data, weights = graph.with_name(f"{GRAPH}_data"), graph.with_name(f"{GRAPH}_data").read_bytes()
    for node in ("/one", "/two"):
        change(graph, node)
        changed = graph.read_bytes()
        digest = hashlib.sha256(changed).hexdigest()
        place = repository / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
        place.parent.mkdir(parents=True)
        place.write_bytes(changed)
        graph.write_text(pointer(changed))
        data.write_text(pointer(weights))
        commit(repository, node)
        graph.write_bytes(changed)
    done = run("review", "HEAD~", cwd=repository)
    assert done.returncode == 1, done.stderr
    assert "nodes: 1 added" in done.stdout and "weights: 0 changed" in done.stdout, "the data file was never fetched"
    assert "2 data files known by the SHA-256 in its Git LFS pointer" in " ".join(done.stdout.split())


def test_review_says_what_is_missing(repository: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    git(tmp_path, "clone", "-q", "--depth", "1", repository.as_uri(), str(cut))
    refused = run("review", "HEAD^1", cwd=cut)
    assert refused.returncode == 2 and "HEAD^1 is no commit of this clone" in refused.stderr
    assert "fetch-depth: 2" in refused.stderr
    outside = run("review", "HEAD", cwd=tmp_path)
    assert outside.returncode == 2 and "is in no git repository: not a git repository" in outside.stderr
    option = run("review", "--", "--output=x", cwd=cut)
    assert option.returncode == 2 and not (cut / "x").exists()
