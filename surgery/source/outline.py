"""A repository of the Hub without its weights: what a comparison reads of it, in a folder of its own.

config.json and the graphs are fetched. In place of a data file lies a Git LFS pointer, which holds the size and the
SHA-256 that the Hub lists: weights are compared by these, and none is fetched.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from surgery.choices import Modality
from surgery.files.safe_reading import POINTER_HEAD
from surgery.source.export import GENAI_CONFIG, best_precision
from surgery.source.hub import HubFile, HubSource, Listing, get, list_files, plan_download

_READ = ("config.json", GENAI_CONFIG, "manifest.json", "report.json")
"""Files beside a graph whose content a comparison reads."""


def outline(source: HubSource, into: Path, precision: str | None = None, media: Sequence[Modality] = ()) -> str | None:
    """Put the outline of a repository into the empty folder `into`: of an export one precision, the best for the CPU if
    none is named, with the encoders of `media`. Returns the precision; None for a folder of GenAI's.

    Raises ExportError as `list_files` and `plan_download` do.
    """
    listing = list_files(source)
    repacked = GENAI_CONFIG in listing.files
    if not repacked:
        precision = precision or best_precision(list(listing.graphs), "cpu", str(source))[0]
        names = [planned.file.name for planned in plan_download(listing, precision, media).files]
    else:
        names = [name for name in listing.files if str(PurePosixPath(name)) == name and "/" not in name]
    for name in names:
        _put(listing, listing.files[name], into / name)
    return None if repacked else precision


def _put(listing: Listing, file: HubFile, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if target.name in _READ or target.suffix == ".onnx":
        shutil.copyfile(get(listing, file), target)
    elif file.sha256 is not None and file.size is not None:
        target.write_text(f"{POINTER_HEAD}v1\noid sha256:{file.sha256}\nsize {file.size}\n")
