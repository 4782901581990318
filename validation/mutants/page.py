"""What became of the faults: by module, what survived, and the page of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from validation.mutants.faults import Fault


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: what told it among its tests, and among the proofs of jobs; CPU seconds, and commits.

    `tried` says whether any proof was run, `is_old` whether module or tests have changed since. No commit: it was not run.
    """

    fault: Fault
    told: str
    proven: str
    tried: bool
    seconds: float
    commits: tuple[str, ...]
    is_old: bool = False


@dataclass(frozen=True)
class Row:
    """A module's verdicts, or all."""

    name: str
    verdicts: Sequence[Verdict]

    @property
    def told(self) -> int:
        return sum(bool(verdict.told) for verdict in self.verdicts)

    @property
    def proven(self) -> str:
        """How many the proofs told, of how many they were run with."""
        tried = [verdict for verdict in self.verdicts if verdict.tried]
        return f"{sum(bool(verdict.proven) for verdict in tried)} of {len(tried)}" if tried else ""

    @property
    def explained(self) -> int:
        return sum(survived(verdict) and bool(verdict.fault.survives) for verdict in self.verdicts)

    @property
    def missing(self) -> int:
        return sum(not verdict.commits for verdict in self.verdicts)

    @property
    def old(self) -> int:
        return sum(verdict.is_old for verdict in self.verdicts)

    @property
    def seconds(self) -> float:
        return sum(verdict.seconds for verdict in self.verdicts)


def rows(found: Sequence[Verdict]) -> Iterator[Row]:
    for file in sorted({verdict.fault.file for verdict in found}):
        yield Row(file, [verdict for verdict in found if verdict.fault.file == file])
    yield Row("all", found)


def survived(verdict: Verdict) -> bool:
    return bool(verdict.commits) and not verdict.told


def summary(found: Sequence[Verdict]) -> tuple[list[str], bool]:
    """A table by module, what survived, and whether all is as it should be."""
    width = max((len(verdict.fault.file) for verdict in found), default=0)
    lines = [
        f"{row.name:{width}}  {row.told:3} of {len(row.verdicts):3} told by tests, {row.seconds:.0f} s of CPU time"
        + (f"; {row.proven} by proofs" if row.proven else "")
        for row in rows(found)
    ]
    alive = [verdict for verdict in found if survived(verdict)]
    unexplained = [verdict for verdict in alive if not verdict.fault.survives]
    strange = [verdict for verdict in found if verdict.told and verdict.fault.survives]
    lines += [f"survived, {one.fault.name}: {one.fault.survives}" for one in alive if one.fault.survives]
    lines += [f"SURVIVED {one.fault.name}{', told by ' + one.proven if one.proven else ''}" for one in unexplained]
    lines += [f"told, though a reason says it cannot be: {one.fault.name}, by {one.told}" for one in strange]
    lines += [f"NOT RUN {one.fault.name}" for one in found if not one.commits]
    lines += [f"of older code: {one.fault.name}" for one in found if one.is_old]
    return lines, not (unexplained or strange or any(one.is_old or not one.commits for one in found))


def page(found: Sequence[Verdict]) -> str:
    """docs/validation/mutants.md."""
    *modules, whole = rows(found)
    table = [
        f"| {row.name} | {len(row.verdicts)} | {row.told} | {row.proven} | {row.explained or ''} | "
        f"{len(row.verdicts) - row.told - row.explained - row.missing or ''} | {row.missing or ''} | {row.old or ''} | {row.seconds:.0f} |"
        for row in (*modules, whole)
    ]
    reasons = [
        f"- `{one.fault.file}`, {one.fault.what}: {one.fault.survives}."
        for one in found
        if one.fault.survives and survived(one)
    ]
    left = [
        f"- `{one.fault.file}`, {one.fault.what}{', in older code' if one.is_old else ''}."
        for one in found
        if survived(one) and not one.fault.survives
    ]
    reasons += ["", "What survives, and no reason is known so far:", "", *left] if left else []
    tried = [one for one in found if one.tried]
    missed = [f"- `{one.fault.file}`, {one.fault.what}." for one in tried if not one.proven]
    if missed:
        reasons += ["", MISSED.format(tried=len(tried), told=len(tried) - len(missed)), "", *missed]
    commits = ", ".join(sorted({commit for verdict in found for commit in verdict.commits}))
    return "\n".join([HEAD.format(commits=commits), *table, "", REASONS, "", *reasons, ""])


HEAD = """\
# Faults injected

What `python -m validation.mutants WORK --page` wrote. Each fault is a text of a module and what stands there instead
([the catalogue](../../validation/mutants/faults)). One at a time goes into a copy of the project, and the tests that the
catalogue names are run up to the first that fails; then, where the module has a part in making a folder, `repack` or `strip`
of a small export with nothing but its own proof. A verdict is of older code where the module, or the test that told the
fault, has changed since; where none told it, any of its tests. Commits: {commits}.

| module | faults | told by tests | told by the proof of a job alone | survive, with a reason | survive | not run | of older code | CPU seconds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
MISSED = "The proof of a job alone was run with {tried} of them, and tells {told}. Left to the tests:"
REASONS = "What survives the tests, and why it cannot matter:"
