"""What can be compared: an .onnx file, an export (one precision's pair of graphs), a GenAI folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.architecture import Architecture, read_config
from surgery.errors import ExportError, FolderError, SurgeryError
from surgery.files.safe_reading import stays_inside
from surgery.folder.genai_config import CONFIG_FILE, MODEL_FILE
from surgery.folder.inspection import nearby_architecture
from surgery.folder.manifest import NAME as MANIFEST_FILE
from surgery.folder.manifest import recorded_precision
from surgery.graph.model import Model
from surgery.source.export import ENCODERS, Export, GraphPair, open_export

MODEL, EMBED, DECODER = "model", "embed_tokens", "decoder"
"""Roles of graphs: of a single one, and of the two of a pair. Encoders have the names of
`surgery.source.export.ENCODERS`."""

_BESIDE = {"vision": ENCODERS["image"], "speech": ENCODERS["audio"], "embedding": EMBED}
"""Section of genai_config.json -> role of the graph that it names, in the order in which one feeds the next."""


@dataclass(frozen=True)
class SubjectGraph:
    """One graph of a side. `file` is its name as the report gives it, without a path of the machine."""

    role: str
    file: str
    model: Model


@dataclass(frozen=True)
class Subject:
    """One of two things to compare. The last part's interface is the side's.

    `root` is the folder whose manifest names the side's files; `config` is genai_config.json, `manifest` is
    manifest.json, both None where there is none. `complete` unless it is a plan, whose other files are not written yet.
    """

    label: str
    kind: Literal["file", "pair", "folder"]
    parts: tuple[SubjectGraph, ...]
    root: Path
    architecture: Architecture | None = None
    config: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] | None = None
    complete: bool = True

    @property
    def main(self) -> SubjectGraph:
        """The graph that the others serve: the only one, or the decoder."""
        return self.parts[-1]

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each graph, in order."""
        return tuple(part.role for part in self.parts)


def open_subject(path: Path | Model, precision: str | None = None, *, label: str | None = None) -> Subject:
    """Open an .onnx file, a GenAI folder, or one precision of an export (its best for the CPU, if none is named).

    A model in memory is a side as it is. Raises SurgeryError where it is none of them. No weight is read, and none
    need be there.
    """
    if isinstance(path, Model):
        return _file(path, label)
    if path.is_file():
        return _file(Model.open(path, nearby_architecture(path)), label)
    if (path / CONFIG_FILE).is_file():
        return _folder(path, label)
    if not path.is_dir():
        raise ExportError(f"{path} does not exist", hint="an .onnx file, an export or a GenAI folder can be compared")
    export = open_export(path)
    return subject_of_pair(export, export.pair(precision) if precision else export.best("cpu")[0], label)


def _file(model: Model, label: str | None) -> Subject:
    part = SubjectGraph(MODEL, model.path.name, model)
    return Subject(label or _label((part,)), "file", (part,), model.path.parent, model.architecture)


def open_subjects(before: Path | Model, after: Path | Model, precision: str | None = None) -> tuple[Subject, Subject]:
    """Two sides. Of an export beside a folder: the precision that the folder was made from, as its manifest says, and
    the encoders that the folder has.
    """
    folders = [side for side in (before, after) if isinstance(side, Path) and (side / CONFIG_FILE).is_file()]
    if len(folders) != 1:
        return open_subject(before, precision), open_subject(after, precision)
    folder = open_subject(folders[0])
    other = after if folders[0] is before else before
    if isinstance(other, Path) and other.is_dir():
        export = open_export(other)
        wanted = precision or recorded_precision(folders[0])
        pair = export.pair(wanted) if wanted else export.best("cpu")[0]
        against = subject_of_pair(export, pair, encoders=folder.roles)
    else:
        against = open_subject(other)
    return (folder, against) if folders[0] is before else (against, folder)


def subject_of_pair(
    export: Export, pair: GraphPair, label: str | None = None, *, encoders: Collection[str] = ()
) -> Subject:
    """The two graphs of one precision of an export, as one model; with those `encoders`, by role, that it has."""
    graphs = {ENCODERS[modality]: path for modality, path in pair.encoders.items() if ENCODERS[modality] in encoders}
    graphs |= {EMBED: pair.embed, DECODER: pair.decoder}
    parts = tuple(
        SubjectGraph(role, _relative(graph, export.root), Model.open(graph, export.architecture))
        for role, graph in graphs.items()
    )
    return Subject(label or _label(parts), "pair", parts, export.root, export.architecture)


def subject_of_plan(
    model: Model, config: Mapping[str, Any], root: Path, others: Mapping[str, Model] | None = None
) -> Subject:
    """The folder that a repack would write: its graphs in memory, their weights where the source has them.

    `others` are the graphs beside the decoder, by role.
    """
    models = {**(others or {}), DECODER if others else MODEL: model}
    files = _graph_files(config).items()
    parts = tuple(SubjectGraph(role, name, models[role].with_data_names(name)) for role, name in files)
    return Subject(_label(parts), "folder", parts, root, model.architecture, config, complete=False)


def _folder(path: Path, label: str | None) -> Subject:
    """A folder's decoder, and what stands beside it where the folder takes images or sound."""
    config = read_config(path / CONFIG_FILE)
    graphs = _graph_files(config)
    arch = nearby_architecture(path / MODEL_FILE)
    for name in graphs.values():
        if not stays_inside(path / name, path):
            raise FolderError(f"{path / CONFIG_FILE} names a graph outside of the folder: {name!r}")
    parts = tuple(SubjectGraph(role, name, Model.open(path / name, arch)) for role, name in graphs.items())
    return Subject(label or _label(parts), "folder", parts, path, arch, config, _manifest(path / MANIFEST_FILE))


def _graph_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> file of each graph of a configuration, the decoder's last: it takes what the others give."""
    graphs = {role: name for section, role in _BESIDE.items() if (name := _named(config, section))}
    graphs[DECODER if graphs else MODEL] = _named(config, "decoder") or MODEL_FILE
    return graphs


def _named(config: Mapping[str, Any], section: str) -> str | None:
    """The graph that a section of genai_config.json names."""
    model = config.get("model")
    found = model.get(section) if isinstance(model, dict) else None
    name = found.get("filename") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _manifest(path: Path) -> Mapping[str, Any] | None:
    """manifest.json, or None where there is none that can be read: a comparison does not depend on it."""
    try:
        return read_config(path)
    except SurgeryError:
        return None


def _label(parts: tuple[SubjectGraph, ...]) -> str:
    """The names of the graphs. A folder's own name is no part of it: it would make the report depend on the machine."""
    return " + ".join(part.file for part in parts)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
