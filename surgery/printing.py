"""Text for people: sizes, and words out of models that must not drive a terminal, a log or a page of Markdown."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import TYPE_CHECKING

from surgery.errors import printable

if TYPE_CHECKING:
    from rich.text import Text


LONGEST_CELL = 400
"""Characters of a text in Markdown; a name in a model may be megabytes long."""

_APART = "&#8203;"
"""A space without width: what it parts is no mention and no link, and looks the same."""


def plain(text: object, style: str = "") -> Text:
    """Text without markup and without control characters; of newlines, one at its end."""
    from rich.text import Text

    line = str(text)
    return Text(printable(line.removesuffix("\n")) + "\n" * line.endswith("\n"), style=style)


def json_text(value: object) -> str:
    """JSON in two columns, with the letters of every script as they are, but no character that is none."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    clean = all(line.isprintable() for line in text.split("\n"))
    return f"{text if clean else json.dumps(value, indent=2)}\n"


def markdown_code(text: str, most: int = LONGEST_CELL) -> str:
    """A code span, whatever is in it, in a table or outside: nothing in it is markup, a link or a mention."""
    text = _clipped(text, most)
    if not text:
        return ""
    ticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    span = f"{ticks}{pad}{text}{pad}{ticks}"
    # A table takes an odd number of backslashes before the pipe as its escape.
    return re.sub(r"(\\*)\|", lambda found: f"{found[1]}{found[1][: len(found[1]) % 2]}\\|", span)


def markdown_text(text: str) -> str:
    """Text that Markdown and HTML take as it is, and that mentions nobody: GitHub looks for an @ after Markdown is
    done."""
    text = re.sub(r"([\\`*_\[\]<>&|#@~])", r"\\\1", _clipped(text))
    text = text.replace("\\<", "&lt;").replace("\\&", "&amp;")
    text = re.sub(r"([@#]|:(?=//)|\b(?:www|gh)(?=[.-]))", rf"\1{_APART}", text, flags=re.IGNORECASE)
    return text.replace("$", "&#36;")  # formulas


def _clipped(text: str, most: int = LONGEST_CELL) -> str:
    text = text if len(text) <= most else f"{text[: most - 60]} ... {text[-40:]}"
    return printable(text.replace("\n", " "))


_TURNING = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Characters that turn the direction of what follows them, to its end or for ever."""


def spoken(text: str) -> str:
    """What a model says, less what would drive a terminal: controls but line feed and tab, and turns of direction.

    In contrast to `printable` it leaves joiners and spaces of every kind: Persian, French and emoji are written with
    them.
    """
    return "".join(c if c in "\n\t" or _says_something(c) else ascii(c)[1:-1] for c in text)


def _says_something(c: str) -> bool:
    return unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in _TURNING


def size(count: float) -> str:
    """Bytes as people read them: `1.61 GB`, in powers of ten as disks and the Hub count. A graph may speak of more than
    there are."""
    if count >= 2**63:
        return "more than 9 EB"
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
