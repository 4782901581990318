"""Products in int8 beside quantised ones, held against what whole numbers come to.

The pass int8-prefill lets a run of many tokens take another side than a run of a few, of one product or of a whole MLP.
The gates of quality forgive what rounding costs, and with it faults that are worth less. A sum of whole numbers has no
order, so those sides are known almost to the last bit: some are cut out of the graph, run on random activations, and
compared with the same in numpy, from the weights of the source. Nothing here is the pass's: what a side is for, the
other side tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from passes.int8_prefill import Int8Prefill
from passes.set_accuracy_level import kind_of
from surgery.errors import ModelError
from surgery.graph.external_data import is_external, reference
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.graph.nodes import copied, int_attribute, node_in_words
from surgery.graph.tensor_types import interface_types
from surgery.runtime.sessions import Array, OpenGraph, Settings, host
from surgery.verify.report import Gate
from surgery.verify.thresholds import decoder_steps

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

MOST = 0.01
"""How far the results of a channel may be off, in parts of their own size, in the mean square. In the small exports it is
3e-7, in float16 4e-4, and 2e-3 in an MLP in which a value next to a half was rounded to the other side. A zero point of 127 in
place of 128 is 0.023 and more there; a scale is what it is off by."""
_LEVELS = np.float32(127)
_MANY = "MatMulIntegerToFloat"
_OF_FEW = ("MatMulNBits", "Split", "Gelu", "Mul", "Cast")
_SPREADING = ("Cast", "Expand", "Unsqueeze")
_CODES, _SCALES, _POINTS = 1, 2, 3
"""Inputs of a MatMulNBits."""
_AT_A_TIME = 2**22
"""Weights that are unpacked at one time."""


@dataclass(frozen=True)
class TwoSided:
    """What has a side for a few tokens and one for many: x -> result, and the nodes of the first one, in order.

    `cuts` are the rows of x that the first one takes: none of a run of many tokens, else all.
    """

    x: str
    result: str
    few: tuple[NodeProto, ...]
    cuts: frozenset[str]

    @property
    def products(self) -> list[NodeProto]:
        """The quantised products of the side for a few."""
        return [node for node in self.few if node.op_type == "MatMulNBits"]

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for the same of other layers, of the same sizes."""
        sizes = ("K", "N", "bits", "block_size")
        return tuple((kind_of(node), *(int_attribute(node, name, 0) for name in sizes)) for node in self.products)


def two_sided(graph: GraphProto) -> list[TwoSided]:
    """All that a graph has, in node order."""
    made = producers(graph)
    places = {id(node): place for place, node in enumerate(graph.node)}
    found = (_two_sided(node, made, places) for node in graph.node if node.op_type == "Concat" and len(node.input) == 2)
    return [each for each in found if each is not None]


def _two_sided(join: NodeProto, made: Mapping[str, NodeProto], places: Mapping[int, int]) -> TwoSided | None:
    """What a Concat joins, or None of one that joins other things."""
    inner: dict[int, NodeProto] = {}
    given: dict[str, str] = {}
    pending = [join.input[0]]
    while pending:
        node = made.get(pending.pop())
        if node is None or node.op_type not in (*_OF_FEW, "Slice"):
            return None
        if node.op_type == "Slice":
            given[node.output[0]] = node.input[0]
        elif id(node) not in inner:
            inner[id(node)] = node
            pending += node.input if node.op_type == "Mul" else node.input[:1]
    few = tuple(sorted(inner.values(), key=lambda node: places[id(node)]))
    is_one = len(set(given.values())) == 1 and any(node.op_type == "MatMulNBits" for node in few)
    return TwoSided(next(iter(given.values())), join.output[0], few, frozenset(given)) if is_one else None


def between(graph: GraphProto, sides: TwoSided) -> list[NodeProto]:
    """The nodes of both sides, and those that tell how many tokens there are, in node order."""
    made = producers(graph)
    found: set[int] = set()
    pending = [sides.result]
    while pending:
        node = made.get(name) if (name := pending.pop()) != sides.x else None
        if node is not None and id(node) not in found:
            found.add(id(node))
            pending += node.input
    return [node for node in graph.node if id(node) in found]


def tokens_in_int8(folder: Path) -> int | None:
    """From how many tokens on a run takes the other side, by a folder's recipe; None where it has none."""
    steps = decoder_steps(folder, Int8Prefill)
    return steps[-1].tokens if steps else None


def whole_number_gate(
    folder: Model, source: Model | None, tokens: int, settings: Settings, told: Callable[[str], None]
) -> Gate:
    """Whether runs of `tokens` tokens are what whole numbers come to, in the first and the last layer of each kind.

    The weights are those of the products of the same names in `source`, where it is given and has them. `told` is told
    the names of the products.
    """
    name = "products in int8 are those of whole numbers"
    everything = two_sided(folder.graph)
    ends = {each.kind: each for each in everything}
    first = {each.kind: each for each in reversed(everything)}
    chosen = [each for each in everything if each in (first[each.kind], ends[each.kind])]
    if not chosen:
        return Gate("accuracy", name, False, detail="the recipe has int8-prefill, and no product has a side in int8")
    weights = _Weights(folder, source)
    worst, where = -1.0, ""
    for each in chosen:
        product = each.products[-1].name
        told(product)
        try:
            found = _error(folder, each, weights, tokens, settings)
        except ModelError as error:
            return Gate("accuracy", name, False, detail=f"{product}: {error}")
        if not found <= worst:  # of a number that is none, too
            worst, where = found, product
    count = sum(len(each.products) for each in everything)
    detail = f"{sum(len(each.products) for each in chosen)} of {count} products, {tokens} tokens; worst {where}"
    return Gate("accuracy", name, worst <= MOST, MOST, worst, detail, "worst channel's relative error")


def _error(folder: Model, sides: TwoSided, weights: _Weights, tokens: int, settings: Settings) -> float:
    """The worst channel's mean square difference, in parts of the mean square of its results."""
    part = _Part.of(folder, sides)
    shape = (1, tokens, int_attribute(sides.products[0], "K", 0))
    x = np.random.default_rng(shape[2]).standard_normal(shape).astype(part.dtype)
    found = part.run(x, settings)[0].astype(np.float64)
    expected = expected_result(sides, x[0].astype(np.float32), weights).astype(np.float64)
    if found.shape != expected.shape:
        raise ModelError(f"it makes {list(found.shape)}; {list(expected.shape)} is expected")
    size = np.sqrt((expected**2).mean(axis=0))
    apart = np.sqrt(((found - expected) ** 2).mean(axis=0))
    return float((apart / np.maximum(size, 1e-3 * size.max() + 1e-30)).max())


@dataclass(frozen=True)
class _Part:
    """Both sides by themselves: a model whose inputs are x, and what tells how many tokens there are."""

    model: Model
    sides: TwoSided
    counted: str
    dtype: type[np.generic]

    @classmethod
    def of(cls, folder: Model, sides: TwoSided) -> _Part:
        from onnx import TensorProto
        from onnx.helper import make_tensor_value_info

        inputs = {value.name: value for value in folder.graph.input}
        nodes = [copied(node) for node in between(folder.graph, sides)]
        names = {name for node in nodes for name in node.input}
        taken = [name for name in inputs if name in names]
        if len(taken) != 1 or not any(node.op_type == _MANY for node in nodes):
            raise ModelError(f"its two sides depend on {', '.join(taken) or 'no input'}; the tokens alone are expected")
        half = any(node.op_type == "Cast" for node in nodes)
        model = folder.copy()
        graph = model.graph
        del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
        graph.node.extend(nodes)
        kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        graph.input.extend([make_tensor_value_info(sides.x, kind, [None, None, None]), inputs[taken[0]]])
        graph.output.extend([make_tensor_value_info(sides.result, kind, [None, None, None])])
        stored = [copied(tensor) for tensor in graph.initializer if tensor.name in names]
        del graph.initializer[:]
        graph.initializer.extend(stored)
        return cls(model, sides, taken[0], np.float16 if half else np.float32)

    def run(self, x: Array, settings: Settings) -> Array:
        """The result [B, S, N] of x [B, S, K], and so of a run of S tokens."""
        declared = interface_types(self.model.graph)[self.counted]
        sizes = iter((*x.shape[:2], *([1] * 8)))
        shape = [dim if isinstance(dim, int) else next(sizes) for dim in declared.shape or ()]
        tokens = np.zeros(shape, np.int64 if declared.dtype == "INT64" else self.dtype)
        found, _ = OpenGraph(self.model, settings).run({self.sides.x: x, self.counted: tokens}, {})
        return host(found[self.sides.result])


def expected_result(sides: TwoSided, x: Array, weights: _Weights) -> Array:
    """What the side for many tokens makes of x, float32 [S, K], by the nodes of the other one."""
    values: dict[str, Array] = {}
    for node in sides.few:
        given = [values.get(name, x) for name in node.input[:2]]
        if node.op_type == "MatMulNBits":
            made = [_product(given[0], weights.of(node))]
        elif node.op_type == "Split":
            made = list(np.split(given[0], len(node.output), axis=-1))
        elif node.op_type == "Gelu":
            made = [_gelu(given[0], node)]
        else:
            made = [given[0] * given[1] if node.op_type == "Mul" else given[0]]
        values |= zip(node.output, made, strict=True)
    return values[sides.few[-1].output[0]]


def _product(x: Array, rows: Iterator[tuple[Array, Array]]) -> Array:
    """Each row of x in whole numbers by each of the weights', float32 [S, N]; sums of whole numbers, exactly."""
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30))
    codes = np.rint(x / largest / (1 / _LEVELS)).astype(np.float64)
    found = []
    for whole, step in rows:
        found.append(codes @ whole.T.astype(np.float64) * step.T.astype(np.float64) * (largest / np.float64(_LEVELS)))
    made: Array = np.concatenate(found, axis=1).astype(np.float32)
    return made


def _gelu(x: Array, node: NodeProto) -> Array:
    tanh = any(attribute.name == "approximate" and attribute.s == b"tanh" for attribute in node.attribute)
    inner = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if tanh else _erf(x / math.sqrt(2))
    made: Array = (x * 0.5 * (1 + inner)).astype(np.float32)
    return made


_erf = np.vectorize(math.erf, [float])


class _Weights:
    """The weights of quantised products: those of the same name in the source, or else the folder's own."""

    def __init__(self, folder: Model, source: Model | None) -> None:
        self._models = [source, folder] if source is not None else [folder]
        self._named = [{node.name: node for node in model.graph.node} for model in self._models]
        self._stored = [{tensor.name: tensor for tensor in model.graph.initializer} for model in self._models]
        self._made = [producers(model.graph) for model in self._models]

    def of(self, node: NodeProto) -> Iterator[tuple[Array, Array]]:
        """Whole numbers, float32 [n, K], and the step [n, 1] that they count, of so many channels at a time.

        Where a channel has one scale and no zero points, codes are whole numbers already; others are rounded to 8 bits.
        """
        place = next(place for place, named in enumerate(self._named) if node.name in named)
        node = self._named[place][node.name]
        bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 0)
        depth, count = int_attribute(node, "K", 0), int_attribute(node, "N", 0)
        blocks = -(-depth // block)
        codes = self._read(place, node, _CODES).reshape(count, -1)
        scales = self._read(place, node, _SCALES).reshape(count, -1)
        packed = self._read(place, node, _POINTS).reshape(count, -1) if any(node.input[_POINTS:]) else None
        most = max(1, _AT_A_TIME // depth)
        for some in (slice(first, first + most) for first in range(0, count, most)):
            size = scales[some].astype(np.float32)
            whole = _unpacked(codes[some], bits).reshape(-1, blocks, block)
            if packed is not None:
                whole = whole - _unpacked(packed[some], bits)[:, :blocks, None]
            else:
                whole = whole - np.float32(2 ** (bits - 1))
            if packed is None and size.shape[1] == 1:
                yield whole.reshape(len(whole), -1)[:, :depth], size
                continue
            real = (whole * size[:, :, None]).reshape(len(whole), -1)[:, :depth]
            step = np.abs(real).max(axis=1, keepdims=True) / _LEVELS
            yield np.rint(real / np.where(step > 0, step, 1)), step

    def _read(self, place: int, node: NodeProto, index: int) -> Array:
        """A weight, which may have been made wider, or spread over the blocks of a channel, on the way."""
        from onnx.helper import tensor_dtype_to_np_dtype
        from onnx.numpy_helper import to_array

        name, model = node.input[index], self._models[place]
        while name not in self._stored[place] and (maker := self._made[place].get(name)) is not None:
            if maker.op_type not in _SPREADING:
                break
            name = maker.input[0]
        tensor = self._stored[place].get(name)
        if tensor is None:
            raise ModelError(f"{node_in_words(node)}: {name!r} is no stored weight")
        if not is_external(tensor):
            return to_array(tensor)
        found = reference(tensor, model.weight_files)
        with model.open_data(found.file) as file:
            file.seek(found.offset)
            return np.frombuffer(file.read(found.length), tensor_dtype_to_np_dtype(tensor.data_type))


def _unpacked(packed: Array, bits: int) -> Array:
    """Codes of `bits` bits each, the lowest first, float32 [n, codes of a row]."""
    each = [(packed >> place) & (2**bits - 1) for place in range(0, 8, bits)]
    found: Array = np.stack(each, axis=-1).reshape(len(packed), -1).astype(np.float32)
    return found
