"""HTML and SVG as a tree of elements: every name out of a model is escaped because nothing is ever pasted into text."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

from surgery.errors import printable

Child = Element | str | None


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """An element. A trailing underscore of an attribute's name is dropped and inner ones become dashes: `class_`,
    `aria_label`. An attribute that is None or False is left out, True has its own name as its value.
    """
    made = Element(tag)
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if value is not None and value is not False:
            made.set(name, name if value is True else printable(str(value)))
    return append(made, *children)


def append(parent: Element, *children: Child) -> Element:
    """Put elements and text behind what is there already; None is nothing."""
    for child in children:
        if isinstance(child, Element):
            parent.append(child)
        elif child:
            _append_text(parent, "\n".join(printable(line) for line in child.split("\n")))
    return parent


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def rendered(tree: Element) -> str:
    """The tree as HTML. The contents of `script` and `style`, which HTML takes literally, are not escaped."""
    return tostring(tree, encoding="unicode", method="html")
