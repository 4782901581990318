"""A part of a graph, run by itself on small numbers: how a pass knows what values mean, however they are computed.

A fragment begins at the values where it is cut and ends at the values that are asked for. It runs in onnx's own
reference implementation, so that it needs no runtime and no weight, and in float32 whatever the graph computes in: what
float16 rounds away would hide a fault. What a Shape on the way reads counts as a cut: for that the tensor is never made,
its declared dimensions are enough.

A graph is a stranger's, and this runs in our own process. So a fragment holds only operators whose work is known before
they run, from what they are given: no loops, no text, and no more of it in all than MOST_WORK.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import ModelError
from surgery.graph.external_data import is_external
from surgery.graph.index import producers
from surgery.graph.nodes import copied, node_in_words
from surgery.graph.operator_work import operator_work, reading_work
from surgery.graph.scopes import subgraphs
from surgery.graph.tensor_types import TensorType, declared_types

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

    Array = NDArray[Any]

MOST_NODES = 200
"""More than the exporter's attention and its masks have; a larger fragment is not the part that a pass looks for."""
LONGEST = 4096
"""Tokens that are tried at least: four times the largest window of the family."""
PROMPT = 640
"""Tokens up to which a prompt is tried at once; what is longer has a past. Scores grow with the square."""
MOST_WORK = 2**38
"""Of all fragments of a model, in multiplications: 28 times what E2B takes."""
MOST_BYTES = 2**32
"""Of all values of a fragment at once."""
_FILL = -1e4
"""What hides a score is this number or a smaller one, and no number of tokens."""
_SMALL = 16
"""Elements of a constant that are looked at one by one; of a larger one, its sizes and its largest."""
_HALVES = ("FLOAT16", "BFLOAT16")


class Subgraphs:
    """Cuts fragments out of one model; what has to be known of the whole graph is found out once."""

    def __init__(self, model: ModelProto) -> None:
        self._opsets = list(model.opset_import)
        self._ir_version = model.ir_version
        self._producers = producers(model.graph)
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._work = _Work()
        self.types = declared_types(model.graph)

    def cut(self, outputs: Sequence[str], at: Collection[str]) -> Subgraph:
        """The nodes from the values `at` to `outputs`, in an order that depends on the wiring alone.

        Raises ModelError where it reaches an input of the graph that is no cut, a weight, or a node with a subgraph.
        """
        nodes: list[NodeProto] = []
        found: set[int] = set()
        constants: dict[str, TensorProto] = {}
        shaped: dict[str, TensorType] = {}
        seen = {"", *at}
        pending: list[str | NodeProto] = [*reversed(outputs)]
        while pending:
            name = pending.pop()
            if not isinstance(name, str):  # all that it reads is there
                nodes.append(name)
                continue
            if name in seen:
                continue
            seen.add(name)
            if name in self._constants:
                constants[name] = self._small(self._constants[name])
                continue
            node = self._producers.get(name)
            if node is None:
                raise ModelError(f"it depends on the input {name!r}")
            if id(node) in found:
                continue
            if any(True for _ in subgraphs(node)) or len(found) == MOST_NODES:
                raise ModelError(f"it depends on {node_in_words(node)}, and more than is looked at")
            for attribute in node.attribute:
                self._small(attribute.t)
            found.add(id(node))
            if node.op_type == "Shape" and node.input[0] not in at:
                node, measured = copied(node), node.input[0]
                node.input[0] = f"{measured}, its shape"  # beside the value itself, which may be read as well
                shaped[node.input[0]] = self._declared(measured)
                pending.append(node)
            else:
                pending.extend([node, *reversed(node.input)])
        cuts = {name: self._declared(name) for name in at}
        return Subgraph(self._proto(nodes, constants, cuts | shaped, outputs), cuts, shaped, self._work)

    def _small(self, tensor: TensorProto) -> TensorProto:
        if is_external(tensor):
            raise ModelError(f"it depends on the weight {tensor.name!r}")
        return tensor

    def _declared(self, name: str) -> TensorType:
        declared = self.types.get(name)
        if declared is None or declared.shape is None:
            raise ModelError(f"{name} has the declaration {declared}, and a shape is expected of its value_info")
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
            onnx.helper.make_tensor_value_info(
                name,
                kinds.FLOAT if declared.dtype in _HALVES else kinds.Value(declared.dtype),
                [None] * len(declared.shape or ()),
            )
            for name, declared in inputs.items()
        ]
        results = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in outputs]
        graph = onnx.helper.make_graph(nodes, "fragment", values, results, list(constants.values()))
        _widen(graph)
        return onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)


def _widen(graph: GraphProto) -> None:
    """Make float32 of half-precision constants and casts."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    halves = {TensorProto.DataType.Value(name) for name in _HALVES}
    held = [attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t")]
    for tensor in (*graph.initializer, *held):
        if tensor.data_type in halves:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in halves:
                attribute.i = TensorProto.FLOAT


@dataclass
class _Work:
    """What has been spent on a model's fragments."""

    spent: int = 0

    def spend(self, work: int) -> None:
        self.spent += work
        if self.spent > MOST_WORK:
            raise ModelError(f"it takes more than {MOST_WORK:.0e} operations to try")


class Subgraph:
    """A runnable part. `cuts` are the values to give, with their declared types; it takes and gives float32 for
    halves."""

    def __init__(
        self, proto: ModelProto, cuts: Mapping[str, TensorType], shaped: Mapping[str, TensorType], work: _Work
    ) -> None:
        self.cuts = cuts
        self._work = work
        self._proto = proto
        self._shaped = shaped
        self._evaluator: Any = None

    def lengths(self, context: int) -> list[int]:
        """Numbers of tokens to try: past each length that a constant mentions, and at least LONGEST past them all.

        A constant up to `context` is a length, but for what a Reshape reads. A product of constants is none that is
        mentioned; LONGEST is for those.
        """
        lengths = sorted({number for number in self._numbers() if 2 <= number <= context})
        return [*(length + 2 for length in lengths), max(LONGEST, *lengths, 0) + 4]

    def _numbers(self) -> Iterator[int]:
        from onnx import numpy_helper

        graph = self._proto.graph
        read = {name for node in graph.node for name in node.input[: 1 if node.op_type == "Reshape" else None]}
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        tensors = [tensor for tensor in graph.initializer if tensor.name in read]
        tensors += [attribute.t for attribute in attributes if attribute.HasField("t")]
        numbers: list[float] = []
        for attribute in attributes:
            numbers += [attribute.i, *attribute.ints, attribute.f, *attribute.floats]
        for tensor in tensors:
            values = numpy_helper.to_array(tensor).reshape(-1)
            numbers += values.tolist() if values.size <= _SMALL else [*tensor.dims, float(values.max())]
        yield from (math.ceil(abs(number)) for number in numbers if math.isfinite(number) and number > _FILL)

    def form(self, named: Sequence[str]) -> bytes:
        """Equal for two fragments that compute the same, `named` being what the values are by place."""
        numbers: dict[str, str] = {"": ""}
        twin = copied(self._proto)
        for name in named:
            numbers.setdefault(name, str(len(numbers)))
        for node in twin.graph.node:
            for names in (node.input, node.output):
                names[:] = [numbers.setdefault(name, str(len(numbers))) for name in names]
            for field in ("name", "doc_string", "metadata_props"):
                node.ClearField(field)
        for value in (*twin.graph.initializer, *twin.graph.input, *twin.graph.output):
            value.name = numbers.setdefault(value.name, str(len(numbers)))
        for values in (twin.graph.initializer, twin.graph.input):
            values.sort(key=lambda value: int(value.name))
        shaped = sorted((int(numbers[name]), declared.shape) for name, declared in self._shaped.items())
        data: bytes = twin.SerializeToString(deterministic=True)
        return data + repr(shaped).encode()

    def run(self, sizes: Mapping[str, int], values: Mapping[str, Array]) -> list[Array]:
        """The outputs, given the cut values and the sizes of symbolic dimensions.

        Raises ModelError for a size that is not known, for what the reference implementation cannot run, and for what
        takes too much work.
        """
        import numpy as np
        from onnx.reference import ReferenceEvaluator

        found: dict[str, Any] = {"": None, **values}
        sized = {name: [_size(name, dim, sizes) for dim in kind.shape or ()] for name, kind in self._shaped.items()}
        try:
            found |= {name: np.broadcast_to(np.zeros((), np.float32), shape) for name, shape in sized.items()}
            if self._evaluator is None:
                self._evaluator = ReferenceEvaluator(self._proto)
            found |= self._evaluator.rt_inits_
            self._work.spend(reading_work(values.values()))
            with np.errstate(all="ignore"):  # the most negative number of a mask overflows on purpose
                for node in self._evaluator.rt_nodes_:
                    given = [found[name] for name in node.input]
                    work, made = operator_work(node.onnx_node, given)
                    self._work.spend(work)
                    if made + sum(value.nbytes for value in found.values() if value is not None) > MOST_BYTES:
                        raise ModelError(f"its values take more than {MOST_BYTES:,} bytes")
                    found |= zip(node.output, node.run(*given), strict=False)
            return [found[name] for name in self._evaluator.output_names]
        except ModelError:
            raise
        except Exception as error:  # the reference implementation raises whatever numpy does, and kinds of its own
            raise ModelError(f"it cannot be run: {' '.join(str(error).split())[:200]}") from None


def _size(name: str, dim: int | str | None, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None or dim not in sizes:
        raise ModelError(f"{name} has a dimension {dim!r}, which no token input has")
    return sizes[dim]
