"""The digest of a file and of parts of it, in one reading."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

Part = tuple[int, int]
"""Offset and length, in bytes."""
_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FileDigests:
    """SHA-256 of the whole file, in hexadecimal, and of each part; of a short part, its bytes."""

    whole: str
    parts: dict[Part, str | bytes]


class _Kept:
    """Collects bytes, as a digest does."""

    def __init__(self) -> None:
        self.data = b""

    def update(self, data: bytes | memoryview) -> None:
        self.data += data


def read_digests(file: Path, parts: Collection[Part], short: int) -> FileDigests:
    """`short` is the most bytes of a part that is kept as it is. A part that the file does not hold wholly is left out.

    Raises OSError.
    """
    whole = hashlib.sha256()
    begun: dict[Part, _Kept | hashlib._Hash] = {}
    found: dict[Part, str | bytes] = {(at, 0): b"" for at, length in parts if not length}
    waiting = sorted((part for part in parts if part[1]), reverse=True)
    start = 0
    with file.open("rb", buffering=0) as reader:
        while chunk := reader.read(_CHUNK):
            end = start + len(chunk)
            whole.update(chunk)
            while waiting and waiting[-1][0] < end:
                part = waiting.pop()
                begun[part] = _Kept() if part[1] <= short else hashlib.sha256()
            view = memoryview(chunk)
            for part, collector in [*begun.items()]:
                offset, length = part
                collector.update(view[max(0, offset - start) : offset + length - start])
                if offset + length <= end:
                    done = begun.pop(part)
                    found[part] = done.data if isinstance(done, _Kept) else done.hexdigest()
            start = end
    return FileDigests(whole.hexdigest(), found)
