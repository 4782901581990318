"""The check of a graph before a pass looks for a meaning in it: values are defined, and operators have what they take."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import ModelError
from surgery.graph.definitions import check_definitions
from surgery.graph.external_data import BITS, byte_size, is_external, tensors
from surgery.graph.model import Model
from surgery.graph.nodes import node_in_words
from surgery.graph.scopes import graphs
from surgery.graph.tensor_types import initializer_type, tensor_type

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

_OF_RUNTIMES = {
    ("", "SimplifiedLayerNormalization"): (0, 1),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (0, 1, 2),
    ("com.microsoft", "GroupQueryAttention"): (0, 5, 6),
    ("com.microsoft", "MultiHeadAttention"): (0,),
    ("com.microsoft", "RotaryEmbedding"): (0, 1, 2, 3),
    ("com.microsoft", "MatMulNBits"): (0, 1, 2),
    ("com.microsoft", "GatherBlockQuantized"): (0, 1, 2),
}
"""Operators that ONNX has no schema of -> the inputs that ONNX Runtime 1.31.1 requires, by place."""

_ANY = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Form:
    """What a node of one operator must have: how many operands, which of them by place, and attributes by type."""

    inputs: tuple[int, int] = (0, _ANY)
    outputs: tuple[int, int] = (1, _ANY)
    required_inputs: Collection[int] = ()
    required_outputs: Collection[int] = ()
    attributes: Mapping[str, int] | None = None
    required_attributes: Collection[str] = ()


def check_graph(model: Model) -> None:
    """Raise ModelError with the file of a graph whose values, nodes or inline tensors are not what ONNX asks for."""
    try:
        check_definitions(model.proto)
        check_operands(model.proto)
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            _check_declared(value)
        for tensor in tensors(model.proto):
            _check_held(tensor)
    except ModelError as error:
        raise ModelError(f"{model.path} holds a broken graph: {error}", hint=error.hint) from error


def check_operands(proto: ModelProto) -> None:
    """Raise ModelError for a node, in bodies too, that lacks an operand or an attribute that its operator requires, has
    more operands than it takes, an attribute of another type, or one attribute twice.

    Of operators that nothing here knows, nodes must have an output.
    """
    versions = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in proto.opset_import}
    local = {(function.domain, function.name) for function in proto.functions}
    forms: dict[tuple[str, str], _Form] = {}
    for graph in graphs(proto.graph):
        for node in graph.node:
            domain = "" if node.domain == "ai.onnx" else node.domain
            operator = domain, node.op_type
            if operator not in forms:
                known = operator not in local
                forms[operator] = _form(domain, node.op_type, versions.get(domain, 0)) if known else _Form()
            _check_node(node, forms[operator])


def _form(domain: str, name: str, version: int) -> _Form:
    from onnx import defs

    if (places := _OF_RUNTIMES.get((domain, name))) is not None:
        return _Form(inputs=(max(places) + 1, _ANY), required_inputs=places, required_outputs=(0,))
    newest = defs.onnx_opset_version()
    try:
        schema = defs.get_schema(name, version if 0 < version < newest else newest, domain)
    except defs.SchemaError:
        return _Form()
    single = defs.OpSchema.FormalParameterOption.Single
    return _Form(
        inputs=(schema.min_input, schema.max_input),
        outputs=(schema.min_output, schema.max_output),
        required_inputs=[place for place, value in enumerate(schema.inputs) if value.option == single],
        required_outputs=[place for place, value in enumerate(schema.outputs) if value.option == single],
        attributes={key: each.type.value for key, each in schema.attributes.items()},  # type: ignore[attr-defined]
        required_attributes=[key for key, each in schema.attributes.items() if each.required],
    )


def _check_node(node: NodeProto, form: _Form) -> None:
    for what, names, (least, most), required in (
        ("input", node.input, form.inputs, form.required_inputs),
        ("output", node.output, form.outputs, form.required_outputs),
    ):
        if not least <= len(names) <= most:
            expected = f"{least}" if least == most else f"{least} to {most}" if most != _ANY else f"{least} or more"
            raise ModelError(f"{node_in_words(node)} has {len(names)} {what}s; {expected} are expected")
        for place in required:
            if not names[place]:
                raise ModelError(f"{node_in_words(node)} has no {what} {place}, which {node.op_type} requires")
    found = {attribute.name: attribute.type for attribute in node.attribute}
    if len(found) != len(node.attribute):
        raise ModelError(f"{node_in_words(node)} has two attributes of one name")
    for name, kind in found.items():
        if form.attributes is not None and form.attributes.get(name, kind) != kind:
            raise ModelError(f"{node_in_words(node)}: attribute {name!r} has another type than {node.op_type} takes")
    if missing := [name for name in form.required_attributes if name not in found]:
        raise ModelError(f"{node_in_words(node)} has no attribute {missing[0]!r}, which {node.op_type} requires")


def _check_declared(value: ValueInfoProto) -> None:
    """Raise ModelError for a value that is declared of a dtype that ONNX does not have."""
    declared = tensor_type(value)
    if declared is not None and declared.dtype.startswith("DTYPE_"):
        raise ModelError(f"{value.name!r} is declared {declared}, a dtype that ONNX does not have")


def _check_held(tensor: TensorProto) -> None:
    """Raise ModelError for an inline tensor that does not hold what its dtype and shape say."""
    dtype, shape = (declared := initializer_type(tensor)).dtype, tensor.dims
    if (dtype not in BITS and dtype != "STRING") or any(size < 0 for size in shape):
        raise ModelError(f"tensor {tensor.name!r} is {declared}; a known dtype and sizes from 0 on are expected")
    if is_external(tensor):
        return
    if tensor.HasField("raw_data"):
        what, holds = "bytes", len(tensor.raw_data)
        expected = byte_size(dtype, shape) if dtype in BITS else 0
    else:
        what, holds = "entries", len(getattr(tensor, _field(tensor.data_type)))
        packed = BITS.get(dtype, 8) < 8
        expected = byte_size(dtype, shape) if packed else math.prod(shape) * (2 if "COMPLEX" in dtype else 1)
    if holds != expected:
        raise ModelError(f"tensor {tensor.name!r} is {declared}, {expected:,} {what}, but holds {holds:,}")


@functools.cache
def _field(data_type: int) -> str:
    """The field that holds the numbers of a dtype where they are not raw bytes."""
    from onnx.helper import tensor_dtype_to_field

    return str(tensor_dtype_to_field(data_type))
