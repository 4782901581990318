"""int8-prefill: quantised products of many tokens at a time multiply whole numbers, those of a few stay as they are."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from passes.base import Finding, Numerics, Pass
from passes.set_accuracy_level import kind_of, quantised_products
from surgery.errors import PassError
from surgery.graph.external_data import WeightReference, byte_size, is_external, reference
from surgery.graph.index import producers
from surgery.graph.int8_weights import ChannelWeights
from surgery.graph.model import Model
from surgery.graph.node_builder import FLOAT, FLOAT16
from surgery.graph.nodes import copied, int_attribute, node_in_words
from surgery.graph.quantised_weights import check_quantised
from surgery.graph.renaming import fresh
from surgery.graph.scopes import all_names
from surgery.graph.tensor_types import initializer_type
from surgery.graph.weight_conversion import Columns, Conversion, NewFiles, SourcePart

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

DATA_FILE = "int8_prefill.onnx_data"

ROUNDED_TWICE = Numerics(
    "lossy",
    {
        "logits": 3.5, "regrouped": 3.5, "caches": 1.5, "mean": 0.75, "kl": 0.35, "cosine": 0.97, "top1": 0.98, "top10": 0.98,
        "exact": 0.9, "first": 0.95, "error": 0.18, "mean_kl": 0.03, "near": 0.5,
    },
)  # fmt: skip
"""Activations in int8 with one scale a token, and weights rounded once more. The relative error is 0.023 to 0.067 in the small
exports with each token in int8, 0.092 in E2B at full size with random weights, where 0.05 is the accuracy level's; mean KL
to 0.016 and 0.0047, worst KL to 0.18 and 0.0085, logits to 1.74. Twice that passes. Twice the error moves logits twice as far,
so a token counts as likely as the source's own up to twice the distance: 2 of 24 positions of E2B had one beyond 0.25
standard deviations, and none of the ten likeliest. A mixture of experts comes to a worst KL of 0.55 and more."""

SIDE = "/int8/"
"""In the names of the nodes of a side in int8."""

_TOKENS = ("input_ids", "inputs_embeds")
"""Inputs [B, S, ...] that say how many tokens a run has."""
_OF_LAYERS = "/layers."
_PARTS = {"layers": "/", "mlp": "/mlp/", "attention": "/attn/"}
_ROUTERS = ("TopK", "MoE", "QMoE")
"""Operators that choose a token's experts."""
_OPSET = 18
"""The first one in which the axes of a ReduceMax are an input."""
_UINT8, _INT8 = 2, 3
"""Of TensorProto.DataType."""
_SCALES, _LAST_INPUT = 2, 3
"""Of a MatMulNBits without an order of groups and without a bias: its scales, its zero points."""


@dataclass(frozen=True)
class Int8Prefill(Pass):
    """Multiply whole numbers where a run has many tokens; a run of a few computes what it did, bit by bit.

        before                                after: n is 0 in a run of `tokens` and more, else all S

        x [B,S,K] -> MatMulNBits -> y         x -> Slice(first n) -> MatMulNBits ------------------+-> Concat -> y
                                              x -> scale = max |x| of the row / 127                 |
                                              x / scale -> QuantizeLinear, uint8, 128 is 0          |
                                                -> Slice(the others) -> MatMulIntegerToFloat -> Mul +
                                                                         int8 [K,N]             by scale

    The MLP of a layer has one Concat, behind down_proj, and gate and up are two products: what lies between is
    computed once on either side, and the scale of up's rows goes into that of down_proj's result.

        x -> gate_up -> Split -> Gelu -> Mul -> down ---------------------------------------+-> Concat -> y
          -> codes, scale -> gate, int8 -> Mul by scale -> Gelu -+-> Mul -> codes -> down,   |
                          -> up, int8 ---------------------------+          int8 -> Mul by --+
                                                                            both scales

    Each token has a scale of its own, so that a row of a batch does not depend on the others. The weights are rounded
    once more, to 8 bits with one scale for each output channel (not at all where they have one already, as in QAT
    exports), K x N bytes beside the codes; they are made when the model is saved. One of the two sides of the Concat is empty. Graphs without branches stay so, and other passes
    and checks see the products: an If takes as long in a step of decoding, and 5% less of a prompt.

    `products` is which: all of the layers, or those of their MLPs or their attention alone. lm_head stays.

    It is for CPUs with VNNI instructions: without them, ONNX Runtime's products of uint8 and int8 may saturate. Goes
    behind all passes that change weights or dtypes.

    Leaves alone: products with an order of groups (g_idx) or a bias. Requires: a MatMulNBits in a layer, no mixture of
    experts, an input input_ids or inputs_embeds, opset 18. Ensures: each product that is meant has a side in int8.
    """

    name: ClassVar[str] = "int8-prefill"
    summary: ClassVar[str] = (
        "long prompts multiply in int8 on the CPU, by weights of 8 bits beside the codes: faster, and larger"
    )
    numerics: ClassVar[Numerics] = ROUNDED_TWICE
    rewrites_weights: ClassVar[bool] = True

    products: Literal["layers", "mlp", "attention"] = "layers"
    tokens: int = 16

    def concerns(self, model: Model) -> list[NodeProto]:
        """The products that are to have a side in int8."""
        return [node for node in quantised_products(model) if self._is_meant(node) and _is_plain(node)]

    def _is_meant(self, node: NodeProto) -> bool:
        return _PARTS[self.products] in node.name and _OF_LAYERS in node.name

    def requires(self, model: Model) -> None:
        if self.tokens < 1:
            raise PassError(f"tokens is {self.tokens}; the fewest that multiply in int8 are 1 and more")
        if not self.concerns(model):
            raise PassError(
                f"{model.path} has no MatMulNBits in a layer, which could multiply in int8",
                hint="take a quantised precision: q4, q4f16 or quantized",
            )
        if routers := [node for node in model.graph.node if node.op_type in _ROUTERS and _OF_LAYERS in node.name]:
            raise PassError(
                f"{model.path} is a mixture of experts ({node_in_words(routers[0])}): with products in int8 a prompt's tokens "
                "go to other experts, which no choice of products kept within the bounds",
                hint="leave out --prefill int8",
            )
        check_quantised(model)
        if strange := [node for node in self.concerns(model) if int_attribute(node, "bits", 4) not in (2, 4, 8)]:
            raise PassError(f"{node_in_words(strange[0])} is not of 2, 4 or 8 bits; int8 weights are made from those")
        weights = _Stored(model.graph)
        for node in self.concerns(model):
            for index in range(1, len(node.input)):
                if node.input[index] and weights.of(node, index) is None:
                    raise PassError(
                        f"{node_in_words(node)}: {node.input[index]!r} is computed by the graph; int8 weights are made from "
                        "stored ones",
                        hint="leave out --prefill int8",
                    )
        if _counted(model) is None:
            raise PassError(f"{model.path} has no input {' or '.join(_TOKENS)}, which says how many tokens a run has")
        if (opset := model.opset()) < _OPSET:
            raise PassError(f"{model.path} is of opset {opset}; {_OPSET} or newer is expected")

    def run(self, model: Model) -> list[Finding]:
        there = {node.name for node in model.graph.node}
        left = [node for node in self.concerns(model) if _side(node) not in there]
        if not left:
            return [Finding("skipped", "MatMulNBits", "each that is meant has a side in int8")]
        files = NewFiles(DATA_FILE, {*model.weight_files, *model.converted_files()})
        work = _Rewriting(model, self.tokens, files)
        work.rewrite({node.name for node in left})
        kinds = ", ".join(sorted({kind_of(node).rsplit("/", 2)[-2] for node in left}))
        size = f"{work.bytes:,} bytes of weights in int8"
        return [
            Finding(
                "changed", f"{len(left)} MatMulNBits", f"int8 in runs of {self.tokens} tokens and more: {kinds}; {size}"
            )
        ]

    def ensures(self, model: Model) -> None:
        there = {node.name for node in model.graph.node}
        for node in self.concerns(model):
            if _side(node) not in there:
                raise PassError(f"{node_in_words(node)} has no side in int8")


def _side(node: NodeProto) -> str:
    """The name of the product in int8 beside a quantised one."""
    return f"{node.name}/int8/MatMulIntegerToFloat"


def _is_plain(node: NodeProto) -> bool:
    return bool(node.name) and not any(node.input[_LAST_INPUT + 1 :])


def _counted(model: Model) -> str | None:
    inputs = {value.name for value in model.graph.input}
    return next((name for name in _TOKENS if name in inputs), None)


@dataclass(frozen=True, slots=True)
class _Half:
    """One of `of` equal parts of a product's output channels."""

    name: str
    index: int
    of: int = 2


_HALVES = _Half("gate", 0), _Half("up", 1)


@dataclass(frozen=True, slots=True)
class _Mlp:
    """gate_up -> Split -> Gelu -> Mul -> down, each read by the next one alone."""

    gate_up: NodeProto
    gelu: NodeProto
    down: NodeProto


def _mlps(graph: GraphProto, names: set[str]) -> list[_Mlp]:
    """The MLPs whose two products are both among `names`."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    outside = {value.name for value in graph.output}

    def next_of(name: str, op: str) -> NodeProto | None:
        found = readers[name]
        return found[0] if len(found) == 1 and found[0].op_type == op and name not in outside else None

    made = []
    for gate_up in graph.node:
        if gate_up.op_type != "MatMulNBits" or gate_up.name not in names:
            continue
        split = next_of(gate_up.output[0], "Split")
        if split is None or not _in_halves(split, int_attribute(gate_up, "N", 0)):
            continue
        gelu = next_of(split.output[0], "Gelu")
        product = next_of(gelu.output[0], "Mul") if gelu is not None else None
        if gelu is None or product is None or product is not next_of(split.output[1], "Mul"):
            continue
        down = next_of(product.output[0], "MatMulNBits")
        if down is not None and down.name in names:
            made.append(_Mlp(gate_up, gelu, down))
    return made


def _in_halves(split: NodeProto, channels: int) -> bool:
    """Whether it cuts the last axis of [B, S, channels] in two equal halves."""
    equal = len(split.input) == 1 or not split.input[1]
    return len(split.output) == 2 and equal and channels % 2 == 0 and int_attribute(split, "axis", 0) in (-1, 2)


class _Stored:
    """The weights of a graph's products. Where it spreads one scale a row over the row's blocks, as QAT exports do, that is
    the weight.

        scales [N] -> Unsqueeze(axes=[1]) -> [N, 1] -> Expand -> [N, blocks] -> MatMulNBits
    """

    def __init__(self, graph: GraphProto) -> None:
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._made = producers(graph)

    def has(self, name: str) -> bool:
        """Whether a name is a weight itself."""
        return name in self._stored

    def of(self, node: NodeProto, index: int) -> TensorProto | None:
        """The weight that is an input of a product; None where the graph computes it."""
        name = node.input[index]
        return self._stored.get(name) or (self._spread(name, int_attribute(node, "N", 0)) if index == _SCALES else None)

    def _spread(self, name: str, rows: int) -> TensorProto | None:
        from onnx.numpy_helper import to_array

        expand = self._made.get(name)
        if expand is None or expand.op_type != "Expand":
            return None
        if (column := self._stored.get(expand.input[0])) is not None:
            return column if list(column.dims) == [rows, 1] else None
        unsqueeze = self._made.get(expand.input[0])
        if unsqueeze is None or unsqueeze.op_type != "Unsqueeze":
            return None
        scales, axes = (self._stored.get(each) for each in unsqueeze.input)
        if scales is None or axes is None or list(scales.dims) != [rows] or is_external(axes):
            return None
        return scales if to_array(axes).tolist() in ([1], [-1]) else None


@dataclass
class _Rewriting:
    """The nodes of a graph as they are written anew, with what they share."""

    model: Model
    tokens: int
    files: NewFiles
    bytes: int = 0
    _nodes: list[NodeProto] = field(default_factory=list)
    _quantised: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    _weights: dict[tuple[str, ...], tuple[str, str]] = field(default_factory=dict)
    _constants: dict[str, str] = field(default_factory=dict)
    _last: str = ""

    def __post_init__(self) -> None:
        self._stored = _Stored(self.model.graph)
        self._taken = all_names(self.model.graph)

    def rewrite(self, names: set[str]) -> None:
        graph = self.model.graph
        length = self._node("Shape", [str(_counted(self.model))], "int8_prefill/tokens", start=1, end=2)
        self._few = self._node("Less", [length, self._number("tokens", [self.tokens])], "int8_prefill/few")
        self._first = self._node("Where", [self._few, length, self._number("zero", [0])], "int8_prefill/first")
        mlps = {mlp.down.name: mlp for mlp in _mlps(graph, names)}
        inside = {mlp.gate_up.name for mlp in mlps.values()}
        for node in [copied(node) for node in graph.node]:
            if node.op_type != "MatMulNBits" or node.name not in names:
                self._nodes.append(node)
            elif node.name in mlps:
                self._mlp(mlps[node.name], node)
            elif node.name in inside:
                node.input[0] = self._rows(node.input[0], self._is_half(node))[0]
                self._nodes.append(node)
            else:
                self._product(node)
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _product(self, node: NodeProto) -> None:
        few, rows, scales = self._rows(node.input[0], self._is_half(node))
        node.input[0] = few
        self._join(node, self._whole_numbers(rows, self._in_int8(node), _side(node)), scales)

    def _mlp(self, mlp: _Mlp, down: NodeProto) -> None:
        """The side in int8 from x to the result of down_proj, whose own input has a few tokens alone already."""
        from onnx.helper import get_attribute_value

        _, rows, scales = self._rows(mlp.gate_up.input[0], self._is_half(mlp.gate_up))
        scope, weights = f"{mlp.gate_up.name}/int8", [self._in_int8(mlp.gate_up, half) for half in _HALVES]
        gate = self._whole_numbers(rows, weights[0], _side(mlp.gate_up))
        up = self._whole_numbers(rows, weights[1], f"{scope}/up/MatMulIntegerToFloat")
        real = self._node("Mul", [gate, scales], f"{scope}/Mul")
        options = {attribute.name: get_attribute_value(attribute) for attribute in mlp.gelu.attribute}
        active = self._node("Gelu", [real], f"{scope}/Gelu", domain=mlp.gelu.domain, **options)
        product = self._node("Mul", [active, up], f"{scope}/up/Mul")
        codes, inner = self._codes(product, f"{down.name}/int8/x")
        both = self._node("Mul", [inner, scales], f"{down.name}/int8/scales/Mul")
        self._join(down, self._whole_numbers(codes, self._in_int8(down), _side(down)), both)

    def _join(self, node: NodeProto, whole: str, scales: str) -> None:
        """The node, of a few tokens, and the others' rows behind its own."""
        scope, result = f"{node.name}/int8", node.output[0]
        node.output[0] = exact = fresh(f"{node.name}/few/output_0", self._taken)
        self._nodes.append(node)
        many = self._node("Mul", [whole, scales], f"{scope}/Mul")
        if self._is_half(node):
            many = self._node("Cast", [many], f"{scope}/Cast", to=FLOAT16)
        self._node("Concat", [exact, many], f"{scope}/Concat", [result], axis=1)

    def _whole_numbers(self, rows: str, weights: tuple[str, str], name: str) -> str:
        """The product of codes and weights, without the scales of the rows."""
        values, channel = weights
        step, middle = self._number("step", 1 / 127, "float32"), self._number("middle", 128, "uint8")
        inputs = [rows, values, step, channel, middle]
        return self._node("MatMulIntegerToFloat", inputs, name, domain="com.microsoft")

    def _codes(self, x: str, scope: str) -> tuple[str, str]:
        """Rows of float32 x in uint8, and the largest number of each [B, rows, 1]; where there is no row, too."""
        if not self._last:  # of no rows ONNX Runtime's ReduceMax makes x's shape, and warns if it expects another
            self._last = self._node("Where", [self._few, self._number("last", [-1]), self._number("third", [2])],
                                    "int8_prefill/last")  # fmt: skip
        size = self._node("Abs", [x], f"{scope}/Abs")
        widest = self._node("ReduceMax", [size, self._last], f"{scope}/ReduceMax", keepdims=1)
        first = [self._number("zero", [0]), self._number("one", [1]), self._number("last", [-1])]
        largest = self._node("Slice", [widest, *first], f"{scope}/Slice")
        return self._rounded(x, largest, scope)

    def _rounded(self, x: str, largest: str, scope: str) -> tuple[str, str]:
        """x in uint8, 128 is 0, and the largest number of each row, which is never 0."""
        largest = self._node("Max", [largest, self._number("least", 1e-30, "float32")], f"{scope}/Max")
        part = self._node("Div", [x, largest], f"{scope}/Div")
        step, middle = self._number("step", 1 / 127, "float32"), self._number("middle", 128, "uint8")
        return self._node("QuantizeLinear", [part, step, middle], f"{scope}/QuantizeLinear"), largest

    def _rows(self, x: str, half: bool) -> tuple[str, str, str]:
        """The rows of x that stay, the others in uint8, and the largest number of each of these [B, rows, 1]; once for all
        products that read x."""
        if x in self._quantised:
            return self._quantised[x]
        scope = f"{x}/int8"
        first, end, axis = self._first, self._number("end", [2**31]), self._number("axis", [1])
        few = self._node("Slice", [x, self._number("zero", [0]), first, axis], f"{scope}/few")
        real = self._node("Cast", [x], f"{scope}/Cast", to=FLOAT) if half else x
        size = self._node("Abs", [real], f"{scope}/Abs")
        # of all rows, also of those that stay: ONNX Runtime gives the largest of no rows another shape
        largest = self._node("ReduceMax", [size, self._number("last", [-1])], f"{scope}/ReduceMax", keepdims=1)
        codes, largest = self._rounded(real, largest, scope)
        rows = self._node("Slice", [codes, first, end, axis], f"{scope}/rows")
        scales = self._node("Slice", [largest, first, end, axis], f"{scope}/scales")
        self._quantised[x] = few, rows, scales
        return self._quantised[x]

    def _is_half(self, node: NodeProto) -> bool:
        return self._stored_tensor(node, _SCALES).data_type == FLOAT16

    def _stored_tensor(self, node: NodeProto, index: int) -> TensorProto:
        """The weight that is a product's input. Raises PassError where it is of another dtype."""
        tensor = self._stored.of(node, index)
        assert tensor is not None  # `requires` saw it
        name = tensor.name
        if tensor.data_type not in ((FLOAT, FLOAT16) if index == _SCALES else (_UINT8,)):
            expected = "float32 or float16" if index == _SCALES else "uint8"
            raise PassError(f"{node_in_words(node)}: {name!r} is {initializer_type(tensor)}; {expected} is expected")
        return tensor

    def _in_int8(self, node: NodeProto, half: _Half | None = None) -> tuple[str, str]:
        """The names of a product's weights in int8 and of their scales, of all channels or of half of them; one pair for
        products of the same codes."""
        given = *node.input[1:], half.name if half else ""
        if given not in self._weights:
            base = f"{given[0]}.{half.name}" if half else given[0]
            values, scales = (fresh(f"{base}.{what}", self._taken) for what in ("int8", "int8_scales"))
            self._store(node, values, scales, half or _Half("", 0, 1))
            self._weights[given] = values, scales
        return self._weights[given]

    def _store(self, node: NodeProto, values: str, scales: str, taken: _Half) -> None:
        from onnx import TensorProto
        from onnx.numpy_helper import to_array

        bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 0)
        depth, count = int_attribute(node, "K", 0), int_attribute(node, "N", 0)
        blocks, half = -(-depth // block), self._is_half(node)
        scales_a_row = blocks if self._stored.has(node.input[_SCALES]) else 1
        widths = blocks * block * bits // 8, scales_a_row * (2 if half else 4), -(-blocks * bits // 8)
        inline: list[bytes | None] = [b"", b"", b""]
        parts: list[SourcePart] = []
        for place, index in enumerate(index for index in range(1, len(node.input)) if node.input[index]):
            tensor = self._stored_tensor(node, index)
            found = initializer_type(tensor)
            if byte_size(found.dtype, tensor.dims) != count * widths[place]:
                raise PassError(
                    f"{node_in_words(node)}: {tensor.name!r} is {found}; {count * widths[place]} bytes are expected"
                )
            if is_external(tensor):
                inline[place] = None
                parts.append(SourcePart(self._source(node, tensor), Columns(widths[place], 0, widths[place], 8)))
            else:
                inline[place] = to_array(tensor).tobytes()
        count //= taken.of
        stored = ChannelWeights(
            depth, block, bits, half, "values", taken.index, taken.of, (inline[0], inline[1], inline[2])
        )
        made = (
            (TensorProto(name=values, data_type=_INT8, dims=[depth, count]), stored),
            (TensorProto(name=scales, data_type=FLOAT, dims=[count]), replace(stored, result="scales")),
        )
        if parts:
            made_from = [(tensor, Conversion(tuple(parts), channels=channels)) for tensor, channels in made]
            self.files.add(self.model.converted, made_from)
        else:
            for tensor, channels in made:
                tensor.raw_data = channels.made(()).tobytes()
        self.model.graph.initializer.extend(tensor for tensor, _ in made)
        self.bytes += depth * count

    def _source(self, node: NodeProto, tensor: TensorProto) -> WeightReference:
        made = self.model.conversion(tensor)
        if made is None:
            return reference(tensor, self.model.weight_files)
        if made.unchanged is None:
            raise PassError(
                f"{node_in_words(node)}: {tensor.name!r} is changed by a pass before; int8 weights are made from stored ones",
                hint="save the model first; or leave out to-fp16, and take the precision q4f16",
            )
        return made.unchanged

    def _number(self, label: str, values: Any, dtype: str = "int64") -> str:
        """The name of a small constant."""
        import numpy as np
        from onnx.numpy_helper import from_array

        if label not in self._constants:
            self._constants[label] = fresh(f"int8_prefill/{label}", self._taken)
            self.model.graph.initializer.append(from_array(np.array(values, dtype), self._constants[label]))
        return self._constants[label]

    def _node(self, op: str, inputs: list[str], name: str, outputs: list[str] | None = None, **attributes: Any) -> str:
        """A node at the end of those written so far. Returns the name of its result."""
        from onnx.helper import make_node

        made = outputs or [fresh(f"{name}/output_0", self._taken)]
        self._nodes.append(make_node(op, inputs, made, name, **attributes))
        return made[0]
