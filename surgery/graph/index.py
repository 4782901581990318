"""Who makes each value of a graph, and who reads it; linear in the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.errors import ModelError
from surgery.graph.external_data import is_external
from surgery.graph.scopes import reads

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Value -> the node that gives it. Graph inputs and initializers have none."""
    return {name: node for node in graph.node for name in node.output if name}


def readers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Value -> the nodes that read it, from inside their subgraphs too, each once, in node order."""
    found: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in reads(node):
            found.setdefault(name, []).append(node)
    return found


def use_counts(graph: GraphProto) -> dict[str, int]:
    """How many nodes and graph outputs read each value."""
    counts = {name: len(nodes) for name, nodes in readers(graph).items()}
    for value in graph.output:
        counts[value.name] = counts.get(value.name, 0) + 1
    return counts


class Constants:
    """The small constants of a graph: inline initializers, and Constant nodes."""

    def __init__(self, graph: GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}

    def integers(self, name: str) -> list[int] | None:
        """The values of an INT64 or INT32 constant, flat; None for any other value.

        Raises ModelError for a constant that does not hold what its shape says.
        """
        if name in self._tensors:
            return _integers(self._tensors[name])
        for attribute in self._nodes[name].attribute if name in self._nodes else ():
            if attribute.name == "value":
                return _integers(attribute.t)
            if attribute.name in ("value_int", "value_ints"):
                return [attribute.i] if attribute.name == "value_int" else list(attribute.ints)
        return None


def _integers(tensor: TensorProto) -> list[int] | None:
    from onnx import TensorProto, numpy_helper

    if is_external(tensor) or tensor.data_type not in (TensorProto.INT64, TensorProto.INT32):
        return None
    try:
        return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]
    except ValueError as error:
        raise ModelError(f"initializer {tensor.name!r} does not hold what its shape says: {error}") from None
