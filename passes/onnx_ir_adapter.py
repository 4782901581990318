"""Our passes in pipelines of onnx-ir: `onnx_ir.passes.Sequential(OnnxIrPass(RenameIO()), ...)`. Needs the extra
`onnx-ir`."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import FunctionalPass, PassResult

from passes.base import Pass, apply
from surgery.architecture import Architecture
from surgery.errors import FolderError, PassError
from surgery.graph.model import Model
from surgery.graph.weight_writing import convert


class OnnxIrPass(FunctionalPass):
    """Passes of ours as one pass of onnx-ir: it takes an `onnx_ir.Model` and returns another; the first stays as it is.

    `steps` are applied in order, with all checks of `apply`; `modified` is measured. `architecture` is what config.json
    says, for the passes that need it. `folder` is where a pass that rewrites weights writes its data files.

    The model goes through a ModelProto and back. External weights stay in their files and are not read; weights in
    memory are copied. What onnx-ir itself changes on that way (names of domains, types of initializers) is not counted.

    Raises PassError here for a pass that rewrites weights without a folder; in a Sequential, `onnx_ir.passes.PassError`
    with ours as its cause.
    """

    def __init__(
        self, *steps: Pass, architecture: Architecture | None = None, folder: str | os.PathLike[str] | None = None
    ) -> None:
        if folder is None and (writing := [step.name for step in steps if step.rewrites_weights]):
            raise PassError(f"{writing[0]} writes weights anew", hint="give OnnxIrPass a folder for the data files")
        self._steps, self._architecture, self._folder = steps, architecture, Path(folder or "")

    def __str__(self) -> str:
        return ",".join(step.name for step in self._steps)

    def call(self, model: ir.Model) -> PassResult:
        """Apply the passes. Raises PassError as `apply` does, FolderError where a data file to be written exists."""
        found = _files(model)
        folders = frozenset(file.parent for file in found.values())
        given = Model(ir.to_proto(model), Path("the onnx-ir model"), found, self._architecture, folders=folders)
        result, outcomes = apply(given, self._steps)
        files = dict(result.weight_files)
        for location in result.converted_files():
            files[location] = self._folder / location
            if files[location].exists():
                raise FolderError(f"{files[location]} exists", hint="give OnnxIrPass an empty folder")
            convert(result, location, files[location])
        made = ir.from_proto(result.proto)
        for tensor, value in _external(made):
            file = files[str(tensor.location)]
            value.const_value = ir.ExternalTensor(
                file.name, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name,
                base_dir=file.parent,
            )  # fmt: skip
        return PassResult(made, any(outcome.changed for outcome in outcomes))


def _files(model: ir.Model) -> dict[str, Path]:
    """Location -> file of the external weights. Raises PassError where one location means two files."""
    files: dict[str, Path] = {}
    for tensor, _ in _external(model):
        file = Path(tensor.path)
        if files.setdefault(str(tensor.location), file) != file:
            raise PassError(f"{str(tensor.location)!r} is {file} and {files[str(tensor.location)]}; rename one of them")
    return files


def _external(model: ir.Model) -> list[tuple[ir.ExternalTensor, ir.Value]]:
    found = [value for graph in model.graphs() for value in graph.initializers.values()]
    return [(value.const_value, value) for value in found if isinstance(value.const_value, ir.ExternalTensor)]
