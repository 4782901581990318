"""Padded caches: the interface declares a larger size than the layer has, and the graph cuts its own part out.

    past_key_values.0.key [batch, 1, past, 512] -> Slice -> [batch, 1, past, 256] -> ... -> Pad -> present.0.key

GenAI 0.12 and 0.13 know one size for all caches; passes/uniform_heads.py writes this form for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.graph.index import Constants, producers, readers
from surgery.graph.tensor_types import Dim, interface_types

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Sizes = tuple[Dim, Dim]
"""KV heads and head size of a cache: axes 1 and 3."""

AXES = (1, 3)


def declared_sizes(graph: GraphProto) -> dict[str, Sizes]:
    """KV heads and head size of every input and output of rank 4, as the interface has them."""
    shapes = {name: declared.shape for name, declared in interface_types(graph).items()}
    return {name: (shape[1], shape[3]) for name, shape in shapes.items() if shape is not None and len(shape) == 4}


def own_sizes(graph: GraphProto) -> dict[str, Sizes]:
    """KV heads and head size that the layers use, by name: the declared ones, less the padding that the graph has.

    An alias of a padded present has its source layer's, and a past that nothing reads has those of its present.
    """
    made, read, constants = producers(graph), readers(graph), Constants(graph)
    declared = declared_sizes(graph)
    outputs = [value.name for value in graph.output if value.name in declared]
    sizes = {name: _present(name, declared[name], made, constants) for name in outputs}
    for name in declared.keys() - sizes.keys():
        present = name.replace("past_key_values.", "present.")
        if reading := read.get(name):
            cut = {_sliced(node, declared[name], constants) for node in reading}
            sizes[name] = cut.pop() if len(cut) == 1 else declared[name]
        elif declared.get(present) == declared[name]:
            sizes[name] = sizes.get(present, declared[name])
        else:
            sizes[name] = declared[name]
    return {name: sizes[name] for name in declared}


def _sliced(node: NodeProto, whole: Sizes, constants: Constants) -> Sizes:
    """What a Slice from 0 leaves of axes 1 and 3; the whole where it is no such Slice."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return whole
    starts, ends, axes = (constants.integers(name) or [] for name in node.input[1:4])
    if any(starts) or not set(axes) <= set(AXES) or len(axes) != len(ends):
        return whole
    kept = dict(zip(axes, ends, strict=True))
    return kept.get(1, whole[0]), kept.get(3, whole[1])


def _present(name: str, whole: Sizes, made: dict[str, NodeProto], constants: Constants) -> Sizes:
    """The declared sizes less what a Pad adds behind axes 1 and 3, also where an alias copies what is padded."""
    node, seen = made.get(name), {name}
    while node is not None and node.op_type == "Identity" and node.input[0] not in seen:
        seen.add(node.input[0])
        node = made.get(node.input[0])
    if node is None or node.op_type != "Pad" or len(node.input) < 2:
        return whole
    pads = constants.integers(node.input[1]) or []
    if len(pads) != 8 or any(pads[:4]):
        return whole
    return _less(whole[0], pads[5]), _less(whole[1], pads[7])


def _less(size: Dim, padding: int) -> Dim:
    return size - padding if isinstance(size, int) else size
