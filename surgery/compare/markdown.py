"""The report as Markdown, for a comment on a pull request: the verdict open, the sections collapsed, never too long."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.compare.comparison import Comparison
from surgery.compare.impact import COST_HEADS, TITLES, cost_cells, impact_of
from surgery.compare.sections import LEGEND, NONE, ReportRow, ReportSection, sections_of, title
from surgery.printing import markdown_code, markdown_text

MOST = 65_000
"""Characters of a report. GitHub refuses a comment of more than 65,536, and whoever posts it adds a line or two."""


def to_markdown(comparison: Comparison, most: int = MOST) -> str:
    """The report in at most `most` characters: details go first, the longest before the others, then whole sections."""
    shown = [section for section in sections_of(comparison) if section.rows or section.lead]
    blocks = [_Block(section) for section in shown if section.title != "Costs"]
    head = markdown_head(comparison)
    while len(report := _report(head, blocks)) > most:
        longest = max(blocks, key=lambda block: block.can_lose)
        if not longest.can_lose:
            break
        longest.cut()
    return report


def markdown_head(comparison: Comparison) -> str:
    """The title, what the change means, its costs, and the verdict: what stands there in any case."""
    impact = impact_of(comparison)
    meaning = f"**{TITLES[impact.level]}**" + (f": {markdown_text('; '.join(impact.why))}" if impact.why else "")
    rows = costs_table([("", comparison)])
    return f"### {markdown_text(title(comparison))}\n\n{meaning}\n\n{rows}\n{markdown_text(comparison.verdict)}\n"


def costs_table(found: Sequence[tuple[str, Comparison]]) -> str:
    """One row a model, by its name: what it costs, and where there are several what became of it."""
    named = any(name for name, _ in found)
    heads = [*(("model", "") if named else ()), *COST_HEADS]
    rows = []
    for name, one in found:
        first = [markdown_code(name), TITLES[impact_of(one).level]] if named else []
        rows.append([*first, *map(markdown_text, cost_cells(one))])
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _report(head: str, blocks: Sequence[_Block]) -> str:
    return "\n".join([head, *(block.text for block in blocks), f"<sub>{LEGEND}</sub>\n"])


class _Block:
    """One section as text, from which its details and then its rows can be cut."""

    def __init__(self, section: ReportSection) -> None:
        self._title = section.title
        self._lead = f"{markdown_text(section.lead)}\n\n" if section.lead else ""
        self._rows = _table(section.rows) if section.rows else f"{NONE}\n"
        self._details = _collapsed("all of it", _table(section.details)) if section.details else ""
        self._empty = not section.rows

    @property
    def can_lose(self) -> int:
        """Characters that the next cut would save; details go before any section's rows do."""
        if self._details:
            return len(self._details) + MOST
        return len(self._rows) if len(self._rows) > 200 else 0

    def cut(self) -> None:
        if self._details:
            self._details = ""
            self._lead += (
                "*The details of this section were cut: the report would be too long. `--format json` has them.*\n\n"
            )
        else:
            self._rows = "*This section was cut: the report would be too long. `--format json` has it.*\n"

    @property
    def text(self) -> str:
        if self._empty and not self._lead:
            return f"**{self._title}**: {NONE}\n"
        if self._empty:
            return f"**{self._title}**: {self._lead.strip()}\n"
        return _collapsed(f"<b>{self._title}</b>", f"{self._lead}{self._rows}\n{self._details}")


def _collapsed(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n</details>\n"


def _table(rows: Sequence[ReportRow]) -> str:
    """A table of the columns that any row fills."""
    cells = [
        (
            row.mark.strip(),
            markdown_text(row.kind),
            markdown_code(row.name),
            markdown_code(row.change),
            markdown_text(row.note),
        )
        for row in rows
    ]
    heads = ("", "what", "name", "change", "by")
    used = [index for index in range(len(heads)) if any(row[index] for row in cells)]
    lines = [heads, tuple("---" for _ in heads), *cells]
    return "".join(f"| {' | '.join(line[index] for index in used)} |\n" for line in lines)
