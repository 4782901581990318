"""The matrix as a document for people, as JSON for programs, and against an earlier one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from validation.runtimes.environments import Column
from validation.runtimes.notes import NOTES
from validation.runtimes.outcomes import BADNESS, Outcome, Verdict

Key = tuple[str, str, str]


class OtherRuntimes(RuntimeError):
    """Rows of two runs that do not make one table."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question to one folder: an outcome for each column of the matrix."""

    layout: str
    made: str
    question: str
    outcomes: tuple[Outcome, ...]

    @property
    def key(self) -> Key:
        return self.layout, self.made, self.question


@dataclass(frozen=True, slots=True)
class Matrix:
    """`made_with` is the environment that repacked the folders, ran the source pairs and answered for the tokenizer."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    made_with: Mapping[str, str]

    def with_rows(self, found: Matrix) -> Matrix:
        """This matrix with the rows of another one in place of those of the same folders, or behind the others. Raises
        OtherRuntimes where the other was asked of other columns."""
        if found.columns != self.columns or found.made_with != self.made_with:
            raise OtherRuntimes(
                f"the committed table is of {_runtimes(self)}, these rows are of {_runtimes(found)}: ask all folders"
            )
        rows: dict[str, list[Row]] = {}
        for matrix in (self, found):
            new = {row.made: [each for each in matrix.rows if each.made == row.made] for row in matrix.rows}
            rows.update(new)
        return Matrix(self.columns, tuple(row for made in rows.values() for row in made), self.made_with)

    def to_json(self) -> str:
        """A line for each column, message and row, so that a diff shows what changed. A cell is a verdict, or a verdict
        and the number of its message."""
        messages = list(dict.fromkeys(cell.detail for row in self.rows for cell in row.outcomes if cell.detail))
        numbers = {message: number for number, message in enumerate(messages)}
        parts: dict[str, Iterable[object]] = {
            "columns": [asdict(column) for column in self.columns],
            "messages": messages,
            "rows": [_plain(row, numbers) for row in self.rows],
        }
        lists = ",\n".join(f'"{name}": [\n{_lines(values)}\n]' for name, values in parts.items())
        return f'{{"made_with": {json.dumps(dict(self.made_with))},\n{lists}}}\n'

    @classmethod
    def from_json(cls, text: str) -> Matrix:
        """What `to_json` wrote."""
        found = json.loads(text)
        messages: list[str] = found["messages"]
        rows = tuple(
            Row(
                row["layout"], row["made"], row["question"], tuple(_outcome(cell, messages) for cell in row["outcomes"])
            )
            for row in found["rows"]
        )
        return cls(tuple(Column(**column) for column in found["columns"]), rows, found["made_with"])


def _runtimes(matrix: Matrix) -> str:
    told = sorted({f"onnxruntime {column.onnxruntime}" for column in matrix.columns})
    return ", ".join([*(f"{name} {version}" for name, version in matrix.made_with.items()), *told])


def _lines(values: Iterable[object]) -> str:
    return ",\n".join(f"  {json.dumps(value, ensure_ascii=False)}" for value in values)


def _plain(row: Row, numbers: Mapping[str, int]) -> dict[str, Any]:
    cells = [[cell.verdict, numbers[cell.detail]] if cell.detail else cell.verdict for cell in row.outcomes]
    return {"layout": row.layout, "made": row.made, "question": row.question, "outcomes": cells}


def _outcome(cell: Verdict | tuple[Verdict, int], messages: Sequence[str]) -> Outcome:
    return Outcome(cell) if isinstance(cell, str) else Outcome(cell[0], messages[cell[1]])


def worse(committed: Matrix, found: Matrix) -> list[str]:
    """The cells that got worse, and those that the committed matrix does not have, in words."""
    return _changes(committed, found, lambda before, now: BADNESS[now.verdict] > BADNESS[before.verdict])


def better(committed: Matrix, found: Matrix) -> list[str]:
    """The cells that got better: the committed matrix is out of date."""
    return _changes(committed, found, lambda before, now: BADNESS[now.verdict] < BADNESS[before.verdict], new=False)


def _changes(
    committed: Matrix, found: Matrix, changed: Callable[[Outcome, Outcome], bool], *, new: bool = True
) -> list[str]:
    before = {(row.key, column.key): outcome for row, column, outcome in _cells(committed)}
    sentences = []
    for row, column, outcome in _cells(found):
        where = f"{row.made} {row.layout}, {row.question}, onnxruntime-genai {column.genai} on {column.onnxruntime}"
        old = before.get((row.key, column.key))
        if old is None:
            sentences += [f"{where}: {outcome}, and the table has no such cell"] if new else []
        elif changed(old, outcome):
            sentences.append(f"{where}: {outcome}, where the table has {old}")
    return sentences


def _cells(matrix: Matrix) -> Iterable[tuple[Row, Column, Outcome]]:
    for row in matrix.rows:
        for column, outcome in zip(matrix.columns, row.outcomes, strict=True):
            yield row, column, outcome


@dataclass
class Footnotes:
    """The runtimes' messages, numbered as they first occur. Messages that differ in numbers alone are one."""

    _numbers: dict[str, int] = field(default_factory=dict)
    _texts: list[str] = field(default_factory=list)

    def mark(self, outcomes: Iterable[Outcome]) -> str:
        numbers = sorted({self._number(outcome.detail) for outcome in outcomes if outcome.detail})
        return "".join(f"[^{number}]" for number in numbers)

    def _number(self, detail: str) -> int:
        pattern = re.sub(r"\d+", "0", detail)
        if pattern not in self._numbers:
            self._texts.append(detail)
            self._numbers[pattern] = len(self._texts)
        return self._numbers[pattern]

    def lines(self) -> list[str]:
        return [f"[^{number}]: `{text}`" for number, text in enumerate(self._texts, 1)]


def markdown(matrix: Matrix, took: str) -> str:
    """The document: a table for each layout, the causes of what is not `ok`, the runtimes' messages."""
    footnotes = Footnotes()
    layouts = dict.fromkeys(row.layout for row in matrix.rows)
    tables = [line for layout in layouts for line in _layout(matrix, layout, footnotes)]
    return "\n".join([*_head(matrix, took), *tables, *_causes(matrix), *footnotes.lines(), ""])


def _head(matrix: Matrix, took: str) -> list[str]:
    made = ", ".join(f"{name} {version}" for name, version in matrix.made_with.items())
    folders = ", ".join(dict.fromkeys(row.made for row in matrix.rows))
    return [
        "# What each version of ONNX Runtime GenAI does with a repacked folder",
        "",
        "<!-- written by `python -m validation.runtimes WORK`; do not edit -->",
        "",
        f"Folders: {folders}, each in every KV layout, on the CPU. Made with {made}.",
        "Products of the QAT exports multiply in int8, as `repack` has it, and so does their source; the others have the "
        "source's numbers.",
        "Each version runs in an environment of its own, with the oldest ONNX Runtime that it admits and with the newest.",
        "",
        "`ok`: the tokens are those of the source pair, the text is that of the environment above. `wrong`: they are not.",
        "`refused`: the runtime raised an error; its words are below. `crash`: the process died.",
        f"Folders that fare alike in every cell share a table. {took}",
        "",
    ]


def _layout(matrix: Matrix, layout: str, footnotes: Footnotes) -> Iterator[str]:
    """A table for each set of folders that fare alike."""
    rows = [row for row in matrix.rows if row.layout == layout]
    everything = list(dict.fromkeys(row.made for row in rows))
    for made in _alike(rows):
        yield from (f"## KV layout {layout}: {_named(made, everything)}", "")
        yield from _table(matrix.columns, [row for row in rows if row.made in made], footnotes)
        yield ""


def _table(columns: Sequence[Column], rows: Sequence[Row], footnotes: Footnotes) -> Iterator[str]:
    """One column for a version; two where the verdicts depend on the ONNX Runtime under it."""
    shown = _merged(columns, rows)
    heads = [f"{columns[places[0]].genai}<br>ORT {_listed(columns, places)}" for places in shown]
    yield _line(["", *heads])
    yield _line(["---"] * (len(heads) + 1))
    for question in dict.fromkeys(row.question for row in rows):
        asked = [row.outcomes for row in rows if row.question == question]
        cells = [[outcomes[place] for outcomes in asked for place in places] for places in shown]
        yield _line([question, *(f"{cell[0].verdict}{footnotes.mark(cell)}" for cell in cells)])


def _listed(columns: Sequence[Column], places: Sequence[int]) -> str:
    return ", ".join(columns[place].onnxruntime for place in places)


def _merged(columns: Sequence[Column], rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of columns, those of one version with equal verdicts together."""
    groups: dict[tuple[str, tuple[Verdict, ...]], list[int]] = {}
    for place, column in enumerate(columns):
        verdicts = tuple(row.outcomes[place].verdict for row in rows)
        groups.setdefault((column.genai, verdicts), []).append(place)
    return list(groups.values())


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _alike(rows: Iterable[Row]) -> list[list[str]]:
    """Folders with the same verdict in every cell together."""
    profiles: dict[str, list[tuple[Verdict, ...]]] = {}
    for row in rows:
        profiles.setdefault(row.made, []).append(tuple(outcome.verdict for outcome in row.outcomes))
    return [[made for made in profiles if profiles[made] == profile] for profile in _distinct(profiles.values())]


def _distinct(profiles: Iterable[list[tuple[Verdict, ...]]]) -> list[list[tuple[Verdict, ...]]]:
    found: list[list[tuple[Verdict, ...]]] = []
    for profile in profiles:
        if profile not in found:
            found.append(profile)
    return found


def _named(made: Sequence[str], everything: Sequence[str]) -> str:
    """Folders by name; a fixture without its precision where all of its precisions are meant."""
    names: dict[str, None] = {}
    for name in made:
        fixture = name.partition(" ")[0]
        whole = {each for each in everything if each.partition(" ")[0] == fixture} <= set(made)
        names[fixture if whole else name] = None
    return ", ".join(names)


def _causes(matrix: Matrix) -> list[str]:
    """Each note that speaks of a cell in the matrix."""
    verdicts = {(row.question, outcome.verdict) for row in matrix.rows for outcome in row.outcomes}
    notes = [note for note in NOTES if any((question, note.verdict) in verdicts for question in note.questions)]
    return ["## Causes", "", *(f"- **{note.title}** {note.text}" for note in notes), ""] if notes else []
