"""The interface section: graph inputs and outputs, and the names of symbolic dimensions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Literal

from surgery.compare.alignment import makers
from surgery.compare.comparison import ChangeVerb, InterfaceChange, InterfaceValue
from surgery.compare.node_changes import Compared, renamed_dims
from surgery.compare.numbered_graph import NumberedGraph, Port, node_place
from surgery.graph.tensor_types import tensor_type


def renamed_dimensions(compared: Compared) -> dict[str, str]:
    """Old -> new name of each symbolic dimension that has another name wherever it stands, and no other one has."""
    news: dict[str, set[str]] = defaultdict(set)
    olds: dict[str, set[str]] = defaultdict(set)
    for scopes in compared.all():
        for one, other in scopes.alignment.values.items():
            before, after = scopes.before.types.get(one), scopes.after.types.get(other)
            if before is None or after is None or before.shape is None or after.shape is None:
                continue
            for old, new in zip(before.shape, after.shape, strict=False):
                if isinstance(old, str) and isinstance(new, str):
                    news[old].add(new)
                    olds[new].add(old)
    pairs = ((old, next(iter(found))) for old, found in sorted(news.items()) if len(found) == 1)
    return {old: new for old, new in pairs if old != new and len(olds[new]) == 1}


def interface_changes(
    compared: Compared, dims: Mapping[str, str], main: tuple[str, str]
) -> tuple[InterfaceChange, ...]:
    """Dimensions, inputs, outputs: those of AFTER in its order, then the removed ones in BEFORE's.

    `main` are the roles of the graphs whose interfaces are compared: of a pair the decoder's.
    """
    used = _interface_dims(compared.before)
    dimensions = [
        InterfaceChange("renamed", "dimension", InterfaceValue(old, ""), InterfaceValue(new, ""))
        for old, new in dims.items()
        if old in used
    ]
    return (*dimensions, *_inputs(compared, dims, main), *_outputs(compared, dims))


def _interface_dims(scope: NumberedGraph) -> set[str]:
    ports = (*scope.inputs, *scope.outputs, *scope.joined)
    types = [tensor_type(port.declaration) for port in ports if port.declaration is not None]
    return {dim for found in types if found and found.shape for dim in found.shape if isinstance(dim, str)}


def _inputs(compared: Compared, dims: Mapping[str, str], main: tuple[str, str]) -> Iterator[InterfaceChange]:
    """Inputs of the graphs that both sides have: the main one, and beside it those of the same role."""
    roles = [
        {node_place(item.role, own) for item in scope.items} for scope, own in zip(_scopes(compared), main, strict=True)
    ]
    both = (roles[0] & roles[1]) | {"main"}
    pairs = _input_pairs(compared)
    twins = {id(new): old for old, new in pairs}
    computed = _computed_inside(compared)
    for port in (*compared.after.inputs, *compared.after.joined):
        old = twins.get(id(port))
        here = node_place(port.role, main[1])
        if here not in both:
            continue
        if old is not None and node_place(old.role, main[0]) == here:
            if (change := _port_change("input", old, port, dims)) is not None:
                yield change
            continue
        note = f"it was the input of {old.role}" if old is not None else computed[1].get(port.value, "")
        yield InterfaceChange("added", "input", None, InterfaceValue(port.name, port.type), _of(here, note))
    mates = {id(old): new for old, new in pairs}
    for port in (*compared.before.inputs, *compared.before.joined):
        new = mates.get(id(port))
        here = node_place(port.role, main[0])
        if here in both and (new is None or node_place(new.role, main[1]) != here):
            note = f"it is the input of {new.role} now" if new is not None else computed[0].get(port.value, "")
            yield InterfaceChange("removed", "input", InterfaceValue(port.name, port.type), None, _of(here, note))


def _scopes(compared: Compared) -> tuple[NumberedGraph, NumberedGraph]:
    return compared.before, compared.after


def _of(here: str, note: str) -> str:
    return note if here == "main" else "; ".join(filter(None, (f"of {here}", note)))


def _input_pairs(compared: Compared) -> list[tuple[Port, Port]]:
    theirs = {port.name: port for port in compared.after.joined}
    joined = [(port, theirs[port.name]) for port in compared.before.joined if port.name in theirs]
    return [*compared.alignment.inputs, *joined]


def _computed_inside(compared: Compared) -> tuple[dict[int, str], dict[int, str]]:
    """Of inputs that the embedding graph of a pair feeds, on one side: what became of them on the other."""
    values = compared.alignment.values
    back = {new: old for old, new in values.items()}
    gone = {p.value: "it is computed inside now" for p in compared.before.joined if p.value in values}
    come = {p.value: "it was computed inside" for p in compared.after.joined if p.value in back}
    return gone, come


def _outputs(compared: Compared, dims: Mapping[str, str]) -> Iterator[InterfaceChange]:
    made = makers(compared.before), makers(compared.after)
    twins = {id(new): old for old, new in compared.alignment.outputs}
    for port in compared.after.outputs:
        old = twins.get(id(port))
        if old is None:
            note = _alias(compared.after, made[1], port)
            yield InterfaceChange("added", "output", None, InterfaceValue(port.name, port.type), note)
            continue
        note = ""
        if compared.alignment.values.get(old.value, port.value) != port.value:  # what it was is another value now
            sources = _source(compared.after, made[1], port), _source(compared.before, made[0], old)
            note = f"it comes from {sources[0]}, not from {sources[1]}"
        if (change := _port_change("output", old, port, dims, note)) is not None:
            yield change
    kept = {id(old) for old, _ in compared.alignment.outputs}
    for port in compared.before.outputs:
        if id(port) not in kept:
            note = _alias(compared.before, made[0], port)
            yield InterfaceChange("removed", "output", InterfaceValue(port.name, port.type), None, note)


def _port_change(
    kind: Literal["input", "output"], old: Port, new: Port, dims: Mapping[str, str], note: str = ""
) -> InterfaceChange | None:
    declared = [tensor_type(port.declaration) if port.declaration is not None else None for port in (old, new)]
    same_type = old.type == new.type
    if declared[0] is not None and declared[1] is not None:
        same_type = renamed_dims(declared[0], dims) == declared[1]
    if same_type and old.name == new.name and not note:
        return None
    verb: ChangeVerb = "renamed" if same_type and not note else "changed"
    return InterfaceChange(verb, kind, InterfaceValue(old.name, old.type), InterfaceValue(new.name, new.type), note)


def _alias(scope: NumberedGraph, made: Mapping[int, int], port: Port) -> str:
    """Of an output that an Identity makes: what it is a copy of."""
    at = made.get(port.value)
    if at is None or scope.items[at].operator != "Identity":
        return ""
    return f"alias of {scope.name(scope.items[at].inputs[0])!r}"


def _source(scope: NumberedGraph, made: Mapping[int, int], port: Port) -> str:
    at = made.get(port.value)
    if at is None:
        return f"{scope.name(port.value)!r}, which no node makes"
    item = scope.items[at]
    return f"{item.operator} {item.proto.name or scope.name(port.value)!r}"
