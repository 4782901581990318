"""The editing view: onnx-graphsurgeon for the edit, the ModelProto for everything the edit does not touch.

A plain import and export with onnx-graphsurgeon 0.6.1 loses metadata, value_info docs, unused initializers,
function fields and more, crashes on empty list attributes, and moves initializers into If branches (each
measured; tests/torture.py has a model for each). Here the export is never used on a whole graph. `edited` shows
the graph as a `gs.Graph`, lets the caller add, drop and rewire nodes, and then writes back the difference alone:

    an untouched node         its NodeProto, unread
    a rewired node            its NodeProto with the changed operator, name, inputs, outputs or attributes
    a new node                exported by onnx-graphsurgeon
    a new gs.Constant         an inline initializer; so is a gs.Constant that was given other values
    a value without producer  its value_info goes; an initializer goes with its last reader

Subgraphs are opaque to the view; the values that they capture count as read. Values keep their names and declared
types: surgery.graph.renaming.rename renames a value in every place that knows it, which a view of one graph cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import ModelError
from surgery.graph.index import use_counts
from surgery.graph.nodes import copied
from surgery.graph.scopes import captured, value_names

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

INLINE_BYTES = 1024
"""Constants up to this size can be read in the view; larger ones and external ones are references without values."""

_FLOAT = 1  # AttributeProto.FLOAT


@dataclass(frozen=True)
class _Origin:
    """What the view showed of a node, to tell afterwards whether it was touched."""

    proto: NodeProto
    shown: gs.Node
    kind: tuple[Any, Any, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class _Before:
    """What the view showed, by identity. It holds every object, so that no new one can take over an id."""

    nodes: dict[int, _Origin]
    tensors: dict[int, tuple[gs.Tensor, str]]


@contextmanager
def edited(graph: GraphProto, *, prune: bool = False) -> Iterator[gs.Graph]:
    """Show a graph as `gs.Graph`; on a clean exit, write the edit back. An exception leaves the graph as it was.

    Node order is the order of `view.nodes`: insert where the node belongs, nothing is sorted.
    `prune` drops the nodes that no output depends on any more; those that none depended on before stay, with what they
    read.
    Do not call `cleanup`, `toposort` or `fold_constants` on the view: it is not the whole model.
    Raises ModelError for what cannot be written back: a renamed value, a new constant under a name in use.
    """
    view, before = _show(graph)
    held = {name for node in graph.node for name in captured(node)} if prune else set()
    idle = _unread(view, held) if prune else set()
    yield view
    if prune:
        gone = _unread(view, held, idle)
        view.nodes = [node for node in view.nodes if id(node) not in gone]
    _write_back(graph, view, before)


def _unread(view: gs.Graph, held: Set[str], kept: Set[int] = frozenset()) -> set[int]:
    """The ids of nodes that no output of the graph depends on. `held` are values that subgraphs capture, `kept` nodes
    that stay in any case."""
    needed = {tensor.name for tensor in view.outputs} | held
    idle = set()
    for node in reversed(view.nodes):
        if id(node) in kept or any(tensor.name in needed for tensor in node.outputs):
            needed.update(tensor.name for tensor in node.inputs)
        else:
            idle.add(id(node))
    return idle


def _show(graph: GraphProto) -> tuple[gs.Graph, _Before]:
    import onnx
    import onnx_graphsurgeon as gs

    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR  # it prints to stdout, which carries our data
    shell = onnx.GraphProto(name="view")
    for value in graph.input:
        shell.input.append(_plain(value))
    for value in graph.output:
        shell.output.append(_plain(value))
    shell.value_info.extend(value for value in graph.value_info if _is_importable(value))
    known = {*onnx.TensorProto.DataType.values()} - {onnx.TensorProto.UNDEFINED}
    shell.initializer.extend(_reference_only(t) for t in graph.initializer if t.data_type in known)
    for node in graph.node:
        shell.node.append(_plain_node(node))
    view = gs.import_onnx(onnx.helper.make_model(shell, opset_imports=[onnx.helper.make_opsetid("", 21)]))
    if len(view.inputs) != len(graph.input):  # the importer hides inputs that override an initializer
        shown = {tensor.name: tensor for tensor in _tensors(view)}
        view.inputs = [shown.get(value.name) or gs.Variable(value.name) for value in graph.input]
    nodes = {
        id(shown): _Origin(proto, shown, _kind(shown), tuple(proto.input), tuple(proto.output), _held(shown.attrs))
        for proto, shown in zip(graph.node, view.nodes, strict=True)
    }
    return view, _Before(nodes, {id(tensor): (tensor, tensor.name) for tensor in _tensors(view)})


def _held(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as they are now: of what the view shows of them, an edit can change lists of numbers alone in place."""
    return {name: [*value] if isinstance(value, list) else value for name, value in attributes.items()}


def _kind(node: gs.Node) -> tuple[Any, Any, Any]:
    return node.op, node.name, node.domain


def _tensors(view: gs.Graph) -> Iterator[gs.Tensor]:
    """Every tensor of the view, as often as it is mentioned."""
    yield from view.inputs
    yield from view.outputs
    for node in view.nodes:
        yield from node.inputs
        yield from node.outputs


def _plain(value: ValueInfoProto) -> ValueInfoProto:
    """What the importer has no form for becomes untyped: sequences, maps, optionals, dtypes newer than it."""
    import onnx

    return value if _is_importable(value) else onnx.ValueInfoProto(name=value.name)


def _is_importable(value: ValueInfoProto) -> bool:
    import onnx

    return value.type.HasField("tensor_type") and value.type.tensor_type.elem_type in onnx.TensorProto.DataType.values()


def _reference_only(tensor: TensorProto) -> TensorProto:
    """Small inline tensors with their values; others with name, dtype and shape alone: nothing big is copied."""
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


def _write_back(graph: GraphProto, view: gs.Graph, before: _Before) -> None:
    """Work out the whole edit, then write it: an edit that cannot be written changes nothing."""
    import onnx

    nodes = [_node_proto(shown, before.nodes.get(id(shown))) for shown in view.nodes]
    inputs = _interface(view.inputs, {value.name: value for value in graph.input})
    outputs = _interface(view.outputs, {value.name: value for value in graph.output})
    added, changed = _constants(graph, view, before)
    after = onnx.GraphProto(node=nodes, output=outputs)
    lost = use_counts(graph).keys() - use_counts(after).keys() - {value.name for value in graph.input}
    old, made = _made(graph), _made(after)
    kept = {tensor.name for tensor in _initializers(graph)} - lost
    here = made | kept | {tensor.name for tensor in added}
    gone = (old | {tensor.name for tensor in _initializers(graph)}) - here
    named = {value.name for value in (*graph.value_info, *outputs)}
    new_values = _new_values(view, made - old - named)
    inner = [value for value in graph.output if value.name in here and value.name not in named]

    if [id(node) for node in nodes] != [id(origin.proto) for origin in before.nodes.values()]:
        _replace(graph.node, nodes)
    new_values += [copied(value) for value in inner]
    _replace(graph.input, inputs)
    _replace(graph.output, outputs)
    for tensor in graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(changed[tensor.name])
    _drop(graph.initializer, [tensor.name in gone for tensor in graph.initializer])
    _drop(graph.sparse_initializer, [sparse.values.name in gone for sparse in graph.sparse_initializer])
    _drop(graph.value_info, [value.name in gone for value in graph.value_info])
    _drop(graph.quantization_annotation, [entry.tensor_name in gone for entry in graph.quantization_annotation])
    graph.initializer.extend(added)
    graph.value_info.extend(new_values)


def _node_proto(shown: gs.Node, origin: _Origin | None) -> NodeProto:
    import onnx
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    if origin is None:
        new: NodeProto = OnnxExporter.export_node(shown)
        return new
    inputs = tuple(tensor.name for tensor in shown.inputs)
    outputs = tuple(tensor.name for tensor in shown.outputs)
    touched = [
        name
        for name in dict.fromkeys((*origin.attributes, *shown.attrs))
        if not (name in shown.attrs and name in origin.attributes)
        or not _same(shown.attrs[name], origin.attributes[name])
    ]
    kind = _kind(shown)
    if (kind, inputs, outputs) == (origin.kind, origin.inputs, origin.outputs) and not touched:
        return origin.proto
    proto = onnx.NodeProto()
    proto.CopyFrom(origin.proto)
    if kind != origin.kind:
        proto.op_type, proto.name, proto.domain = kind[0], kind[1] or "", kind[2] or ""
    _replace(proto.input, inputs)
    _replace(proto.output, outputs)
    for name in touched:
        _set_attribute(proto, name, shown.attrs.get(name))
    return proto


def _same(one: Any, other: Any) -> bool:
    """Equal in type and value; 1 and 1.0 are not, because ONNX tells INT and FLOAT apart."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other) or (isinstance(one, float) and one != one and other != other)


def _set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Set, add or (with None) remove one attribute; the others keep their places. A FLOAT given as 1 stays FLOAT."""
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    position = next((index for index, attribute in enumerate(node.attribute) if attribute.name == name), None)
    if value is None:
        if position is not None:
            del node.attribute[position]
        return
    if position is not None and isinstance(value, int) and node.attribute[position].type == _FLOAT:
        value = float(value)
    (attribute,) = OnnxExporter.export_attributes({name: value})
    if position is None:
        node.attribute.append(attribute)
    else:
        node.attribute[position].CopyFrom(attribute)


def _interface(tensors: list[Any], declared: dict[str, ValueInfoProto]) -> list[ValueInfoProto]:
    return [declared[tensor.name] if tensor.name in declared else _declaration(tensor) for tensor in tensors]


def _declaration(tensor: gs.Tensor) -> ValueInfoProto:
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    if tensor.dtype is None:
        raise ModelError(f"the new input or output {tensor.name!r} has no dtype")
    value: ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, do_type_check=True)
    return value


def _constants(graph: GraphProto, view: gs.Graph, before: _Before) -> tuple[list[TensorProto], dict[str, TensorProto]]:
    """New constants in order of first use, and the initializers that were given other values, by name."""
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    originals = {tensor.name: tensor for tensor in graph.initializer}
    fresh: dict[str, gs.Constant] = {}
    changed: dict[str, TensorProto] = {}
    for tensor in _tensors(view):
        _, name = before.tensors.get(id(tensor), (None, None))
        if name is not None and tensor.name != name:
            raise ModelError(
                f"value {name!r} cannot be renamed to {tensor.name!r} in the view; surgery.graph.renaming.rename can"
            )
        if not isinstance(tensor, gs.Constant):
            continue
        if name is None:
            if fresh.setdefault(tensor.name, tensor) is not tensor:
                raise ModelError(f"two new constants are named {tensor.name!r}")
        elif name in originals and name not in changed and _has_other_values(tensor, originals[name]):
            changed[name] = OnnxExporter.export_tensor_proto(gs.Constant(name, tensor.values))
    if fresh and (taken := fresh.keys() & value_names(graph)):
        raise ModelError(f"a new constant is named {min(taken)!r}, but the graph has a value of that name")
    return [OnnxExporter.export_tensor_proto(tensor) for tensor in fresh.values()], changed


def _has_other_values(shown: gs.Constant, original: TensorProto) -> bool:
    """Whether a constant of the view was given other values than the initializer has; one never read has not."""
    import onnx
    from onnx_graphsurgeon.ir.tensor import LazyValues

    if isinstance(shown._values, LazyValues):
        return False
    if original.data_location == onnx.TensorProto.EXTERNAL:
        return True
    held = onnx.numpy_helper.to_array(original)
    values = shown.values
    return bool(held.dtype != values.dtype or held.shape != values.shape or held.tobytes() != values.tobytes())


def _new_values(view: gs.Graph, new: Set[str]) -> list[ValueInfoProto]:
    return [
        _declaration(tensor)
        for shown in view.nodes
        for tensor in shown.outputs
        if tensor.name in new and tensor.dtype is not None and tensor.shape is not None
    ]


def _initializers(graph: GraphProto) -> list[TensorProto]:
    return [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]


def _made(graph: GraphProto) -> set[str]:
    """The values that nodes make. value_info may also hold leftovers of other values, which stay."""
    return {name for node in graph.node for name in node.output if name}


def _drop(field: Any, marks: list[bool]) -> None:
    """Delete the marked elements in place: the others are not copied, however big they are."""
    for index in range(len(marks) - 1, -1, -1):
        if marks[index]:
            del field[index]


def _replace(field: Any, values: Any) -> None:
    """Set a repeated protobuf field, copying first: the new values may be elements of the field itself."""
    held = list(values)
    if held and hasattr(held[0], "SerializeToString"):
        held = [copied(value) for value in held]
    del field[:]
    field.extend(held)
