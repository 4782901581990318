"""A folder that appears at once or not at all: written beside its target, flushed to disk, renamed.

The staging folder is locked by the process that fills it; one without a living owner is removed by the next run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import FolderError

_MARK = ".staging-"


@contextlib.contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on a clean exit it becomes `target`, on an exception it goes.

    Raises FolderError if `target` exists and `force` is not given, or if its parent cannot be written.
    With `force` the old folder stays in place until the new one is complete.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, force=force)
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        stage = parent / f".{target.name}{_MARK}{os.getpid()}"
        stage.mkdir()
    except OSError as error:
        raise FolderError(f"{parent} cannot be written: {error.strerror}") from None
    lock = _lock(stage)
    try:
        try:
            yield stage
            _flush(stage)
            _swap(stage, target)
        except OSError as error:
            where = error.filename or stage
            raise FolderError(f"{where} cannot be written: {error.strerror}; {target} was not touched") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def refuse_existing(target: Path, *, force: bool) -> None:
    if target.is_symlink() or target.exists():
        if not force:
            raise FolderError(f"{target} exists", hint="choose another name, or pass --force to replace it")
        if target.is_symlink() or not target.is_dir():
            raise FolderError(f"{target} is not a folder; --force replaces folders only")


def require_space(parent: Path, needed: int) -> None:
    """Raise FolderError if the filesystem of `parent` has fewer than `needed` bytes free."""
    existing = parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise FolderError(
            f"{parent} has {free:,} bytes free, but {needed:,} are needed",
            hint="free some space, choose another disk, or pass --weights link to share the source's bytes",
        )


def _swap(stage: Path, target: Path) -> None:
    if not target.exists():
        os.rename(stage, target)
    else:
        old = stage.with_name(stage.name + ".old")
        os.rename(target, old)
        try:
            os.rename(stage, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _flush_one(target.parent)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(folder: Path) -> int | None:
    """Hold the staging folder; None where folders cannot be locked. Dies with the process, also by SIGKILL."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_stale(target: Path) -> None:
    """Staging folders of this target that no process holds are leftovers of a run that was killed.

    If it was killed between the two renames of a replacement, the old folder is put back first.
    """
    for leftover in sorted(target.parent.glob(f".{target.name}{_MARK}*")):
        lock = _lock(leftover)
        if lock is None:
            continue
        os.close(lock)
        if leftover.name.endswith(".old") and not target.exists():
            os.rename(leftover, target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
