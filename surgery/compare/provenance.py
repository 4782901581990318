"""What is known of a comparison beside the two graphs: the passes that made AFTER, and what a validation measured.

`repack` knows both and records them in the folder's report.json. A record speaks of the graphs whose SHA-256 it names,
and its numbers of the data as well: where both sides still are these, they belong to a later comparison, and nowhere
else. They are the word of whoever made the folder, and are shown as that.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from passes.base import Outcome
from surgery.architecture import read_config
from surgery.compare.comparison import (
    Comparison,
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
from surgery.files.json_values import typed
from surgery.graph.changes import ModelThing

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.verify.parity import Parity
    from surgery.verify.report import Gate, Report

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
"""The names under which a folder holds its report."""

Key = tuple[Hashable, ...]
"""What a change is told from the others of its section by: names, verbs, never its reasons."""


Change = InterfaceChange | LayerChange | FieldChange | NodeChange | WeightChange


class PassFinder(Protocol):
    """Who made a change."""

    def reasons(self, section: str, key: Key, things: Sequence[ModelThing]) -> tuple[Reason, ...]:
        """The passes that made a change. `things` are what changed, by its names before and after."""


@dataclass(frozen=True)
class Provenance:
    """Who made the changes, and what is on record of the passes and of the proof."""

    blame: PassFinder
    passes: tuple[PassRecord, ...] = ()
    numbers: Numbers | None = None
    proven: str = ""
    """What AFTER was proven against, and how that went, where that is not BEFORE."""


class NoPasses:
    """No pass is known."""

    def reasons(self, section: str, key: Key, things: Sequence[ModelThing]) -> tuple[Reason, ...]:
        """None, whatever changed."""
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

    def __init__(self, report: Comparison) -> None:
        sections: dict[str, Sequence[Change]] = {
            "interface": report.interface,
            "layers": report.layers,
            "metadata": report.metadata,
            "nodes": tuple(report.nodes),
            "weights": report.weights.changes,
        }
        self._found = {(name, key(one)): one.reasons for name, changes in sections.items() for one in changes}

    def reasons(self, section: str, key: Key, things: Sequence[ModelThing]) -> tuple[Reason, ...]:
        return self._found.get((section, key), ())


def recorded(after: Subject, *sides: SideSummary) -> Provenance:
    """What AFTER's folder has on record about these two: reasons where their graphs are those that it speaks of, and
    numbers where all of their data is as well, going by SHA-256. Anybody may have written it, so it is read as data.
    """
    try:
        held = read_config(after.root / JSON_FILE) if after.kind == "folder" else {}
        report: Comparison = typed(Comparison, held)
    except (SurgeryError, TypeError, ValueError, RecursionError):
        return Provenance(NoPasses())  # no report, or not one of ours: the comparison does without
    numbers = replace(report.numbers, recorded=True) if report.numbers else None
    spoken_of = report.before, report.after
    if held.get("version") != VERSION or any(map(_other_graphs, spoken_of, sides)):
        return Provenance(NoPasses(), proven=_proven(report, after, sides[1]))
    known = all(None not in side.data.values() for side in sides)
    same_data = [side.data for side in spoken_of] == [side.data for side in sides]
    return Provenance(_Recorded(report), report.passes, numbers if known and same_data else None)


def _other_graphs(one: SideSummary, other: SideSummary) -> bool:
    return [graph.sha256 for graph in one.graphs] != [graph.sha256 for graph in other.graphs]


def _proven(report: Comparison, after: Subject, side: SideSummary) -> str:
    """What a report about this very AFTER says that it was proven against; empty where it speaks of another one."""
    data = all(side.data.get(name) in (None, digest) for name, digest in report.after.data.items())
    if report.numbers is None or _other_graphs(report.after, side) or not data:
        return ""
    source = (after.manifest or {}).get("source")
    made = source if isinstance(source, Mapping) else {}
    repo, revision, precision = (made.get(name) for name in ("repo", "revision", "precision"))
    where = f"{repo}@{revision} {precision}" if repo else report.before.label
    return f"its author proved it against {where}: {report.numbers.summary}"


def key(change: Change) -> Key:
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

    gates: list[Gate] = [typed(Gate, entry) for entry in report["gates"]]
    held = [gate for gate in gates if gate.measure == "max |difference|" and gate.threshold == 0]
    passed, level = bool(gates) and all(gate.passed for gate in gates), _parity(report.get("level"))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return Numbers(
        origin=f"{origin}, with {versions}",
        passed=passed,
        exact=passed and bool(held) and all(gate.found == 0 for gate in held) and (level is None or level.max_abs == 0),
        summary=_summary(gates, _parity(report["parity"]), level),
        gates=tuple(
            NumberGate(g.section, g.name, g.passed, ": ".join(part for part in (g.reading, g.detail) if part))
            for g in gates
        ),
    )


def _parity(values: Mapping[str, Any] | None) -> Parity | None:
    """What a report has of a comparison, where it has one."""
    from surgery.verify.parity import Parity

    if values is None:
        return None
    given: dict[str, Any] = {name: float(value) if isinstance(value, str) else value for name, value in values.items()}
    return Parity(**given)


def _summary(gates: Sequence[Gate], parity: Parity | None, level: Parity | None) -> str:
    from surgery.verify.report import of_level

    passed = f"{sum(gate.passed for gate in gates)} of {len(gates)} gates passed"
    return "; ".join([passed, *([str(parity)] if parity else []), *([of_level(level)] if level else [])])
