"""What is known of a comparison beside the two graphs: the passes that made AFTER, and what a validation measured.

`repack` knows both and records them in the folder's report.json. A record speaks of the graphs whose SHA-256 it names,
and its numbers of the data as well: where both sides still are these, they belong to a later comparison, and nowhere
else. They are the word of whoever made the folder, and are shown as that.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_type_hints

from passes.base import Outcome
from surgery.architecture import read_config
from surgery.compare.comparison import (
    FieldChange,
    InterfaceChange,
    LayerChange,
    NodeChange,
    NumberGate,
    Numbers,
    PassFinding,
    PassRecord,
    Reason,
    SideSummary,
    WeightChange,
)
from surgery.compare.report_json import VERSION
from surgery.compare.subjects import Subject
from surgery.errors import RequestError, SurgeryError
from surgery.graph.changes import ModelThing

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.verify.report import Gate, Report

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
"""The names under which a folder holds its report."""

_T = TypeVar("_T")

Key = tuple[Hashable, ...]
"""What a change is told from the others of its section by: names, verbs, never its reasons."""


class PassFinder(Protocol):
    """Who made a change."""

    def reasons(self, section: str, key: Key, things: Sequence[ModelThing]) -> tuple[Reason, ...]:
        """The passes that made a change. `things` are what changed, by its names before and after."""


@dataclass(frozen=True)
class Provenance:
    blame: PassFinder
    passes: tuple[PassRecord, ...] = ()
    numbers: Numbers | None = None
    proven: str = ""
    """What AFTER was proven against, and how that went, where that is not BEFORE."""


class NoPasses:
    """No pass is known."""

    def reasons(self, section: str, key: Key, things: Sequence[ModelThing]) -> tuple[Reason, ...]:
        return ()


class _Witnessed:
    """Passes that were watched: each is a reason for what it touched."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes = [(outcome, dict(_told(outcome))) for outcome in outcomes if outcome.changed]

    def reasons(self, section: str, key: Key, things: Sequence[ModelThing]) -> tuple[Reason, ...]:
        found = []
        for outcome, told in self._outcomes:
            if any(thing in outcome.touched for thing in things):
                text = next((told[name] for name in key if name in told), "")
                found.append(Reason(outcome.name, text))
        return tuple(found)


def _told(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """Name -> what the pass said of it."""
    for finding in outcome.findings:
        if finding.verb != "skipped":
            yield from ((name, finding.reason) for name in subject_names(finding.subject))


def subject_names(subject: str) -> list[str]:
    """The names that a finding's subject stands for.

    >>> subject_names("Neg node '/lm_head/Neg'"), subject_names("present.5.key|value")
    (['/lm_head/Neg'], ['present.5.key', 'present.5.value'])
    """
    if match := re.fullmatch(r"\w+ node '(.*)'", subject):
        return [match[1]]
    if match := re.fullmatch(r"(.*?)(?<!\w)(\w++)\|(\w+)", subject):
        return [match[1] + match[2], match[1] + match[3]]
    return [subject]


def witnessed(outcomes: Sequence[Outcome], numbers: Numbers | None = None) -> Provenance:
    """What `repack` knows: the outcomes of its passes, and what its closing proof measured."""
    passes = tuple(
        PassRecord(one.name, dict(one.operators), tuple(PassFinding(f.verb, f.subject, f.reason) for f in one.findings))
        for one in outcomes
    )
    return Provenance(_Witnessed(outcomes), passes, numbers)


class _Recorded:
    """Reasons that a report names, by section and key."""

    def __init__(self, found: Mapping[tuple[str, Key], tuple[Reason, ...]]) -> None:
        self._found = found

    def reasons(self, section: str, key: Key, things: Sequence[ModelThing]) -> tuple[Reason, ...]:
        return self._found.get((section, key), ())


def recorded(after: Subject, *sides: SideSummary) -> Provenance:
    """What AFTER's folder has on record about these two: reasons where their graphs are those that it speaks of, and
    numbers where all of their data is as well, going by SHA-256. Anybody may have written it, so it is read as data.
    """
    try:
        report = read_config(after.root / JSON_FILE) if after.kind == "folder" else {}
        spoken_of = [report[name] for name in ("before", "after")]
        same = [[graph["sha256"] for graph in side["graphs"]] for side in spoken_of] == [
            [graph.sha256 for graph in side.graphs] for side in sides
        ]
        if report["version"] == VERSION and same:
            known = all(None not in side.data.values() for side in sides)
            return _read(report, known and [side["data"] for side in spoken_of] == [side.data for side in sides])
        return Provenance(NoPasses(), proven=_proven(report, after, sides[1]))
    except (SurgeryError, KeyError, TypeError, AttributeError):
        pass  # no report, or not one of ours: the comparison does without
    return Provenance(NoPasses())


def _proven(report: Mapping[str, Any], after: Subject, side: SideSummary) -> str:
    """What a report about this very AFTER says that it was proven against; empty where it speaks of another one."""
    spoken_of, numbers = report["after"], report["numbers"]
    graphs = [graph["sha256"] for graph in spoken_of["graphs"]] == [graph.sha256 for graph in side.graphs]
    data = all(side.data.get(name) in (None, digest) for name, digest in spoken_of["data"].items())
    if numbers is None or not graphs or not data:
        return ""
    source = (after.manifest or {}).get("source")
    made = source if isinstance(source, Mapping) else {}
    where = f"{made['repo']}@{made['revision']} {made['precision']}" if made.get("repo") else report["before"]["label"]
    return f"its author proved it against {_as(str, where)}: {_recorded_numbers(numbers).summary}"


def _read(report: Mapping[str, Any], with_numbers: bool) -> Provenance:
    """Raises KeyError, TypeError or AttributeError for another form than that of docs/diff-report.md."""
    found: dict[tuple[str, Key], tuple[Reason, ...]] = {}
    for section, changes in _sections(report):
        for change in changes:
            found[section, key_of(section, change)] = tuple(_flat(Reason, reason) for reason in change["reasons"])
    passes = tuple(
        PassRecord(
            _as(str, entry["name"]),
            {operator: _as(int, count) for operator, count in entry["operators"].items()},
            tuple(_flat(PassFinding, finding) for finding in entry["findings"]),
        )
        for entry in report["passes"]
    )
    numbers = report["numbers"] if with_numbers else None
    return Provenance(_Recorded(found), passes, None if numbers is None else _recorded_numbers(numbers))


def _recorded_numbers(numbers: Mapping[str, Any]) -> Numbers:
    return Numbers(
        origin=_as(str, numbers["origin"]),
        passed=_as(bool, numbers["passed"]),
        exact=_as(bool, numbers["exact"]),
        summary=_as(str, numbers["summary"]),
        gates=tuple(_flat(NumberGate, gate) for gate in numbers["gates"]),
        recorded=True,
    )


def _flat(kind: type[_T], value: Mapping[str, Any]) -> _T:
    """A dataclass of plain fields from a JSON object."""
    return kind(**{name: _as(hint, value[name]) for name, hint in get_type_hints(kind).items()})


def _as(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} is expected, not {type(value).__name__}")
    return value


def _sections(report: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[Mapping[str, Any]]]]:
    yield "interface", report["interface"]
    yield "layers", report["layers"]
    yield "metadata", report["metadata"]
    yield "nodes", [change for group in report["nodes"]["groups"] for change in group["changes"]]
    yield "weights", report["weights"]["changes"]


def key_of(section: str, change: Mapping[str, Any]) -> Key:
    """The key of a change in its JSON form; `key` gives the same for the change itself."""
    if section == "layers":
        return (change["index"],)
    if section == "metadata":
        return (change["key"],)
    names = [change[side] for side in ("before", "after")]
    if section == "nodes":
        return change["scope"], *names
    return change.get("kind"), *(value["name"] if value else None for value in names)


def key(section: str, change: InterfaceChange | LayerChange | FieldChange | NodeChange | WeightChange) -> Key:
    """What a change is told from the others of its section by."""
    if isinstance(change, LayerChange):
        return (change.index,)
    if isinstance(change, FieldChange):
        return (change.key,)
    if isinstance(change, NodeChange):
        return change.scope, change.before, change.after
    kind = change.kind if isinstance(change, InterfaceChange) else None
    return kind, *(side.name if side is not None else None for side in (change.before, change.after))


# ---- numbers


def of_validation(report: Report, origin: str) -> Numbers:
    """What a validation measured, without its times. `origin` says which one it was."""
    return _numbers(report.to_dict(), origin)


def read_validation(path: Path) -> Numbers:
    """The same from what `validate --json` printed. Raises RequestError where it is something else."""
    try:
        return _numbers(read_config(path), path.name)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise RequestError(f"{path} is not what validate --json prints: it has no list of gates") from None


def _numbers(report: Mapping[str, Any], origin: str) -> Numbers:
    from surgery.verify.report import Gate

    gates = [_gate(Gate(**entry)) for entry in report["gates"]]
    held = [gate for gate in gates if gate.measure == "max |difference|" and gate.threshold == 0]
    passed = bool(gates) and all(gate.passed for gate in gates)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return Numbers(
        origin=f"{origin}, with {versions}",
        passed=passed,
        exact=passed and bool(held) and all(gate.found == 0 for gate in held),
        summary=_summary(gates, report["parity"]),
        gates=tuple(
            NumberGate(g.section, g.name, g.passed, ": ".join(part for part in (g.reading, g.detail) if part))
            for g in gates
        ),
    )


def _gate(gate: Gate) -> Gate:
    """The gate itself; raises TypeError where a field is of another type than `validate` prints."""
    for text in (gate.section, gate.name, gate.detail, gate.measure, gate.option):
        _as(str, text)
    _as(bool, gate.passed)
    if not all(isinstance(value, float | int | str | None) for value in (gate.threshold, gate.found)):
        raise TypeError("a number is expected")
    return gate


def _summary(gates: Sequence[Gate], parity: Mapping[str, Any] | None) -> str:
    passed = f"{sum(gate.passed for gate in gates)} of {len(gates)} gates passed"
    if parity is None:
        return passed
    from surgery.verify.parity import Parity

    values: dict[str, Any] = {name: float(value) if isinstance(value, str) else value for name, value in parity.items()}
    return f"{passed}; {Parity(**values)}"
