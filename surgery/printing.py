"""Text for people: sizes, and words out of models that must not drive a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.errors import printable

if TYPE_CHECKING:
    from rich.text import Text


def plain(text: object, style: str = "") -> Text:
    """Text without markup and without control characters."""
    from rich.text import Text

    return Text(printable(str(text)), style=style)


def size(count: float) -> str:
    """Bytes as people read them: `1.61 GB`, in powers of ten as disks and the Hub count. A graph may speak of more than there are."""
    if count >= 2**63:
        return "more than 9 EB"
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
