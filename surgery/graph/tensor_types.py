"""What a graph declares of its values: dtypes, and shapes with their symbolic sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
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
    if not value.type.HasField("tensor_type"):
        return None
    declared = value.type.tensor_type
    shape = tuple([_dim(dim) for dim in declared.shape.dim]) if declared.HasField("shape") else None
    return TensorType(_dtype(declared.elem_type), shape)


def initializer_type(tensor: TensorProto) -> TensorType:
    """The type of a stored tensor; a TensorType with a shape, whose sizes are numbers."""
    return TensorType(_dtype(tensor.data_type), tuple(tensor.dims))


@functools.cache
def _dtype(number: int) -> str:
    """The name of an ONNX dtype, `DTYPE_99` for one that is not known."""
    from onnx import TensorProto

    known = number in TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(number)) if known else f"DTYPE_{number}"


def _dim(dim: object) -> Dim:
    kind = dim.WhichOneof("value")  # type: ignore[attr-defined]
    return getattr(dim, kind) if kind else None


def types_of(values: Iterable[ValueInfoProto]) -> dict[str, TensorType]:
    """Name -> declared type of those values that are tensors with one, e.g. of `graph.input`."""
    return {value.name: declared for value in values if (declared := tensor_type(value)) is not None}


def interface_types(graph: GraphProto) -> dict[str, TensorType]:
    """The declared types of the graph's inputs and outputs."""
    return types_of((*graph.input, *graph.output))


def declared_types(graph: GraphProto) -> dict[str, TensorType]:
    """The declared type of every value that has one: interface, value_info and initializers. Linear in the graph."""
    stored = {tensor.name: initializer_type(tensor) for tensor in graph.initializer}
    return {**types_of(graph.value_info), **interface_types(graph), **stored}
