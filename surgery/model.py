"""One ONNX graph, opened without its weights. The ModelProto is the document; opening and saving changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import ArchitectureError, FolderError, ModelError
from surgery.gemma4 import Architecture
from surgery.weights import (
    Placement,
    Progress,
    WeightReference,
    check_extents,
    check_location,
    external_field,
    is_external,
    place,
    reference,
    tensors,
)

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, ModelProto


@dataclass
class Model:
    """A graph and the files that hold its weights.

    `weight_files` maps each external data location, as the tensors spell it, to the file that stands there.
    `architecture` is what config.json says, where one is known; passes that need it say so when it is None.
    """

    proto: ModelProto
    path: Path
    weight_files: dict[str, Path] = field(default_factory=dict)
    architecture: Architecture | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], architecture: Architecture | None = None) -> Model:
        """Read a graph; external tensors stay references. Raises ModelError, or WeightError for a hostile location."""
        from google.protobuf.message import DecodeError
        from onnx import ModelProto

        path = Path(path)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist") from None
        except IsADirectoryError:
            raise ModelError(f"{path} is a folder; an .onnx file is expected") from None
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None
        proto = ModelProto()
        try:
            proto.ParseFromString(data)
        except DecodeError:
            raise ModelError(
                f"{path} ({len(data)} bytes) is not an ONNX model, or is cut short",
                hint="compare its size with the one the repository lists; a Git LFS pointer is about 130 bytes",
            ) from None
        if not proto.HasField("graph") or not proto.ir_version:
            raise ModelError(f"{path} ({len(data)} bytes) holds no ONNX graph")
        return cls(proto, path, _weight_files(proto, path), architecture)

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

    def edited(self) -> AbstractContextManager[gs.Graph]:
        """The onnx-graphsurgeon view of the main graph; see surgery.view."""
        from surgery.view import edited

        return edited(self.graph)

    def copy(self) -> Model:
        from onnx import ModelProto

        proto = ModelProto()
        proto.CopyFrom(self.proto)
        return Model(proto, self.path, dict(self.weight_files), self.architecture)

    def fingerprint(self) -> str:
        """SHA-256 of the graph and of where its weights are; equal before and after means that nothing changed."""
        digest = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        for location, file in sorted(self.weight_files.items()):
            digest.update(f"\0{location}\0{file}".encode())
        return digest.hexdigest()

    def weight_references(self) -> Iterator[WeightReference]:
        """One checked reference per external tensor. Raises WeightError; no weight is read."""
        for tensor in tensors(self.proto):
            if is_external(tensor):
                yield reference(tensor, self.weight_files)

    def check_weights(self) -> int:
        """Check every extent against its file. Returns the number of bytes referenced; raises WeightError."""
        return check_extents(self.weight_references())

    def used_weight_files(self) -> dict[str, Path]:
        """The entries of `weight_files` that a tensor still refers to, in order of first reference."""
        used = dict.fromkeys(external_field(t, "location") or "" for t in tensors(self.proto) if is_external(t))
        return {location: self.weight_files[location] for location in used}

    def opset(self, domain: str = "") -> int:
        """The version of an operator set, 0 where the model does not import it. '' and 'ai.onnx' are one domain."""
        names = {"", "ai.onnx"} if domain in ("", "ai.onnx") else {domain}
        return max((entry.version for entry in self.proto.opset_import if entry.domain in names), default=0)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights: Placement = "copy",
        force: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write the graph to `path` and place its weight files beside it, at the locations that the tensors name.

        Weight files go first and the graph last, each through a temporary file that is renamed, so that `path`
        never names a graph whose weights are not there. A weight file already in its place is left alone.
        Raises FolderError where something exists and `force` is not given.
        """
        path = Path(path)
        moves = [(file, path.parent / location) for location, file in self.used_weight_files().items()]
        moves = [(file, target) for file, target in moves if not _same_file(file, target)]
        for target in (path, *(target for _, target in moves)):
            if target.exists() and not force:
                raise FolderError(f"{target} exists", hint="choose another name, or pass --force to overwrite it")
        if not path.parent.is_dir():
            raise FolderError(f"the folder {path.parent} does not exist")
        self.check_weights()
        for file, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _renamed_into_place(target) as staged:
                place(file, staged, weights, progress)
        with _renamed_into_place(path) as staged:
            staged.write_bytes(self.proto.SerializeToString())


def _weight_files(proto: ModelProto, path: Path) -> dict[str, Path]:
    locations = dict.fromkeys(external_field(t, "location") or "" for t in tensors(proto) if is_external(t))
    for location in locations:
        check_location(location, str(path))
    return {location: path.parent / location for location in locations}


def _same_file(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False


@contextlib.contextmanager
def _renamed_into_place(target: Path) -> Iterator[Path]:
    staged = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield staged
        os.replace(staged, target)
    except OSError as error:
        raise FolderError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        staged.unlink(missing_ok=True)
