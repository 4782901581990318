"""What a graph declares of its values: dtypes, and shapes with their symbolic sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto, ValueInfoProto

Dim = int | str | None
"""One dimension: a size, the name of a symbolic size, or unknown."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """A declared type: ONNX dtype name, and the dimensions, or None where the rank is unknown."""

    dtype: str
    shape: tuple[Dim, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return self.dtype
        return f"{self.dtype} [{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


def tensor_type(value: ValueInfoProto) -> TensorType | None:
    """The declared type of a tensor value, or None for sequences, maps, optionals and undeclared values."""
    from onnx import TensorProto

    if not value.type.HasField("tensor_type"):
        return None
    declared = value.type.tensor_type
    try:
        dtype = TensorProto.DataType.Name(declared.elem_type)
    except ValueError:
        dtype = f"DTYPE_{declared.elem_type}"
    if not declared.HasField("shape"):
        return TensorType(dtype, None)
    return TensorType(dtype, tuple(_dim(dim) for dim in declared.shape.dim))


def initializer_type(tensor: TensorProto) -> TensorType:
    from onnx import TensorProto

    try:
        dtype = TensorProto.DataType.Name(tensor.data_type)
    except ValueError:
        dtype = f"DTYPE_{tensor.data_type}"
    return TensorType(dtype, tuple(tensor.dims))


def _dim(dim: object) -> Dim:
    kind = dim.WhichOneof("value")  # type: ignore[attr-defined]
    return getattr(dim, kind) if kind else None


def declared_types(graph: GraphProto) -> dict[str, TensorType]:
    """The declared type of every value that has one: interface, value_info and initializers."""
    types: dict[str, TensorType] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        declared = tensor_type(value)
        if declared is not None:
            types[value.name] = declared
    for tensor in graph.initializer:
        types[tensor.name] = initializer_type(tensor)
    return types
