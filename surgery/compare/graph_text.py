"""A graph as text: one line per thing, the same bytes for the same graph, so that line tools can compare two of them.

    ir_version 10
    producer pytorch 2.9
    opset ai.onnx 21
    metadata gemma4_surgery.layers = {"version":1, ...}

    graph main_graph: inputs
      attention_mask  INT64 [batch_size, total_sequence_length]
    graph main_graph: outputs
      logits  FLOAT16 [batch_size, 1, 262144]
    graph main_graph: initializers
      /model/constants/INT64/[0]  INT64 [1] = 0
      model.embed_tokens.weight  FLOAT16 [262144, 1536] in decoder.onnx_data at 0, 805306368 bytes
    graph main_graph: nodes
      Gather /model/Gather (a, b) -> c FLOAT16 [batch_size, 1536]  axis=0

    file 652311 bytes, sha256 5f2c...

Initializers are sorted by name, attributes and metadata by key; nodes stay in their order, which a reader needs.
The last line is the file's digest: two files that differ never have one text, wherever the difference lies.
Headings start at the margin, because git shows the last line that does so in its `@@` lines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from surgery.errors import printable
from surgery.files.safe_reading import read_regular
from surgery.graph.external_data import external_field, is_external
from surgery.graph.model import MAX_PROTO_BYTES, Model
from surgery.graph.tensor_types import declared_types, initializer_type, tensor_type

if TYPE_CHECKING:
    from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

    from surgery.graph.tensor_types import TensorType

FEW = 8
"""Up to this many elements an inline tensor is shown by its values, beyond that by their digest."""

DIGITS = 16
"""Hexadecimal digits that are shown of a value's digest."""

_PLAIN = re.compile(r"[\w./:+\-]+")


def graph_text(model: Model) -> str:
    """The text of a model, ending in a newline. No external weight is read. Raises OSError if its file is gone."""
    data = read_regular(model.path, MAX_PROTO_BYTES)
    closing = f"file {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"
    lines = [*_head(model.proto), "", *_graph(model.graph, ""), *_functions(model.proto), "", closing]
    return "".join(f"{printable(line)}\n" for line in lines)


def _head(proto: ModelProto) -> Iterator[str]:
    yield f"ir_version {proto.ir_version}"
    yield f"producer {f'{proto.producer_name} {proto.producer_version}'.strip()}"
    if proto.domain or proto.model_version:
        yield f"model {_name(proto.domain)} version {proto.model_version}"
    if proto.doc_string:
        yield f"doc {proto.doc_string}"
    for opset in sorted(proto.opset_import, key=lambda entry: entry.domain):
        yield f"opset {_name(opset.domain or 'ai.onnx')} {opset.version}"
    for entry in sorted(proto.metadata_props, key=lambda entry: entry.key):
        yield f"metadata {_name(entry.key)} = {entry.value}"


def _graph(graph: GraphProto, indent: str) -> Iterator[str]:
    head, inner = f"{indent}graph {_name(graph.name)}", f"{indent}  "
    if graph.doc_string:
        yield f"{head}: doc {graph.doc_string}"
    for title, values in (("inputs", graph.input), ("outputs", graph.output)):
        yield f"{head}: {title}"
        yield from (f"{inner}{_name(value.name)}  {tensor_type(value) or _other_type(value.type)}" for value in values)
    yield f"{head}: initializers"
    yield from sorted(f"{inner}{_name(tensor.name)}  {_tensor(tensor)}" for tensor in graph.initializer)
    for sparse in graph.sparse_initializer:
        yield f"{inner}{_name(sparse.values.name)}  sparse {list(sparse.dims)} of {_tensor(sparse.values)}"
    yield f"{head}: nodes"
    yield from _nodes(graph.node, declared_types(graph), inner)


def _functions(proto: ModelProto) -> Iterator[str]:
    for function in proto.functions:
        yield from _function(function)


def _function(function: FunctionProto) -> Iterator[str]:
    takes, gives = _names(function.input), _names(function.output)
    yield f"function {_operator(function.domain, function.name)} ({takes}) -> {gives}"
    for opset in sorted(function.opset_import, key=lambda entry: entry.domain):
        yield f"  opset {_name(opset.domain or 'ai.onnx')} {opset.version}"
    for attribute in sorted(function.attribute):
        yield f"  attribute {_name(attribute)}"
    for default in sorted(function.attribute_proto, key=lambda entry: entry.name):
        yield f"  attribute {_name(default.name)}={_value(default)}"
    yield from _nodes(function.node, {}, "  ")


def _nodes(nodes: Iterable[NodeProto], types: dict[str, TensorType], indent: str) -> Iterator[str]:
    for node in nodes:
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        outputs = ", ".join(f"{_name(name)} {types[name]}" if name in types else _name(name) for name in node.output)
        line = f"{indent}{_operator(node.domain, node.op_type)} {_name(node.name)} ({_names(node.input)}) -> {outputs}"
        flat = [f"{_name(a.name)}={_value(a)}" for a in attributes if not _bodies(a)]
        yield "  ".join((line, *flat))
        for attribute in attributes:
            for body in _bodies(attribute):
                yield f"{indent}  {_name(attribute.name)}:"
                yield from _graph(body, f"{indent}    ")


def _bodies(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _value(attribute: AttributeProto) -> str:
    """An attribute's value: numbers as the file has them in float32 or int64, text quoted, tensors as initializers."""
    from onnx import AttributeProto

    kind = attribute.type
    if attribute.ref_attr_name:
        return f"@{_name(attribute.ref_attr_name)}"
    if kind in (AttributeProto.INT, AttributeProto.INTS):
        return str(attribute.i) if kind == AttributeProto.INT else str(list(attribute.ints))
    if kind == AttributeProto.FLOAT:
        return _float(attribute.f)
    if kind == AttributeProto.FLOATS:
        return f"[{', '.join(_float(number) for number in attribute.floats)}]"
    if kind == AttributeProto.STRING:
        return _bytes(attribute.s)
    if kind == AttributeProto.STRINGS:
        return f"[{', '.join(_bytes(text) for text in attribute.strings)}]"
    if kind == AttributeProto.TENSOR:
        return _tensor(attribute.t)
    if kind == AttributeProto.TENSORS:
        return f"[{', '.join(_tensor(tensor) for tensor in attribute.tensors)}]"
    data: bytes = attribute.SerializeToString(deterministic=True)
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:DIGITS]}"


def _tensor(tensor: TensorProto) -> str:
    declared = str(initializer_type(tensor))
    if is_external(tensor):
        offset, length = external_field(tensor, "offset") or "0", external_field(tensor, "length") or "all"
        return f"{declared} in {_name(external_field(tensor, 'location') or '')} at {offset}, {length} bytes"
    return f"{declared} = {_content(tensor)}"


def _content(tensor: TensorProto) -> str:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type == TensorProto.STRING:
        return f"[{', '.join(_bytes(text) for text in tensor.string_data)}]"
    try:
        values = numpy_helper.to_array(tensor)
    except Exception:  # onnx raises many kinds for a tensor that does not hold what its shape says
        return "a value that does not fit its shape"
    if values.size <= FEW:
        flat = ", ".join(str(number) for number in values.reshape(-1).tolist())
        return flat if values.ndim == 0 else f"[{flat}]"
    return f"sha256 {hashlib.sha256(values.tobytes()).hexdigest()[:DIGITS]}"


def _other_type(declared: object) -> str:
    """A type that is no tensor: a sequence, a map, an optional, as protobuf writes it, on one line."""
    return " ".join(str(declared).split()) or "?"


def _operator(domain: str, name: str) -> str:
    return f"{_name(domain)}::{_name(name)}" if domain not in ("", "ai.onnx") else _name(name)


def _names(names: Iterable[str]) -> str:
    return ", ".join(_name(name) for name in names)


def _name(name: str) -> str:
    """A name as it is, or quoted where it could be mistaken for more than one word."""
    return name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _bytes(data: bytes) -> str:
    return json.dumps(data.decode("utf-8", "backslashreplace"), ensure_ascii=False)


def _float(number: float) -> str:
    """The shortest decimal that float32 reads back to the same number: 0.1, not 0.10000000149011612."""
    import numpy

    return str(numpy.float32(number))
