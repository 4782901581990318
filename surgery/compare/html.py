"""The report as one HTML page that needs nothing beside itself: no network, no other file, and scripting for the
filter over nodes alone.

Its content security policy allows no request, and no script and no style but its own, named by their hashes: a name
in a model that got past the escaping could still do nothing. The same comparison gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, TypeVar

from surgery.compare.change_picture import change_picture
from surgery.compare.comparison import (
    VERBS,
    Comparison,
    Edit,
    InterfaceChange,
    InterfaceValue,
    LayerChange,
    Numbers,
    Reason,
    tally,
)
from surgery.compare.impact import COST_HEADS, TITLES, cost_cells, impact_of, speed_notes
from surgery.compare.layer_picture import layer_picture
from surgery.compare.sections import ranges, signed
from surgery.errors import printable
from surgery.printing import size

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDED = 12
"""A list longer than this is closed until it is asked for."""

LONG, BEGINNING = 240, 100
"""Characters: a longer value shows its beginning, and the rest when it is asked for."""

_TITLES = {
    "interface": "Interface", "caches": "KV caches", "metadata": "Opsets and metadata", "nodes": "Nodes",
    "weights": "Weights and files", "config": "genai_config.json", "numbers": "Numbers",
}  # fmt: skip

_Item = TypeVar("_Item")


def html(found: Comparison) -> str:
    """The page, ending in a newline. What it looks like is in page.html, page.css and page.js."""
    from markupsafe import Markup

    style, script = _resource("page.css"), _resource("page.js")
    nodes = list(found.nodes)
    verbs = Counter(change.verb for change in nodes)
    sides = [cache for layer in found.layers for cache in (layer.before, layer.after) if cache is not None]
    page = _environment().get_template("page.html")
    return page.render(
        found=found,
        impact=impact_of(found),
        meaning=TITLES[impact_of(found).level],
        costs=[(head, text) for head, text in zip(COST_HEADS, cost_cells(found), strict=True) if text],
        speed=speed_notes(found),
        change=Markup(change_picture(found)),  # its texts are escaped
        titles=_TITLES,
        badges=_badges(found),
        interface=_interface(found.interface),
        picture=layer_picture(found.layers) if found.layers else None,
        operators=sorted({cache.operator for cache in sides}),
        layer_groups=_layer_groups(found.layers),
        nodes=nodes,
        node_counts=Counter(change.layer for change in nodes),
        passes=sorted({name for group in found.nodes.groups for name in group.by}),
        verb_counts=[(verb, verbs[verb]) for verb in VERBS if verbs[verb]],
        policy=_policy(style, script),
        style=Markup(style),  # ours, and HTML takes what is in these two literally
        script=Markup(script),
        FOLDED=FOLDED,
        LONG=LONG,
        BEGINNING=BEGINNING,
    )


def _resource(name: str) -> str:
    return files("surgery.compare").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"


def _environment() -> Environment:
    """Everything that is put into the page is escaped, and shown without control characters; None is nothing."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: object) -> object:
        text = "" if value is None else value if isinstance(value, Markup) else str(value)
        return text if isinstance(text, Markup) else "\n".join(map(printable, text.split("\n")))

    made = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "beside": lambda reasons, by: _told(one for one in reasons if one.text or one.by not in by),
        "cells": _cells,
        "count_of": lambda count, noun: f"{count:,} {noun}{'' if count == 1 else 's'}",
        "counted": _counted,
        "grouped": lambda count: f"{count:,}",
        "layers": _layers,
        "signed": signed,
        "size": size,
        "told": _told,
        "tone": _tone,
        "twice": lambda options: [(one, one) for one in sorted(set(options))],
        "zip": lambda one, other: zip(one, other, strict=True),
    }
    return made


def _tone(part: str) -> str:
    """How a part of the verdict looks: nothing to see, something to read, proof, or alarm."""
    if "FAIL" in part or "not compared" in part:
        return "bad"
    if part.startswith("numbers identical") or part.startswith("same"):
        return "good"
    return "quiet" if part.endswith((": unchanged", ": 0 changed")) or part.startswith("numbers") else "loud"


def _badges(found: Comparison) -> dict[str, str]:
    """What stands beside each section's title; empty where nothing changed."""
    changed = sum(layer.changed for layer in found.layers)
    files = sum(file.kind == "side" for file in found.weights.files)
    weights = [found.weights.changes and tally(found.weights.changes), files and f"{files} files differ"]
    fewer = found.weights.vocabulary
    weights.append(f"{fewer.after:,} tokens stay" if fewer is not None else "")
    weights.append(found.weights.uncompared and f"{found.weights.uncompared} not compared")
    return {
        "interface": tally(found.interface) if found.interface else "",
        "caches": f"{changed} of {len(found.layers)} layers" if changed else "",
        "metadata": tally(found.metadata) if found.metadata else "",
        "nodes": tally(found.nodes) if found.nodes.groups else "",
        "weights": ", ".join(str(part) for part in weights if part),
        "config": tally(found.config) if found.config else "",
        "numbers": _numbers_badge(found.numbers),
    }


def _numbers_badge(numbers: Numbers | None) -> str:
    if numbers is None:
        return ""
    return "FAIL" if not numbers.passed else "identical" if numbers.exact else "within tolerance"


def _counted(badge: str) -> str:
    """A badge in a word: how many changes, or what it says where it counts none."""
    numbers = re.findall(r"\d+", badge.partition(" of ")[0])
    return f"{sum(map(int, numbers)):,}" if numbers else badge


@dataclass(frozen=True, slots=True)
class _InterfaceRow:
    """Changes that differ only in a layer's number, and in key or value.

    `texts` is what is said of all of them; where that differs, `each` is what is said of each, and `by` who did it.
    """

    verb: str
    kind: str
    before: list[InterfaceValue]
    after: list[InterfaceValue]
    texts: list[str] = field(default_factory=list)
    each: list[tuple[str, str]] = field(default_factory=list)
    by: str = ""


def _interface(changes: Sequence[InterfaceChange]) -> list[_InterfaceRow]:
    rows = []
    for group in _alike(changes, _interface_family):
        first = group[0]
        before, after = (
            [one for one in side if one] for side in zip(*((c.before, c.after) for c in group), strict=True)
        )
        told = [[text for text in (change.note, *_told(change.reasons)) if text] for change in group]
        if all(texts == told[0] for texts in told):
            rows.append(_InterfaceRow(first.verb, first.kind, before, after, told[0]))
        else:
            names = [value.name for one in group if (value := one.after or one.before)]
            each = [(name, "; ".join(texts)) for name, texts in zip(names, told, strict=True)]
            rows.append(_InterfaceRow(first.verb, first.kind, before, after, [], each, _by(first.reasons)))
    return rows


def _interface_family(change: InterfaceChange) -> Hashable:
    sides = [
        (re.sub(r"key|value", "", _without_numbers(value.name)), value.type) if value else None
        for value in (change.before, change.after)
    ]
    return change.verb, change.kind, *sides, tuple(reason.by for reason in change.reasons)


@dataclass(frozen=True, slots=True)
class _LayerGroup:
    """Layers that changed alike; where their edits differ, in numbers alone, those are an N. `word` for a whole
    layer."""

    title: str
    word: str
    edits: list[Edit]
    by: str


def _layer_groups(layers: Sequence[LayerChange]) -> list[_LayerGroup]:
    groups = []
    for group in _alike([layer for layer in layers if layer.changed], _layer_family):
        word = "added" if group[0].before is None else "removed" if group[0].after is None else ""
        columns = zip(*(layer.edits for layer in group), strict=True)
        edits = [alike[0] if len(set(alike)) == 1 else _numberless(alike[0]) for alike in columns]
        title = _layers([layer.index for layer in group])
        groups.append(_LayerGroup(title, word, edits, _by(group[0].reasons)))
    return groups


def _layer_family(layer: LayerChange) -> Hashable:
    by = tuple(reason.by for reason in layer.reasons)
    return tuple(map(_numberless, layer.edits)), layer.before is None, layer.after is None, by


def _numberless(edit: Edit) -> Edit:
    before, after = (None if text is None else _without_numbers(text) for text in (edit.before, edit.after))
    return Edit(edit.what, before, after)


def _cells(layer: LayerChange) -> list[tuple[str | None, str | None]]:
    """A layer's properties before and after, in the order of the table's columns."""

    def of(cache: object, name: str) -> str | None:
        value = getattr(cache, name, None)
        if value is None or name != "owner":
            return None if value is None else str(value)
        return "its own" if value == layer.index else f"reads {value}'s"

    names = ("attention", "operator", "head_size", "kv_heads", "window", "owner", "past", "present", "alias")
    return [(of(layer.before, name), of(layer.after, name)) for name in names]


def _told(reasons: Iterable[Reason]) -> list[str]:
    return list(dict.fromkeys(str(reason) for reason in reasons))


def _by(reasons: Iterable[Reason]) -> str:
    return ", ".join(dict.fromkeys(reason.by for reason in reasons))


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
