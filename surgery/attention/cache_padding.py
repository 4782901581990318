"""Padded caches: the interface declares a larger size than the layer has, and the graph cuts its own part out.

    past_key_values.0.key [batch, 1, past, 512] -> Slice -> [batch, 1, past, 256] -> ... -> Pad -> present.0.key

GenAI 0.12 and 0.13 know one size for all caches; passes/uniform_heads.py writes this form for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.graph.external_data import is_external
from surgery.graph.index import producers
from surgery.graph.nodes import integers
from surgery.graph.tensor_types import Dim, declared_types

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

Sizes = tuple[Dim, Dim]
"""KV heads and head size of a cache: axes 1 and 3."""

AXES = (1, 3)


def declared_sizes(graph: GraphProto) -> dict[str, Sizes]:
    """KV heads and head size of every input and output of rank 4, as the interface has them."""
    names = [value.name for value in (*graph.input, *graph.output)]
    types = declared_types(graph)
    shapes = {name: types[name].shape for name in names if name in types}
    return {name: (shape[1], shape[3]) for name, shape in shapes.items() if shape is not None and len(shape) == 4}


def own_sizes(graph: GraphProto) -> dict[str, Sizes]:
    """KV heads and head size that the layers use, by name: the declared ones, less the padding that the graph has.

    An alias of a padded present has its source layer's, and a past that nothing reads has those of its present.
    """
    made, constants = producers(graph), {tensor.name: tensor for tensor in graph.initializer}
    read, declared = _readers(graph), declared_sizes(graph)
    outputs = [value.name for value in graph.output if value.name in declared]
    sizes = {name: _present(name, declared[name], made, constants) for name in outputs}
    for name in declared.keys() - sizes.keys():
        present = name.replace("past_key_values.", "present.")
        if readers := read.get(name):
            cut = {_sliced(node, declared[name], constants) for node in readers}
            sizes[name] = cut.pop() if len(cut) == 1 else declared[name]
        elif declared.get(present) == declared[name]:
            sizes[name] = sizes.get(present, declared[name])
        else:
            sizes[name] = declared[name]
    return {name: sizes[name] for name in declared}


def _readers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = {value.name: [] for value in graph.input}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            if name in found:
                found[name].append(node)
    return found


def _sliced(node: NodeProto, whole: Sizes, constants: dict[str, TensorProto]) -> Sizes:
    """What a Slice from 0 leaves of axes 1 and 3; the whole where it is no such Slice."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return whole
    starts, ends, axes = (_values(constants.get(name)) for name in node.input[1:4])
    if any(starts) or not set(axes) <= set(AXES) or len(axes) != len(ends):
        return whole
    kept = dict(zip(axes, ends, strict=True))
    return kept.get(1, whole[0]), kept.get(3, whole[1])


def _present(name: str, whole: Sizes, made: dict[str, NodeProto], constants: dict[str, TensorProto]) -> Sizes:
    """The declared sizes less what a Pad adds behind axes 1 and 3, also where an alias copies what is padded."""
    node, seen = made.get(name), {name}
    while node is not None and node.op_type == "Identity" and node.input[0] not in seen:
        seen.add(node.input[0])
        node = made.get(node.input[0])
    if node is None or node.op_type != "Pad" or len(node.input) < 2:
        return whole
    pads = _values(constants.get(node.input[1]))
    if len(pads) != 8 or any(pads[:4]):
        return whole
    return _less(whole[0], pads[5]), _less(whole[1], pads[7])


def _less(size: Dim, padding: int) -> Dim:
    return size - padding if isinstance(size, int) else size


def _values(tensor: TensorProto | None) -> list[int]:
    """The values of a small constant; none where it is no constant, or stored externally."""
    return [] if tensor is None or is_external(tensor) else integers(tensor)
