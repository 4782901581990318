"""A part of a graph, run by itself on small numbers: how a pass knows what values mean, however they are computed.

A fragment begins at the values where it is cut and ends at the values that are asked for. It runs in onnx's own
reference implementation, so that it needs no runtime and no weight. A Shape on the way counts as a cut: the tensor that
it reads is never made, its declared dimensions are enough.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import ModelError
from surgery.graph.external_data import is_external
from surgery.graph.protos import TensorType, declare, describe, producers, subgraphs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto, TensorProto

    Array = NDArray[Any]

MOST_NODES = 200
"""More than the exporter's attention and its masks have; a larger fragment is not the part that a pass looks for."""


class Fragments:
    """Cuts fragments out of one model; what has to be known of the whole graph is found out once."""

    def __init__(self, model: ModelProto) -> None:
        self._opsets = list(model.opset_import)
        self._ir_version = model.ir_version
        self._producers = producers(model.graph)
        self._places = {id(node): place for place, node in enumerate(model.graph.node)}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.types = declare(model.graph)

    def cut(self, outputs: Sequence[str], at: Collection[str]) -> Fragment:
        """The nodes from the values `at` to `outputs`, in their order.

        Raises ModelError where it reaches an input of the graph that is no cut, a weight, or a node with a subgraph.
        """
        found: dict[int, NodeProto] = {}
        constants: dict[str, TensorProto] = {}
        shaped: dict[str, TensorType] = {}
        pending = [name for name in outputs if name not in at]
        seen = set(at)
        while pending:
            name = pending.pop()
            if name in seen or not name:
                continue
            seen.add(name)
            if name in self._constants:
                constants[name] = self._small(self._constants[name])
                continue
            node = self._producers.get(name)
            if node is None:
                raise ModelError(f"it depends on the input {name!r}")
            if any(True for _ in subgraphs(node)) or len(found) == MOST_NODES:
                raise ModelError(f"it depends on {describe(node)}, and more than is looked at")
            found[id(node)] = node
            if node.op_type == "Shape" and node.input[0] not in at:
                shaped[node.input[0]] = self._declared(node.input[0])
                seen.add(node.input[0])
            else:
                pending.extend(node.input)
        cuts = {name: self._declared(name) for name in at}
        return Fragment(
            self._proto(
                sorted(found.values(), key=lambda node: self._places[id(node)]), constants, cuts | shaped, outputs
            ),
            cuts,
            shaped,
        )

    def _small(self, tensor: TensorProto) -> TensorProto:
        if is_external(tensor):
            raise ModelError(f"it depends on the weight {tensor.name!r}")
        return tensor

    def _declared(self, name: str) -> TensorType:
        declared = self.types.get(name)
        if declared is None or declared.shape is None or None in declared.shape:
            raise ModelError(f"{name} is {declared}; a declared shape is expected")
        return declared

    def _proto(
        self,
        nodes: list[NodeProto],
        constants: Mapping[str, TensorProto],
        inputs: Mapping[str, TensorType],
        outputs: Sequence[str],
    ) -> ModelProto:
        import onnx

        kinds = onnx.TensorProto.DataType
        values = [
            onnx.helper.make_tensor_value_info(name, kinds.Value(declared.dtype), [None] * len(declared.shape or ()))
            for name, declared in inputs.items()
        ]
        results = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in outputs]
        graph = onnx.helper.make_graph(nodes, "fragment", values, results, list(constants.values()))
        return onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)


class Fragment:
    """A runnable part. `cuts` are the values to give, with their declared types."""

    def __init__(self, proto: ModelProto, cuts: Mapping[str, TensorType], shaped: Mapping[str, TensorType]) -> None:
        self.cuts = cuts
        self._proto = proto
        self._shaped = shaped
        self._evaluator: Any = None

    def run(self, sizes: Mapping[str, int], values: Mapping[str, Array]) -> list[Array]:
        """The outputs, given the cut values and the sizes of symbolic dimensions.

        Raises ModelError for a size that is not known, and for what the reference implementation cannot run.
        """
        import numpy as np
        from onnx.reference import ReferenceEvaluator

        feeds = dict(values)
        for name, declared in self._shaped.items():
            feeds[name] = np.broadcast_to(
                np.zeros((), np.float32), [_size(name, dim, sizes) for dim in declared.shape or ()]
            )
        try:
            if self._evaluator is None:
                self._evaluator = ReferenceEvaluator(self._proto)
            with np.errstate(all="ignore"):  # the most negative number of a mask overflows on purpose
                found: list[Array] = self._evaluator.run(None, feeds)
        except Exception as error:  # the reference implementation raises whatever numpy does, and kinds of its own
            raise ModelError(f"it cannot be run: {' '.join(str(error).split())[:200]}") from None
        return found


def _size(name: str, dim: int | str | None, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None or dim not in sizes:
        raise ModelError(f"{name} has a dimension {dim!r}, which no token input has")
    return sizes[dim]
