"""Reading what others wrote: a file may be a FIFO, a device, a symlink that leads elsewhere, or far too long."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

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
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, and at most {most:,} are read")
    return path.read_bytes()


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
    if "\0" in str(path):
        return False
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(root):
        return True
    for above in root.parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            return real.parent == above.parent / "blobs"
    return False


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
