"""How help reads: commands and options by what they are for, examples that can be copied, in the terminal's width."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDEST = 120
"""Columns of help; longer lines are hard to read on any terminal."""
FEW = 10
"""Up to this many options stand in one list, whatever they are for."""
SOURCE, MADE, RUNTIME, WRITTEN = "Source", "What is made", "Where it runs", "What is written"
ASKED, ANSWER, TRIED, COUNTS, GENERAL = "What is asked", "The answer", "What is tried", "What counts", "General"
_GROUPS = (ASKED, ANSWER, SOURCE, MADE, TRIED, COUNTS, WRITTEN, RUNTIME, GENERAL)
"""What options are for, where a command has many, in the order of help."""
_PLACES = {"str": "TEXT", "path": "FILE", "list[Path]": "FILE", "int": "N", "int range": "N", "float": "X"}
_TYPE = re.compile(rf"<({'|'.join(map(re.escape, _PLACES))})>")
_NOTE = re.compile(r"  \[(?P<notes>[^\[\]]*)\]$")
_RANGE = re.compile(r"(; )?(\d+<=x<=\d+|x>=\d+)")


class Command(TyperCommand):
    """A command whose options stand in groups, where there are many."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Choices without the braces."""
        return [re.sub(r"^\{(.*)\}$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then the options group by group."""
        shown = [(param, record) for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        arguments = [_argument(*record) for param, record in shown if param.param_type_name == "argument"]
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in _GROUPS}
        for param, record in shown:
            if param.param_type_name == "option":
                groups[getattr(param, "rich_help_panel", None) or GENERAL].append(_option(*record))
        if sum(map(len, groups.values())) <= FEW:
            groups = {"Options": [row for rows in groups.values() for row in rows]}
        widest = _column(formatter, [row for rows in groups.values() for row in rows])
        _listed(formatter, "Arguments", arguments, _column(formatter, arguments))
        for title, rows in groups.items():
            _listed(formatter, title, rows, widest)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, line by line as they are."""
        _as_it_is(formatter, self.epilog)


class Group(TyperGroup):
    """The commands, by what they are for."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The same with any command."""
        return ["COMMAND", "..."]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands, by their panels."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                rows = panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", [])
                rows.append((name, command.short_help or ""))
        widest = _column(formatter, [row for rows in panels.values() for row in rows])
        for title, rows in panels.items():
            _listed(formatter, title, rows, widest)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The commands, then the options that all of them have."""
        self.format_commands(ctx, formatter)
        rows = [_option(*record) for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        _listed(formatter, "Options", rows, _column(formatter, rows))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, line by line as they are."""
        _as_it_is(formatter, self.epilog)


def examples(*lines: str) -> str:
    """An epilog of commands; each line is `words   what they do`, the words without the program's name."""
    return "\n".join(["Examples:", *(f"  gemma4-surgery {line}" for line in lines)])


def _column(formatter: Any, rows: Iterable[tuple[str, str]]) -> int:
    """Columns of the names in a list, the same for all that stand below one another."""
    return min(max((len(name) for name, _ in rows), default=0), 30 if formatter.width >= 70 else 20)


def _listed(formatter: Any, title: str, rows: Iterable[tuple[str, str]], column: int) -> None:
    if rows := [(name.ljust(column), text) for name, text in rows]:
        with formatter.section(title):
            formatter.write_dl(rows, col_max=column)


def _as_it_is(formatter: Any, text: str | None) -> None:
    """Lines that are to be copied are not wrapped; a sentence is."""
    if text is None:
        return
    formatter.write_paragraph()
    for line in text.split("\n"):
        if line.startswith("  "):
            formatter.write(f"{line}\n")
        else:
            formatter.write_text(line)


def _argument(name: str, text: str) -> tuple[str, str]:
    return name.partition(" <")[0].strip("[]"), text.removesuffix("[required]").rstrip()  # the usage says it


def _option(name: str, text: str) -> tuple[str, str]:
    place = _TYPE.sub(lambda found: _PLACES[found[1]], name)
    if (found := _NOTE.search(text)) is None:
        return place, text
    notes = _RANGE.sub("", found["notes"]).strip("; ")  # the error names it
    return place, text[: found.start()] + (f"  [{notes}]" if notes else "")
