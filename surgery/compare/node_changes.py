"""What differs between two aligned scopes, their bodies included: node by node, edit by edit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.attention.kv_wiring import slot_of_name
from surgery.compare.alignment import Alignment, align, makers
from surgery.compare.comparison import ChangeVerb, Edit, NodeChange
from surgery.compare.numbered_graph import MISSING, Label, NumberedGraph, NumberedNode, node_place, of_body
from surgery.graph.changes import ModelThing, node_name
from surgery.graph.tensor_types import TensorType

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto

LONGEST_VALUE = 120
"""Characters of an attribute's value that a report shows."""

_LAYER = re.compile(r"(?:^|[./_])(?:layers?|blocks?|h)[./_](\d{1,5})(?=[./_]|$)")


Blamable = tuple[NodeChange, list[ModelThing]]
"""A change, and the things that make it, for whoever knows which pass touched them."""


@dataclass
class Compared:
    """Two scopes, how they align, and the same of each pair of bodies. `where` is empty for the main graph."""

    before: NumberedGraph
    after: NumberedGraph
    alignment: Alignment
    where: str
    bodies: list[Compared] = field(default_factory=list)

    def all(self) -> Iterator[Compared]:
        """This one and those nested in it, outer ones first."""
        pending = [self]
        while pending:
            current = pending.pop()
            yield current
            pending.extend(reversed(current.bodies))


def compare_graphs(
    before: NumberedGraph,
    after: NumberedGraph,
    labels: tuple[Label, Label],
    where: str = "",
    outer: Mapping[int, int] | None = None,
) -> Compared:
    """Align two scopes, and the bodies of the nodes that turn out to be the same."""
    found = Compared(before, after, align(before, after, labels, outer), where)
    for ours, theirs in found.alignment.nodes.items():
        one, other = before.items[ours], after.items[theirs]
        for name, body, twin in _paired_bodies(one, other):
            inner, outer_inner = of_body(one.role, body), of_body(other.role, twin)
            captured = _captured(inner, outer_inner, one, other, found.alignment)
            inside = f"{where} / " if where else ""
            label = f"{inside}{other.operator} {node_name(other.proto)!r} {name}"
            found.bodies.append(compare_graphs(inner, outer_inner, labels, label, captured))
    return found


def _paired_bodies(one: NumberedNode, other: NumberedNode) -> Iterator[tuple[str, GraphProto, GraphProto]]:
    theirs = dict(other.bodies)
    return ((name, body, theirs[name]) for name, body in one.bodies if name in theirs)


def _captured(
    inner: NumberedGraph, twin: NumberedGraph, one: NumberedNode, other: NumberedNode, around: Alignment
) -> dict[int, int]:
    """Values that two bodies capture -> each other, where the values around are the same."""
    by_value = {other.outer[name]: value for name, value in twin.captured.items() if name in other.outer}
    found = {}
    for name, value in inner.captured.items():
        counterpart = around.values.get(one.outer.get(name, MISSING))
        if counterpart in by_value:
            found[value] = by_value[counterpart]
    return found


class Differ:
    """Edits of the nodes of a comparison. `dims` are the symbolic dimensions that were renamed throughout."""

    def __init__(self, compared: Compared, dims: Mapping[str, str], main: tuple[str, str]) -> None:
        self._compared = compared
        self._dims = dims
        self._main = main
        self._makers: dict[int, dict[int, int]] = {}

    def changes(self) -> Iterator[Blamable]:
        """Every node that differs, and what of it does: AFTER's in its order, removed ones where they stood."""
        for compared in self._compared.all():
            yield from self._scope(compared)

    def _scope(self, compared: Compared) -> Iterator[Blamable]:
        taken = {theirs: ours for ours, theirs in compared.alignment.nodes.items()}
        removed = _removed_by_place(compared)
        yield from (self._gone(compared, at) for at in removed.pop(-1, ()))
        for theirs, item in enumerate(compared.after.items):
            if theirs not in taken:
                name = node_name(item.proto)
                yield self._change("added", compared, item, None, name)
            elif (change := self._pair(compared, compared.before.items[taken[theirs]], item)) is not None:
                yield change
            yield from (self._gone(compared, at) for at in removed.pop(theirs, ()))

    def _gone(self, compared: Compared, at: int) -> Blamable:
        item = compared.before.items[at]
        return self._change("removed", compared, item, node_name(item.proto), None)

    def _pair(self, compared: Compared, one: NumberedNode, other: NumberedNode) -> Blamable | None:
        inner: list[ModelThing] = []
        edits = [Edit("operator", one.operator, other.operator)] if one.operator != other.operator else []
        edits += [*self._inputs(compared, one, other, inner), *_attributes(one, other)]
        edits += [*self._outputs(compared, one, other, inner), *_texts(one, other)]
        names = list(_names(compared, one, other))
        moved = node_place(one.role, self._main[0]) != node_place(other.role, self._main[1])
        graph = [Edit("graph", one.role, other.role)] if moved else []
        if not (edits or names or graph):
            return None
        verb: ChangeVerb = "changed" if edits else "moved" if graph else "renamed"
        before, after = node_name(one.proto), node_name(other.proto)
        return self._change(verb, compared, other, before, after, (*graph, *edits, *names), inner)

    def _change(
        self,
        verb: ChangeVerb,
        compared: Compared,
        item: NumberedNode,
        before: str | None,
        after: str | None,
        edits: tuple[Edit, ...] = (),
        inner: Sequence[ModelThing] = (),
    ) -> Blamable:
        """`inner` are the things beside the node itself that make the difference."""
        scope = compared.before if after is None else compared.after
        layer = layer_of(item, scope)
        things: list[ModelThing] = [("node", name) for name in (before, after) if name is not None]
        change = NodeChange(verb, item.operator, before, after, item.role, compared.where, layer, edits)
        return change, [*things, *inner]

    def _inputs(
        self, compared: Compared, one: NumberedNode, other: NumberedNode, inner: list[ModelThing]
    ) -> Iterator[Edit]:
        before, after = compared.before, compared.after
        for index in range(max(len(one.inputs), len(other.inputs))):
            old, new = _at(one.inputs, index), _at(other.inputs, index)
            same = new == MISSING if old == MISSING else compared.alignment.values.get(old) == new
            if not same:
                names = before.name(old), after.name(new)
                if names[0] == names[1]:  # another node makes what has this name now
                    makers_of = self._maker(compared.before, old), self._maker(compared.after, new)
                    names = (
                        f"{names[0]}, made by {_operator(makers_of[0])}",
                        f"{names[1]}, made by {_operator(makers_of[1])}",
                    )
                    inner += [("node", node_name(item.proto)) for item in makers_of if item]
                yield Edit(f"input {index}", *names)

    def _maker(self, scope: NumberedGraph, value: int) -> NumberedNode | None:
        found = self._makers.setdefault(id(scope), makers(scope))
        return scope.items[found[value]] if value in found else None

    def _outputs(
        self, compared: Compared, one: NumberedNode, other: NumberedNode, inner: list[ModelThing]
    ) -> Iterator[Edit]:
        for index in range(max(len(one.outputs), len(other.outputs))):
            old, new = _at(one.outputs, index), _at(other.outputs, index)
            if (old == MISSING) != (new == MISSING):
                yield Edit(f"output {index}", compared.before.name(old), compared.after.name(new))
            elif old != MISSING:
                before, after = compared.before.types.get(old), compared.after.types.get(new)
                if before is not None and after is not None and renamed_dims(before, self._dims) != after:
                    for name in (compared.before.names[old], compared.after.names[new]):
                        inner += [("type", name), ("output", name)]
                    yield Edit(f"type of output {index}", str(before), str(after))


def _operator(item: NumberedNode | None) -> str:
    return item.operator if item is not None else "no node"


def _removed_by_place(compared: Compared) -> dict[int, list[int]]:
    """Position in AFTER -> the removed nodes that stood behind what is there now; -1 for those before everything."""
    found: dict[int, list[int]] = defaultdict(list)
    last = -1
    for at in range(len(compared.before.items)):
        if at in compared.alignment.nodes:
            last = compared.alignment.nodes[at]
        else:
            found[last].append(at)
    return found


def _at(values: list[int], index: int) -> int:
    return values[index] if index < len(values) else MISSING


def _names(compared: Compared, one: NumberedNode, other: NumberedNode) -> Iterator[Edit]:
    if one.proto.name != other.proto.name:
        yield Edit("name", one.proto.name or None, other.proto.name or None)
    for index, (old, new) in enumerate(zip(one.outputs, other.outputs, strict=False)):
        before, after = compared.before.name(old), compared.after.name(new)
        if before is not None and after is not None and before != after:
            yield Edit(f"name of output {index}", before, after)


def _attributes(one: NumberedNode, other: NumberedNode) -> Iterator[Edit]:
    old, new = dict(one.attributes), dict(other.attributes)
    bodies = ({name for name, _ in one.bodies}, {name for name, _ in other.bodies})
    for name in sorted(bodies[0] ^ bodies[1]):
        yield Edit(f"attribute {name}", *("a graph" if name in side else None for side in bodies))
    shown = [{attribute.name: attribute for attribute in item.proto.attribute} for item in (one, other)]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            texts = [attribute_text(side[name]) if name in side else None for side in shown]
            if texts[0] == texts[1]:
                texts[1] = f"{texts[1]}, with other content"
            yield Edit(f"attribute {name}", *texts)


def _texts(one: NumberedNode, other: NumberedNode) -> Iterator[Edit]:
    if one.proto.doc_string != other.proto.doc_string:
        yield Edit("doc_string", _clipped(one.proto.doc_string) or None, _clipped(other.proto.doc_string) or None)
    old, new = ({entry.key: entry.value for entry in item.proto.metadata_props} for item in (one, other))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield Edit(f"metadata {key}", old.get(key), new.get(key))
    if one.proto.overload != other.proto.overload:
        yield Edit("overload", one.proto.overload or None, other.proto.overload or None)


def attribute_text(attribute: AttributeProto) -> str:
    """An attribute's value as people read it, long ones cut."""
    from onnx import AttributeProto, helper

    from surgery.graph.tensor_types import initializer_type

    if attribute.ref_attr_name:
        return f"the function's {attribute.ref_attr_name}"
    if attribute.type == AttributeProto.TENSOR:
        return f"tensor {initializer_type(attribute.t)}{_small_values(attribute)}"
    try:
        value = helper.get_attribute_value(attribute)
    except ValueError:
        return f"attribute type {attribute.type}"
    if isinstance(value, bytes):
        return _clipped(value.decode("utf-8", errors="backslashreplace"))
    if isinstance(value, int | float):
        return f"{value:.9g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value):
        return _clipped(f"[{', '.join(f'{each:.9g}' if isinstance(each, float) else str(each) for each in value)}]")
    return _clipped(" ".join(str(value).split()))


def _small_values(attribute: AttributeProto) -> str:
    from onnx import numpy_helper

    if attribute.t.data_location == 1 or sum(attribute.t.dims) > 8:
        return ""
    try:
        return f" = {numpy_helper.to_array(attribute.t).tolist()}"
    except (ValueError, TypeError):
        return ""


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 12]} [{len(text)} chars]"


def layer_of(item: NumberedNode, scope: NumberedGraph) -> int | None:
    """The layer that a node's names speak of, or the cache that it makes."""
    outputs = [scope.names[value] for value in item.outputs if value != MISSING]
    for name in (item.proto.name, *outputs):
        if (layer := layer_in(name)) is not None:
            return layer
    slot = next((found for name in outputs if (found := slot_of_name(name)) is not None), None)
    return slot[0] if slot else None


def layer_in(name: str) -> int | None:
    """The layer that a name speaks of.

    >>> layer_in("/model/layers.3/mlp/Mul"), layer_in("model_layers_12_attn"), layer_in("lm_head")
    (3, 12, None)
    """
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def renamed_dims(declared: TensorType, dims: Mapping[str, str]) -> TensorType:
    """A type with its symbolic dimensions under their new names."""
    if declared.shape is None or not dims:
        return declared
    shape = tuple([dims.get(dim, dim) if isinstance(dim, str) else dim for dim in declared.shape])
    return TensorType(declared.dtype, shape)
