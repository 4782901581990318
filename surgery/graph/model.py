"""One ONNX graph, opened without its weights. The ModelProto is the document; opening and saving changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from surgery.architecture import Architecture
from surgery.choices import WeightMode
from surgery.errors import ArchitectureError, FolderError, ModelError, WeightError
from surgery.files.atomic import staged_files
from surgery.files.safe_reading import open_inside, read_regular
from surgery.graph.external_data import (
    WeightReference,
    check_extents,
    check_link,
    check_location,
    data_folder,
    external_field,
    is_external,
    reference,
    set_location,
    tensors,
)
from surgery.graph.weight_conversion import Conversion
from surgery.graph.weight_writing import Placed, Progress, consolidate, convert, data_names, write_data_file
from surgery.graph.wire import check_rank, check_wire

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, ModelProto, TensorProto

IN_MEMORY = Path("the model in memory")
"""What messages call a model that comes from no file."""

MAX_PROTO_BYTES = 2**31 - 1
"""The most that protobuf reads or writes as one message."""


@dataclass
class Model:
    """A graph and the files that hold its weights.

    `weight_files` maps each external data location, as the tensors spell it, to the file that stands there.
    `architecture` is what config.json says, where one is known; passes that need it say so when it is None.
    `converted` names the weights that are written in another dtype than they are read in; their data file, which
    is in no `weight_files`, comes into being when the model is saved.
    `folders` are those that data files may not lead out of; the graph's own if none is given.
    """

    proto: ModelProto
    path: Path
    weight_files: dict[str, Path] = field(default_factory=dict)
    architecture: Architecture | None = None
    converted: dict[str, Conversion] = field(default_factory=dict)
    folders: frozenset[Path] = frozenset()

    @classmethod
    def open(cls, path: str | os.PathLike[str], architecture: Architecture | None = None) -> Model:
        """Read a graph; external tensors stay references. Raises ModelError, or WeightError for a hostile location."""
        from google.protobuf.message import DecodeError
        from onnx import ModelProto

        path = Path(path)
        try:
            data = read_regular(path, MAX_PROTO_BYTES)
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist") from None
        except IsADirectoryError:
            raise ModelError(f"{path} is a folder; an .onnx file is expected") from None
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None
        proto = ModelProto()
        try:
            check_wire(data, path)
            proto.ParseFromString(data)
        except DecodeError:
            raise ModelError(
                f"{path} ({len(data)} bytes) is not an ONNX model, or is cut short",
                hint="compare its size with the one the repository lists; a Git LFS pointer is about 130 bytes",
            ) from None
        if not proto.HasField("graph") or not proto.ir_version:
            raise ModelError(f"{path} ({len(data)} bytes) holds no ONNX graph")
        return cls(proto, path, _weight_files(proto, path), architecture, folders=frozenset({data_folder(path)}))

    @classmethod
    def from_proto(
        cls, proto: ModelProto, path: str | os.PathLike[str] | None = None, architecture: Architecture | None = None
    ) -> Model:
        """A model from a ModelProto in memory; the proto is copied, and stays as it is.

        `path` is the file that the graph was read from: its external data lies beside it. A graph that holds all of its
        weights needs none. Raises ModelError for what is no graph, WeightError for external data without a path.
        """
        from onnx import ModelProto

        where = Path(path) if path is not None else IN_MEMORY
        if not isinstance(proto, ModelProto) or not proto.HasField("graph") or not proto.ir_version:
            raise ModelError(
                f"{where}: a ModelProto with a graph and an ir_version is expected, a {type(proto).__name__} is given"
            )
        files = _weight_files(proto, where)
        if files and path is None:
            hint = "give from_proto the path of the file that the graph was read from"
            raise WeightError(f"the graph refers to the data file {min(files)!r}, which may be anywhere", hint=hint)
        made = cls(proto, where, files, architecture, folders=frozenset({data_folder(where)})).copy()
        check_wire(made.to_bytes(), where)
        return made

    @property
    def graph(self) -> GraphProto:
        """The main graph; a change to it changes the model."""
        return self.proto.graph

    def require_architecture(self) -> Architecture:
        """The architecture, or ArchitectureError where no config.json came with the graph."""
        if self.architecture is None:
            raise ArchitectureError(
                f"{self.path}: layers and head sizes come from the architecture, and no config.json was found",
                hint="pass --config FILE, or give Model.open an architecture",
            )
        return self.architecture

    def edited(self, *, prune: bool = False) -> AbstractContextManager[gs.Graph]:
        """The onnx-graphsurgeon view of the main graph; see surgery.graph.editing."""
        from surgery.graph.editing import edited

        return edited(self.graph, prune=prune)

    def copy(self) -> Model:
        """A model of its own: the proto is copied, the weights are the same files."""
        from onnx import ModelProto

        proto = ModelProto()
        proto.CopyFrom(self.proto)
        return Model(proto, self.path, dict(self.weight_files), self.architecture, dict(self.converted), self.folders)

    def to_bytes(self) -> bytes:
        """The graph as the file holds it. Raises ModelError where inline weights make it larger than 2 GiB."""
        from google.protobuf.message import EncodeError

        try:
            data: bytes = self.proto.SerializeToString(deterministic=True)
            return data
        except (EncodeError, ValueError):
            raise ModelError(
                f"{self.path}: the graph is larger than the 2 GiB that one ONNX file can have",
                hint="store its weights as external data first: onnx.save(model, path, save_as_external_data=True)",
            ) from None

    def fingerprint(self) -> str:
        """SHA-256 of the graph and of where its weights are; equal before and after means that nothing changed."""
        digest = hashlib.sha256(self.to_bytes())
        for location, file in sorted(self.weight_files.items()):
            digest.update(f"\0{location}\0{file}".encode())
        for name, conversion in sorted(self.converted.items()):
            digest.update(f"\0{name}\0{conversion}".encode())
        return digest.hexdigest()

    def weight_references(self) -> Iterator[WeightReference]:
        """A checked reference to all that each external tensor is made from. Raises WeightError; no byte is read."""
        for tensor in tensors(self.proto):
            if is_external(tensor):
                conversion = self.conversion(tensor)
                sources = [part.source for part in conversion.parts] if conversion else None
                yield from sources or [reference(tensor, self.weight_files)]

    def conversion(self, tensor: TensorProto) -> Conversion | None:
        """What an external tensor is made from, where it is not the bytes that it refers to."""
        if external_field(tensor, "location") in self.weight_files:
            return None
        return self.converted.get(tensor.name)

    def check_weights(self) -> int:
        """Check every extent against its file. Returns the number of bytes referenced; raises WeightError."""
        return check_extents(self.weight_references())

    def used_weight_files(self) -> dict[str, Path]:
        """The entries of `weight_files` that a tensor still refers to, in order of first reference."""
        external = [t for t in tensors(self.proto) if is_external(t) and self.conversion(t) is None]
        used = dict.fromkeys(external_field(tensor, "location") or "" for tensor in external)
        if unknown := used.keys() - self.weight_files.keys():
            raise WeightError(
                f"{self.path}: no file is known for the external data location {min(unknown)!r}",
                hint="Model.open(path) and Model.from_proto(proto, path) look beside the path",
            )
        return {location: self.weight_files[location] for location in used}

    def converted_files(self) -> dict[str, int]:
        """Location -> size of each data file that does not exist yet: the converted weights are written to it."""
        sizes: dict[str, int] = {}
        for tensor in tensors(self.proto):
            if is_external(tensor) and (conversion := self.conversion(tensor)):
                location = external_field(tensor, "location") or ""
                end = int(external_field(tensor, "offset") or 0) + conversion.length
                sizes[location] = max(sizes.get(location, 0), end)
        return sizes

    def source_files(self) -> list[Path]:
        """Every file that a weight comes from, as it is or converted, in order of first reference."""
        return list(dict.fromkeys(ref.file for ref in self.weight_references()))

    def opset(self, domain: str = "") -> int:
        """The version of an operator set, 0 where the model does not import it. '' and 'ai.onnx' are one domain."""
        names = {"", "ai.onnx"} if domain in ("", "ai.onnx") else {domain}
        return max((entry.version for entry in self.proto.opset_import if entry.domain in names), default=0)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights: WeightMode = "copy",
        force: bool = False,
        progress: Progress | None = None,
    ) -> list[Placed]:
        """Write the graph to `path` and its weights beside it; see surgery.graph.weight_writing for the ways.

        Returns how each data file was placed. They are named after the graph, PATH_data, PATH_data_1, ..., whatever
        they were called before; one that lies beside `path` already is left alone. The graph comes last, and at once:
        whoever reads `path` finds all of its weights. With `force`, new data files stand beside the old ones until
        then, and have the next numbers; the old ones go, but for those that the weights came from.
        Raises FolderError where something exists and `force` is not given.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FolderError(f"the folder {path.parent} does not exist")
        used = self.used_weight_files().items()
        self.check_weights()
        if any(_same_file(path, file) for _, file in used):
            raise FolderError(f"{path} is also a data file of this graph", hint="choose another name")
        kept = {at for at, file in used if weights != "consolidate" and _same_file(file, path.parent / at)}
        old = _data_files_of(path)
        if not force and (found := [name for name in (path.name, *old) if name not in kept and _is_there(path, name)]):
            raise FolderError(
                f"{path.parent / found[0]} exists", hint="choose another name, or pass --force to overwrite it"
            )
        with staged_files(path) as folder:
            placed = self.write(folder, path.name, weights=weights, kept=kept, taken=old, progress=progress)
        for name in old - kept:
            if not any(_same_file(path.parent / name, file) for file in self.source_files()):
                with contextlib.suppress(OSError):
                    (path.parent / name).unlink()
        return placed

    def write(
        self,
        folder: Path,
        name: str,
        *,
        weights: WeightMode = "copy",
        kept: Collection[str] = (),
        taken: Collection[str] = (),
        progress: Progress | None = None,
    ) -> list[Placed]:
        """Write the graph and its weights into a folder that nobody reads yet; see `save` for their names.

        Locations in `kept` stay as they are, and names in `taken` are not given. Raises OSError where a file exists or
        cannot be written.
        """
        placed: list[Placed] = []
        if weights == "consolidate":
            moved = self.copy()
            if any(map(is_external, tensors(self.proto))):
                target = folder / next(at for at in data_names(name) if at not in taken)
                placed.append(consolidate(moved, target, progress))
        else:
            moved = self.with_data_names(name, kept, taken)
            ends = moved.data_ends()
            for at, file in moved.used_weight_files().items():
                if at not in kept:
                    placed.append(write_data_file(file, self.open_data, folder / at, weights, ends[file], progress))
            placed += [convert(moved, at, folder / at, progress) for at in moved.converted_files()]
        with (folder / name).open("xb") as writer:
            writer.write(moved.to_bytes())
        return placed

    def with_data_names(self, graph: str, kept: Collection[str] = (), taken: Collection[str] = ()) -> Model:
        """A copy whose data files are called as those of a graph of this name: GRAPH_data, GRAPH_data_1, ...

        Locations in `kept` stay as they are, and names in `taken` are not given.
        """
        free = (name for name in data_names(graph) if name not in taken and name not in kept)
        used, names = self.used_weight_files(), {at: at for at in kept}
        targets: dict[Path, str] = {}
        for at, file in used.items():
            if at not in kept:
                names[at] = targets[file] = targets.get(file) or next(free)
        names |= {at: next(free) for at in self.converted_files()}
        moved = self.copy()
        moved.weight_files = {names[at]: file for at, file in used.items()}
        for tensor in tensors(moved.proto):
            if is_external(tensor):
                set_location(tensor, names[external_field(tensor, "location") or ""])
        return moved

    def open_data(self, file: Path) -> BinaryIO:
        """Open one of the files that weights come from. Raises OSError where it does not lie where they may."""
        try:
            return open_inside(file, self.folders or {data_folder(self.path)})
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None

    def data_ends(self) -> dict[Path, int]:
        """How much is used of each file that is placed as it is: the end of the last tensor that refers to it."""
        ends: dict[Path, int] = {}
        for tensor in tensors(self.proto):
            if is_external(tensor) and self.conversion(tensor) is None:
                ref = reference(tensor, self.weight_files)
                ends[ref.file] = max(ends.get(ref.file, 0), ref.end)
        return ends


def _data_files_of(path: Path) -> set[str]:
    """The names beside a graph that are those of its data files."""
    names = re.compile(re.escape(path.name) + r"_data(_[0-9]+)?")
    return {entry for entry in os.listdir(path.parent) if names.fullmatch(entry)}


def _is_there(path: Path, name: str) -> bool:
    return os.path.lexists(path.with_name(name))


def _weight_files(proto: ModelProto, path: Path) -> dict[str, Path]:
    locations: dict[str, None] = {}
    for tensor in tensors(proto):
        check_rank(repr(tensor.name), len(tensor.dims), path)
        if is_external(tensor):
            locations[external_field(tensor, "location") or ""] = None
    for location in locations:
        check_location(location, str(path))
        check_link(path.parent / location, path)
    return {location: path.parent / location for location in locations}


def _same_file(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False
