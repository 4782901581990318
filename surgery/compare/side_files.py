"""The files beside the graphs and their data: tokenizer, chat template, configurations, processors."""

from __future__ import annotations

from pathlib import Path

from surgery.compare.comparison import FileChange
from surgery.compare.provenance import JSON_FILE, MARKDOWN_FILE
from surgery.compare.subjects import Subject
from surgery.compare.tensor_contents import QUICK_BYTES, data_files, file_size
from surgery.files.safe_reading import sha256
from surgery.folder.genai_config import CONFIG_FILE
from surgery.folder.manifest import NAME as MANIFEST_FILE
from surgery.folder.model_card import CARD_FILE
from surgery.source.hub import SIDE_FILES

_APART = {CONFIG_FILE, MANIFEST_FILE, JSON_FILE, MARKDOWN_FILE, CARD_FILE}
"""Files that have a section of their own, or that follow from the others."""


def side_file_changes(before: Subject, after: Subject) -> tuple[FileChange, ...]:
    """Those that differ, by name; of an export beside a folder, only what the folder has. Nothing for single graphs."""
    if "file" in (before.kind, after.kind) or not (before.complete and after.complete):
        return ()
    found = []
    for name in _names(before, after):
        pair = before.root / name, after.root / name
        sizes = [file_size(path) if path.is_file() else None for path in pair]
        same = _same(*pair) if None not in sizes else False
        if same is not True and sizes != [None, None]:
            found.append(FileChange(name, sizes[0], sizes[1], same, kind="side"))
    return tuple(found)


def _names(before: Subject, after: Subject) -> list[str]:
    names = {name for side in (before, after) if side.kind == "folder" for name in _of_folder(side)}
    return sorted(names or SIDE_FILES)


def _of_folder(side: Subject) -> set[str]:
    """What lies in it; less the graphs and their data, and files whose names begin with a dot."""
    found = {path.name for path in side.root.iterdir() if path.is_file() and not path.name.startswith(".")}
    return found - _APART - {part.file for part in side.parts} - set(data_files(side).values())


def _same(one: Path, other: Path) -> bool | None:
    """Whether two files hold the same; None for what is too large to be read unasked."""
    sizes = one.stat().st_size, other.stat().st_size
    if sizes[0] != sizes[1]:
        return False
    return sha256(one) == sha256(other) if sizes[0] <= QUICK_BYTES else None
