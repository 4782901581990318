"""What changed as one SVG picture of a phone's width: what it means, the layers and their caches, the costs, and the
regions of the graph with what went and what came.

    verdict        one band, in the colour of what the change means
    layers         a square each: filled where it has a KV cache of its own, a thick frame where it changed
    costs          two bars each, before and after
    regions        the nodes of one place in the graph: gone on the left, new on the right, changed across

Every text is 12 pixels at least, names are cut to their place, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element, SubElement, tostring

from surgery.compare.comparison import Comparison, LayerChange, NodeGroup
from surgery.compare.impact import TITLES, Impact, impact_of
from surgery.compare.sections import ranges
from surgery.errors import printable
from surgery.printing import size

WIDTH, MARGIN, LINE = 328, 12, 17
"""Pixels: of a page on a phone of 360 in upright position, beside what is drawn, from line to line."""

_INNER = WIDTH - 2 * MARGIN
_LETTER = 7.3
"""Pixels of a letter, of the fixed width that the font has."""

_CELL, _MOST_REGIONS, _MOST_OPERATORS, _MOST_MODELS = 28, 12, 4, 20
_INK, _DIM, _PAPER = "#1b1f26", "#5b6472", "#ffffff"
_MEANING = {"same": "#116b33", "compatible": "#116b33", "numerics": "#8a5300", "breaking": "#b3261e"}
_KINDS = {"sliding": "#2563c9", "full": "#a84a08", None: "#6b7280"}
_GONE, _NEW, _CHANGED = ("#fbe7e5", "#b3261e"), ("#e2f4e7", "#116b33"), ("#fcefd5", "#8a5300")


def change_picture(found: Comparison) -> str:
    """The picture as SVG text, ending in a newline; the same bytes for the same comparison."""
    name, impact = f"{found.before.label} → {found.after.label}", impact_of(found)
    drawing = _Drawing()
    _draw(drawing, name, impact, found)
    return drawing.svg(f"{name}: {impact}")


def pictures(found: Sequence[tuple[str, Impact, Comparison | None]], title: str) -> str:
    """One picture of several models below one another: each by its name, what it means, and, of one that both sides
    have, what differs."""
    drawing = _Drawing()
    for name, impact, comparison in found[:_MOST_MODELS]:
        _draw(drawing, name, impact, comparison)
        drawing.y += MARGIN
    if len(found) > _MOST_MODELS:
        drawing.lines(f"and {len(found) - _MOST_MODELS} more models", fill=_DIM)
    if not found:
        drawing.lines(title)
    return drawing.svg(title)


def _draw(drawing: _Drawing, name: str, impact: Impact, found: Comparison | None) -> None:
    _verdict(drawing, name, impact)
    if found is None:
        return
    if found.layers:
        _layers(drawing, found.layers)
    _costs(drawing, found)
    _regions(drawing, found.nodes.groups)


@dataclass
class _Drawing:
    """Shapes from the top down; `y` is where the next one goes."""

    shapes: list[Element] = field(default_factory=list)
    y: float = MARGIN

    def rect(self, x: float, y: float, width: float, height: float, fill: str, **more: object) -> None:
        self._add("rect", x=x, y=y, width=max(width, 0), height=height, fill=fill, **more)

    def text(self, x: float, y: float, text: str, width: float, *, fill: str = _INK, bold: bool = False) -> None:
        most = max(1, int(width / _LETTER))
        clean = printable(text)
        shape = self._add("text", x=x, y=y, fill=fill, font_size=12, font_weight="bold" if bold else "normal")
        shape.text = clean if len(clean) <= most else f"{clean[: most - 1]}…"

    def lines(self, text: str, *, fill: str = _INK, most: int = 4) -> None:
        for line in _wrapped(printable(text), int(_INNER / _LETTER))[:most]:
            self.text(MARGIN, self.y + 12, line, _INNER, fill=fill)
            self.y += LINE

    def head(self, text: str) -> None:
        self.y += 8
        self.text(MARGIN, self.y + 12, text, _INNER, bold=True)
        self.y += LINE + 3

    def _add(self, tag: str, **attributes: object) -> Element:
        shape = Element(tag, {name.replace("_", "-"): str(value) for name, value in attributes.items()})
        self.shapes.append(shape)
        return shape

    def svg(self, title: str) -> str:
        height = round(self.y + MARGIN)
        svg = Element("svg", {
            "xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}", "width": str(WIDTH),
            "height": str(height), "role": "img", "font-family": "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace",
        })  # fmt: skip
        SubElement(svg, "title").text = printable(title)
        SubElement(svg, "rect", {"width": str(WIDTH), "height": str(height), "fill": _PAPER})
        svg.extend(self.shapes)
        return f"{tostring(svg, encoding='unicode')}\n"


def _wrapped(text: str, most: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _verdict(drawing: _Drawing, name: str, impact: Impact) -> None:
    top = drawing.y if drawing.shapes else 0
    drawing.rect(0, top, WIDTH, 34, _MEANING[impact.level])
    drawing.text(MARGIN, top + 22, TITLES[impact.level], _INNER, fill=_PAPER, bold=True)
    drawing.y = top + 42
    drawing.lines(name, fill=_DIM)
    for why in impact.why[:5]:
        drawing.lines(f"• {why}", most=3)


def _layers(drawing: _Drawing, layers: Sequence[LayerChange]) -> None:
    changed = sum(layer.changed for layer in layers)
    drawing.head(f"Layers: {changed} of {len(layers)} changed")
    row = int(_INNER // _CELL)
    for place, layer in enumerate(layers):
        x, y = MARGIN + place % row * _CELL, drawing.y + place // row * _CELL
        cache = layer.after or layer.before
        colour = _KINDS.get(cache.attention if cache else None, _KINDS[None])
        own = cache is not None and cache.owner == layer.index
        frame = {"stroke": _CHANGED[1], "stroke_width": 3} if layer.changed else {"stroke": colour, "stroke_width": 1}
        drawing.rect(x + 2, y + 2, _CELL - 4, _CELL - 4, colour if own else _PAPER, rx=4, **frame)
        drawing.text(x + 7, y + 18, str(layer.index), _CELL, fill=_PAPER if own else _INK)
    drawing.y += -(-len(layers) // row) * _CELL + 4
    legend = ((_KINDS["sliding"], _KINDS["sliding"], "sliding"), (_KINDS["full"], _KINDS["full"], "full"),
              (_PAPER, _KINDS["sliding"], "shared"), (_PAPER, _CHANGED[1], "changed"))  # fmt: skip
    for number, (fill, stroke, word) in enumerate(legend):
        x = MARGIN + number * 74
        drawing.rect(x, drawing.y + 2, 11, 11, fill, rx=2, stroke=stroke, stroke_width=2)
        drawing.text(x + 17, drawing.y + 12, word, 56, fill=_DIM)
    drawing.y += LINE
    for text, count in _operators(layers):
        drawing.lines(f"{count} × {text}", most=2)


def _operators(layers: Sequence[LayerChange]) -> Iterator[tuple[str, int]]:
    edits: dict[str, int] = {}
    for layer in layers:
        for edit in layer.edits:
            if edit.what in ("operator", "owner", "head_size", "kv_heads", "window"):
                edits[f"{edit.what} {edit.before or 'none'} → {edit.after or 'none'}"] = (
                    edits.get(f"{edit.what} {edit.before or 'none'} → {edit.after or 'none'}", 0) + 1
                )
    yield from list(edits.items())[:4]


def _costs(drawing: _Drawing, found: Comparison) -> None:
    before, after = found.before.costs, found.after.costs
    if before is None or after is None:
        return
    pairs = {
        "weights read a token": (before.reads, after.reads),
        "KV cache at 8k": tuple(None if each.cache is None else each.cache * 8192 for each in (before, after)),
        "download": (before.download, after.download),
    }
    shown = {name: pair for name, pair in pairs.items() if None not in pair and any(pair)}
    if shown:
        drawing.head("Costs, before and after")
    for name, (old, new) in shown.items():
        assert old is not None and new is not None
        drawing.text(MARGIN, drawing.y + 12, name, _INNER, fill=_DIM)
        drawing.y += LINE
        for count, colour in ((old, "#9aa3b1"), (new, "#2563c9"))[old == new :]:
            drawing.rect(MARGIN, drawing.y + 2, 200 * count / max(old, new), 11, colour, rx=2)
            drawing.text(MARGIN + 208, drawing.y + 12, size(count), _INNER - 208)
            drawing.y += LINE


def _regions(drawing: _Drawing, groups: Sequence[NodeGroup]) -> None:
    """Renamed nodes alone are no region."""
    shown = [group for group in groups if any(verb != "renamed" for verb, _ in group.counts)]
    if shown:
        drawing.head("The graph, where it changed")
    half = (_INNER - 8) / 2
    for group in shown[:_MOST_REGIONS]:
        several = "s" if len(group.layers) > 1 else ""
        where = f"layer{several} {ranges(group.layers)}" if group.layers else "outside of the layers"
        drawing.text(
            MARGIN, drawing.y + 12, f"{where}{': ' if group.by else ''}{', '.join(group.by)}", _INNER, fill=_DIM
        )
        drawing.y += LINE + 2
        top = drawing.y
        sides = [
            _boxes(drawing, group, "removed", MARGIN, half, _GONE),
            _boxes(drawing, group, "added", MARGIN + half + 8, half, _NEW),
        ]
        drawing.y = max(top, *sides)
        for verb in ("changed", "moved"):
            drawing.y = _boxes(drawing, group, verb, MARGIN, _INNER, _CHANGED)
        drawing.y += 6
    if len(shown) > _MOST_REGIONS:
        drawing.lines(f"and {len(shown) - _MOST_REGIONS} more places", fill=_DIM)


def _boxes(drawing: _Drawing, group: NodeGroup, verb: str, x: float, width: float, colours: tuple[str, str]) -> float:
    """A box for each operator of one verb, the commonest first; returns where they end."""
    counts = [(operator, count) for (done, operator), count in group.counts.items() if done == verb]
    y, mark = drawing.y, {"removed": "−", "added": "+", "changed": "~", "moved": ">"}[verb]
    texts = [f"{mark} {count} {operator.rpartition('::')[2]}" for operator, count in counts[:_MOST_OPERATORS]]
    if left := sum(count for _, count in counts[_MOST_OPERATORS:]):
        texts.append(f"{mark} {left} other{'s' if left > 1 else ''}")
    for text in texts:
        drawing.rect(x, y, width, LINE, colours[0], rx=3)
        drawing.text(x + 6, y + 13, text, width - 10, fill=colours[1])
        y += LINE + 2
    return y
