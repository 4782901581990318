"""Reading what others wrote: a file may be a FIFO, a device, a symlink that leads elsewhere, or far too long."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_SIDE_FILE, _TEMPLATE = 64 * 2**20, 2**20
"""Bytes: twice the tokenizer.json of Gemma 4, and fifty times its chat template."""


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes. Raises OSError for anything else, without opening it:
    a FIFO would block for ever, and a device would never end.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    _refuse_longer(found.st_size, most)
    return path.read_bytes()


def _refuse_longer(size: int, most: int) -> None:
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read")


def oversized(path: Path) -> str:
    """How a file beside a model is larger than any is, in words; empty where it is not, or is not there."""
    most = _TEMPLATE if path.suffix == ".jinja" else _SIDE_FILE
    try:
        found = path.stat().st_size
    except OSError:
        return ""
    return f"it has {found:,} bytes, and at most {most:,} are read" if found > most else ""


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file, symlinks followed, lies in `folder`, or among the blobs of the Hub cache that `folder` is in.

        models--OWNER--NAME/snapshots/REVISION/onnx/model.onnx_data -> ../../../../blobs/SHA256

    The file need not exist.
    """
    return "\0" not in str(path) and _home(Path(os.path.realpath(path)), folder) is not None


def _home(real: Path, folder: Path) -> Path | None:
    """Of `folder` and the blobs that belong to it, that which a path without links lies in."""
    root = Path(os.path.realpath(folder))
    homes = [root]
    for above in root.parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            homes.append(above.parent / "blobs")
    return next((home for home in homes if real.is_relative_to(home)), None)


def open_inside(path: Path, folders: Iterable[Path]) -> BinaryIO:
    """Open a regular file that lies in one of `folders`, as `stays_inside` says. Raises OSError for any other.

    What is opened is what was looked at: no link is followed on the way, and a link that is put there meanwhile is an
    error.
    """
    real = Path(os.path.realpath(path))
    home = next((home for folder in folders if (home := _home(real, folder)) is not None), None)
    if home is None or real == home:
        raise OSError(errno.ELOOP, f"it is {real}, outside of the folder")
    handle = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *between, name = real.relative_to(home).parts
        for step in between:
            inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
    finally:
        os.close(handle)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return os.fdopen(file, "rb", buffering=0)


def read_inside(path: Path, folder: Path, most: int) -> bytes:
    """The bytes of a file as `open_inside` opens it, at most `most` of them. Raises OSError."""
    with open_inside(path, [folder]) as file:
        _refuse_longer(os.fstat(file.fileno()).st_size, most)
        return file.read()


def sha256(path: Path) -> str:
    """The digest of a file that nobody writes any more."""
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


POINTER_HEAD = "version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class Pointer:
    """What Git LFS keeps in place of a large file: its SHA-256, and its size in bytes."""

    sha256: str
    size: int


def read_pointer(path: Path) -> Pointer | None:
    """The Git LFS pointer that a file holds in place of its content; None for any other file.

    https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: less than 1024 bytes, keys sorted after `version`.
    """
    try:
        data = read_regular(path, 1023)
    except OSError:
        return None
    if not data.startswith(POINTER_HEAD.encode()):
        return None
    fields = dict(line.partition(" ")[::2] for line in data.decode("utf-8", "replace").splitlines())
    digest = re.fullmatch(r"sha256:([0-9a-f]{64})", fields.get("oid", ""))
    size = re.fullmatch(r"\d{1,19}", fields.get("size", ""), re.ASCII)
    return Pointer(digest[1], int(size[0])) if digest and size else None
