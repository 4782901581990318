"""The layers as an SVG picture: which have a KV cache, which read whose, how large it is, and what changed.

    index        0   1   2   3   4   5   6   7   8   9
    interface   v^  v^  v^  v^  v^   ^   ^   ^   ^   ^        a past goes in, a present comes out: names of its own
    bar         |#| |#| |#| |#| |#| |-| |-| |-| |-| |-|       filled: a cache of its own; outlined: reads another's; height: head size; operator's initial
    rails                    o---|'--|'--|'--|'   |           one for each layer whose cache others read
                                 o----------------'

Two panels, before and after, where any layer changed; a column that changed is shaded in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from xml.etree.ElementTree import Element

from surgery.compare.comparison import LayerCache, LayerChange
from surgery.compare.markup import Child, append, element

STEP, BAR, LABELS, MARGIN = 28, 20, 64, 8
"""Pixels: from layer to layer, width of a bar, room for a panel's title at its left, margin at the right."""

TALLEST, SHORTEST = 54, 24
INDEX_LINE, PORT_LINE, BAR_TOP, RAIL_GAP, RAIL_STEP, PANEL_GAP = 12, 23, 30, 12, 9, 18

PictureSide = Callable[[LayerChange], LayerCache | None]


@dataclass(frozen=True)
class _Panel:
    title: str
    layers: Sequence[LayerChange]
    side: PictureSide
    tallest_head: int

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """KV source layer that others read -> the columns of those; each source has a rail, in this order."""
        found: dict[int, list[int]] = {}
        for column, layer in enumerate(self.layers):
            cache = self.side(layer)
            if cache is not None and cache.owner is not None and cache.owner != layer.index:
                found.setdefault(cache.owner, []).append(column)
        return dict(sorted(found.items()))

    @property
    def height(self) -> int:
        return BAR_TOP + TALLEST + RAIL_GAP + RAIL_STEP * len(self.readers)


def layer_picture(layers: Sequence[LayerChange]) -> Element:
    """The picture of every layer; each is a link to `#layer-INDEX`. One panel where both sides are the same."""
    heads = [c.head_size or 0 for layer in layers for c in (layer.before, layer.after) if c is not None]
    tallest = max(heads, default=0)
    after = _Panel("after", layers, lambda layer: layer.after, tallest)
    if any(layer.changed for layer in layers):
        panels = [_Panel("before", layers, lambda layer: layer.before, tallest), after]
    else:
        panels = [_Panel("both", layers, lambda layer: layer.after, tallest)]
    width = LABELS + STEP * len(layers) + MARGIN
    height = sum(panel.height + PANEL_GAP for panel in panels)
    svg = element(
        "svg",
        element("title", "Layers and their KV caches", id="picture-title"),
        element("desc", _described(layers), id="picture-desc"),
        viewBox=f"0 0 {width} {height}", width=width, height=height, role="group", class_="picture",
        aria_labelledby="picture-title picture-desc",
    )  # fmt: skip
    for column, layer in enumerate(layers):
        if layer.changed:
            append(svg, _rect(_left(column) - 4, 0, STEP, height - PANEL_GAP + 6, "shade"))
    top = 0
    for panel in panels:
        append(svg, _drawn(panel, top))
        top += panel.height + PANEL_GAP
    return svg


def _described(layers: Sequence[LayerChange]) -> str:
    sources = sum(1 for layer in layers if layer.after and layer.after.owner == layer.index)
    changed = sum(layer.changed for layer in layers)
    return f"{len(layers)} layers, {sources} of them have a KV cache of their own afterwards; {changed} layers changed"


def _drawn(panel: _Panel, top: int) -> Element:
    title = element("text", panel.title, x=0, y=BAR_TOP + TALLEST - 4, class_="panel")
    group = element("g", title, transform=f"translate(0 {top})", class_="side")
    columns = {layer.index: column for column, layer in enumerate(panel.layers)}
    for rail, (owner, readers) in enumerate(panel.readers.items()):
        append(group, *_rail(panel, readers, columns.get(owner), rail))
    for column, layer in enumerate(panel.layers):
        append(group, _column(panel, column, layer))
    return group


def _rail(panel: _Panel, readers: Sequence[int], own: int | None, rail: int) -> list[Element]:
    """The source layer's line, by columns: down from its bar, along, and up into each reader."""
    base = BAR_TOP + TALLEST
    y = base + RAIL_GAP + RAIL_STEP * rail
    first = panel.side(panel.layers[readers[0]])
    kind = first.attention if first is not None else None
    style = f"rail {_kind(kind)}"
    ends = [_middle(c) for c in (*readers, *([own] if own is not None else []))]
    drawn = [element("path", d=f"M{min(ends)} {y}H{max(ends)}", class_=style)]
    drawn += [element("path", d=f"M{_middle(c)} {y}V{base + 2}", class_=style) for c in readers]
    drawn += [element("path", d=f"M{_middle(c) - 3} {base + 6}l3 -4l3 4", class_=style) for c in readers]
    if own is not None:
        drawn.append(element("path", d=f"M{_middle(own)} {base}V{y}", class_=style))
        drawn.append(element("circle", cx=_middle(own), cy=y, r=3, class_=f"source {_kind(kind)}"))
    return drawn


def _column(panel: _Panel, column: int, layer: LayerChange) -> Element:
    cache = panel.side(layer)
    parts: list[Child] = [
        element("title", _told(panel.title, layer, cache)),
        _rect(_left(column) - 4, 0, STEP, panel.height, "touch"),
        element("text", str(layer.index), x=_middle(column), y=INDEX_LINE, class_="index"),
    ]
    if cache is None:
        parts.append(element("text", "–", x=_middle(column), y=BAR_TOP + TALLEST - 4, class_="index"))
    else:
        parts += _bar(panel, column, layer, cache)
    return element("a", *parts, href=f"#layer-{layer.index}", class_="changed" if layer.changed else None)


def _bar(panel: _Panel, column: int, layer: LayerChange, cache: LayerCache) -> list[Child]:
    tall = SHORTEST
    if cache.head_size and panel.tallest_head:
        tall += round((TALLEST - SHORTEST) * cache.head_size / panel.tallest_head)
    left, top = _left(column), BAR_TOP + TALLEST - tall
    middle = _middle(column)
    own = cache.owner == layer.index
    style = f"bar {_kind(cache.attention)} {'kv-source' if own else 'kv-shared'}"
    parts: list[Child] = [_rect(left, top, BAR, tall, style, rx=3)]
    if cache.head_size:
        parts.append(element("text", str(cache.head_size), x=middle, y=BAR_TOP + TALLEST - 5, class_=f"head {style}"))
    parts.append(element("text", initial(cache.operator), x=middle, y=top + 9, class_=f"operator {style}"))
    if cache.past and own:
        parts.append(element("path", d=f"M{middle - 8} {PORT_LINE - 6}h6l-3 6z", class_="port"))
    if cache.alias or (cache.present and own):
        parts.append(element("path", d=f"M{middle + 2} {PORT_LINE}h6l-3 -6z", class_="port"))
    return parts


def _told(title: str, layer: LayerChange, cache: LayerCache | None) -> str:
    """The layer in words: a tooltip, and what a screen reader says."""
    if cache is None:
        return f"layer {layer.index}, {title}: not there"
    owner = "owner unknown" if cache.owner is None else f"reads layer {cache.owner}'s cache"
    if cache.owner == layer.index:
        owner = "has its own cache"
    head = f"head size {cache.head_size}" if cache.head_size else ""
    heads = f"{cache.kv_heads} KV head{'' if cache.kv_heads == 1 else 's'}" if cache.kv_heads else ""
    window = f"window {cache.window}" if cache.window else ""
    kind = f"{cache.attention} attention" if cache.attention else "attention"
    words = [f"{kind} by {cache.operator}", owner, head, heads, window]
    words += [f"past {cache.past or '(none)'}", f"present {cache.present or '(none)'}"]
    words += [f"alias {cache.alias}"] if cache.alias else []
    text = f"layer {layer.index}, {title}: {', '.join(word for word in words if word)}"
    return "\n".join([text, *(f"changed {edit}" for edit in layer.edits)])


def initial(operator: str) -> str:
    """The letter that stands for an attention's operator in its bar: GroupQueryAttention is G."""
    return operator[:1].upper()


def _kind(attention: str | None) -> str:
    return attention if attention in ("sliding", "full") else "unknown"


def _left(column: int) -> int:
    return LABELS + STEP * column + (STEP - BAR) // 2


def _middle(column: int) -> int:
    return _left(column) + BAR // 2


def _rect(x: int, y: int, width: int, height: int, style: str, **more: object) -> Element:
    return element("rect", x=x, y=y, width=width, height=height, class_=style, **more)
