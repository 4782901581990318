"""manifest.json: what a folder was made from, how, and the SHA-256 of every file in it.

    {"version": 1,
     "made_by": {"gemma4-surgery": "0.1.0", "onnx": "1.23.2", "onnx-graphsurgeon": "0.6.1"},
     "source": {"repo": "onnx-community/...", "revision": "9f4bef82...", "precision": "q4",
                "files": {"onnx/embed_tokens_q4.onnx": {"size": 5142, "sha256": "..."}, ...}},
     "recipe": "merge-embeddings{embed=onnx/embed_tokens_q4.onnx},...",
     "weights": "copy",
     "files": {"model.onnx": {"size": 652311, "sha256": "..."},
               "model.onnx_data": {"size": 1519700992, "sha256": "...", "from": "onnx/decoder_model_merged_q4.onnx_data"},
               ...}}

A folder of fewer tokens than its source has `"vocabulary": {"source": 262144, "kept": 64000}`, and a list of them.
A folder of several graphs has a recipe for each, by the graph's role. It holds no time and no path of a machine: the
same input, recipe and versions give the same bytes. `repo` and `revision` are null for a local source. `from` is the
source's file that a data file is a copy of, or a link to. A link has `"sha256": null`: it was neither read nor written;
its source has a digest where the Hub's cache, which names its blobs by it, tells it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from surgery.architecture import read_config
from surgery.choices import Target
from surgery.errors import FolderError, SurgeryError
from surgery.files.safe_reading import sha256, stays_inside
from surgery.graph.weight_writing import Placed
from surgery.source.export import Export, GraphPair
from surgery.source.kept_tokens import VOCABULARY_FILE, KeptTokens
from surgery.source.pruned_export import vocabulary_size

NAME = "manifest.json"
VERSION = 1
_PACKAGES = ("gemma4-surgery", "onnx", "onnx-graphsurgeon")


@dataclass(frozen=True, slots=True)
class FileFault:
    """A file of a folder that is not as its manifest says."""

    name: str
    fault: str


def manifest(
    folder: Path,
    export: Export,
    pair: GraphPair,
    recipe: str | Mapping[str, str],
    weights: str,
    placed: Iterable[Placed],
    data_files: Iterable[Path],
    encoders: Iterable[Path] = (),
    target: Target = "genai-0.15",
) -> dict[str, Any]:
    """The manifest of a complete folder. Weight files are not read again: `placed` knows their digests.

    `target` is the oldest GenAI that must load it; 0.12 alone is written down, whose configuration is another one.

    `data_files` are the source's, in the order of the graphs' references; `encoders` its graphs beside the pair.
    """
    known = {entry.location: entry for entry in placed}
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        entry = known.get(name)
        digest = entry.sha256 if entry else sha256(path)
        origin = {"from": _relative(entry.source, export.root)} if entry and entry.source else {}
        files[name] = {"size": path.stat().st_size, "sha256": digest, **origin}
    return {
        "version": VERSION,
        "made_by": made_by(),
        "source": {
            "repo": export.repo,
            "revision": export.revision,
            "precision": pair.precision,
            "files": _source_files(export, (pair.embed, pair.decoder, *encoders), data_files, known.values()),
        },
        "recipe": recipe if isinstance(recipe, str) else dict(recipe),
        **({"target": target} if target == "genai-0.12" else {}),
        **({"vocabulary": {"source": vocabulary_size(export), "kept": len(pair.kept)}} if pair.kept else {}),
        "weights": weights,
        "files": files,
    }


def made_by() -> dict[str, str | None]:
    """Versions of what writes a folder; None for a package that is not installed."""
    return {package: _version(package) for package in _PACKAGES}


def _source_files(
    export: Export, graphs: Iterable[Path], data_files: Iterable[Path], known: Iterable[Placed]
) -> dict[str, dict[str, Any]]:
    """Graphs by their digest; a data file by its copy's, which was taken from the very bytes that were written."""
    copies = {entry.source: entry for entry in known}
    found: dict[str, dict[str, Any]] = {}
    for path in graphs:
        found[_relative(path, export.root)] = {"size": path.stat().st_size, "sha256": sha256(path)}
    for path in data_files:
        copy = copies.get(path)
        same = copy is not None and copy.how == "copied" and copy.size == path.stat().st_size
        digest = copy.sha256 if copy is not None and same else blob_digest(path)
        found[_relative(path, export.root)] = {"size": path.stat().st_size, "sha256": digest}
    return found


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def blob_digest(path: Path) -> str | None:
    """The SHA-256 that the user's cache of the Hub names a large file by, or None for any other file."""
    real = Path(os.path.realpath(path))
    if real.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{64}", real.name):
        return None  # without a look at huggingface_hub, which takes a while
    from huggingface_hub import constants

    return real.name if real.is_relative_to(os.path.realpath(constants.HF_HUB_CACHE)) else None


def refuse_foreign(target: Path) -> None:
    """Raise FolderError where replacing the folder `target` would remove what this program did not write.

    It may hold nothing, or a manifest of this program and the files that it lists.
    """
    found = sorted(_files(target))
    if not found:
        return
    listed = _listed(target)
    if listed is None:
        raise FolderError(
            f"{target} holds {found[0]}, and no {NAME} of this program; --force replaces folders that have one",
            hint="choose another name, or remove the folder yourself",
        )
    if foreign := [name for name in found if name not in listed and name != NAME]:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise FolderError(
            f"{target} holds {foreign[0]}{more}, which its {NAME} does not list; --force removes what it lists only",
            hint="move it elsewhere, or choose another name",
        )


def _files(folder: Path) -> Iterator[str]:
    """Everything below a folder that is no folder, as manifests call it; links are not followed."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name).relative_to(folder).as_posix() for name in (*names, *links))


def _listed(folder: Path) -> Mapping[str, Any] | None:
    """The files that a folder's manifest names; None where it has no manifest of this program."""
    try:
        found = read_config(folder / NAME)
    except SurgeryError:
        return None
    made, files = found.get("made_by"), found.get("files")
    ours = found.get("version") == VERSION and isinstance(made, Mapping) and _PACKAGES[0] in made
    return files if ours and isinstance(files, Mapping) else None


@dataclass(frozen=True, slots=True)
class RecordedSource:
    """The export that a folder's manifest names. `files` has size and SHA-256 by name; what is not known is None."""

    repo: str | None
    revision: str | None
    precision: str | None
    files: Mapping[str, tuple[int | None, str | None]]


def recorded_source(folder: Path) -> RecordedSource | None:
    """What a folder was made from, as its manifest says; None where it has none that can be read."""
    try:
        source = read_config(folder / NAME).get("source")
    except SurgeryError:
        return None
    if not isinstance(source, Mapping):
        return None
    texts = {key: value for key, value in source.items() if isinstance(value, str)}
    entries = source.get("files")
    files = {}
    for name, entry in entries.items() if isinstance(entries, Mapping) else ():
        if isinstance(entry, Mapping):
            size, digest = entry.get("size"), entry.get("sha256")
            files[str(name)] = (size if isinstance(size, int) else None, digest if isinstance(digest, str) else None)
    return RecordedSource(texts.get("repo"), texts.get("revision"), texts.get("precision"), files)


def recorded_precision(folder: Path) -> str | None:
    """The precision that a folder was made from, as its manifest says; None where it has none that can be read."""
    found = recorded_source(folder)
    return found.precision if found is not None else None


def other_file(recorded: RecordedSource, root: Path, listed: Mapping[str, tuple[int | None, str | None]]) -> str | None:
    """The first of the recorded files that `root` has with another content; None where there is none.

    `listed` has size and SHA-256 of files that are not here yet. Sizes are compared first, then what is small.
    """
    wanted = sorted(recorded.files.items(), key=lambda item: item[1][0] or 0)
    here = {name: root / name for name, _ in wanted if stays_inside(root / name, root) and (root / name).is_file()}
    for name, (size, _) in wanted:
        found = here[name].stat().st_size if name in here else listed.get(name, (None, None))[0]
        if None not in (size, found) and size != found:
            return name
    for name, (_, digest) in wanted:
        if digest is None:
            continue
        known = listed.get(name, (None, None))[1]
        if known is None and name in here:
            known = blob_digest(here[name]) or sha256(here[name])
        if known is not None and known != digest:
            return name
    return None


def recorded_tokens(folder: Path) -> KeptTokens | None:
    """The tokens of the source that stay in a folder, where its manifest says that not all do. Raises RequestError for
    a list that cannot be read."""
    try:
        found = read_config(folder / NAME).get("vocabulary")
    except SurgeryError:
        return None
    return KeptTokens.read(folder / VOCABULARY_FILE) if isinstance(found, Mapping) else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def faults(folder: Path) -> Iterator[FileFault]:
    """Files that are missing, of another size or of other content than the manifest says.

    Raises FolderError where there is no manifest of a version that is known.
    """
    found = read_config(folder / NAME)
    if found.get("version") != VERSION or not isinstance(found.get("files"), dict):
        raise FolderError(f"{folder / NAME} has version {found.get('version')!r}; {VERSION} is known")
    for name, entry in found["files"].items():
        path = folder / str(name)
        if not isinstance(entry, dict) or not stays_inside(path, folder):
            yield FileFault(str(name), "its entry cannot be read")
        elif not path.is_file():
            yield FileFault(name, "it is missing")
        elif path.stat().st_size != entry.get("size"):
            yield FileFault(name, f"it has {path.stat().st_size} bytes, the manifest says {entry.get('size')}")
        elif entry.get("sha256") is not None and sha256(path) != entry["sha256"]:
            yield FileFault(name, "its content is not what was written")
