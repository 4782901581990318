"""Options and files that several tests share."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import served_processes, started_processes
from once import work_anew, work_in_common
from places import TINY
from repositories import GRAPH, change, commit, git

from surgery.source.export import Export, open_export


def pytest_configure() -> None:
    """One processor for each process of the tests: the models are tiny, and threads that wait for them burn the rest."""
    if hasattr(os, "sched_setaffinity"):
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        free = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {free[worker % len(free)]})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With pytest-xdist a file's tests stay together: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-docs", action="store_true", help="write what the commands print into the pages")
    parser.addoption("--real", metavar="DIR", help="a folder of real .onnx files, searched at every depth")
    parser.addoption("--mutations", type=int, default=60, help="damaged inputs that test_hostile.py tries")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`real_onnx`: each file below --real; one skipped test, which says why, where the option is not given."""
    if "real_onnx" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--real")
    if folder is None:
        reason = "needs real files: pytest --real DIR"
        metafunc.parametrize("real_onnx", [pytest.param(None, marks=pytest.mark.skip(reason=reason))], ids=["none"])
        return
    files = sorted(Path(folder).rglob("*.onnx"))
    if not files:
        raise pytest.UsageError(f"--real {folder}: no .onnx file is below it")
    metafunc.parametrize("real_onnx", files, ids=[str(file.relative_to(folder)) for file in files])


def pytest_collection_finish() -> None:
    _set_aside()


def _set_aside() -> None:
    """What lasts is looked at no more when rubbish is collected, which a proof does several times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _set_aside_what_a_file_leaves() -> Iterator[None]:
    yield
    _set_aside()


@pytest.fixture(autouse=True, scope="session")
def _work_in_common() -> Iterator[None]:
    with work_in_common(), served_processes():
        yield


@pytest.fixture
def monkeypatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """pytest's own; from where a test patches a function on, its work is done anew."""
    with contextlib.ExitStack() as anew:
        really = monkeypatch.setattr

        def patch(target: Any, *others: Any, **options: Any) -> None:
            if not getattr(target, "__name__", "").startswith("validation."):
                anew.enter_context(work_anew())
                anew.enter_context(started_processes())
            really(target, *others, **options)

        monkeypatch.setattr = patch  # type: ignore[method-assign]
        try:
            yield monkeypatch
        finally:
            monkeypatch.undo()


@pytest.fixture(scope="session")
def export() -> Export:
    """The committed export."""
    return open_export(TINY)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the committed export that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "source"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with nothing configured but a name."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("GIT_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for key, value in (("user.name", "n"), ("user.email", "n@example.org"), ("init.defaultBranch", "main")):
        git(tmp_path, "config", "--global", key, value)
    return folder


@pytest.fixture
def repository(tmp_path: Path, home: Path) -> Path:
    """Two commits of a graph with its data file; .gitattributes calls both binary, as many repositories do."""
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / ".gitattributes").write_text("*.onnx binary\n*.onnx_data binary\n")
    (folder / "models").mkdir()
    for path in (*(TINY / "onnx").glob(f"{GRAPH}*"), TINY / "config.json"):
        shutil.copy(path, folder / "models" / path.name)
    commit(folder, "first")
    change(folder / "models" / GRAPH)
    commit(folder, "second")
    return folder
