"""The formats of a report that are files: each a function from a comparison to text, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from surgery.compare.change_picture import change_picture
from surgery.compare.comparison import Comparison
from surgery.compare.html import html
from surgery.compare.markdown import to_markdown
from surgery.compare.report_json import to_json
from surgery.errors import FolderError, RequestError
from surgery.files.safe_reading import read_regular

MOST_BYTES = 2**30
"""A report that is longer is none."""

FORMATS: dict[str, Callable[[Comparison], str]] = {
    "md": to_markdown,
    "json": to_json,
    "html": html,
    "svg": change_picture,
}


SUFFIXES = {f".{name}": name for name in FORMATS}
"""Suffix of a file -> its format."""


def known_suffix(path: Path, suffixes: Mapping[str, str]) -> str:
    """The format that a file's suffix names. Raises RequestError for another suffix."""
    found = suffixes.get(path.suffix.lower())
    if found is None:
        raise RequestError(f"{path} has the suffix {path.suffix!r}; {', '.join(suffixes)} is expected")
    return found


def is_current(path: Path, comparison: Comparison) -> bool:
    """Whether a report that lies somewhere, in version control say, is the one of this comparison."""
    text = FORMATS[known_suffix(path, SUFFIXES)](comparison)
    try:
        return read_regular(path, MOST_BYTES) == text.encode("utf-8")
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist", hint="diff with --output writes it") from None
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}") from None
