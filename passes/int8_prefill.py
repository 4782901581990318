"""int8-prefill: quantised products of many tokens at a time multiply whole numbers, those of a few stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from passes.base import Finding, Numerics, Pass
from passes.set_accuracy_level import INT8, kind_of, quantised_products
from surgery.errors import PassError
from surgery.graph.external_data import WeightReference, byte_size, is_external, reference
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
    from onnx import NodeProto, TensorProto

DATA_FILE = "int8_prefill.onnx_data"

_TOKENS = ("input_ids", "inputs_embeds")
"""Inputs [B, S, ...] that say how many tokens a run has."""
_OF_LAYERS = "/layers."
_SMALL = ("/per_layer/", "/per_layer_input_gate/", "/per_layer_projection/")
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

    Each token has a scale of its own, so that a row of a batch does not depend on the others. The weights are rounded
    once more, to 8 bits with one scale for each output channel, K x N bytes beside the codes; they are made when the
    model is saved. One of the two sides of the Concat is empty. Graphs without branches stay so, and other passes
    and checks see the products: an If takes as long in a step of decoding, and 5% less of a prompt.

    `products` is which: those of the layers' MLPs, or all of the layers but those of per-layer inputs. lm_head stays.

    It is for CPUs with VNNI instructions: without them, ONNX Runtime's products of uint8 and int8 may saturate. Goes
    behind all passes that change weights or dtypes.

    Leaves alone: products with an order of groups (g_idx) or a bias. Requires: a MatMulNBits in a layer, an input
    input_ids or inputs_embeds, opset 18. Ensures: each product that is meant has a side in int8.
    """

    name: ClassVar[str] = "int8-prefill"
    summary: ClassVar[str] = (
        "long prompts multiply in int8 on the CPU, by weights of 8 bits beside the codes: faster, and larger"
    )
    numerics: ClassVar[Numerics] = INT8
    rewrites_weights: ClassVar[bool] = True

    products: Literal["layers", "mlp"] = "layers"
    tokens: int = 16

    def concerns(self, model: Model) -> list[NodeProto]:
        """The products that are to have a side in int8."""
        return [node for node in quantised_products(model) if self._is_meant(node) and _is_plain(node)]

    def _is_meant(self, node: NodeProto) -> bool:
        if self.products == "mlp":
            return "/mlp/" in node.name
        return _OF_LAYERS in node.name and not any(part in node.name for part in _SMALL)

    def requires(self, model: Model) -> None:
        if self.tokens < 1:
            raise PassError(f"tokens is {self.tokens}; the fewest that multiply in int8 are 1 and more")
        if not self.concerns(model):
            raise PassError(
                f"{model.path} has no MatMulNBits in a layer, which could multiply in int8",
                hint="take a quantised precision: q4, q4f16 or quantized",
            )
        check_quantised(model)
        if strange := [node for node in self.concerns(model) if int_attribute(node, "bits", 4) not in (2, 4, 8)]:
            raise PassError(f"{node_in_words(strange[0])} is not of 2, 4 or 8 bits; int8 weights are made from those")
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

    def __post_init__(self) -> None:
        self._stored = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._taken = all_names(self.model.graph)

    def rewrite(self, names: set[str]) -> None:
        graph = self.model.graph
        length = self._node("Shape", [str(_counted(self.model))], "int8_prefill/tokens", start=1, end=2)
        few = self._node("Less", [length, self._number("tokens", [self.tokens])], "int8_prefill/few")
        self._first = self._node("Where", [few, length, self._number("zero", [0])], "int8_prefill/first")
        for node in [copied(node) for node in graph.node]:
            if node.name in names and node.op_type == "MatMulNBits":
                self._product(node)
            else:
                self._nodes.append(node)
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _product(self, node: NodeProto) -> None:
        scope, result, half = f"{node.name}/int8", node.output[0], self._is_half(node)
        few, rows, scales = self._rows(node.input[0], half)
        values, channel = self._in_int8(node)
        one, middle = self._number("one", 1, "float32"), self._number("middle", 128, "uint8")
        exact = fresh(f"{node.name}/few/output_0", self._taken)
        node.input[0], node.output[0] = few, exact
        self._nodes.append(node)
        whole = self._node("MatMulIntegerToFloat", [rows, values, one, channel, middle], f"{scope}/MatMulIntegerToFloat",
                           domain="com.microsoft")  # fmt: skip
        many = self._node("Mul", [whole, scales], f"{scope}/Mul")
        if half:
            many = self._node("Cast", [many], f"{scope}/Cast", to=FLOAT16)
        self._node("Concat", [exact, many], f"{scope}/Concat", [result], axis=1)

    def _rows(self, x: str, half: bool) -> tuple[str, str, str]:
        """The rows of x that stay, the others in uint8, and their scales [B, S, 1]; once for all products that read x."""
        if x in self._quantised:
            return self._quantised[x]
        scope = f"{x}/int8"
        first, end, axis = self._first, self._number("end", [2**31]), self._number("axis", [1])
        few = self._node("Slice", [x, self._number("zero", [0]), first, axis], f"{scope}/few")
        real = self._node("Cast", [x], f"{scope}/Cast", to=FLOAT) if half else x
        size = self._node("Abs", [real], f"{scope}/Abs")
        # of all rows, also of those that stay: ONNX Runtime gives the largest of no rows another shape
        largest = self._node("ReduceMax", [size, self._number("last", [-1])], f"{scope}/ReduceMax", keepdims=1)
        part = self._node("Mul", [largest, self._number("step", 1 / 127, "float32")], f"{scope}/Mul")
        scale = self._node("Max", [part, self._number("least", 1e-30, "float32")], f"{scope}/Max")
        whole = self._node("Div", [real, scale], f"{scope}/Div")
        one, middle = self._number("one", 1, "float32"), self._number("middle", 128, "uint8")
        codes = self._node("QuantizeLinear", [whole, one, middle], f"{scope}/QuantizeLinear")
        rows = self._node("Slice", [codes, first, end, axis], f"{scope}/rows")
        scales = self._node("Slice", [scale, first, end, axis], f"{scope}/scales")
        self._quantised[x] = few, rows, scales
        return self._quantised[x]

    def _is_half(self, node: NodeProto) -> bool:
        return self._stored_tensor(node, _SCALES).data_type == FLOAT16

    def _stored_tensor(self, node: NodeProto, index: int) -> TensorProto:
        """The weight that is a product's input. Raises PassError where it is computed, or of another dtype."""
        name = node.input[index]
        if name not in self._stored:
            raise PassError(
                f"{node_in_words(node)}: {name!r} is no stored weight; int8 weights are made from stored ones"
            )
        tensor: TensorProto = self._stored[name]
        if tensor.data_type not in ((FLOAT, FLOAT16) if index == _SCALES else (_UINT8,)):
            expected = "float32 or float16" if index == _SCALES else "uint8"
            raise PassError(f"{node_in_words(node)}: {name!r} is {initializer_type(tensor)}; {expected} is expected")
        return tensor

    def _in_int8(self, node: NodeProto) -> tuple[str, str]:
        """The names of a product's weights in int8 and of their scales; one pair for products of the same codes."""
        given = tuple(node.input[1:])
        if given not in self._weights:
            values, scales = (fresh(f"{given[0]}.{what}", self._taken) for what in ("int8", "int8_scales"))
            self._store(node, values, scales)
            self._weights[given] = values, scales
        return self._weights[given]

    def _store(self, node: NodeProto, values: str, scales: str) -> None:
        from onnx import TensorProto
        from onnx.numpy_helper import to_array

        bits, block = int_attribute(node, "bits", 4), int_attribute(node, "block_size", 0)
        depth, count = int_attribute(node, "K", 0), int_attribute(node, "N", 0)
        blocks, half = -(-depth // block), self._is_half(node)
        widths = blocks * block * bits // 8, blocks * (2 if half else 4), -(-blocks * bits // 8)
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
        stored = ChannelWeights(depth, block, bits, half, "values", (inline[0], inline[1], inline[2]))
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
