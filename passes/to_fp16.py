"""to-fp16: activations, caches and weights of a float32 graph become float16, so that it runs on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from passes.base import LOSSY, Finding, Numerics, Pass
from surgery.attention.kv_wiring import slot_of_name
from surgery.errors import PassError
from surgery.graph.external_data import is_external, reference
from surgery.graph.index import readers
from surgery.graph.model import Model
from surgery.graph.node_builder import FLOAT, FLOAT16
from surgery.graph.nodes import copied, int_attribute, node_in_words
from surgery.graph.renaming import fresh
from surgery.graph.scopes import all_names, subgraphs
from surgery.graph.tensor_types import tensor_type
from surgery.graph.weight_conversion import HALF_MAX, NewFile, compacted, halved, moved

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

DATA_FILE = "float16.onnx_data"

Norms = Literal["float32", "float16"]
Overflow = Literal["refuse", "clip"]

_NORMS = {
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}  # fmt: skip

_TYPED_BY = {
    **dict.fromkeys(
        (
            "Add", "Sub", "Mul", "Div", "Neg", "Tanh", "Sigmoid", "Softmax", "Gelu", "FastGelu", "QuickGelu", "Min",
            "Max", "Clip", "MatMul", "FusedMatMul", "MatMulNBits", "Gemm", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten",
            "Concat", "Split", "Slice", "Pad", "Expand", "Identity", "Tile", "Trilu", "Gather", "GatherND",
            "GatherElements", "ScatterND", "RotaryEmbedding", "GroupQueryAttention", "MultiHeadAttention", "Attention",
            *_NORMS,
        ),
        0,
    ),
    "Where": 1,
    "GatherBlockQuantized": 2,
}  # fmt: skip
"""Operator -> the input whose dtype its outputs have. Each has float16 kernels on CUDA, and runs on the CPU
provider."""

_ANY_DTYPE = {"Cast", "Shape", "Size"}
"""Operators that read float32 and float16 alike: what they read needs no Cast."""

_UNTYPED = {"Shape", "Size", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "ArgMax", "IsNaN", "NonZero"}
"""Operators that may read floats, and whose outputs are none."""


@dataclass(frozen=True)
class ToFp16(Pass):
    """Compute in float16 instead of float32: a q4, quantized or fp32 graph becomes what q4f16 and fp16 are.

        before                                           after

        inputs_embeds f32 -> [layers] -> logits f32      inputs_embeds f32 -> Cast -> [layers] -> logits f16
        past_key_values.N f32 -^     -> present.N f32    past_key_values.N f16 --------^      -> present.N f16
        weight, scales f32 ----^                         weight, scales f16 -------------^

        x -> SimplifiedLayerNormalization -> y           x -> Cast -> SimplifiedLayerNormalization f32 -> Cast -> y

    On CUDA, GroupQueryAttention takes float16 alone. Caches and logits change their dtype in the interface; every other
    input and output keeps it, behind a Cast. Logits are known by their name, caches by their spelling and rank.
    Whether embed_tokens is in the graph makes no difference.

    Weights: float32 tensors are declared float16, with their bytes still in the source. `Model.save` rounds them
    portion by portion into one new data file; this pass reads none of them. Integer codes and zero points
    stay where they are. Two tensors that share bytes go on sharing them.

    norms=float32 (default) leaves each norm and its weight in float32 between casts, as the exporter's own float16
    graphs of Gemma 3 have it: a hidden state of 300 has a square that float16 does not hold. norms=float16 trusts
    the runtime's kernels to accumulate in float32. overflow=refuse (default) fails, when the weights are written, with
    the name and the value of a weight beyond 65504; overflow=clip keeps it at 65504. A single number far
    below zero is a mask, -3.4e38 in float32, and becomes -65504 in either case.

    The numbers change: this pass is not bit-exact. A residual stream beyond 65504 overflows whatever the norms do.

    Requires: operators that have float16 kernels on CUDA, no control flow. Ensures: no operator but
    the norms reads or gives float32.
    """

    name: ClassVar[str] = "to-fp16"
    summary: ClassVar[str] = "activations, caches and float weights in float16, which CUDA's attention needs"
    numerics: ClassVar[Numerics] = LOSSY
    rewrites_weights: ClassVar[bool] = True

    norms: Norms = "float32"
    overflow: Overflow = "refuse"

    def requires(self, model: Model) -> None:
        _Floats(model.graph, self.norms)

    def run(self, model: Model) -> list[Finding]:
        floats = _Floats(model.graph, self.norms)
        if not floats.becoming:
            return [Finding("skipped", "activations", "none is float32, but for those around norms")]
        findings = _convert_weights(model, floats, clip=self.overflow == "clip")
        edit = _Edit(model.graph, floats)
        edit.write()
        findings += [Finding("changed", name, "float32 is now float16") for name in edit.interface]
        findings.append(Finding("changed", f"{edit.changed} values", "computed in float16 now"))
        if edit.casts:
            findings.append(Finding("added", f"{edit.casts} Cast nodes", "between float16 and what stays float32"))
        return findings

    def ensures(self, model: Model) -> None:
        floats = _Floats(model.graph, self.norms)
        if floats.becoming:
            raise PassError(f"{min(floats.becoming)!r} is still float32")
        for node in model.graph.node:
            if node.op_type not in _ANY_DTYPE and not floats.is_kept(node):
                for name in node.input:
                    if name in floats.all:
                        raise PassError(f"{node_in_words(node)} reads {name!r}, which is float32")


class _Floats:
    """Which values of a graph are float32 (`all`), and which of them are to become float16 (`becoming`).

    The dtypes are followed from inputs and initializers through the nodes: value_info does not know all of them.
    Raises PassError for an operator whose dtypes are not known.
    """

    def __init__(self, graph: GraphProto, norms: Norms) -> None:
        self._kept_operators = _NORMS if norms == "float32" else set()
        self._readers = readers(graph)
        self.all = {value.name for value in graph.input if _is_float(value)}
        self.all.update(tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT)
        for node in graph.node:
            self.all.update(self._given(node))
        halved_outputs = {value.name for value in graph.output if _is_halved(value)}
        self._float_outputs = {value.name for value in graph.output if _is_float(value)} - halved_outputs
        staying = set(self._staying(graph))
        if trapped := self._kept(graph) & halved_outputs:
            raise PassError(f"{min(trapped)!r} should be float16, but an operator that stays in float32 gives it")
        self.becoming = self.all - (staying - halved_outputs) - self._kept(graph)

    def _staying(self, graph: GraphProto) -> Iterator[str]:
        """Inputs that are no caches, and what is there for operators that stay: their weights, and casts before
        them."""
        yield from (value.name for value in graph.input if value.name in self.all and not _is_halved(value))
        yield from (tensor.name for tensor in graph.initializer if self._is_for_kept(tensor.name, set()))
        for node in graph.node:
            used = node.output[0] in self._readers or node.output[0] in self._float_outputs
            if node.op_type == "Cast" and used and self._is_for_kept(node.output[0], _ANY_DTYPE):
                yield node.output[0]

    def _is_for_kept(self, name: str, others: set[str]) -> bool:
        """Whether every reader of a float32 value stays in float32, or takes either dtype."""
        reading = self._readers.get(name, [])
        return name in self.all and all(self.is_kept(node) or node.op_type in others for node in reading)

    def _kept(self, graph: GraphProto) -> set[str]:
        """What the operators that stay in float32 give."""
        return {name for node in graph.node if self.is_kept(node) for name in node.output if name in self.all}

    def is_kept(self, node: NodeProto) -> bool:
        return node.op_type in self._kept_operators

    def _given(self, node: NodeProto) -> list[str]:
        """The float32 outputs of a node."""
        if any(True for _ in subgraphs(node)):
            raise PassError(f"{node_in_words(node)} has a subgraph; graphs without control flow are converted")
        outputs = [name for name in node.output if name]
        if node.op_type == "Cast":
            return outputs if int_attribute(node, "to", 0) == FLOAT else []
        if node.op_type in ("Constant", "ConstantOfShape"):
            return outputs if _constant_type(node) == FLOAT else []
        if node.op_type in _UNTYPED or not self.all.intersection(node.input):
            return []
        position = _TYPED_BY.get(node.op_type)
        if position is None:
            raise PassError(
                f"{node_in_words(node)} reads float32 values, and is not among the operators that to-fp16 knows to have "
                "float16 kernels"
            )
        return outputs if position < len(node.input) and node.input[position] in self.all else []


def _is_float(value: ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == FLOAT


def _is_halved(value: ValueInfoProto) -> bool:
    """Caches and logits become float16 in the interface."""
    declared = tensor_type(value)
    rank = len(declared.shape) if declared is not None and declared.shape is not None else 0
    return _is_float(value) and (value.name == "logits" or (rank == 4 and slot_of_name(value.name) is not None))


def _constant_type(node: NodeProto) -> int:
    for attribute in node.attribute:
        if attribute.name == "value":
            if is_external(attribute.t):
                raise PassError(f"{node_in_words(node)} has its number in a data file; an initializer is expected")
            return int(attribute.t.data_type)
        if attribute.name in ("value_float", "value_floats"):
            raise PassError(f"{node_in_words(node)} holds its number in {attribute.name}; an initializer is expected")
    return FLOAT if node.op_type == "ConstantOfShape" else 0


def _convert_weights(model: Model, floats: _Floats, *, clip: bool) -> list[Finding]:
    """Declare float32 initializers float16. External ones are laid out in a data file that is written on saving."""
    taken = {*model.weight_files, *(model.converted_files())}
    file = NewFile(fresh(DATA_FILE, taken))
    inline = external = 0
    for tensor in model.graph.initializer:
        if tensor.name not in floats.becoming:
            continue
        if not is_external(tensor):
            _halve(tensor, clip=clip)
            inline += 1
            continue
        made = model.conversion(tensor) or moved(reference(tensor, model.weight_files))
        tensor.data_type = FLOAT16
        file.add(model.converted, tensor, made.rounded(clip=clip))
        external += 1
    findings = []
    if external:
        compacted(model.proto, model.converted)
        reason = f"float32 in the source, to be written as float16 into a data file of its own, {file.end:,} bytes"
        findings.append(Finding("changed", f"{external} weights", reason))
    if inline:
        findings.append(Finding("changed", f"{inline} constants", "float32 is now float16"))
    return findings


def _halve(tensor: TensorProto, *, clip: bool) -> None:
    """An inline tensor; one number far below zero is a mask, and becomes the lowest that float16 has."""
    import numpy as np
    from onnx.numpy_helper import from_array, to_array

    values = to_array(tensor)
    if values.size == 1 and values.flat[0] < -HALF_MAX:
        values = np.full(values.shape, -HALF_MAX, np.float32)
    tensor.CopyFrom(from_array(halved(values, tensor.name, clip=clip), tensor.name))


@dataclass
class _Edit:
    """The edit of the nodes and declarations; weights are declared already."""

    graph: GraphProto
    floats: _Floats
    interface: list[str] = field(default_factory=list)
    changed: int = 0
    casts: int = 0
    _other: dict[tuple[str, int], str] = field(default_factory=dict)
    _new_values: list[ValueInfoProto] = field(default_factory=list)

    def write(self) -> None:
        self._taken = all_names(self.graph)
        self._declared = {v.name: v for v in (*self.graph.value_info, *self.graph.input, *self.graph.output)}
        self._float_outputs = {
            value.name for value in self.graph.output if value.name in self.floats.becoming and not _is_halved(value)
        }
        held = [copied(node) for node in self._nodes()]
        del self.graph.node[:]
        self.graph.node.extend(held)
        self._declare()

    def _nodes(self) -> Iterator[NodeProto]:
        """The nodes in their order, each Cast right before its first reader or right behind what it casts."""
        for node in self.graph.node:
            if node.op_type not in _ANY_DTYPE:
                yield from self._cast_inputs(node, FLOAT if self.floats.is_kept(node) else FLOAT16)
            self._retype(node)
            yield from self._with_float_outputs(node)

    def _cast_inputs(self, node: NodeProto, wanted: int) -> Iterator[NodeProto]:
        for index, name in enumerate(node.input):
            if name in self.floats.all and self._dtype(name) != wanted:
                if (name, wanted) not in self._other:
                    yield self._cast(name, self._fresh(name, wanted), wanted)
                node.input[index] = self._other[name, wanted]

    def _with_float_outputs(self, node: NodeProto) -> Iterator[NodeProto]:
        """A graph output that stays float32 is cast back from an inner value."""
        outputs = {index: name for index, name in enumerate(node.output) if name in self._float_outputs}
        for index, name in outputs.items():
            node.output[index] = self._fresh(name, FLOAT16)
        yield node
        for name in outputs.values():
            yield self._cast(self._other[name, FLOAT16], name, FLOAT)

    def _dtype(self, name: str) -> int:
        return FLOAT16 if name in self.floats.becoming and name not in self._float_outputs else FLOAT

    def _fresh(self, name: str, dtype: int) -> str:
        """A second name of a value, in the other dtype."""
        twin = fresh(f"{name}/{'float16' if dtype == FLOAT16 else 'float32'}", self._taken)
        self._other[name, dtype] = twin
        if name in self._declared:
            value = copied(self._declared[name])
            value.name = twin
            value.type.tensor_type.elem_type = dtype
            self._new_values.append(value)
        return twin

    def _cast(self, source: str, target: str, dtype: int) -> NodeProto:
        from onnx.helper import make_node

        self.casts += 1
        return make_node("Cast", [source], [target], name=f"{target}/Cast", to=dtype)

    def _retype(self, node: NodeProto) -> None:
        """What a node says of its output's dtype in an attribute."""
        from onnx.helper import make_tensor

        if not self.floats.becoming.intersection(node.output):
            return
        self.changed += len(self.floats.becoming.intersection(node.output))
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = FLOAT16
            if node.op_type in ("Constant", "ConstantOfShape") and attribute.name == "value":
                _halve(attribute.t, clip=False)
        if node.op_type == "ConstantOfShape" and not node.attribute:
            node.attribute.add(name="value", type=4, t=make_tensor("value", FLOAT16, [1], [0.0]))

    def _declare(self) -> None:
        for value in (*self.graph.value_info, *self.graph.input, *self.graph.output):
            if value.name in self.floats.becoming and value.name not in self._float_outputs:
                value.type.tensor_type.elem_type = FLOAT16
        for value in (*self.graph.input, *self.graph.output):
            if value.name in self.floats.becoming and value.name not in self._float_outputs:
                self.interface.append(value.name)
        self.graph.value_info.extend(self._new_values)
