"""A folder that appears at once or not at all: written beside its target, flushed to disk, renamed.

    .OUT.staging        what is being written; locked by the process that writes it, so that a second run is refused
    .OUT.staging.old    what `force` replaces, for a moment, where the system cannot exchange two names in one step

The lock ends with its process, also by SIGKILL: a staging folder that nobody holds is removed by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from surgery.errors import FolderError

_MARK = ".staging"
_ATTEMPTS = 100
"""How often a staging folder may vanish under us, because another run removes it, before we give up."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_IN_THE_WAY = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""What filesystems answer that cannot flush a folder; they have nothing to lose by it."""

_OPEN_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)

Identity = tuple[int, int]
"""Device and inode: which folder it is, whatever its name is now."""


class ToDict(Protocol):
    """What the check of a staged folder returns where it is to be told in JSON, such as surgery.verify's Report."""

    def to_dict(self) -> dict[str, Any]: ...


@contextlib.contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on a clean exit it becomes `target`, on an exception it goes.

    Raises FolderError if `target` exists and `force` is not given, if another run is writing it, or if it cannot be
    written. With `force` the old folder stays in place until the new one is complete.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, force=force)
    with _parents_of(target), _Claim(target) as claim:
        refuse_existing(target, force=force)  # a replacement that was cut short has just been undone
        try:
            yield claim.stage
            _flush(claim.stage)
            _stop_if_told()
            claim.publish(force=force)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise FolderError(f"{target} was not written: {where}{error.strerror}") from error
        _confirm(target)  # before the old folder goes


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise FolderError if there is something at `target`, or with `force` something that is not a folder."""
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise FolderError(f"{target} cannot be written: {error.strerror}") from None
    if not force:
        raise FolderError(f"{target} exists", hint="choose another name, or pass --force to replace it")
    if target.is_symlink() or not target.is_dir():
        raise FolderError(f"{target} is not a folder; --force replaces folders only")


def refuse_holding(target: Path, sources: Iterable[Path]) -> None:
    """Raise FolderError where replacing `target` would remove one of the sources."""
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise FolderError(f"{target} holds the source, {source}", hint="write it somewhere else")


def require_space(parent: Path, needed: int) -> None:
    """Raise FolderError if the filesystem of `parent` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(existing(parent)).free
    if needed > free:
        raise FolderError(
            f"{parent} has {free:,} bytes free, but {needed:,} are needed",
            hint="free some space, choose another disk, or pass --weights link to share the source's bytes",
        )


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))


def unwind_when_told_to_stop() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end the process through every `finally`, with exit code 128 + signal.

    For programs, not for libraries. A signal that is ignored (by nohup, say) stays ignored.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the cleaning short
        _told.append(number)
        raise SystemExit(128 + number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


_told: list[int] = []
"""Signals that told this process to stop."""


def _stop_if_told() -> None:
    """Python drops an exception that is raised while it runs a callback of its own: the signal still counts."""
    if _told:
        raise SystemExit(128 + _told[0])


@contextlib.contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders above `target`; if it does not come to be, those that were made go again."""
    made = [path for path in target.parents if not os.path.lexists(path)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        _remove_empty(made)
        raise FolderError(f"{target.parent} cannot be written: {error.strerror}") from None
    except BaseException:
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


class _Claim:
    """The right to write one target: its staging folder, made empty and locked; at the end it is gone."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._old = target.with_name(f".{target.name}{_MARK}.old")
        self._locks: list[int] = []
        self._ours: set[Identity] = set()
        self.stage = target.with_name(f".{target.name}{_MARK}")

    def __enter__(self) -> _Claim:
        try:
            self._make_stage()
            self._recover()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._recover()
        self._release()

    def publish(self, *, force: bool) -> None:
        """Give the staging folder its name. With `force`, what had it before goes when the claim ends."""
        if not (force and self._target.is_dir()):
            _rename_to_free(self.stage, self._target)
            return
        self._ours.add(_identity(self._target))
        with contextlib.suppress(BlockingIOError):
            self._hold(self._target)  # under the staging name, no other run may take it for a leftover
        if not _exchange(self.stage, self._target):
            os.rename(self._target, self._old)
            os.rename(self.stage, self._target)

    def _make_stage(self) -> None:
        for _ in range(_ATTEMPTS):
            made = _make(self.stage)
            try:
                locked = self._hold(self.stage)
            except BlockingIOError:
                break
            except FileNotFoundError:
                continue
            if made and not locked:
                self._ours.add(_identity(self.stage))
                return
            if not locked:
                raise FolderError(
                    f"{self.stage} is there: another run is writing {self._target}, or one was killed",
                    hint="remove it if no run is going on; folders cannot be locked here",
                )
            if made and self._stands():
                return
            self._release()  # the leftover of a killed run goes; so does our hold on one that another run removed
        raise FolderError(f"another run is writing {self._target}", hint="wait for its end, or choose another name")

    def _stands(self) -> bool:
        """Whether what we hold still has the staging name: another run may have removed it before we held it."""
        try:
            return _identity(self.stage) in self._ours
        except OSError:
            return False

    def _hold(self, folder: Path) -> bool:
        """Lock a folder and take it as ours. False where folders cannot be locked.

        Raises BlockingIOError if another process holds it, FileNotFoundError if it is gone.
        """
        handle = _lock(folder)
        if handle is None:
            return False
        self._locks.append(handle)
        found = os.fstat(handle)
        self._ours.add((found.st_dev, found.st_ino))
        return True

    def _release(self) -> None:
        """Remove what has the staging name, if it is ours; then let go of the locks."""
        with contextlib.suppress(OSError):
            if _identity(self.stage) in self._ours:
                shutil.rmtree(self.stage, ignore_errors=True)
        self._ours.clear()
        while self._locks:
            os.close(self._locks.pop())

    def _recover(self) -> None:
        """Undo a replacement that was killed between its two renames, or remove what one had replaced."""
        if not os.path.lexists(self._old):
            return
        if os.path.lexists(self._target):
            shutil.rmtree(self._old, ignore_errors=True)
        else:
            os.rename(self._old, self._target)


def _make(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _lock(folder: Path) -> int | None:
    """An open, locked folder; None where folders cannot be locked."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, _OPEN_FOLDER)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _identity(folder: Path) -> Identity:
    """Raises OSError where there is nothing."""
    found = folder.lstat()
    return found.st_dev, found.st_ino


def _rename_to_free(stage: Path, target: Path) -> None:
    """Rename a folder; the system refuses in the same step where something but an empty folder has the name."""
    try:
        os.rename(stage, target)
    except OSError as error:
        if error.errno in _IN_THE_WAY:
            raise FolderError(f"{target} appeared while it was being written; it was left as it is") from None
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system or the filesystem cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows flushes files only
    handle = os.open(path, os.O_RDONLY if hasattr(os, "O_DIRECTORY") else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


def _confirm(target: Path) -> None:
    """Flush the new name. It is there already: a failure must not say that it is not."""
    try:
        _flush_one(target.parent)
    except OSError as error:
        raise FolderError(
            f"{target} is complete, but the disk does not confirm its name: {error.strerror}",
            hint="check the disk; the folder may be gone after a loss of power",
        ) from None
