"""One ONNX graph, opened without its weights. The ModelProto is the document; opening and saving changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.architecture import Architecture
from surgery.choices import WeightMode
from surgery.errors import ArchitectureError, FolderError, ModelError, WeightError
from surgery.files.safe_reading import read_regular
from surgery.graph.external_data import (
    WeightReference,
    check_extents,
    check_link,
    check_location,
    external_field,
    is_external,
    reference,
    tensors,
)
from surgery.graph.weight_conversion import Conversion
from surgery.graph.weight_writing import Placed, Progress, consolidate, convert, write_data_file
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
    """

    proto: ModelProto
    path: Path
    weight_files: dict[str, Path] = field(default_factory=dict)
    architecture: Architecture | None = None
    converted: dict[str, Conversion] = field(default_factory=dict)

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
        return cls(proto, path, _weight_files(proto, path), architecture)

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
        made = cls(proto, where, files, architecture).copy()
        check_wire(made.to_bytes(), where)
        return made

    @property
    def graph(self) -> GraphProto:
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
        from onnx import ModelProto

        proto = ModelProto()
        proto.CopyFrom(self.proto)
        return Model(proto, self.path, dict(self.weight_files), self.architecture, dict(self.converted))

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
        """Write the graph to `path` and place its weights beside it; see surgery.graph.weight_writing for the ways.

        Returns how each weight file was placed. Weight files go first and the graph last, each through a temporary
        file that is renamed, so that `path` never names a graph whose weights are not there. A weight file already
        in its place is left alone.
        Raises FolderError where something exists and `force` is not given.
        """
        path = Path(path)
        if weights == "consolidate":
            return self._save_consolidated(path, force, progress)
        moves = self._moves(path)
        new = {location: path.parent / location for location in self.converted_files()}
        placed = []
        _refuse_existing((path, *(target for _, target in moves), *new.values()), path.parent, force)
        self.check_weights()
        data, ends = self.to_bytes(), self._ends(path.parent)
        for file, target in moves:
            location = str(target.relative_to(path.parent))
            with _renamed_into_place(target) as staged:
                placed.append(write_data_file(file, staged, location, weights, ends[target], progress))
        for location, target in new.items():
            with _renamed_into_place(target) as staged:
                placed.append(convert(self, staged, location, progress))
        with _renamed_into_place(path) as staged:
            staged.write_bytes(data)
        return placed

    def _save_consolidated(self, path: Path, force: bool, progress: Progress | None) -> list[Placed]:
        data_file = path.with_name(f"{path.name}.data")
        _refuse_existing((path, data_file), path.parent, force)
        self.check_weights()
        moved = self.copy()
        with _renamed_into_place(data_file) as staged:
            placed = consolidate(moved, staged, data_file.name, progress)
        with _renamed_into_place(path) as staged:
            staged.write_bytes(moved.to_bytes())
        return [placed]

    def _ends(self, folder: Path) -> dict[Path, int]:
        """Place in `folder` of each weight file -> the end of the last tensor that refers to it."""
        ends: dict[Path, int] = {}
        for tensor in tensors(self.proto):
            if is_external(tensor) and self.conversion(tensor) is None:
                ref = reference(tensor, self.weight_files)
                target = folder / ref.location
                ends[target] = max(ends.get(target, 0), ref.end)
        return ends

    def _moves(self, path: Path) -> list[tuple[Path, Path]]:
        """(file, target) of each weight file that is not in its place beside `path` yet."""
        targets: dict[Path, Path] = {}
        for location, file in self.used_weight_files().items():
            target = path.parent / location
            if target == path:
                raise FolderError(f"{path} is also the name of a data file of this graph", hint="choose another name")
            other = targets.setdefault(target, file)
            if other != file and not _same_file(other, file):
                raise FolderError(f"two data files, {other} and {file}, would both be placed at {target}")
        return [(file, target) for target, file in targets.items() if not _same_file(file, target)]


def _refuse_existing(targets: Iterable[Path], folder: Path, force: bool) -> None:
    for target in targets:
        if target.exists() and not force:
            raise FolderError(f"{target} exists", hint="choose another name, or pass --force to overwrite it")
    if not folder.is_dir():
        raise FolderError(f"the folder {folder} does not exist")


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


@contextlib.contextmanager
def _renamed_into_place(target: Path) -> Iterator[Path]:
    """A name to write to, which becomes `target` at the end; whatever happens, it is gone afterwards."""
    staged = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)  # left by a killed process; it may be a hard link to a source
        yield staged
        staged.replace(target)
    except OSError as error:
        raise FolderError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
