"""What is in a file, an export or a GenAI folder, and where its nodes would run on CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.jobs.listener import SILENT, Listener

if TYPE_CHECKING:
    from surgery.cuda.prediction import Prediction
    from surgery.folder.inspection import ExportInspection, FolderInspection, Inspection


def inspect(
    source: str | Path, *, precision: str | None = None, listener: Listener = SILENT
) -> Inspection | ExportInspection | FolderInspection:
    """Interface, layers, KV caches, operators and bytes of an .onnx file, an export or a GenAI folder.

    No weight is read, and of a Hub repository none is fetched. Raises SurgeryError for what is none of the three.

        print(surgery.inspect("model.onnx").to_dict()["operators"])
    """
    from surgery.folder.inspection import inspect_export, inspect_path
    from surgery.source.hub import get, list_files, plan_folder
    from surgery.source.opening import SourceRequest, look_up

    choice = SourceRequest(str(source), "cpu", precision, modalities=None)
    if choice.hub is None:
        return inspect_path(Path(source), precision)
    listing = list_files(choice.hub)
    sizes = {name: file.size for name, file in listing.files.items()}
    if listing.holds_folder:
        for one in plan_folder(listing).files:
            if one.file.name.endswith(".json"):
                get(listing, one.file)
        return inspect_path(listing.root, precision, sizes)
    found = look_up(choice, listener.said)
    assert found.download is not None  # it is a repository
    return inspect_export(found.export, found.pair, found.download.listing.graphs, sizes)


def predict_cuda(found: Inspection | ExportInspection | FolderInspection) -> dict[str, Prediction]:
    """File name of each inspected graph -> which of its nodes CUDA would run, and why the others not; without a GPU."""
    from surgery.cuda.prediction import predict
    from surgery.folder.inspection import ExportInspection, FolderInspection
    from surgery.graph.model import Model

    graphs = found.graphs if isinstance(found, ExportInspection | FolderInspection) else (found,)
    return {graph.path.name: predict(Model.open(graph.path)) for graph in graphs}
