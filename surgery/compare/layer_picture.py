"""The layers as an SVG picture: which have a KV cache, which read whose, how large it is, and what changed.

    index        0   1   2   3   4   5   6   7   8   9
    interface   v^  v^  v^  v^  v^   ^   ^   ^   ^   ^        a past goes in, a present comes out: names of its own
    bar         |#| |#| |#| |#| |#| |-| |-| |-| |-| |-|       filled: a cache of its own; outlined: reads another's;
                                                              height: head size; letter: the operator's initial
    rails                    o---|'--|'--|'--|'   |           one for each layer whose cache others read
                                 o----------------'

Two panels, before and after, where any layer changed; a column that changed is shaded in both. layers.svg draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery.compare.comparison import LayerCache, LayerChange

STEP, LABELS, MARGIN = 28, 64, 8
"""Pixels: from layer to layer, width of a panel's title at its left, margin at the right."""

TALLEST, SHORTEST, BAR_TOP = 54, 24, 30
BASE, RAIL_GAP, RAIL_STEP, PANEL_GAP = BAR_TOP + TALLEST, 12, 9, 18
"""Pixels: BASE is where bars end, and rails begin below."""

PictureSide = Callable[[LayerChange], LayerCache | None]


@dataclass(frozen=True, slots=True)
class Bar:
    """A layer in a panel; `x` is its middle. `own` is whether it has a cache of its own, `told` all of it in words."""

    layer: LayerChange
    cache: LayerCache | None
    x: int
    height: int
    own: bool
    told: str

    @property
    def style(self) -> str:
        """The classes of the style sheet."""
        return f"bar {_kind(self.cache)} {'kv-source' if self.own else 'kv-shared'}"


@dataclass(frozen=True, slots=True)
class Rail:
    """A line from a KV source layer to those that read its cache; `source` is None where that layer is not there."""

    kind: str
    y: int
    source: int | None
    readers: list[int]

    @property
    def ends(self) -> tuple[int, int]:
        """Where it begins and ends, from left to right."""
        places = [*self.readers, *([self.source] if self.source is not None else [])]
        return min(places), max(places)


@dataclass(frozen=True, slots=True)
class Panel:
    """One side. `top` is its place in the picture."""

    title: str
    top: int
    height: int
    bars: list[Bar]
    rails: list[Rail]


@dataclass(frozen=True, slots=True)
class LayerPicture:
    """The whole picture; `changed` are the middles of the layers that are shaded."""

    width: int
    height: int
    described: str
    changed: list[int]
    panels: list[Panel]
    base: int = BASE


def layer_picture(layers: Sequence[LayerChange]) -> LayerPicture:
    """The picture of every layer; each is a link to `#layer-INDEX`. One panel where both sides are the same."""
    changed = [_middle(column) for column, layer in enumerate(layers) if layer.changed]
    sides: dict[str, PictureSide] = {"before": lambda layer: layer.before, "after": lambda layer: layer.after}
    if not changed:
        sides = {"both": sides["after"]}
    panels: list[Panel] = []
    for title, side in sides.items():
        top = panels[-1].top + panels[-1].height + PANEL_GAP if panels else 0
        panels.append(_panel(title, top, layers, side))
    sources = sum(1 for layer in layers if layer.after and layer.after.owner == layer.index)
    told = f"{sources} of them have a KV cache of their own afterwards; {len(changed)} layers changed"
    height = panels[-1].top + panels[-1].height + PANEL_GAP
    width = LABELS + STEP * len(layers) + MARGIN
    return LayerPicture(width, height, f"{len(layers)} layers, {told}", changed, panels)


def _panel(title: str, top: int, layers: Sequence[LayerChange], side: PictureSide) -> Panel:
    sizes = [cache.head_size or 0 for layer in layers for cache in (layer.before, layer.after) if cache is not None]
    tallest, bars = max(sizes, default=0), []
    places = {layer.index: _middle(column) for column, layer in enumerate(layers)}
    readers: dict[int, list[LayerChange]] = {}
    for layer in layers:
        cache, height = side(layer), SHORTEST
        if cache is not None and cache.head_size and tallest:
            height += round((TALLEST - SHORTEST) * cache.head_size / tallest)
        own = cache is not None and cache.owner == layer.index
        bars.append(Bar(layer, cache, places[layer.index], height, own, _told(title, layer, cache)))
        if cache is not None and cache.owner is not None and not own:
            readers.setdefault(cache.owner, []).append(layer)
    rails = [
        Rail(
            _kind(side(readers[owner][0])),
            BASE + RAIL_GAP + RAIL_STEP * number,
            places.get(owner),
            [places[layer.index] for layer in readers[owner]],
        )
        for number, owner in enumerate(sorted(readers))
    ]
    return Panel(title, top, BASE + RAIL_GAP + RAIL_STEP * len(rails), bars, rails)


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


def _kind(cache: LayerCache | None) -> str:
    return cache.attention if cache is not None and cache.attention in ("sliding", "full") else "unknown"


def _middle(column: int) -> int:
    return LABELS + STEP * column + STEP // 2
