"""Comparing two sides: the one call that makes a Comparison."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import replace

from surgery.compare.comparison import (
    ASPECTS,
    Aspect,
    Comparison,
    FieldChange,
    GraphSummary,
    InterfaceChange,
    LayerChange,
    NodeChange,
    NodeGroup,
    Nodes,
    SideSummary,
    WeightChange,
)
from surgery.compare.costs import costs
from surgery.compare.interface import interface_changes, renamed_dimensions
from surgery.compare.kv_caches import layers
from surgery.compare.metadata import config_changes, declaration_changes, metadata_changes
from surgery.compare.node_changes import Compared, Differ, compare_graphs
from surgery.compare.numbered_graph import NumberedGraph, of_function, of_graphs
from surgery.compare.other_fields import other_changes
from surgery.compare.provenance import PassFinder, Provenance, key, recorded
from surgery.compare.side_files import side_file_changes
from surgery.compare.subjects import Subject
from surgery.compare.tensor_contents import Contents, Manifests, WeightsBy
from surgery.compare.vocabulary_rows import RowsOfTokens
from surgery.compare.weight_changes import bytes_of_tensors, weights
from surgery.graph.changes import ModelThing, ThingKind


def compare(
    before: Subject,
    after: Subject,
    *,
    weights_by: WeightsBy = "auto",
    ignore: Collection[Aspect] = (),
    provenance: Provenance | None = None,
    manifests: Manifests = "claimed",
) -> Comparison:
    """What differs between two sides. No weight is loaded; `weights_by="digest"` reads them in portions.

    `provenance` says who made the changes and what was measured; without it, AFTER's folder may have that on record.
    `manifests` says what becomes of what they say of data files; those that this process wrote need no check.
    Near-linear in nodes: 1,400 take 0.3 s, 20,000 take 5 s. Raises WeightError for external data that no file can hold.
    """
    contents = Contents(before, after, weights_by, manifests)
    scopes = _scope(before), _scope(after)
    compared = compare_graphs(*scopes, contents.labels, outer=_undefined(*scopes))
    compared.bodies += _functions(before, after, contents)
    main = before.main.role, after.main.role
    dims = renamed_dimensions(compared)
    sizes = bytes_of_tensors(compared)
    summaries = _summary(before, sizes[0], contents.digests(0)), _summary(after, sizes[1], contents.digests(1))
    known = provenance or recorded(after, *summaries)
    blamed = _Blamed(known.blame)
    found = weights(compared, contents, RowsOfTokens.of(before, after))
    comparison = Comparison(
        before=summaries[0],
        after=summaries[1],
        interface=tuple(blamed.interface(change) for change in interface_changes(compared, dims, main)),
        layers=tuple(blamed.layer(layer) for layer in layers(before, after)),
        metadata=(
            *(blamed.field(change) for change in metadata_changes(before, after)),
            *declaration_changes(compared),
        ),
        nodes=_nodes(
            compared,
            [blamed.node(*change) for change in Differ(compared, dims, main).changes()],
            [record.name for record in known.passes],
        ),
        weights=replace(
            found,
            changes=tuple(blamed.weight(change) for change in found.changes),
            files=(*found.files, *side_file_changes(before, after)),
        ),
        config=config_changes(before, after),
        numbers=known.numbers,
        passes=known.passes,
        ignored=tuple(aspect for aspect in ASPECTS if aspect in ignore),
        proven=known.proven,
    )
    if comparison.interface or comparison.metadata or comparison.nodes.groups or found.changes or found.vocabulary:
        return comparison
    return replace(comparison, metadata=other_changes(before, after))


class _Blamed:
    """Changes with their reasons: each is asked for by the names that it has on both sides."""

    def __init__(self, blame: PassFinder) -> None:
        self._blame = blame

    def interface(self, change: InterfaceChange) -> InterfaceChange:
        if change.kind == "dimension":
            return change
        kind: ThingKind = change.kind
        things: list[ModelThing] = [(kind, side.name) for side in (change.before, change.after) if side is not None]
        return replace(change, reasons=self._blame.reasons("interface", key(change), things))

    def layer(self, layer: LayerChange) -> LayerChange:
        if not layer.changed:
            return layer
        names = {edit.what: (edit.before, edit.after) for edit in layer.edits}
        things: list[ModelThing] = []
        for what, kind in (("past", "input"), ("present", "output"), ("alias", "output")):
            things += [(kind, name) for name in names.get(what, ()) if name is not None]  # type: ignore[misc]
        return replace(layer, reasons=self._blame.reasons("layers", key(layer), things))

    def field(self, change: FieldChange) -> FieldChange:
        reasons = self._blame.reasons("metadata", key(change), [("field", change.key)])
        return replace(change, reasons=reasons)

    def node(self, change: NodeChange, things: Sequence[ModelThing]) -> NodeChange:
        return replace(change, reasons=self._blame.reasons("nodes", key(change), things))

    def weight(self, change: WeightChange) -> WeightChange:
        things: list[ModelThing] = [("weight", side.name) for side in (change.before, change.after) if side is not None]
        return replace(change, reasons=self._blame.reasons("weights", key(change), things))


def _scope(side: Subject) -> NumberedGraph:
    return of_graphs([(part.role, part.model.graph) for part in side.parts])


def _undefined(before: NumberedGraph, after: NumberedGraph) -> dict[int, int]:
    """Values that nodes read before anything defines them, as broken graphs have: the same where the name is."""
    return {value: after.captured[name] for name, value in before.captured.items() if name in after.captured}


def _functions(before: Subject, after: Subject, contents: Contents) -> list[Compared]:
    """The functions that both sides have, by domain, name and overload."""
    found = []
    ours, theirs = (_scopes_of_functions(side) for side in (before, after))
    for name, scope in ours.items():
        if name in theirs:
            found.append(compare_graphs(scope, theirs[name], contents.labels, f"function {name}"))
    return found


def _scopes_of_functions(side: Subject) -> dict[str, NumberedGraph]:
    return {
        "::".join(part for part in (function.domain, function.name, function.overload) if part): of_function(
            part.role, function
        )
        for part in side.parts
        for function in part.model.proto.functions
    }


def _summary(side: Subject, weight_bytes: int, data: dict[str, str | None]) -> SideSummary:
    graphs = tuple(
        GraphSummary(
            role=part.role,
            file=part.file,
            sha256=hashlib.sha256(part.model.to_bytes()).hexdigest(),
            nodes=len(part.model.graph.node),
            initializers=len(part.model.graph.initializer),
            functions=len(part.model.proto.functions),
        )
        for part in side.parts
    )
    return SideSummary(side.label, side.kind, graphs, weight_bytes, data, costs(side))


def _nodes(compared: Compared, changes: list[NodeChange], passes: Sequence[str]) -> Nodes:
    total = sum(len(scopes.after.items) for scopes in compared.all())
    return Nodes(_groups(changes, passes), total - sum(change.after is not None for change in changes))


def _groups(changes: Iterable[NodeChange], passes: Sequence[str]) -> tuple[NodeGroup, ...]:
    """Changes by pass, in the order of `passes`, and layer; layers in which the same happened share a group."""
    by_layer: dict[tuple[Hashable, int | None], list[NodeChange]] = {}
    for change in changes:
        kind: Hashable = (tuple(reason.by for reason in change.reasons), change.verb == "moved", change.scope)
        by_layer.setdefault((kind, change.layer), []).append(change)
    joined: dict[Hashable, list[NodeChange]] = {}
    for (kind, layer), found in by_layer.items():
        what = Counter((c.verb, c.operator, tuple(edit.what for edit in c.edits)) for c in found)
        joined.setdefault((kind, frozenset(what.items()) if layer is not None else None), []).extend(found)
    order = {name: index for index, name in enumerate(passes)}
    groups = [_group(found) for found in joined.values()]
    return tuple(sorted(groups, key=lambda group: ([order.get(name, len(order)) for name in group.by], group.layers)))


def _group(changes: list[NodeChange]) -> NodeGroup:
    layers = sorted({change.layer for change in changes if change.layer is not None})
    return NodeGroup(tuple(reason.by for reason in changes[0].reasons), tuple(layers), tuple(changes))
