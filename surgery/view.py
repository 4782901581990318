"""The editing view: onnx-graphsurgeon for the edit, the ModelProto for everything the edit does not touch.

A plain import and export with onnx-graphsurgeon 0.6.1 loses metadata, value_info docs, unused initializers,
function fields and more, crashes on empty list attributes, and moves initializers into If branches (each
measured; tests/torture.py has a model for each). Here the export is never used on a whole graph. `edited` shows the graph as a
`gs.Graph`, lets the caller add, drop and rewire nodes, and then writes back the difference alone:

    an untouched node         its NodeProto, unread
    a rewired node            its NodeProto with the changed inputs, outputs or attributes
    a new node                exported by onnx-graphsurgeon
    a new gs.Constant         an inline initializer
    a value without producer  its value_info goes; an initializer goes with its last reader

Subgraphs are opaque to the view; the values that they capture count as read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.graph import use_counts

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, NodeProto, ValueInfoProto

INLINE_BYTES = 1024
"""Constants up to this size can be read in the view; larger ones and external ones are references without values."""


@dataclass(frozen=True)
class _Origin:
    """What the view showed of a node, to tell afterwards whether it was touched."""

    proto: NodeProto
    shown: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@contextmanager
def edited(graph: GraphProto) -> Iterator[gs.Graph]:
    """Show a graph as `gs.Graph`; on a clean exit, write the edit back. An exception leaves the graph as it was.

    Node order is the order of `view.nodes`: insert where the node belongs, nothing is sorted.
    Do not call `cleanup`, `toposort` or `fold_constants` on the view: it is not the whole model.
    """
    view, origins = _show(graph)
    yield view
    _write_back(graph, view, origins)


def _show(graph: GraphProto) -> tuple[gs.Graph, dict[int, _Origin]]:
    import onnx
    import onnx_graphsurgeon as gs

    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR  # it prints to stdout, which carries our data
    shell = onnx.GraphProto(name=graph.name)
    for value in graph.input:
        shell.input.append(_plain(value))
    for value in graph.output:
        shell.output.append(_plain(value))
    for value in graph.value_info:
        if value.type.HasField("tensor_type"):
            shell.value_info.append(value)
    for tensor in graph.initializer:
        shell.initializer.append(_reference_only(tensor))
    for node in graph.node:
        shell.node.append(_plain_node(node))
    view = gs.import_onnx(onnx.helper.make_model(shell, opset_imports=[onnx.helper.make_opsetid("", 21)]))
    origins = {}
    for proto, shown in zip(graph.node, view.nodes, strict=True):
        origins[id(shown)] = _Origin(proto, shown, tuple(proto.input), tuple(proto.output), dict(shown.attrs))
    return view, origins


def _plain(value: ValueInfoProto) -> ValueInfoProto:
    """Sequences, maps and optionals become untyped: the importer has no form for some of them."""
    import onnx

    return value if value.type.HasField("tensor_type") else onnx.ValueInfoProto(name=value.name)


def _reference_only(tensor: Any) -> Any:
    """Small inline tensors with their values; others with name, dtype and shape alone, so that nothing big is copied."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() <= INLINE_BYTES:
        return tensor
    shell = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    shell.data_location = onnx.TensorProto.EXTERNAL
    shell.external_data.add(key="location", value="not-read")
    return shell


def _plain_node(node: NodeProto) -> NodeProto:
    """A node as the importer can take it: attributes that it drops or crashes on stay with the original."""
    import onnx

    plain = onnx.NodeProto(op_type=node.op_type, name=node.name, domain=node.domain)
    plain.input.extend(node.input)
    plain.output.extend(node.output)
    kinds = onnx.AttributeProto
    for attribute in node.attribute:
        simple = attribute.type in (kinds.FLOAT, kinds.INT) or (
            (attribute.type == kinds.INTS and attribute.ints)
            or (attribute.type == kinds.FLOATS and attribute.floats)
            or (attribute.type == kinds.STRING and _is_utf8(attribute.s))
        )
        if simple and not attribute.ref_attr_name:
            plain.attribute.append(attribute)
    return plain


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _write_back(graph: GraphProto, view: gs.Graph, origins: dict[int, _Origin]) -> None:
    before = use_counts(graph)
    values_before = _values(graph)
    nodes = [_node_proto(shown, origins.get(id(shown))) for shown in view.nodes]
    inputs = _interface(view.inputs, {value.name: value for value in graph.input})
    outputs = _interface(view.outputs, {value.name: value for value in graph.output})

    _replace(graph.node, nodes)
    _replace(graph.input, inputs)
    _replace(graph.output, outputs)
    _write_initializers(graph, view, before)
    _write_value_info(graph, view, values_before)


def _node_proto(shown: gs.Node, origin: _Origin | None) -> NodeProto:
    import onnx
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    if origin is None:
        return OnnxExporter.export_node(shown)
    inputs = tuple(tensor.name for tensor in shown.inputs)
    outputs = tuple(tensor.name for tensor in shown.outputs)
    if (inputs, outputs, shown.attrs) == (origin.inputs, origin.outputs, origin.attributes):
        return origin.proto
    proto = onnx.NodeProto()
    proto.CopyFrom(origin.proto)
    _replace(proto.input, inputs)
    _replace(proto.output, outputs)
    for name in (origin.attributes.keys() | shown.attrs.keys()):
        if name in shown.attrs and name in origin.attributes and shown.attrs[name] == origin.attributes[name]:
            continue
        kept = [attribute for attribute in proto.attribute if attribute.name != name]
        if name in shown.attrs:
            kept.append(onnx.helper.make_attribute(name, shown.attrs[name]))
        _replace(proto.attribute, kept)
    return proto


def _interface(tensors: list[Any], declared: dict[str, ValueInfoProto]) -> list[ValueInfoProto]:
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    return [
        declared[tensor.name]
        if tensor.name in declared
        else OnnxExporter.export_value_info_proto(tensor, do_type_check=True)
        for tensor in tensors
    ]


def _write_initializers(graph: GraphProto, view: gs.Graph, before: dict[str, int]) -> None:
    """New constants are appended in order of first use; an initializer that lost its last reader goes."""
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    after = use_counts(graph)
    interface = {value.name for value in graph.input}
    gone = before.keys() - after.keys() - interface
    known = {tensor.name for tensor in graph.initializer}
    if gone & known:
        _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in gone])
    for shown in view.nodes:
        for tensor in shown.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in known:
                known.add(tensor.name)
                graph.initializer.append(OnnxExporter.export_tensor_proto(tensor))


def _write_value_info(graph: GraphProto, view: gs.Graph, values_before: set[str]) -> None:
    """Drop the entries of values and initializers that went; declare new typed values; keep all others in place."""
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    values_after = _values(graph)
    gone = values_before - values_after
    declared = {value.name for value in (*graph.value_info, *graph.output)}
    if gone & declared:
        _replace(graph.value_info, [value for value in graph.value_info if value.name not in gone])
    new = values_after - values_before - declared
    for shown in view.nodes:
        for tensor in shown.outputs:
            if tensor.name in new and tensor.dtype is not None and tensor.shape is not None:
                graph.value_info.append(OnnxExporter.export_value_info_proto(tensor, do_type_check=True))


def _values(graph: GraphProto) -> set[str]:
    """Initializers and node outputs: what value_info may describe. It may also hold leftovers, which stay."""
    return {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output if name}


def _replace(field: Any, values: Any) -> None:
    """Set a repeated protobuf field, copying first: the new values may be elements of the field itself."""
    held = list(values)
    if held and hasattr(held[0], "SerializeToString"):
        held = [_copy(value) for value in held]
    del field[:]
    field.extend(held)


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy

