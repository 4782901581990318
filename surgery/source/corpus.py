"""Text files that a vocabulary is counted over, and the part of them that it is tried on: a tenth, by content."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from surgery.errors import RequestError

_TENTH = 10
_MOST = 2**31
"""Bytes of a file."""
_LONGEST = 100_000
"""Characters of a line that is taken whole."""


def lines(files: Iterable[Path]) -> Iterator[str]:
    """The lines of text files, with their ends; what is no UTF-8 is replaced. Raises RequestError for a file that
    cannot be read."""
    for path in files:
        try:
            if not path.is_file():
                raise RequestError(f"{path} is no file; a corpus is text files")
            if path.stat().st_size > _MOST:
                raise RequestError(f"{path} has {path.stat().st_size:,} bytes, and at most {_MOST:,} are read")
            with path.open(encoding="utf-8", errors="replace", newline="") as reader:
                while line := reader.readline(_LONGEST):
                    yield line
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def is_held_out(line: str) -> bool:
    """Whether a line is not counted, but tried on: one of ten, and the same ones each time."""
    return zlib.crc32(line.encode("utf-8", "replace")) % _TENTH == 0


def held_out_lines(files: Sequence[Path], most: int) -> tuple[str, ...]:
    """The held-out lines, each once, up to so many characters."""
    found: dict[str, None] = {}
    for line in lines(files):
        if is_held_out(line) and line.strip() and line not in found:
            if (most := most - len(line)) < 0:
                break
            found[line] = None
    return tuple(found)
