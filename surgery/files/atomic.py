"""What appears at once or not at all: written beside its target, flushed to disk, renamed.

    .OUT.staging/                           locked by the process that writes it: a second run is refused
        .gemma4-surgery-staging             the marker: without it, a folder of this name is somebody else's
        new/                                what is being written
        old/                                what a new folder replaces, for a moment, where the system cannot exchange
                                            two names in one step

The lock ends with its process, also by SIGKILL: a marked staging folder that nobody holds is removed by the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from surgery.errors import FolderError

_MARKER = ".gemma4-surgery-staging"
_ATTEMPTS = 100
"""How often a staging folder may vanish under us, because another run removes it, before we give up."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_IN_THE_WAY = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""What filesystems answer that cannot flush a folder; they have nothing to lose by it."""

_OPEN_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


class ToDict(Protocol):
    """What the check of a staged folder returns where it is to be told in JSON, such as surgery.verify's Report."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""


@contextlib.contextmanager
def staged_folder(target: Path, *, may_replace: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield an empty folder; on a clean exit it becomes `target`, on an exception it goes.

    Raises FolderError if there is something at `target`, if another run is writing it, or if it cannot be written.
    With `may_replace`, a folder that is there stays in place until the new one is complete; it is asked before the
    writing and again before the old folder goes, and raises where that may not be.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, may_replace)
    with _told_if_stopped(target), _parents_of(target), _written(target), _Claim(target) as claim:
        refuse_existing(target, may_replace)  # a replacement that was cut short has just been undone
        yield claim.new
        _flush(claim.new)
        _stop_if_told()
        if may_replace is not None:
            refuse_existing(target, may_replace)
        claim.publish_folder(force=may_replace is not None)
        _confirm(target)  # before the old folder goes


@contextlib.contextmanager
def staged_files(target: Path) -> Iterator[Path]:
    """Yield an empty folder; on a clean exit its files move beside `target`, which comes last and replaces a file.

    On an exception they go. Raises FolderError if another run is writing `target`, if another file beside it has the
    name of a new one, or if it cannot be written. Whoever reads `target` finds all that it was written with.
    """
    target = Path(os.path.abspath(target))
    with _told_if_stopped(target), _written(target), _Claim(target) as claim:
        yield claim.new
        _flush(claim.new)
        _stop_if_told()
        claim.publish_files()
        _confirm(target)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, in place of an older one. Raises FolderError where it cannot be written; the older one then stays.

    What is no regular file, such as /dev/stdout, is written to, if somebody reads it. A link stays, and leads to the
    new file.
    """
    with _written(path), contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            _write_through(path, data)
            return
    target = Path(os.path.realpath(path))
    with staged_files(target) as folder:
        (folder / target.name).write_bytes(data)


def _write_through(path: Path, data: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # the opening alone: a FIFO without a reader would wait
    except OSError as error:
        reason = "nobody reads from it" if error.errno == errno.ENXIO else error.strerror
        raise OSError(error.errno, reason, str(path)) from None
    os.set_blocking(handle, True)
    with os.fdopen(handle, "wb") as writer:
        writer.write(data)


def refuse_existing(target: Path, may_replace: Callable[[Path], None] | None) -> None:
    """Raise FolderError if there is something at `target`; with `may_replace`, if it is no folder that it lets go."""
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise FolderError(f"{target} cannot be written: {error.strerror}") from None
    if may_replace is None:
        raise FolderError(f"{target} exists", hint="choose another name, or pass --force to replace it")
    if target.is_symlink() or not target.is_dir():
        raise FolderError(f"{target} is not a folder; --force replaces folders only")
    may_replace(target)


def require_writable(target: Path) -> None:
    """Raise FolderError where nothing can be made in the folder that `target` would be made in; nothing is left there."""
    place = existing(target.absolute().parent)
    try:
        tempfile.TemporaryDirectory(prefix=f".{target.name[:80]}.", dir=place).cleanup()
    except OSError as error:
        raise FolderError(f"{target} cannot be written: {place}: {error.strerror}") from None


def refuse_holding(target: Path, sources: Iterable[Path]) -> None:
    """Raise FolderError where replacing `target` would remove one of the sources."""
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(os.path.realpath(target)):
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


@contextlib.contextmanager
def _written(target: Path) -> Iterator[None]:
    """Say of what the system refuses that `target` was not written."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise FolderError(f"{target} was not written: {where}{error.strerror or error}") from error


@contextlib.contextmanager
def _told_if_stopped(target: Path) -> Iterator[None]:
    """Let a signal that ends this say what became of the target."""
    before = os.path.lexists(target)
    try:
        yield
    except SystemExit as stop:
        stop.add_note(f"{target} is as it was" if before else f"{target} was not written, and nothing of it was left")
        raise


class _Claim:
    """The right to write one target: its staging folder, marked and locked, with an empty folder `new` in it.

    At the end it is gone.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._stage = target.with_name(f".{target.name}.staging")
        self._old = self._stage / "old"
        self._lock: int | None = None
        self._made = self._ours = False
        self.new = self._stage / "new"

    def __enter__(self) -> _Claim:
        try:
            self._hold()
            self._take_over()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def publish_folder(self, *, force: bool) -> None:
        """Give `new` the target's name. With `force`, what had it before goes when the claim ends."""
        if not (force and self._target.is_dir()):
            _rename_to_free(self.new, self._target)
        elif not _exchange(self.new, self._target):
            os.rename(self._target, self._old)
            os.rename(self.new, self._target)

    def publish_files(self) -> None:
        """Move what is in `new` beside the target, the target itself last."""
        moved: list[Path] = []
        try:
            for path in sorted(self.new.iterdir()):
                place = self._target.with_name(path.name)
                if place != self._target:
                    if os.path.lexists(place):
                        raise FolderError(f"{place} appeared while {self._target} was being written")
                    os.rename(path, place)
                    moved.append(place)
            _flush_one(self._target.parent)
            os.replace(self.new / self._target.name, self._target)
        except BaseException:
            for place in moved:
                place.unlink(missing_ok=True)
            raise

    def _hold(self) -> None:
        """Make the staging folder, or take the one that is there, and lock it. Raises FolderError if another run
        does."""
        for _ in range(_ATTEMPTS):
            self._made = _make(self._stage)
            try:
                self._lock = _lock(self._stage)
            except BlockingIOError:
                self._made = False
                break
            except FileNotFoundError:
                continue
            if self._lock is None:
                if self._made:
                    return
                raise FolderError(
                    f"{self._stage} is there: another run is writing {self._target}, or one was killed",
                    hint="remove it if no run is going on; folders cannot be locked here",
                )
            if self._stands():
                return
            self._unlock()  # another run has removed it before we held it
        raise FolderError(f"another run is writing {self._target}", hint="wait for its end, or choose another name")

    def _stands(self) -> bool:
        """Whether what we hold has the staging name still."""
        assert self._lock is not None
        try:
            return os.path.samestat(os.fstat(self._lock), self._stage.lstat())
        except OSError:
            return False

    def _take_over(self) -> None:
        """Mark the folder as ours, and clear away what a killed run left. Raises FolderError for somebody else's
        folder."""
        found = os.listdir(self._stage)
        if found and _MARKER not in found:
            raise FolderError(
                f"{self._stage} is in the way: it is no staging folder of this program",
                hint="rename it, or choose another name to write to",
            )
        self._ours = True
        (self._stage / _MARKER).touch()
        self._recover()
        self._clear()
        self.new.mkdir()

    def _recover(self) -> None:
        """Undo a replacement that was cut short between its two renames."""
        if os.path.lexists(self._old) and not os.path.lexists(self._target):
            os.rename(self._old, self._target)

    def _clear(self) -> None:
        for folder in (self.new, self._old):
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)

    def _release(self) -> None:
        """Remove the staging folder if it is ours, its marker last; then let go of the lock."""
        if self._ours:
            with contextlib.suppress(OSError):
                self._recover()
            self._clear()
        with contextlib.suppress(OSError):
            if self._ours and os.listdir(self._stage) == [_MARKER]:
                (self._stage / _MARKER).unlink()
            if self._ours or self._made:
                self._stage.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


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
