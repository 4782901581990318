"""A repack that is killed, told to stop, starved of space or run twice: the target is complete or absent, never between.

Children are forked from this process, which has everything imported: a kill costs milliseconds. A child that is to be
killed kills itself: before the first of the calls that change the disk, the next one before the second, and so on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from exhaustive import in_full
from folders import digests, names, repack
from killing import child, ended, has_ended, kills, seen
from limits import FOR_EVER, cpu_limit, wait_until
from places import ROOT, TINY

from passes.presets import compatible
from surgery.errors import FolderError
from surgery.files import atomic as staging
from surgery.files.atomic import require_space, staged_files, staged_folder, unwind_when_told_to_stop, write_file
from surgery.folder.building import plan
from surgery.graph.model import Model
from surgery.source.export import open_export

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to mount a disk")
not_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(TINY, tmp_path_factory.mktemp("export") / "source"))


@pytest.fixture(scope="module")
def references(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What complete folders hold, by precision."""
    found = {}
    for precision in ("q4", "q4f16"):
        folder = tmp_path_factory.mktemp("reference") / precision
        repack(source, folder, precision)
        found[precision] = digests(folder)
    return found


@pytest.fixture(autouse=True, scope="module")
def planned(source: Path) -> Iterator[None]:
    """The passes' work, done once for each precision: it writes nothing."""
    export, done = open_export(source), {}
    for precision in ("q4", "q4f16"):
        pair = export.pair(precision)
        done[pair] = plan(pair, export, compatible(pair.embed))
    with mock.patch("surgery.folder.building.plan", lambda pair, *given: done.get(pair) or plan(pair, *given)):
        yield


@needs_fork
@pytest.mark.parametrize("each", [3, in_full(1)])
def test_a_killed_run_leaves_a_complete_target_or_none(
    each: int, source: Path, references: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    before, complete, staged = digests(source), 0, 0
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    for _ in kills(lambda: repack(source, out, "q4f16"), each):
        staged += (out.parent / ".out.staging").exists()
        if out.exists():
            assert digests(out) == references["q4f16"]
            complete += 1
            shutil.rmtree(out)
    assert digests(source) == before
    assert staged > 20 / each and complete > 0
    shutil.rmtree(out)
    repack(source, out)
    assert names(out.parent) == ["out"] and digests(out) == references["q4"]
    Model.open(out / "model.onnx").check_weights()


@needs_fork
@pytest.mark.parametrize("each", [3, in_full(1)])
@pytest.mark.parametrize("at_once", [True, False], ids=["exchange", "two renames"])
def test_a_killed_replacement_leaves_the_old_folder_or_the_new_one(
    at_once: bool,
    each: int,
    source: Path,
    references: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where two renames are needed, a kill between them leaves neither; the next test makes sure that there is one."""
    if not at_once:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    before, found = digests(source), {"q4": 0, "q4f16": 0}
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    repack(source, out)
    wanted = "q4f16"

    def replace() -> None:
        repack(source, out, wanted, force=True)

    for _ in kills(replace, each):
        if not out.exists():
            assert not at_once
            with pytest.raises(FolderError, match="exists"):
                repack(source, out)
        (precision,) = (name for name, reference in references.items() if digests(out) == reference)
        wanted = "q4f16" if precision == "q4" else "q4"
        found[precision] += 1
    assert digests(source) == before
    assert min(found.values()) > 0
    repack(source, out, force=True)
    assert names(out.parent) == ["out"] and digests(out) == references["q4"]


@needs_fork
def test_a_kill_between_the_two_renames_is_undone_by_the_next_run(
    source: Path, references: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    out, rename = tmp_path / "out", os.rename
    repack(source, out)

    def stop_at_the_second(one: Path, other: Path) -> None:
        if Path(other) == out:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(one, other)

    def work() -> None:
        staging._exchange = lambda one, other: False
        os.rename = stop_at_the_second  # type: ignore[assignment]
        repack(source, out, "q4f16", force=True)

    assert ended(child(work)) == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(FolderError, match="exists"):
        repack(source, out)
    assert names(tmp_path) == ["out"] and digests(out) == references["q4"]


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
def test_a_run_that_is_told_to_stop_cleans_up(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    """And an impatient second signal does not cut the cleaning short."""
    remove, writing, cleaning = shutil.rmtree, tmp_path / "writing", tmp_path / "cleaning"

    def pause(number: int) -> None:
        if number == 5:
            writing.touch()
            signal.pause()

    def slow_remove(path: Path, ignore_errors: bool) -> None:
        shutil.rmtree = remove
        cleaning.touch()
        wait_until(lambda: not cleaning.exists(), "the second signal")
        remove(path, ignore_errors=ignore_errors)

    def work() -> None:
        signal.signal(number, signal.SIG_DFL)  # a shell's background job starts with some that are ignored
        unwind_when_told_to_stop()
        shutil.rmtree = slow_remove  # type: ignore[assignment]
        repack(source, tmp_path / "made" / "out")

    pid = child(work, pause)
    seen(writing, pid)
    assert (tmp_path / "made" / ".out.staging" / "new").exists()
    os.kill(pid, number)
    seen(cleaning, pid)
    os.kill(pid, number)
    cleaning.unlink()
    writing.unlink()
    assert ended(pid) == 128 + number
    assert names(tmp_path) == []


@needs_fork
def test_a_signal_whose_exception_is_dropped_still_counts(source: Path, tmp_path: Path) -> None:
    """Python prints and drops what is raised inside a callback, a destructor's for one."""

    class Careless:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    def work() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unwind_when_told_to_stop()
        with staged_folder(tmp_path / "out") as stage:
            (stage / "file").touch()
            careless = Careless()
            del careless

    assert ended(child(work)) == 128 + signal.SIGTERM
    assert names(tmp_path) == []


@needs_fork
def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As nohup starts it."""

    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        unwind_when_told_to_stop()
        os.kill(os.getpid(), signal.SIGHUP)

    assert ended(child(work)) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_the_command_cleans_up_and_says_by_its_exit_code_that_it_was_stopped(
    number: signal.Signals, source: Path, tmp_path: Path
) -> None:
    heard = f"import signal; signal.signal({int(number)}, signal.SIG_DFL)"
    stop = f"pathlib.Path({str(tmp_path / 'writing')!r}).touch() or signal.pause()"
    wait = f"{heard}; import pathlib; from surgery.graph import weight_writing as p; from surgery.commands import app; p._moved = lambda *a: ({stop} or 0 for _ in range(20))"
    command = [sys.executable, "-c", f"{wait}; app.main()"]
    place = tmp_path / "place"
    place.mkdir()
    arguments = ["repack", str(source), str(place / "out"), "--no-validate", "--ep", "cpu"]
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: (tmp_path / "writing").exists() or process.poll() is not None, "a file that is written")
    assert process.poll() is None, process.communicate()[1]
    assert (place / ".out.staging").exists()
    process.send_signal(number)
    _, talk = process.communicate(timeout=FOR_EVER)
    assert names(place) == []
    assert process.returncode == 128 + number, talk
    assert "Traceback" not in talk


# Two runs at once


@needs_fork
@pytest.mark.parametrize("force", [False, True])
def test_of_two_runs_at_once_one_wins_and_the_other_says_so(
    force: bool, source: Path, references: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """The one that gets in waits until the others have ended."""
    for attempt in range(5):
        out, alone = tmp_path / str(attempt) / "out", tmp_path / f"{attempt} is alone"
        out.parent.mkdir()
        if force:
            repack(source, out, "q4f16")

        def wait(number: int, alone: Path = alone) -> None:
            if number == 0:
                wait_until(alone.exists, "the end of the others")

        pids = [child(lambda out=out: repack(source, out, force=force), wait) for _ in range(3)]
        wait_until(lambda pids=pids: sum(map(has_ended, pids)) >= 2, "the end of all but one")
        alone.touch()
        assert sorted(ended(pid) for pid in pids) == [0, 2, 2]
        assert names(out.parent) == ["out"] and digests(out) == references["q4"]


def test_a_second_run_is_refused_in_one_sentence_and_the_first_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_folder(out) as stage:
        (stage / "file").write_text("first")
        with pytest.raises(FolderError, match=f"^another run is writing {out}$"), staged_folder(out):
            raise AssertionError("the second run got in")
    assert (out / "file").read_text() == "first" and names(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FolderError, match="appeared while it was being written"), staged_folder(out):
        out.mkdir()
        (out / "mine").write_text("keep")
    assert (out / "mine").read_text() == "keep" and names(tmp_path) == ["out"]


def test_where_folders_cannot_be_locked_a_leftover_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_lock", lambda folder: None)
    with staged_folder(tmp_path / "out"):
        pass
    (tmp_path / ".out2.staging").mkdir()
    with (
        pytest.raises(FolderError, match=r"another run is writing .*, or one was killed"),
        staged_folder(tmp_path / "out2"),
    ):
        pass
    assert names(tmp_path) == [".out2.staging", "out"]


def test_a_link_under_the_staging_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep")
    (tmp_path / ".out.staging").symlink_to("precious")
    with pytest.raises(FolderError, match=r"\.out\.staging: Not a directory"), staged_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "precious" / "file").read_text() == "keep"


# Targets that cannot be written


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["copy_file_range", "write", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=["ENOSPC", "EIO", "EDQUOT"])
def test_a_disk_that_fails_is_one_sentence_and_nothing_stays(
    call: str, code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    if call == "copy_file_range":  # a kernel that cannot copy is no failure: the buffer's writes are
        monkeypatch.setattr(os, "write", fail)
    with pytest.raises(FolderError) as caught:
        if call == "write":
            monkeypatch.setattr(os, "copy_file_range", fail)
        repack(source, tmp_path / "made" / "out")
    assert os.strerror(code) in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_failing_flush_of_the_new_name_does_not_say_that_the_folder_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", os.fsync

    def fail_late(handle: int) -> None:
        if out.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    monkeypatch.setattr(os, "fsync", fail_late)
    with (
        pytest.raises(FolderError, match="out is complete, but the disk does not confirm its name"),
        staged_folder(out),
    ):
        pass
    assert names(tmp_path) == ["out"]


def test_a_filesystem_that_cannot_flush_folders_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    with staged_folder(tmp_path / "out") as stage:
        (stage / "file").touch()
    assert names(tmp_path) == ["out"]


@contextlib.contextmanager
def small_disk(at: Path, options: str) -> Iterator[Path]:
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(at)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@needs_root
def test_a_disk_that_fills_up_while_it_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", "size=300k") as disk:
        with pytest.raises(FolderError, match=r"has [\d,]+ bytes free, but [\d,]+ are needed"):
            repack(source, disk / "out")
        monkeypatch.setattr("surgery.folder.building.require_space", lambda *_: None)
        with pytest.raises(FolderError, match="No space left on device"):
            repack(source, disk / "out")
        assert names(disk) == []


@needs_root
def test_a_link_to_another_disk_becomes_a_copy_and_needs_space(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=300k") as disk, pytest.raises(FolderError, match="bytes free"):
        repack(source, disk / "out", weights="link")
    with small_disk(tmp_path / "larger", "size=4m") as disk:
        repack(source, disk / "out", weights="link")
        manifest = json.loads((disk / "out" / "manifest.json").read_text())
        assert manifest["files"]["model.onnx_data"]["sha256"]


@needs_root
def test_a_read_only_disk(source: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=4m,ro") as disk, pytest.raises(FolderError, match="Read-only file system"):
        repack(source, disk / "out")


@not_root
def test_a_folder_that_may_not_be_written(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FolderError, match="Permission denied"):
        repack(source, tmp_path / "out")
    tmp_path.chmod(0o700)


def test_a_file_limit_is_one_sentence(source: Path, tmp_path: Path) -> None:
    import resource

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        repack(source, tmp_path / "out")

    assert ended(child(work)) == 2
    assert names(tmp_path) == []


def test_a_missing_parent_is_made(source: Path, tmp_path: Path) -> None:
    repack(source, tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "model.onnx").is_file()


def test_a_parent_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(FolderError, match="cannot be written"):
        repack(source, tmp_path / "file" / "out")
    assert names(tmp_path) == ["file"]


def test_a_name_that_is_too_long(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="File name too long"):
        repack(source, tmp_path / ("n" * 300))
    with pytest.raises(FolderError, match="File name too long"):
        repack(source, tmp_path / ("n" * 250))  # the folder's own name fits, its staging name does not
    assert names(tmp_path) == []


@pytest.mark.parametrize("to", ["folder", "nowhere"])
@pytest.mark.parametrize("force", [False, True])
def test_a_link_at_the_target_is_left_as_it_is(force: bool, to: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").symlink_to(to)
    with pytest.raises(FolderError, match="is not a folder; --force" if force else "exists"):
        repack(source, tmp_path / "out", force=force)
    assert names(tmp_path) == ["folder", "out"] and names(tmp_path / "folder") == []


@pytest.mark.parametrize("name", ["source", "source/onnx", "."])
def test_a_target_that_holds_the_source_is_refused_even_with_force(name: str, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    for place in (tmp_path / "source" / "onnx", tmp_path / "source", tmp_path):
        listed = {str(path.relative_to(place)): {} for path in place.rglob("*")}  # as if a repack had written it
        manifest = {"version": 1, "made_by": {"gemma4-surgery": None}, "files": listed}
        (place / "manifest.json").write_text(json.dumps(manifest))
    before = digests(tmp_path)
    with pytest.raises(FolderError, match="holds the source"):
        repack(tmp_path / "source", tmp_path / name, force=True)
    assert digests(tmp_path) == before


def test_a_target_inside_the_source_adds_a_folder_and_changes_no_file(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    before = digests(tmp_path / "source")
    repack(tmp_path / "source", tmp_path / "source" / "out")
    after = digests(tmp_path / "source")
    assert {name: digest for name, digest in after.items() if not name.startswith("out/")} == before
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("thesis.txt", "keep"),
        ("genai_config.json", "{}"),
        ("manifest.json", '{"manifest_version": 3, "version": "1.0", "name": "a web extension"}'),
        ("manifest.json", '{"version": 1, "made_by": {"npm": "11"}, "files": {"thesis.txt": {}}}'),
        ("manifest.json", "not JSON"),
    ],
)
def test_force_replaces_no_folder_without_a_manifest_of_this_program(
    name: str, content: str, source: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / name).write_text(content)
    (home / "thesis.txt").write_text("keep")
    before = digests(tmp_path)
    with pytest.raises(FolderError, match=r"and no manifest\.json of this program; --force replaces folders"):
        repack(source, home, force=True)
    assert digests(tmp_path) == before


def test_force_replaces_an_empty_folder_and_its_own(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    repack(source, tmp_path / "out", force=True)
    repack(source, tmp_path / "out", "q4f16", force=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["thesis.txt", ".git/config", "link"])
def test_force_removes_no_file_that_the_manifest_does_not_list(name: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    repack(source, out)
    (out / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (out / name).symlink_to(tmp_path)
    else:
        (out / name).write_text("keep")
    before = digests(tmp_path)
    with pytest.raises(FolderError, match=rf"holds {name}, which its manifest\.json does not list"):
        repack(source, out, force=True)
    assert digests(tmp_path) == before and names(tmp_path) == ["out"]


def test_what_is_put_into_the_old_folder_meanwhile_is_not_removed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    repack(source, out)
    with pytest.raises(FolderError, match=r"thesis\.txt, which its manifest\.json does not list"):
        repack(source, out, force=True, check=lambda _: (out / "thesis.txt").write_text("keep"))
    assert (out / "thesis.txt").read_text() == "keep" and names(tmp_path) == ["out"]


def test_a_folder_of_somebody_else_under_the_staging_name_stays(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / ".out.staging"
    mine.mkdir()
    (mine / "thesis.txt").write_text("keep")
    with pytest.raises(FolderError, match="is in the way: it is no staging folder of this program"):
        repack(source, tmp_path / "out")
    assert (mine / "thesis.txt").read_text() == "keep" and names(tmp_path) == [".out.staging"]


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.md"
    write_file(report, b"old")
    write_file(report, b"new")
    assert report.read_bytes() == b"new"
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(FolderError, match=r"report\.md was not written: .*No space left on device"):
        write_file(report, b"newer")
    assert report.read_bytes() == b"new" and names(tmp_path) == ["report.md"]


@needs_root
def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=100k") as disk:
        write_file(disk / "report.md", b"old")
        with pytest.raises(FolderError, match="No space left on device"):
            write_file(disk / "report.md", bytes(200_000))
        assert (disk / "report.md").read_bytes() == b"old" and names(disk) == ["report.md"]


@needs_fork
def test_what_a_killed_writer_of_a_file_left_goes_with_the_next(tmp_path: Path) -> None:
    def work() -> None:
        with staged_files(tmp_path / "report.md") as folder:
            (folder / "report.md").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert ended(child(work)) == -signal.SIGKILL
    assert names(tmp_path) == [".report.md.staging"]
    write_file(tmp_path / "report.md", b"whole")
    assert names(tmp_path) == ["report.md"]


def test_a_link_and_what_is_no_file_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.md").symlink_to("folder/report.md")
    write_file(tmp_path / "link.md", b"text")
    assert (tmp_path / "link.md").is_symlink() and (tmp_path / "folder" / "report.md").read_bytes() == b"text"
    write_file(Path(os.devnull), b"text")
    assert not Path(os.devnull).is_file()


def test_a_pipe_that_nobody_reads_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.md")
    with cpu_limit(5), pytest.raises(FolderError, match="nobody reads from it"):
        write_file(tmp_path / "report.md", b"text")
    reader = os.open(tmp_path / "report.md", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "report.md", b"text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)


def test_a_loop_of_links_is_one_sentence(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FolderError, match="Too many levels of symbolic links"):
        write_file(tmp_path / "a", b"text")
    with pytest.raises(FolderError, match="cannot be written"):
        repack(source, tmp_path / "a" / "out")


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(FolderError, match="bytes free, but 1,000,000,000,000,000,000 are needed"):
        require_space(tmp_path / "a" / "b", 10**18)
