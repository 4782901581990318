"""A comparison in words: the same sections and rows for every format that people read.

A section has `rows`, which a reviewer takes in at a glance, and `details`, which are complete: like things share a
row (forty caches, twenty layers), and their details name each of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from surgery.compare.comparison import (
    ChangeVerb,
    Comparison,
    FieldChange,
    FileChange,
    InterfaceChange,
    LayerCache,
    LayerChange,
    NodeChange,
    NodeGroup,
    PassFinding,
    Reason,
    WeightChange,
    tally,
)
from surgery.compare.impact import COST_HEADS, TITLES, cost_cells, impact_of, speed_notes
from surgery.compare.node_changes import layer_in
from surgery.printing import size

VERB_MARKS: dict[str, str] = {
    "added": "+",
    "removed": "-",
    "changed": "~",
    "renamed": "=",
    "moved": ">",
    "skipped": " ",
}
LEGEND = "+ added, - removed, ~ changed, = renamed, > moved"
NONE = "(none)"

FEW = 6
"""Up to so many like things have a row each."""

SMALL = 64
"""Bytes of a tensor inside the graph up to which it is a constant, an axis or a shape say, and not a weight."""


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One line: `kind` and `note` are our words, `name` and `change` may be anything that a model says."""

    mark: str
    kind: str
    name: str
    change: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class ReportSection:
    """`lead` is a sentence about the whole; `details` is empty where the rows say it all."""

    title: str
    lead: str
    rows: tuple[ReportRow, ...]
    details: tuple[ReportRow, ...] = ()


def sections_of(comparison: Comparison) -> tuple[ReportSection, ...]:
    """The sections after the verdict, in their order."""
    return (
        _costs(comparison),
        _speed(comparison),
        _interface(comparison),
        _caches(comparison.layers),
        _fields("Opsets and metadata", comparison.metadata),
        _nodes(comparison),
        _weights(comparison),
        _config(comparison),
        _numbers(comparison),
    )


def title(comparison: Comparison) -> str:
    """One line: what the change means, and the two labels."""
    ignored = f", {' and '.join(comparison.ignored)} ignored" if comparison.ignored else ""
    return (
        f"{comparison.before.label} -> {comparison.after.label}: {TITLES[impact_of(comparison).level].lower()}{ignored}"
    )


# ---- costs


def _costs(comparison: Comparison) -> ReportSection:
    cells = zip(COST_HEADS, cost_cells(comparison), strict=True)
    return ReportSection("Costs", "", tuple(ReportRow(" ", head, text) for head, text in cells if text))


def _speed(comparison: Comparison) -> ReportSection:
    rows = tuple(ReportRow("~", "", subject, change) for subject, change in speed_notes(comparison))
    return ReportSection("Speed", "what the graphs say of it; nothing was measured" if rows else "", rows)


# ---- interface


def _interface(comparison: Comparison) -> ReportSection:
    changes = comparison.interface
    rows: list[ReportRow] = []
    for _, run in groupby(sorted(changes, key=_interface_rank), key=_family):
        rows += _interface_rows(list(run))
    details = tuple(_interface_row(change) for change in changes) if len(rows) < len(changes) else ()
    return ReportSection("Interface", tally(changes) if changes else "", tuple(rows), details)


_CACHE = re.compile(r"^(?P<head>.*?)(?<!\d)(?P<layer>\d++)(?P<middle>\D*?)(?P<kind>key|value)(?P<tail>.*)$")


def _interface_rank(change: InterfaceChange) -> tuple[int, int, Hashable]:
    """Dimensions, inputs, outputs; the caches of each behind the others, as one family."""
    kinds = ("dimension", "input", "output")
    verbs = tuple(VERB_MARKS)
    shape = _shape(change)
    return kinds.index(change.kind), verbs.index(change.verb), ("" if shape is None else shape)


def _shape(change: InterfaceChange) -> str | None:
    """A cache's name without its layer and its kind, on both sides; None for any other value."""
    sides = [value.name for value in (change.before, change.after) if value is not None]
    matches = [_CACHE.match(name) for name in sides]
    if not all(matches):
        return None
    return " ".join(f"{m['head']}*{m['middle']}*{m['tail']}" for m in matches if m)


def _family(change: InterfaceChange) -> Hashable:
    return change.kind, change.verb, _shape(change)


def _interface_rows(run: list[InterfaceChange]) -> Iterator[ReportRow]:
    if _shape(run[0]) is None or len(run) <= 2:
        yield from (_interface_row(change) for change in run)
        return
    types = _merged(list(dict.fromkeys(_types(change) for change in run)))
    notes = {_note(change) for change in run}
    note = notes.pop() if len(notes) == 1 else _passes(change.reasons for change in run)
    name = _folded([(change.after or change.before).name for change in run])  # type: ignore[union-attr]
    if run[0].verb == "renamed":
        name = f"{_folded([change.before.name for change in run if change.before])} -> {name}"
    yield ReportRow(VERB_MARKS[run[0].verb], f"{len(run)} {run[0].kind}s", name, types, note)


def _merged(types: Sequence[str]) -> str:
    """Types that differ in a size as one: `FLOAT [batch_size, 1, past_sequence_length, 256|512]`."""
    words = [re.split(r"([,\] ]+)", text) for text in types]
    if len({len(each) for each in words}) != 1:
        return " | ".join(types)
    return "".join("|".join(dict.fromkeys(column)) for column in zip(*words, strict=True))


def _folded(names: Sequence[str]) -> str:
    """`past_key_values.{5-9}.{key,value}`"""
    matches = [match for name in names if (match := _CACHE.match(name))]
    layers = ranges(sorted({int(match["layer"]) for match in matches}))
    kinds = ",".join(dict.fromkeys(match["kind"] for match in matches))
    first = matches[0]
    kind = f"{{{kinds}}}" if "," in kinds else kinds
    return f"{first['head']}{{{layers}}}{first['middle']}{kind}{first['tail']}"


def _interface_row(change: InterfaceChange) -> ReportRow:
    names = [value.name for value in (change.before, change.after) if value is not None]
    return ReportRow(VERB_MARKS[change.verb], change.kind, _arrow(names), _types(change), _note(change))


def _types(change: InterfaceChange) -> str:
    return _arrow([value.type for value in (change.before, change.after) if value is not None])


def _note(change: InterfaceChange) -> str:
    return "; ".join(part for part in (change.note, _reasons(change.reasons)) if part)


# ---- KV caches


def _caches(layers: Sequence[LayerChange]) -> ReportSection:
    """Layers with the same cache and the same change share a row."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for layer in layers:
        groups.setdefault(_cache_words(layer), []).append(layer.index)
    rows = tuple(
        ReportRow(mark, "layer" if len(found) == 1 else "layers", ranges(found), words, note)
        for (mark, words, note), found in groups.items()
    )
    sources = sum(1 for layer in layers if (now := layer.after or layer.before) and now.owner == layer.index)
    lead = f"{len(layers)} layers, {sources} of them have a cache of their own" if layers else ""
    details = [
        ReportRow("~", "layer", str(layer.index), str(edit), _reasons(layer.reasons))
        for layer in layers
        for edit in layer.edits
    ]
    return ReportSection("KV caches", lead, rows, tuple(details) if len(details) > len(rows) else ())


def _cache_words(layer: LayerChange) -> tuple[str, str, str]:
    """Mark, description and reasons; a part that changed as `old -> new`."""
    sides = [_cache(cache, layer.index) for cache in (layer.before, layer.after) if cache is not None]
    parts = [_arrow([part for part in pair if part]) for pair in zip(*sides, strict=True)]
    if len(sides) == 2:
        old, new = sides[0][_ALIAS], sides[1][_ALIAS]
        if old != new and not (old and new):
            parts[_ALIAS] = f"now with {new}" if new else f"no longer with {old}"
        if sides[0][_NAMES] == sides[1][_NAMES]:
            parts[_NAMES] = ""
    mark = "+" if layer.before is None else "-" if layer.after is None else "~" if layer.changed else ""
    return mark, ", ".join(part for part in parts if part), _reasons(layer.reasons)


_NAMES, _ALIAS = 3, 4
"""Places of the names of past and present, and of the alias, among a cache's words."""


def _cache(cache: LayerCache, index: int) -> tuple[str, ...]:
    """`sliding 512`, `1 KV head of 256`, `own cache`, names, alias, operator; empty where unknown or as expected."""
    window = f" {cache.window}" if cache.window is not None else ""
    sizes = ""
    if cache.kv_heads is not None and cache.head_size is not None:
        sizes = f"{cache.kv_heads} KV head{'s' if cache.kv_heads > 1 else ''} of {cache.head_size}"
    owner = "" if cache.owner is None else "own cache" if cache.owner == index else f"reads layer {cache.owner}'s cache"
    number = index if cache.owner is None else cache.owner
    names = [_without_number(name, number) for name in (cache.past, cache.present) if name]
    alias = f"an alias of it, {_without_number(cache.alias, index)}" if cache.alias else ""
    attention = f"{cache.attention}{window}" if cache.attention else ""
    return attention, sizes, owner, " and ".join(names), alias, cache.operator


def _without_number(text: str, index: int) -> str:
    """`N` for a layer's number in names: `/layers.5/`, `present.5.key`, `_layers_5_`; other numbers stay."""
    return re.sub(rf"(?:(?<=[./])|(?<=layers_)){index}(?=[._/,;: ]|$)", "N", text)


# ---- metadata and configuration


def _fields(title: str, changes: Sequence[FieldChange]) -> ReportSection:
    rows = tuple(_field(change, short=True) for change in changes)
    details = tuple(_field(change, short=False) for change in changes)
    return ReportSection(title, tally(changes) if changes else "", rows, details if details != rows else ())


def _config(comparison: Comparison) -> ReportSection:
    """A file that only one side has is one row."""
    section = _fields("genai_config.json", comparison.config)
    kinds = comparison.before.kind, comparison.after.kind
    if not comparison.config or kinds == ("folder", "folder"):
        return section
    mark = VERB_MARKS[comparison.config[0].verb]
    row = ReportRow(mark, "", "genai_config.json", f"{len(comparison.config)} keys")
    return ReportSection(section.title, "", (row,), section.details or section.rows)


def _field(change: FieldChange, *, short: bool) -> ReportRow:
    values = [value for value in (change.before, change.after) if value is not None]
    text = _arrow([_short(value) if short else value for value in values])
    return ReportRow(VERB_MARKS[change.verb], "", change.key, text, _reasons(change.reasons))


def _short(value: str, most: int = 60) -> str:
    return value if len(value) <= most else f"{value[: most - 20]}... ({len(value)} characters)"


# ---- nodes


def _nodes(comparison: Comparison) -> ReportSection:
    nodes = comparison.nodes
    rows: list[ReportRow] = []
    told: set[str] = set()
    for group in nodes.groups:
        rows += _group_rows(group)
        for name in group.by:
            if name not in told:
                rows += _findings(comparison, name)
                told.add(name)
    changes = list(nodes)
    details = tuple(_node(change) for change in changes)
    lead = f"{tally(changes)}; {nodes.unchanged} unchanged" if changes else f"{nodes.unchanged} unchanged"
    return ReportSection("Nodes", lead, tuple(rows), details if len(details) > len(rows) or any(rows) else ())


def _group_rows(group: NodeGroup) -> Iterator[ReportRow]:
    for verb in dict.fromkeys(verb for verb, _ in group.counts):
        changes = [change for change in group.changes if change.verb == verb]
        rows = _across_layers(changes) if verb == "changed" else []
        if rows and len(rows) <= FEW:
            yield from rows
        else:
            yield _counted(group, verb, changes)


def _across_layers(changes: Sequence[NodeChange]) -> list[ReportRow]:
    """A row per change; changes that differ in the number of their layer alone share one, with N for the number."""
    found: dict[tuple[str, ...], list[NodeChange]] = {}
    for change in changes:
        row = _node(change, brief=True)
        texts = [row.name, row.change, row.note]
        if change.layer is not None:
            texts = [_without_number(text, change.layer) for text in texts]
        found.setdefault((row.kind, *texts), []).append(change)
    return _same_types([_shared(key, same) for key, same in found.items()])


def _same_types(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Rows with one row for nodes that differ in nothing but the same declared type."""
    found: dict[Hashable, list[ReportRow]] = {}
    for index, row in enumerate(rows):
        alone = not row.change.startswith("type of output") or ";" in row.change
        found.setdefault(index if alone else (row.change, row.note), []).append(row)
    return [
        same[0]
        if len(same) == 1
        else replace(same[0], kind=f"{len(same)} nodes", name=", ".join(row.kind for row in same))
        for same in found.values()
    ]


def _shared(key: tuple[str, ...], changes: Sequence[NodeChange]) -> ReportRow:
    if len(changes) == 1:
        return _node(changes[0], brief=True)
    kind, name, change, note = key
    layers = ranges(sorted({each.layer for each in changes if each.layer is not None}))
    return ReportRow(
        VERB_MARKS[changes[0].verb],
        f"{len(changes)} {kind}",
        name,
        change,
        "; ".join(filter(None, (f"N = {layers}", note))),
    )


def _counted(group: NodeGroup, verb: ChangeVerb, changes: Sequence[NodeChange]) -> ReportRow:
    counts = Counter(_operators(change) for change in changes)
    ordered = sorted(counts, key=lambda operator: (-counts[operator], operator))
    notes = [", ".join(group.by)]
    if verb == "moved":
        notes.append(f"from {changes[0].edits[0].before}")
    nodes = f"{len(changes)} node{'s' if len(changes) > 1 else ''}"
    operators = ", ".join(f"{counts[operator]} {operator}" for operator in ordered)
    return ReportRow(VERB_MARKS[verb], _where(group), nodes, operators, "; ".join(filter(None, notes)))


def _operators(change: NodeChange) -> str:
    """A node's operator, and the one that it was."""
    was = next((edit.before for edit in change.edits if edit.what == "operator"), None)
    return f"{was} -> {change.operator}" if was else change.operator


def _where(group: NodeGroup) -> str:
    scope = f"{group.changes[0].scope}, " if group.changes[0].scope else ""
    if not group.layers:
        return f"{scope}outside of layers"
    return f"{scope}layer{'s' if len(group.layers) > 1 else ''} {ranges(group.layers)}"


def _node(change: NodeChange, *, brief: bool = False) -> ReportRow:
    """`brief` says of a node with another operator no more than that: its attributes and inputs follow from it."""
    names = [name for name in (change.before, change.after) if name is not None]
    scope = f" in {change.scope}" if change.scope else ""
    edits = [edit for edit in change.edits if edit.what != "name"]
    if brief and edits and edits[0].what == "operator":
        edits = edits[:1]
    text = "; ".join(map(str, edits))
    return ReportRow(
        VERB_MARKS[change.verb], f"{change.operator}{scope}", _arrow(names), text, _reasons(change.reasons)
    )


def _findings(comparison: Comparison, name: str) -> Iterator[ReportRow]:
    """What a pass said that no change shows: about nodes as a whole."""
    shown = {reason for changes in _all_reasons(comparison) for reason in changes}
    for record in comparison.passes:
        if record.name == name:
            told = [f for f in record.findings if f.verb != "skipped" and Reason(name, f.reason) not in shown]
            yield from (_finding(name, finding) for finding in told[:FEW])


def _finding(name: str, finding: PassFinding) -> ReportRow:
    return ReportRow(" ", "", finding.subject, finding.reason, name)


def _all_reasons(comparison: Comparison) -> Iterator[tuple[Reason, ...]]:
    for changes in (comparison.interface, comparison.metadata, comparison.nodes, comparison.weights.changes):
        yield from (change.reasons for change in changes)


# ---- weights


def _weights(comparison: Comparison) -> ReportSection:
    found = comparison.weights
    delta = comparison.after.weight_bytes - comparison.before.weight_bytes
    ways = {"reference": "by the digest of their file, offset and length", "digest": "by SHA-256 of their content"}
    lead = f"{found.unchanged} unchanged, compared {ways[found.method]}; {signed(delta)} in all"
    rows = [_weights_row(same) for same in _like_weights(found.changes)]
    brief = rows if len(rows) <= 2 * FEW else [*rows[:FEW], *_rest(found.changes, rows[:FEW])]
    if (fewer := found.vocabulary) is not None:
        what = f"{fewer.before:,} -> {fewer.after:,}, rows equal"
        note = f"{len(fewer.tensors)} weights, by a digest of the rows of the tokens that stay"
        brief.insert(0, ReportRow("~", "vocabulary", what, signed(fewer.delta), note))
    brief += [_file(file) for file in found.files]
    brief += [ReportRow("?", "not compared", reason) for reason in found.why]
    details = tuple(_weight(change) for change in found.changes) if len(rows) < len(found.changes) else ()
    return ReportSection("Weights and files", "; ".join((lead, *found.basis)), tuple(brief), details)


def _like_weights(changes: Sequence[WeightChange]) -> list[list[WeightChange]]:
    """Small constants of one verb and pass together, weights of several layers together; the most bytes first."""
    found: dict[Hashable, list[WeightChange]] = {}
    for change in changes:
        sides = [side for side in (change.before, change.after) if side is not None]
        by = tuple(reason.by for reason in change.reasons)
        if all(side.file is None and side.size <= SMALL for side in sides):
            found.setdefault((change.verb, by), []).append(change)
        else:
            shape = tuple((_any_layer(side.name), side.type) for side in sides)
            found.setdefault((change.verb, by, shape), []).append(change)
    return sorted(found.values(), key=lambda same: -abs(sum(change.delta for change in same)))


def _weights_row(same: Sequence[WeightChange]) -> ReportRow:
    first = _weight(same[0])
    if len(same) == 1:
        return first
    sides = [side for change in same for side in (change.before, change.after) if side is not None]
    by = _passes(change.reasons for change in same)
    delta = signed(sum(change.delta for change in same))
    if all(side.file is None and side.size <= SMALL for side in sides):
        return ReportRow(first.mark, "constants", f"{len(same)} {same[0].verb}", delta, by)
    layers = ranges(sorted({layer for side in sides if (layer := layer_in(side.name)) is not None}))
    types = _arrow([side.type for side in (same[0].before, same[0].after) if side is not None])
    note = "; ".join(filter(None, (f"N = {layers}", by)))
    return ReportRow(first.mark, f"{len(same)} weights", _any_layer(first.name), f"{types}, {delta}", note)


def _any_layer(name: str) -> str:
    layer = layer_in(name)
    return name if layer is None else _without_number(name, layer)


def _rest(changes: Sequence[WeightChange], shown: Sequence[ReportRow]) -> Iterator[ReportRow]:
    """One row a verb for what the rows that are shown leave out."""
    left = [change for same in _like_weights(changes) if _weights_row(same) not in shown for change in same]
    for verb in VERB_MARKS:
        found = [change for change in left if change.verb == verb]
        if found:
            yield ReportRow(
                VERB_MARKS[verb], "others", f"{len(found)} {verb}", signed(sum(change.delta for change in found))
            )


def _file(file: FileChange) -> ReportRow:
    sizes = " -> ".join(NONE if count is None else size(count) for count in (file.before, file.after))
    if file.before is None or file.after is None:
        return ReportRow("+" if file.before is None else "-", "file", file.title, sizes, signed(file.delta))
    states = {True: ("", "same content"), False: ("~", "other content"), None: ("", "not compared as a whole")}
    mark, state = states[file.same]
    return ReportRow(mark, "file", file.title, sizes, state)


def _weight(change: WeightChange) -> ReportRow:
    sides = [side for side in (change.before, change.after) if side is not None]
    delta = f", {signed(change.delta)}" if change.verb != "renamed" else ""
    types = f"{_arrow([side.type for side in sides])}{delta}"
    return ReportRow(
        VERB_MARKS[change.verb], "weight", _arrow([side.name for side in sides]), types, _reasons(change.reasons)
    )


# ---- numbers

NOT_MEASURED = "not measured between these very graphs and weights; {}"


def _numbers(comparison: Comparison) -> ReportSection:
    if (numbers := comparison.numbers) is None and comparison.computes_the_same:
        return ReportSection("Numbers", "identical: graphs and weights are the same", ())
    if numbers is None:
        return ReportSection("Numbers", NOT_MEASURED.format(comparison.proven or "nothing is on record"), ())
    rows = [ReportRow("ok" if gate.passed else "FAIL", gate.section, gate.name, gate.reading) for gate in numbers.gates]
    failed = tuple(row for row in rows if row.mark == "FAIL")
    summary = ReportRow("ok" if numbers.passed else "FAIL", "summary", numbers.summary)
    return ReportSection("Numbers", numbers.source, (summary, *failed), tuple(rows))


# ---- words


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 5`"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def signed(count: int) -> str:
    """A difference in bytes with its sign."""
    return "±0 bytes" if count == 0 else f"{'+' if count > 0 else '-'}{size(abs(count))}"


def _arrow(sides: Sequence[str]) -> str:
    return " -> ".join(dict.fromkeys(sides))


def _reasons(reasons: Iterable[Reason]) -> str:
    return "; ".join(str(reason) for reason in reasons)


def _passes(found: Iterable[Iterable[Reason]]) -> str:
    return ", ".join(dict.fromkeys(reason.by for reasons in found for reason in reasons))
