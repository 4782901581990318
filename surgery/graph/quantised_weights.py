"""Quantised weights whose shapes and dtypes are what their node's attributes say: a runtime reads past them, or
refuses.

MatMulNBits            x [.., K], codes [N, blocks, block_size * bits / 8], scales [N, blocks] or [N * blocks]
GatherBlockQuantized   codes [V, width * bits / 8], ids, scales [V, blocks]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.errors import ModelError
from surgery.graph.external_data import BITS
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute, node_in_words
from surgery.graph.tensor_types import TensorType, declared_types

if TYPE_CHECKING:
    from onnx import NodeProto

Types = Mapping[str, TensorType]
Shapes = tuple[tuple[int, ...], ...]


def check_quantised(model: Model) -> None:
    """Raise ModelError, one sentence, for the first quantised weight that is not what its node says. No weight is
    read."""
    types = declared_types(model.graph)
    for node in model.graph.node:
        for fault in _FAULTS.get(node.op_type, _none)(node, types):
            raise ModelError(f"{model.path}: {node_in_words(node)}: {fault}")


def _none(_: NodeProto, __: Types) -> Iterator[str]:
    yield from ()


def _product(node: NodeProto, types: Types) -> Iterator[str]:
    bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 0)
    depth, rows = int_attribute(node, "K", 0), int_attribute(node, "N", 0)
    if min(bits, block, depth, rows) < 1:
        yield f"bits, block_size, K and N are {bits}, {block}, {depth} and {rows}; numbers above 0 are expected"
        return
    blocks = math.ceil(depth / block)
    told = f"{bits} bits in blocks of {block}, K {depth} and N {rows}"
    yield from _of_other_shape(node, 1, types, ((rows, blocks, math.ceil(block * bits / 8)),), told)
    yield from _of_other_shape(node, 2, types, ((rows, blocks), (rows * blocks,)), told)
    yield from _of_other_dtype(node, types, _type(node.input, 0, types), "the activations")


def _lookup(node: NodeProto, types: Types) -> Iterator[str]:
    bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 128)
    codes = _type(node.input, 0, types)
    shape = _sizes(codes)
    if codes is None or shape is None or len(shape) != 2 or int_attribute(node, "quantize_axis", 1) not in (1, -1):
        return
    if bits < 1 or block < 1:
        yield f"bits and block_size are {bits} and {block}; numbers above 0 are expected"
        return
    width = shape[1] * (BITS.get(codes.dtype, 8) // bits or 1)
    told = f"codes {codes}, {bits} bits in blocks of {block}"
    yield from _of_other_shape(node, 2, types, ((shape[0], math.ceil(width / block)),), told)
    rows = _type(node.output, 0, types)
    if rows is not None and rows.shape and isinstance(rows.shape[-1], int) and rows.shape[-1] != width:
        yield f"the rows that it gives are {rows}; {width} values a row are expected of {told}"
    yield from _of_other_dtype(node, types, rows, "the rows that it gives")


_FAULTS = {"MatMulNBits": _product, "GatherBlockQuantized": _lookup}
_INPUTS = {1: "codes", 2: "scales"}


def _of_other_shape(node: NodeProto, index: int, types: Types, wanted: Shapes, told: str) -> Iterator[str]:
    found = _sizes(_type(node.input, index, types))
    if found is not None and found not in wanted:
        expected = " or ".join(str(list(shape)) for shape in wanted)
        yield f"its {_INPUTS[index]} {node.input[index]!r} are {list(found)}; {expected} is expected of {told}"


def _of_other_dtype(node: NodeProto, types: Types, other: TensorType | None, what: str) -> Iterator[str]:
    scales = _type(node.input, 2, types)
    if scales is not None and other is not None and scales.dtype != other.dtype:
        yield f"its scales {node.input[2]!r} are {scales.dtype}, {what} {other.dtype}; one dtype is expected"


def _type(names: Sequence[str], index: int, types: Types) -> TensorType | None:
    return types.get(names[index]) if index < len(names) else None


def _sizes(found: TensorType | None) -> tuple[int, ...] | None:
    """A shape of numbers alone."""
    if found is None or found.shape is None:
        return None
    sizes = tuple(dim for dim in found.shape if isinstance(dim, int))
    return sizes if len(sizes) == len(found.shape) else None
