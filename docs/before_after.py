"""Draw docs/before-after.svg, the README's picture: an export's two graphs, and the one that repack makes of them.

    python docs/before_after.py

Names and counts are read from fixtures/tiny-e2b and from what the default recipe makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from passes.base import apply
from passes.presets import compatible
from surgery.graph.model import Model
from surgery.source.export import open_export

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "before-after.svg"
WIDTH, LINE, BOX, GAP = 640, 17, 196, 52

STYLE = """
text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328 }
.head { font-weight: 600 } .dim { fill: #59636e }
rect { fill: #f6f8fa; stroke: #8c959f } path { fill: none; stroke: #0969da; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .dim { fill: #9198a1 } rect { fill: #151b23; stroke: #656c76 } path { stroke: #4493f8 } }
"""


@dataclass(frozen=True)
class Box:
    """A graph: its file, what it takes, and what it gives."""

    title: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    note: str

    @property
    def height(self) -> int:
        return LINE * (max(len(self.takes), len(self.gives)) + 3)


def interface(names: list[str]) -> tuple[str, ...]:
    """Names of an interface, the caches as one line: `past_key_values.* (10)`."""
    caches = [name for name in names if name.startswith(("past", "present"))]
    others = [name for name in names if name not in caches]
    return (*others, *([f"{caches[0].split('.')[0]}.* ({len(caches)})"] if caches else []))


def box(title: str, model: Model) -> Box:
    takes = interface([value.name for value in model.graph.input])
    gives = interface([value.name for value in model.graph.output])
    return Box(title, takes, gives, f"{len(model.graph.node)} nodes")


def picture() -> str:
    """The SVG as text."""
    export = open_export(ROOT / "fixtures" / "tiny-e2b")
    pair = export.pair("q4")
    decoder = Model.open(pair.decoder, export.architecture)
    merged, _ = apply(decoder, compatible(pair.embed))
    before = [box("embed_tokens", Model.open(pair.embed)), box("decoder_model_merged", decoder)]
    after = box("model.onnx", merged)
    height = 28 + sum(one.height for one in before) + GAP + 10
    size = {"viewBox": f"0 0 {WIDTH} {height}", "width": str(WIDTH), "height": str(height), "role": "img"}
    svg = Element("svg", size)
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    _add(svg, "title", "Before: two graphs. After: one graph that ONNX Runtime GenAI loads.")
    _add(svg, "style", STYLE)
    _add(svg, "text", "published: two graphs", x=8, y=16, class_="head")
    _add(svg, "text", "repacked: og.Model loads it", x=WIDTH // 2 + 8, y=16, class_="head")
    top = 28
    for one in before:
        _draw(svg, one, 8, top)
        top += one.height + GAP
    middle = 28 + before[0].height
    _add(svg, "path", d=f"M{8 + BOX // 2} {middle} v{GAP} m-5 -8 l5 8 l5 -8")
    _draw(svg, after, WIDTH // 2 + 8, 28 + (height - 38 - after.height) // 2)
    return tostring(svg, encoding="unicode", method="html") + "\n"


def _draw(svg: Element, one: Box, left: int, top: int) -> None:
    right = left + WIDTH // 2 - 26
    _add(svg, "rect", x=left, y=top, width=WIDTH // 2 - 16, height=one.height, rx=6)
    _add(svg, "text", one.title, x=left + 10, y=top + LINE + 2, class_="head")
    _add(svg, "text", one.note, x=right, y=top + LINE + 2, class_="dim", text_anchor="end")
    for row, name in enumerate(one.takes):
        _add(svg, "text", name, x=left + 10, y=top + LINE * (row + 2) + 8)
    for row, name in enumerate(one.gives):
        _add(svg, "text", name, class_="dim", x=right, y=top + LINE * (row + 2) + 8, text_anchor="end")


def _add(svg: Element, tag: str, text: str = "", **attributes: object) -> None:
    named = {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()}
    SubElement(svg, tag, named).text = text


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
