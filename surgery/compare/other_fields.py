"""What no section speaks of: sharding annotations, sparse indices, docs of inner values, and whatever ONNX adds next.

Where the sections find nothing, the two models are held against each other field by field, so that `same` means it.
The order of nodes, initializers and declarations does not count, nor does where and how a tensor's content is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.compare.comparison import FieldChange
from surgery.compare.subjects import Subject
from surgery.graph.nodes import copied

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

_STORED = ("raw_data", "external_data", "data_location", "segment")
"""Fields of a tensor that say where its content is; those that end in `_data` hold it."""


def other_changes(before: Subject, after: Subject) -> tuple[FieldChange, ...]:
    """Fields that differ in two sides whose graphs have the same roles; nothing for other sides."""
    if [part.role for part in before.parts] != [part.role for part in after.parts]:
        return ()
    found = []
    for one, other in zip(before.parts, after.parts, strict=True):
        ours, theirs = _fields(one.model.proto), _fields(other.model.proto)
        for key in sorted(ours.keys() | theirs.keys()):
            old, new = ours.get(key, []), theirs.get(key, [])
            if old != new:
                parts = "other entries" if len(old) == len(new) else f"{len(new)} entries"
                found.append(FieldChange("changed", f"field {key}", f"{len(old)} entries", parts))
    return tuple(found)


def _fields(proto: ModelProto) -> dict[str, list[bytes]]:
    """Field -> its entries as sorted bytes."""
    model = copied(proto)
    graph = model.graph
    _canonical(graph)
    found = {f"graph.{name}": entries for name, entries in _entries(graph).items()}
    model.ClearField("graph")
    return found | _entries(model)


def _entries(message: Any) -> dict[str, list[bytes]]:
    found = {}
    for field, value in message.ListFields():
        values = list(value) if hasattr(value, "extend") else [value]
        found[field.name] = sorted(_bytes(each) for each in values)
    return found


def _bytes(value: Any) -> bytes:
    return bytes(value.SerializeToString(deterministic=True)) if hasattr(value, "ListFields") else str(value).encode()


def _canonical(graph: GraphProto) -> None:
    """Take out what does not count, in place; bodies first, so that a node's bytes do not depend on their order."""
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        _without_content(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _canonical(body)
                _sort(body.node)
                _sort(body.initializer)


def _without_content(tensor: TensorProto) -> None:
    for field, _ in tensor.ListFields():
        if field.name in _STORED or field.name.endswith("_data"):
            tensor.ClearField(field.name)


def _sort(entries: Any) -> None:
    held = sorted((copied(entry) for entry in entries), key=lambda entry: entry.SerializeToString(deterministic=True))
    del entries[:]
    entries.extend(held)
