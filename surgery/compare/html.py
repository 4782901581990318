"""The report as one HTML page that needs nothing beside itself: no network, no other file, and scripting for the
filter over nodes alone.

Its content security policy allows no request, and no script and no style but its own, named by their hashes: a name
in a model that got past the escaping could still do nothing. The same comparison gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TypeVar
from xml.etree.ElementTree import Element

from surgery.compare.comparison import (
    VERBS,
    Comparison,
    Edit,
    FieldChange,
    FileChange,
    InterfaceChange,
    InterfaceValue,
    LayerChange,
    NodeChange,
    NodeGroup,
    Numbers,
    Reason,
    SideSummary,
    Weight,
    WeightChange,
    tally,
)
from surgery.compare.layer_picture import initial, layer_picture
from surgery.compare.markup import Child, element, rendered
from surgery.compare.sections import ranges, signed
from surgery.printing import size

FOLDED = 12
"""A list longer than this is closed until it is asked for."""

LONG, BEGINNING = 240, 100
"""Characters: a longer value shows its beginning, and the rest when it is asked for."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class _Section:
    id: str
    title: str
    badge: str
    body: Sequence[Child]

    @property
    def count(self) -> str | None:
        """The badge in a word: how many changes, or what it says where it counts none."""
        numbers = re.findall(r"\d+", self.badge.partition(" of ")[0])
        return f" {sum(map(int, numbers)):,}" if numbers else f" {self.badge}" if self.badge else None

    def element(self) -> Element:
        heading = element("h2", self.title, element("span", self.badge, class_="badge") if self.badge else None)
        body = self.body or [element("p", "(none)", class_="none")]
        return element("section", heading, *body, id=self.id, aria_label=self.title)


def html(found: Comparison) -> str:
    """The page, ending in a newline."""
    sections = [
        _Section("interface", "Interface", _badge(found.interface), _interface(found.interface)),
        _Section("caches", "KV caches", _changed_layers(found.layers), _caches(found.layers, list(found.nodes))),
        _Section("metadata", "Opsets and metadata", _badge(found.metadata), _fields(found.metadata)),
        _Section("nodes", "Nodes", _badge(found.nodes), _nodes(found)),
        _Section("weights", "Weights and files", _weights_badge(found), _weights(found)),
        _Section("config", "genai_config.json", _badge(found.config), _fields(found.config)),
        _Section("numbers", "Numbers", _numbers_badge(found.numbers), _numbers(found.numbers)),
    ]
    style, script = _resource("page.css"), _resource("page.js")
    links = [element("li", element("a", s.title, element("small", s.count), href=f"#{s.id}")) for s in sections]
    title = f"{found.before.label} → {found.after.label}"
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", f"diff: {title}"),
            element("style", style),
        ),
        element(
            "body",
            element("a", "Skip to the report", href="#report", class_="skip"),
            _header(found),
            element("nav", element("ul", *links), aria_label="Sections"),
            element("main", *(section.element() for section in sections), id="report"),
            element("footer", "Written by gemma4-surgery diff. The same two models give the same page."),
            element("script", script),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{rendered(page)}\n"


def _resource(name: str) -> str:
    return files("surgery.compare").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"


# Head of the page


def _header(found: Comparison) -> Element:
    chips = [element("li", part, class_=f"chip {_tone(part)}") for part in found.verdict.split(" · ")]
    return element(
        "header",
        element("p", "gemma4-surgery diff", class_="kicker"),
        element("h1", found.before.label, element("span", " → ", class_="arrow"), found.after.label),
        element("ul", *chips, class_="verdict", aria_label="Verdict"),
        element("div", _side("before", found.before), _side("after", found.after), class_="sides"),
    )


def _tone(part: str) -> str:
    """How a part of the verdict looks: nothing to see, something to read, proof, or alarm."""
    if "FAIL" in part or "not compared" in part:
        return "bad"
    if part.startswith("numbers identical") or part.startswith("same"):
        return "good"
    return "quiet" if part.endswith("unchanged") or part.startswith(("0 ", "numbers")) else "loud"


def _side(which: str, side: SideSummary) -> Element:
    rows = [
        element(
            "p",
            element("b", graph.file),
            f" {_count(graph.nodes, 'node')}, {_count(graph.initializers, 'initializer')}"
            + (f", {_count(graph.functions, 'function')}" if graph.functions else ""),
            element("code", f" sha256 {graph.sha256[:12]}", title=graph.sha256, class_="dim"),
        )
        for graph in side.graphs
    ]
    head = element("h2", which, element("span", f" {side.kind}, {size(side.weight_bytes)} of weights", class_="dim"))
    return element("div", head, *rows, class_="card")


# Sections


def _interface(changes: Sequence[InterfaceChange]) -> list[Child]:
    """Changes that differ only in a layer's number, and in key or value, stand in one row."""
    rows = []
    for group in _alike(changes, _interface_family):
        before, after = ([getattr(change, side) for change in group] for side in ("before", "after"))
        rows.append(_row(group[0].verb, group[0].kind, _values(before), _values(after), _interface_why(group)))
    return [_table(("", "", "before", "after", "why"), rows, "stacked interface")] if rows else []


def _interface_family(change: InterfaceChange) -> Hashable:
    sides = [
        (re.sub(r"key|value", "", _without_numbers(value.name)), value.type) if value else None
        for value in (change.before, change.after)
    ]
    return change.verb, change.kind, *sides, tuple(reason.by for reason in change.reasons)


def _interface_why(group: Sequence[InterfaceChange]) -> Child:
    """What is said of all of them; where that differs, who did it, and each one's on demand."""
    told = [[text for text in (change.note, *_told(change.reasons)) if text] for change in group]
    if all(texts == told[0] for texts in told):
        return _paragraphs(told[0])
    by = ", ".join(dict.fromkeys(reason.by for reason in group[0].reasons))
    names = [(change.after or change.before or InterfaceValue("", "")).name for change in group]
    each = [
        element("li", element("code", name), f": {'; '.join(texts)}") for name, texts in zip(names, told, strict=True)
    ]
    summary = element("summary", by or "each has its own", class_="why")
    return element("details", summary, element("ul", *each, class_="why"))


def _values(values: Sequence[InterfaceValue | None]) -> Child:
    """One value, or the first and the last of many alike, with all of them on demand."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    kind = element("span", there[0].type, class_="type")
    if len(there) == 1:
        return element("div", element("code", there[0].name), kind)
    shown = (element("code", there[0].name), " … ", element("code", there[-1].name), f" ({len(there)})")
    every = element("ul", *(element("li", element("code", value.name)) for value in there))
    return element("div", element("details", element("summary", *shown), every), kind)


def _caches(layers: Sequence[LayerChange], nodes: Sequence[NodeChange]) -> list[Child]:
    if not layers:
        return []
    counts: dict[int | None, int] = {}
    for node in nodes:
        counts[node.layer] = counts.get(node.layer, 0) + 1
    heads = (
        "layer",
        "attention",
        "operator",
        "head size",
        "KV heads",
        "window",
        "KV cache",
        "past",
        "present",
        "alias",
        "nodes",
    )
    rows = [_layer_row(layer, counts.get(layer.index, 0)) for layer in layers]
    groups = [
        element("li", element("b", f"{_layers([layer.index for layer in group])}: "), _layer_summary(group))
        for group in _alike([layer for layer in layers if layer.changed], _layer_family)
    ]
    summary = f"All {len(layers)} layers, one by one"
    return [
        element(
            "div", layer_picture(layers), class_="wide", tabindex="0", role="region", aria_label="Picture of the layers"
        ),
        _legend(layers),
        element("ul", *groups, class_="changes") if groups else None,
        element("details", element("summary", summary), _table(heads, rows, "layers"), id="layers"),
    ]


def _legend(layers: Sequence[LayerChange]) -> Element:
    swatches = (
        ("swatch sliding kv-source", "sliding attention, a cache of its own"),
        ("swatch full kv-source", "full attention, a cache of its own"),
        ("swatch kv-shared", "reads the cache that the line leads to"),
        ("swatch shade", "changed"),
    )
    signs = [("▾▴", "its own past input, present output"), ("256", "head size, which is also the bar's height")]
    operators = {cache.operator for layer in layers for cache in (layer.before, layer.after) if cache is not None}
    signs += [(initial(name), f"{name}{', unfused' if name == 'Softmax' else ''}") for name in sorted(operators)]
    return element(
        "ul",
        *(element("li", element("span", class_=style), text) for style, text in swatches),
        *(element("li", element("b", sign, class_="sign"), text) for sign, text in signs),
        class_="legend",
    )


def _layer_family(layer: LayerChange) -> Hashable:
    return (
        tuple(map(_numberless, layer.edits)),
        layer.before is None,
        layer.after is None,
        tuple(reason.by for reason in layer.reasons),
    )


def _layer_summary(group: Sequence[LayerChange]) -> Element:
    """What changed in layers that changed alike; where their texts differ, in numbers alone, those are an N."""
    first = group[0]
    if first.before is None or first.after is None:
        return element("span", "added" if first.before is None else "removed")
    edits = []
    for alike in zip(*(layer.edits for layer in group), strict=True):
        one = alike[0] if len(set(alike)) == 1 else _numberless(alike[0])
        edits.append(element("span", _words(one), class_="edit"))
    by = dict.fromkeys(reason.by for reason in first.reasons)
    return element("span", *edits, element("span", ", ".join(by), class_="by") if by else None)


def _numberless(edit: Edit) -> Edit:
    before, after = (None if text is None else _without_numbers(text) for text in (edit.before, edit.after))
    return Edit(edit.what, before, after)


def _layer_row(layer: LayerChange, nodes: int) -> Element:
    def cell(read: Callable[[LayerChange, bool], object]) -> Child:
        before, after = (None if read(layer, side) is None else str(read(layer, side)) for side in (False, True))
        return (before or "") if before == after else _edit(before, after)

    def field(name: str) -> Callable[[LayerChange, bool], object]:
        return lambda layer, side: getattr(layer.after if side else layer.before, name, None)

    def owner(layer: LayerChange, side: bool) -> object:
        cache = layer.after if side else layer.before
        if cache is None or cache.owner is None:
            return None
        return "its own" if cache.owner == layer.index else f"reads {cache.owner}'s"

    names = ("attention", "operator", "head_size", "kv_heads", "window")
    cells: list[Child] = [cell(field(name)) for name in names]
    cells += [cell(owner), *(cell(field(name)) for name in ("past", "present", "alias"))]
    button = element("button", str(nodes), type="button", data_layer=layer.index, class_="jump") if nodes else "0"
    row = element("tr", *(element("td", child) for child in (str(layer.index), *cells, button)))
    row.set("id", f"layer-{layer.index}")
    if layer.changed:
        row.set("class", "touched")
    return row


def _fields(changes: Sequence[FieldChange]) -> list[Child]:
    rows = [
        _row(
            change.verb,
            element("code", change.key),
            _edit(change.before, change.after),
            _paragraphs(_told(change.reasons)),
        )
        for change in changes
    ]
    table = _table(("", "key", "before → after", "why"), rows)
    return [table if len(rows) <= FOLDED else _folded(table, len(rows), "keys")] if rows else []


def _nodes(found: Comparison) -> list[Child]:
    every = list(found.nodes)
    same = f"{_count(found.nodes.unchanged, 'node')} the same on both sides, names included."
    if not every:
        return [element("p", "(none)", class_="none"), element("p", same, class_="dim")]
    groups = [_group(group, len(every) <= FOLDED) for group in found.nodes.groups]
    return [
        _filter(every, found.nodes.groups),
        element("p", f"{_count(len(every), 'node')} changed", id="shown", role="status", class_="dim"),
        *groups,
        element("p", same, class_="dim"),
        _passes(found),
    ]


def _filter(changes: Sequence[NodeChange], groups: Sequence[NodeGroup]) -> Element:
    """The form over the nodes; without scripting it is not shown, and every node is."""
    verbs = [verb for verb in VERBS if any(change.verb == verb for change in changes)]
    boxes = [
        element(
            "label",
            element("input", type="checkbox", name="verb", value=verb, checked=True),
            element("span", f"{verb} {sum(change.verb == verb for change in changes)}", class_=f"verb {verb}"),
        )
        for verb in verbs
    ]
    layers = sorted({change.layer for change in changes if change.layer is not None})
    operators = sorted({change.operator for change in changes})
    passes = sorted({name for group in groups for name in group.by})
    search = element("input", type="search", id="search", placeholder="name, operator, value…", autocomplete="off")
    return element(
        "form",
        element("label", element("span", "Search"), search, class_="field grow"),
        _choice("operator", "Operator", [(name, name) for name in operators]),
        _choice("layer", "Layer", [(str(layer), str(layer)) for layer in layers] + [("none", "outside of layers")]),
        _choice("by", "Pass", [(name, name) for name in passes]) if passes else None,
        element("fieldset", element("legend", "Changes"), *boxes),
        element("button", "Clear", type="reset"),
        id="filter", role="search", aria_label="Nodes", hidden=True,
    )  # fmt: skip


def _choice(name: str, label: str, options: Sequence[tuple[str, str]]) -> Element:
    choices = [element("option", "all", value=""), *(element("option", text, value=value) for value, text in options)]
    return element("label", element("span", label), element("select", *choices, name=name), class_="field")


def _group(group: NodeGroup, opened: bool) -> Element:
    where = _layers(group.layers) if group.layers else "outside of the layers"
    parts = [
        element("span", f"{count} {operator} {verb}", class_=f"count {verb}")
        for (verb, operator), count in group.counts.items()
    ]
    shown, more = parts[:FOLDED], len(parts) - FOLDED
    summary = element(
        "summary",
        element("b", where),
        element("span", f" by {', '.join(group.by)}", class_="dim") if group.by else None,
        " ",
        *shown,
        element("span", f"and {more} more", class_="dim") if more > 0 else None,
    )
    rows = [_node_row(change, group.by) for change in group.changes]
    table = _table(("", "operator", "node", "what and why"), rows, "stacked nodes")
    return element("details", summary, table, class_="group", open=opened)


def _node_row(change: NodeChange, by: Sequence[str]) -> Element:
    name = element("code", change.name) if change.before == change.after else _edit(change.before, change.after)
    place = ", ".join(word for word in (change.graph if change.graph != "model" else "", change.scope) if word)
    told = [element("li", _words(edit)) for edit in change.edits if edit.what != "name"]
    reasons = [reason for reason in change.reasons if reason.text or reason.by not in by]  # the group has the others
    told += [element("li", text, class_="why") for text in _told(reasons)]
    return _row(
        change.verb,
        element("code", change.operator),
        element("div", name, element("span", place, class_="type") if place else None),
        element("ul", *told) if told else None,
        data_verb=change.verb,
        data_operator=change.operator,
        data_layer="none" if change.layer is None else change.layer,
        data_by="|".join(by),
    )


def _passes(found: Comparison) -> Child:
    """What the passes that made AFTER said themselves."""
    if not found.passes:
        return None
    items: list[Child] = []
    for record in found.passes:
        operators = ", ".join(f"{count:+d} {name}" for name, count in record.operators.items())
        findings = [
            element(
                "li", element("span", f.verb, class_=f"verb {f.verb}"), " ", element("code", f.subject), f": {f.reason}"
            )
            for f in record.findings
        ]
        head = element("summary", element("b", record.name), element("span", f" {operators}", class_="dim"))
        items.append(element("details", head, element("ul", *findings), class_="pass"))
    return element("div", element("h3", "What the passes say"), *items, class_="passes")


def _weights(found: Comparison) -> list[Child]:
    weights = found.weights
    facts = [f"{_count(weights.unchanged, 'tensor')} the same"]
    if weights.relocated:
        facts.append(f"{weights.relocated} of them in another place")
    told: list[Child] = [element("p", f"{', '.join(facts)}.", class_="dim")]
    told += [element("p", f"Compared: {text}.", class_="dim") for text in weights.basis]
    if weights.uncompared:
        told.append(element("p", f"{_count(weights.uncompared, 'tensor')} not compared.", class_="warning"))
        told += [element("p", text, class_="warning") for text in weights.why]
    rows = [_weight_row(change) for change in weights.changes]
    tensors = _folded(_table(("", "tensor", "before", "after", "bytes"), rows), len(rows), "tensors") if rows else None
    files_ = _table(("", "file", "before", "after", "bytes"), [_file_row(file) for file in weights.files])
    return [*told, tensors, files_ if weights.files else None] if rows or weights.files else [_none(), *told]


def _none() -> Element:
    return element("p", "(none)", class_="none")


def _weight_row(change: WeightChange) -> Element:
    either = change.after or change.before
    renamed = change.before and change.after and change.before.name != change.after.name
    name = _edit(change.before.name, change.after.name) if renamed and change.before and change.after else None
    shown = name if name is not None else element("code", either.name if either else "")
    why = [element("p", text, class_="why") for text in _told(change.reasons)]
    cells = (element("div", shown, *why), _weight(change.before), _weight(change.after))
    return _row(change.verb, *cells, _bytes(change.delta))


def _weight(weight: Weight | None) -> Child:
    if weight is None:
        return None
    where = "inline" if weight.file is None else f"{weight.file} at {weight.offset:,}"
    return element("div", weight.type, element("span", f"{size(weight.size)}, {where}", class_="type"))


def _file_row(file: FileChange) -> Element:
    verb = "added" if file.before is None else "removed" if file.after is None else "changed"
    shown = {True: "same", False: verb, None: "not compared"}[file.same]
    sizes = ["" if count is None else size(count) for count in (file.before, file.after)]
    return _row(shown, element("code", file.title), *sizes, _bytes(file.delta))


def _numbers(numbers: Numbers | None) -> list[Child]:
    if numbers is None:
        return []
    rows = [
        element(
            "tr",
            element("td", _verb("ok" if gate.passed else "FAIL")),
            *(element("td", text) for text in (gate.section, gate.name, gate.reading)),
        )
        for gate in numbers.gates
    ]
    head = element("p", element("b", numbers.summary), element("span", f" {numbers.source}", class_="dim"))
    table = _table(("", "section", "gate", "measured"), rows)
    return [head, _folded(table, len(rows), "gates", opened=not numbers.passed)]


# Parts


def _table(heads: Sequence[str], rows: Iterable[Element], style: str = "stacked") -> Element:
    """A table; a `stacked` one turns its rows into blocks on a narrow screen, each cell under its column's name."""
    body = element("tbody", *rows)
    for row in body:
        for cell, head in zip(row, heads, strict=True):
            if head:
                cell.set("data-head", head)
    names = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
    return element("div", element("table", names, body, class_=style), class_="wide")


def _row(verb: str, *cells: Child, **attributes: object) -> Element:
    return element("tr", element("td", _verb(verb)), *(element("td", cell) for cell in cells), **attributes)


def _verb(verb: str) -> Element:
    return element("span", verb, class_=f"verb {verb.replace(' ', '-')}")


def _folded(table: Element, count: int, what: str, *, opened: bool | None = None) -> Element:
    """A long table closed, a short one open."""
    return element(
        "details", element("summary", f"{count:,} {what}"), table, open=count <= FOLDED if opened is None else opened
    )


def _edit(before: str | None, after: str | None) -> Element:
    """Old and new; an arrow between them where both are there."""
    parts: list[Child] = [_value("del", before) if before is not None else None]
    parts += [" → "] if before is not None and after is not None else []
    return element("span", *parts, _value("ins", after) if after is not None else None, class_="edit")


def _value(tag: str, text: str) -> Element:
    """A value as it is, or its beginning where it is long, with all of it on demand."""
    if len(text) <= LONG:
        return element(tag, text)
    start = element(tag, text[:BEGINNING], "…")
    summary = element("summary", start, element("span", f" {len(text):,} characters", class_="dim"))
    return element("details", summary, element(tag, text))


def _words(edit: Edit) -> Element:
    return element("span", element("span", f"{edit.what} ", class_="what"), _edit(edit.before, edit.after))


def _paragraphs(texts: Sequence[str]) -> Child:
    there = [element("p", text, class_="why") for text in texts if text]
    return element("div", *there) if there else None


def _told(reasons: Sequence[Reason]) -> list[str]:
    return list(dict.fromkeys(str(reason) for reason in reasons))


def _bytes(count: int) -> Element:
    """A difference in bytes, with its sign."""
    return element("span", signed(count), class_="bytes")


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _badge(changes: Iterable[InterfaceChange | FieldChange | NodeChange | WeightChange]) -> str:
    text = tally(changes)
    return "" if text == "unchanged" else text


def _changed_layers(layers: Sequence[LayerChange]) -> str:
    changed = sum(layer.changed for layer in layers)
    return f"{changed} of {len(layers)} layers" if changed else ""


def _weights_badge(found: Comparison) -> str:
    files = sum(file.kind == "side" for file in found.weights.files)
    parts = [_badge(found.weights.changes), f"{files} files differ" if files else ""]
    if found.weights.uncompared:
        parts.append(f"{found.weights.uncompared} not compared")
    return ", ".join(part for part in parts if part)


def _numbers_badge(numbers: Numbers | None) -> str:
    if numbers is None:
        return ""
    return "FAIL" if not numbers.passed else "identical" if numbers.exact else "within tolerance"


def _layers(indices: Sequence[int]) -> str:
    return f"layer{'' if len(indices) == 1 else 's'} {ranges(sorted(indices))}"


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "N", text)


def _alike(items: Sequence[_Item], family: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    """Items of one family together, families in the order of their first item."""
    groups: dict[Hashable, list[_Item]] = {}
    for item in items:
        groups.setdefault(family(item), []).append(item)
    return list(groups.values())
