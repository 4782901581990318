"""What is in a file, an export or a GenAI folder, and where its nodes would run on CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.cuda.prediction import Prediction
    from surgery.folder.inspection import ExportInspection, FolderInspection, Inspection


def inspect(source: str | Path, *, precision: str | None = None) -> Inspection | ExportInspection | FolderInspection:
    """Interface, layers, KV caches, operators and bytes of an .onnx file, an export or a GenAI folder.

    No weight is read. Raises SurgeryError for what is none of the three.

        print(surgery.inspect("model.onnx").to_dict()["operators"])
    """
    from surgery.folder.inspection import inspect as look

    return look(Path(source), precision)


def predict_cuda(found: Inspection | ExportInspection | FolderInspection) -> dict[str, Prediction]:
    """File name of each inspected graph -> which of its nodes CUDA would run, and why the others not; without a GPU."""
    from surgery.cuda.prediction import predict
    from surgery.folder.inspection import ExportInspection, FolderInspection
    from surgery.graph.model import Model

    graphs = found.graphs if isinstance(found, ExportInspection | FolderInspection) else (found,)
    return {graph.path.name: predict(Model.open(graph.path)) for graph in graphs}
