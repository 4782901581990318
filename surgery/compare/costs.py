"""What a model costs whoever runs it, as its graphs say: bytes for each token, bytes to download, the oldest runtimes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.attention.kv_wiring import slot_of_name
from surgery.compare.comparison import Costs
from surgery.compare.subjects import Subject, SubjectGraph
from surgery.compare.tensor_contents import data_files, file_size
from surgery.errors import SurgeryError
from surgery.folder.minimum_versions import minimum_versions
from surgery.graph.tensor_types import interface_types
from surgery.source.export import ENCODERS

if TYPE_CHECKING:
    from onnx import GraphProto

_TABLES = ("Gather", "GatherND", "GatherElements", "GatherBlockQuantized")
"""Operators that read a few rows of a table, and not all of it."""

_HALF_BYTES = ("INT4", "UINT4", "FLOAT4E2M1")


def costs(side: Subject) -> Costs:
    """The costs of one side. What no graph says is None; encoders run once a picture or sound, and count as download
    alone."""
    each_token = [part for part in side.parts if part.role not in ENCODERS.values()]
    sizes = [file_size(file) for file in data_files(side)]
    graphs = sum(len(part.model.to_bytes()) for part in side.parts)
    genai, onnxruntime = _runtimes(side)
    return Costs(
        reads=sum(_reads(part.model.graph) for part in each_token),
        cache=_cache(side.main),
        download=graphs + sum(size for size in sizes if size is not None) if None not in sizes else None,
        genai=genai,
        onnxruntime=onnxruntime,
    )


def _reads(graph: GraphProto) -> int:
    """Bytes of weights that a run for one token reads: all of them, of tables a row."""
    tables: dict[str, bool] = {}
    for node in graph.node:
        for name in node.input:
            tables[name] = tables.get(name, True) and node.op_type in _TABLES
    total = 0
    for tensor in graph.initializer:
        count = _bytes(tensor.data_type, tensor.dims)
        total += count // max(1, tensor.dims[0]) if tensor.dims and tables.get(tensor.name, False) else count
    return total


def _bytes(data_type: int, dims: Any) -> int:
    from onnx import TensorProto, helper

    if data_type not in TensorProto.DataType.values():
        return 0
    if TensorProto.DataType.Name(data_type) in _HALF_BYTES:
        return int(math.prod(dims)) // 2
    try:
        return int(math.prod(dims) * helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    except (KeyError, TypeError, ValueError):
        return 0


def _cache(part: SubjectGraph) -> int | None:
    """Bytes that one token takes in all KV caches of the interface; None where their sizes are no numbers."""
    from onnx import TensorProto

    inputs = {value.name for value in part.model.graph.input}
    found: list[int] = []
    for name, declared in interface_types(part.model.graph).items():
        if name not in inputs or slot_of_name(name) is None:
            continue
        heads, size = (
            (declared.shape[1], declared.shape[3]) if declared.shape and len(declared.shape) == 4 else (None,) * 2
        )
        if not isinstance(heads, int) or not isinstance(size, int) or declared.dtype not in TensorProto.DataType.keys():  # noqa: SIM118
            return None
        found.append(_bytes(TensorProto.DataType.Value(declared.dtype), (heads, size)))
    return sum(found)


def _runtimes(side: Subject) -> tuple[str | None, str | None]:
    """The oldest GenAI and ONNX Runtime of a folder; None where they are not known, or any will do."""
    if side.kind != "folder" or side.architecture is None:
        return None, None
    recipe = (side.manifest or {}).get("recipe")
    texts = recipe.values() if isinstance(recipe, Mapping) else (recipe,)
    padded = any("uniform-heads" in text for text in texts if isinstance(text, str))
    try:
        found = minimum_versions(
            side.main.model, "genai-0.12" if padded else "genai-0.14", multimodal=len(side.parts) > 1
        )
    except SurgeryError:
        return None, None
    return found.genai, found.onnxruntime
