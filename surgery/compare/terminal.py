"""The report on a terminal: the verdict first, a few lines a section, everything with `full`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.compare.commits import Reviewed, summary
from surgery.compare.comparison import Comparison
from surgery.compare.impact import impact_of
from surgery.compare.sections import NONE, ReportRow, ReportSection, sections_of, title
from surgery.errors import unforeseen
from surgery.printing import plain

if TYPE_CHECKING:
    from rich.console import Console

ROWS = 16
"""Lines of a section where not all are asked for."""

_COLOURS = {"same": "green", "compatible": "green", "numerics": "yellow", "breaking": "red"}
_STYLES = {"+": "green", "-": "red", "~": "yellow", "=": "cyan", ">": "blue", "FAIL": "bold red", "ok": "green"}


def show_comparison(console: Console, comparison: Comparison, *, full: bool = False) -> None:
    """Print the report; `full` lists every change, else the first of each kind."""
    impact = impact_of(comparison)
    console.print(plain(title(comparison), "bold"))
    if impact.why:
        console.print(plain(str(impact), f"bold {_COLOURS[impact.level]}"))
    console.print(plain(comparison.verdict))
    for section in sections_of(comparison):
        if section.rows or section.lead:
            console.print()
            _show_section(console, section, full)


def show_review(console: Console, found: Sequence[Reviewed]) -> None:
    """The reports of all models that differ between two commits, and one line for all of them."""
    for one in found:
        try:
            if one.comparison is not None:
                show_comparison(console, one.comparison)
            else:
                console.print(plain(f"{one.name}: {one.state}", "bold"))
        except Exception as error:  # the other models are shown in any case
            console.print(plain(f"{one.name}: {unforeseen(error)}", "bold"))
        console.print()
    console.print(plain(summary(found)))


def _show_section(console: Console, section: ReportSection, full: bool) -> None:
    rows = (section.details or section.rows) if full else section.rows
    head = plain(section.title, "bold")
    if section.lead or not rows:
        head.append_text(plain(f"  {section.lead or NONE}", "dim"))
    console.print(head)
    for row in rows if full else rows[:ROWS]:
        console.print(_line(row))
    if not full and len(rows) > ROWS:
        console.print(plain(f"  and {len(rows) - ROWS} others; --full shows them", "dim"))


def _line(row: ReportRow):  # type: ignore[no-untyped-def]
    line = plain(f"  {row.mark or ' '} ", _STYLES.get(row.mark, ""))
    line.append_text(plain(f"{row.kind} " if row.kind else "", "dim"))
    line.append_text(plain(row.name))
    if row.change:
        line.append_text(plain(f": {row.change}"))
    if row.note:
        line.append_text(plain(f"  ({row.note})", "dim"))
    return line
