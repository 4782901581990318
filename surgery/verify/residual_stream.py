"""The residual stream of a decoder: the values that carry the hidden state from layer to layer.

    embeddings -> Add (attention) -> Add (feed-forward) -> Add (per-layer input) -> Mul (layer scalar) -> next layer

It is found from the wiring, backwards from `logits`. Of the two values that a residual Add joins, the stream is the
one that was made first: the other is computed from it. Layers are told apart by their attention cores, whatever the
values are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.attention.kv_wiring import attentions
from surgery.errors import ModelError
from surgery.graph.index import producers

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_CARRIES = {"Add", "Mul", "Cast", "Identity", "Dropout", "GatherND"}
_FUSED = {"SkipSimplifiedLayerNormalization": 3, "SkipLayerNormalization": 3}
"""An Add and the norm after it in one operator -> the output that is the sum."""

EMBEDDINGS = -1
"""The layer of what comes before the first layer."""


@dataclass(frozen=True, slots=True)
class Carried:
    """A value of the stream, the layer that makes it (EMBEDDINGS before the first), and its node's place."""

    name: str
    layer: int
    place: int


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """The values in the order in which they are computed, and the number of layers."""

    values: tuple[Carried, ...]
    layers: int

    def layer_of(self, place: int) -> int | None:
        """The layer that the node at a place in the graph belongs to; None before the first and after the last."""
        ends = self._ends()
        if place <= ends.get(EMBEDDINGS, -1):
            return None
        return next((layer for layer in range(self.layers) if layer in ends and place <= ends[layer]), None)

    def _ends(self) -> dict[int, int]:
        return {carried.layer: carried.place for carried in self.values}  # the last of each layer stays


def residual_stream(graph: GraphProto, logits: str = "logits") -> ResidualStream:
    """Find the stream. Raises ModelError where a layer has none of its values."""
    walk = _Walk(graph)
    names_of_cores = [core.node for core in attentions(graph)]
    if not names_of_cores or "" in names_of_cores:
        raise ModelError("the graph has no attention with a name, so no layers to tell apart")
    places = {node.name: place for place, node in enumerate(graph.node)}
    cores = [places[name] for name in names_of_cores]
    names = walk.stream(logits)
    values = []
    for name in reversed(names):
        place = walk.places[name]
        values.append(Carried(name, sum(core < place for core in cores) - 1, place))
    found = {carried.layer for carried in values}
    if missing := [layer for layer in range(len(cores)) if layer not in found]:
        raise ModelError(f"the residual stream is not found in layer {missing[0]} of {len(cores)}")
    return ResidualStream(tuple(values), len(cores))


class _Walk:
    """The way back from the logits."""

    def __init__(self, graph: GraphProto) -> None:
        self._makers: Mapping[str, NodeProto] = producers(graph)
        self.places = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
        self._constant = _constants(graph)

    def stream(self, logits: str) -> list[str]:
        """The values of the stream, the last one first."""
        name: str | None = logits
        while name is not None and not self._joins(name):
            name = self._back(name)
        found: list[str] = []
        while name is not None and self._carries(name):
            found.append(name)
            name = self._back(name)
        return found

    def _joins(self, name: str) -> bool:
        """Whether the value is a sum of two activations: the last one is the end of the stream or just before it."""
        node = self._makers.get(name)
        if node is None or len(self._variable(node)) < 2:
            return False
        return node.op_type == "Add" or self._is_fused_sum(node, name)

    def _carries(self, name: str) -> bool:
        node = self._makers.get(name)
        if node is None:
            return False
        if node.op_type == "Mul" and len(self._variable(node)) > 1:
            return False
        return node.op_type in _CARRIES or self._is_fused_sum(node, name)

    def _is_fused_sum(self, node: NodeProto, name: str) -> bool:
        place = _FUSED.get(node.op_type)
        return place is not None and len(node.output) > place and node.output[place] == name

    def _back(self, name: str) -> str | None:
        node = self._makers.get(name)
        if node is None:
            return None
        if node.op_type in _FUSED and not self._is_fused_sum(node, name):
            sums = node.output[_FUSED[node.op_type] :]
            return sums[0] if sums and sums[0] else self._earliest(node)
        if node.op_type in ("Add", "Mul") or node.op_type in _FUSED:
            return self._earliest(node)
        return next(iter(self._variable(node)), None)

    def _earliest(self, node: NodeProto) -> str | None:
        return min(self._variable(node), key=lambda name: self.places.get(name, -1), default=None)

    def _variable(self, node: NodeProto) -> list[str]:
        return [name for name in node.input if name and name not in self._constant]


def _constants(graph: GraphProto) -> set[str]:
    """Values that depend on no input."""
    known = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in known or not name for name in node.input):
            known.update(node.output)
    return known
