"""Inject each fault, one at a time, into a copy of the project, and run the tests that should tell.

    python -m validation.mutants WORK                     every fault; verdicts that still hold are not made again
    python -m validation.mutants WORK --only rename_io    those whose name this regular expression finds
    python -m validation.mutants WORK --check             only whether each fault's text is there, once
    python -m validation.mutants WORK --no-proofs         the tests alone
    python -m validation.mutants WORK --page              the same as without, and writes docs/validation/mutants.md

Prints what survived. Ends with 1 where something did without a written reason, where a fault is stale, or where a reason is
written for what a test tells. A verdict holds while the fault, its module and what is run are what they were. What
the proofs of jobs say of a fault is counted beside the tests: a fault that they alone tell has survived.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from validation.mutants.faults import Fault, all_faults
from validation.mutants.forked import Outcome, import_what_takes_long, run_tests

ROOT = Path(__file__).parents[2]
COPIED = (
    "surgery", "passes", "fixtures", "tests", "validation", "docs", "cli.py", "pyproject.toml", "README.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "NOTICE", "action.yml",
)  # fmt: skip
LONGEST = 4
"""A run that takes this many times the CPU time of one without a fault has no end."""
PAGE = ROOT / "docs/validation/mutants.md"
LATER = 10.0
"""Seconds by which a changed module is younger: Python then does not take the compiled one."""


class Tree:
    """A copy of the project below `work`, with one fault at a time."""

    def __init__(self, work: Path) -> None:
        self.root = work / "tree"
        self._log = work / "last.log"
        self._sound: dict[tuple[str, ...], Outcome] = {}
        self.root.mkdir()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).is_file():
                shutil.copy2(ROOT / name, self.root / name)
        for name in ("surgery", "passes", "fixtures"):
            compileall.compile_dir(self.root / name, quiet=2)

    def sound(self, tests: tuple[str, ...]) -> Outcome:
        """The tests without a fault, run once."""
        if tests not in self._sound:
            self._sound[tests] = run_tests(self.root, tests, self._log, 3600)
            if failed := self._sound[tests].failed:
                print(f"without a fault, {failed}:\n{self._log.read_text()[-2000:]}", flush=True)
        return self._sound[tests]

    def run(self, fault: Fault, tests: tuple[str, ...], sound: Outcome) -> Outcome:
        """The tests with the fault; `sound` is what they took without."""
        limit = int(LONGEST * sound.seconds) + 10
        path = self.root / fault.file
        times, text = path.stat(), path.read_text(encoding="utf-8")
        path.write_text(fault.applied(text), encoding="utf-8")
        os.utime(path, (times.st_atime, times.st_mtime + LATER))
        try:
            return run_tests(self.root, tests, self._log, limit)
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: what told it among its tests, and among the proofs of jobs; CPU seconds, and commits.

    `tried` says whether any proof was run.
    """

    fault: Fault
    told: str
    proven: str
    tried: bool
    seconds: float
    commits: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A fault, and what is run with it: its tests, or the proofs of jobs."""

    fault: Fault
    tests: tuple[str, ...]
    digest: str

    @property
    def is_proof(self) -> bool:
        return self.tests == self.fault.proofs


def verdicts(faults: Sequence[Fault], work: Path, *, proofs: bool = True) -> list[Verdict]:
    """What became of each, from WORK/verdicts.json where that still holds. What could not be run has no commit."""
    path = work / "verdicts.json"
    kinds = [fault.tests for fault in faults], [fault.proofs if proofs else () for fault in faults]
    runs = [
        Run(fault, tests, fault.digest(ROOT, tests))
        for kind in kinds
        for fault, tests in zip(faults, kind, strict=True)
        if tests
    ]
    known = _read(path)
    if missing := [run for run in runs if run.digest not in known]:
        import_what_takes_long()
        with TemporaryDirectory(dir=work) as place:
            tree = Tree(Path(place))
            likely = _likely(missing, known)
            for number, run in enumerate(missing, 1):
                outcome = _likely_first(tree, run, likely)
                if outcome is None:
                    continue
                made = {
                    "fault": run.fault.name, "tests": run.tests, "failed": outcome.failed,
                    "seconds": round(outcome.seconds, 2), "commit": _commit(),
                }  # fmt: skip
                path.write_text(json.dumps(_read(path) | {run.digest: made}, indent=1) + "\n")
                told = outcome.failed.partition("\n")[0] or ("no proof tells" if run.is_proof else "SURVIVED")
                print(f"{number}/{len(missing)} {outcome.seconds:.1f} s  {run.fault.name}  [{told}]", flush=True)
    known = _read(path)
    made_of = {(run.fault, run.is_proof): known[run.digest] for run in runs if run.digest in known}
    return [_verdict(fault, made_of.get((fault, False), {}), made_of.get((fault, True), {})) for fault in faults]


def _likely(runs: Sequence[Run], known: Mapping[str, Any]) -> dict[Run, str]:
    """The test that told a fault of an older module, or with other tests beside it."""
    before = {made["fault"]: made["failed"].partition("\n")[0] for made in known.values() if "::" in made["failed"]}
    found = {}
    for run in runs:
        told = before.get(run.fault.name, "")
        if told.partition("::")[0] in {name.partition("::")[0] for name in run.tests} and not run.is_proof:
            found[run] = told
    return found


def _likely_first(tree: Tree, run: Run, likely: Mapping[Run, str]) -> Outcome | None:
    """What tells the fault: the likely test by itself, then all tests."""
    if told := likely.get(run):
        beside = sorted({one for other, one in likely.items() if other.tests == run.tests})
        sound = tree.sound(tuple(beside))
        if not sound.failed and (outcome := tree.run(run.fault, (told,), sound)).failed:
            return outcome
    sound = tree.sound(run.tests)
    return None if sound.failed else tree.run(run.fault, run.tests, sound)


def _verdict(fault: Fault, tests: Mapping[str, Any], proofs: Mapping[str, Any]) -> Verdict:
    return Verdict(
        fault,
        tests.get("failed", ""),
        proofs.get("failed", ""),
        bool(proofs),
        tests.get("seconds", 0.0) + proofs.get("seconds", 0.0),
        tuple(made["commit"] for made in (tests, proofs) if made),
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _commit() -> str:
    said = subprocess.run(["git", "rev-parse", "--short=9", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip()


def by_module(found: Iterable[Verdict]) -> Iterator[tuple[str, int, int, int, int, int, float]]:
    """Of each module, and of all: faults, told by tests, told by proofs, tried with proofs, survivors with a reason, CPU
    seconds."""
    found = sorted(found, key=lambda verdict: verdict.fault.file)
    groups = [(file, list(group)) for file, group in groupby(found, lambda verdict: verdict.fault.file)]
    for file, group in (*groups, ("all", found)):
        yield (
            file,
            len(group),
            sum(bool(verdict.told) for verdict in group),
            sum(bool(verdict.proven) for verdict in group),
            sum(verdict.tried for verdict in group),
            sum(not verdict.told and bool(verdict.fault.survives) for verdict in group),
            sum(verdict.seconds for verdict in group),
        )


def summary(found: Sequence[Verdict]) -> tuple[list[str], bool]:
    """A table by module, what survived, and whether all is as it should be."""
    width = max((len(verdict.fault.file) for verdict in found), default=0)
    lines = [
        f"{file:{width}}  {told:3} of {count:3} caught by tests, {proven:3} of {tried:3} by proofs, {seconds:.0f} s of CPU time"
        for file, count, told, proven, tried, _, seconds in by_module(found)
    ]
    missing = [verdict.fault.name for verdict in found if not verdict.commits]
    survived = [verdict for verdict in found if not verdict.told and verdict.commits]
    unexplained = [verdict for verdict in survived if not verdict.fault.survives]
    told = [verdict for verdict in found if verdict.told and verdict.fault.survives]
    lines += [
        f"survived, {verdict.fault.name}: {verdict.fault.survives}" for verdict in survived if verdict.fault.survives
    ]
    lines += [f"SURVIVED {one.fault.name}{', told by ' + one.proven if one.proven else ''}" for one in unexplained]
    lines += [f"told, though a reason says it cannot be: {one.fault.name}, by {one.told}" for one in told]
    lines += [f"NOT RUN {name}: its tests fail without it" for name in missing]
    return lines, not (unexplained or told or missing)


def page(found: Sequence[Verdict]) -> str:
    """docs/validation/mutants.md."""
    *modules, whole = by_module(found)
    commits = sorted({commit for verdict in found for commit in verdict.commits})
    rows = [
        f"| {file} | {count} | {told} | {f'{proven} of {tried}' if tried else ''} | {reasons or ''} | {seconds:.0f} |"
        for file, count, told, proven, tried, reasons, seconds in (*modules, whole)
    ]
    reasons = [
        f"- `{verdict.fault.file}`, {verdict.fault.what}: {verdict.fault.survives}."
        for verdict in found
        if verdict.fault.survives and not verdict.told
    ]
    return "\n".join([HEAD.format(commits=", ".join(commits)), *rows, "", REASONS, "", *reasons, ""])


HEAD = """\
# Faults injected

What `python -m validation.mutants WORK --page` wrote. Each fault is a text of a module and what stands there instead
([the catalogue](../../validation/mutants/faults)). One at a time goes into a copy of the project, and the tests of its
module are run up to the first that fails; then, where the module has a part in making a folder, `repack` or `strip` of a small
export with nothing but its own proof. Commits: {commits}.

| module | faults | told by tests | told by the proof of a job alone | survive, with a reason | CPU seconds |
| --- | --- | --- | --- | --- | --- |"""
REASONS = "What survives the tests, and why it cannot matter:"


def main() -> int:
    """0 where every fault is told, or has a reason why it is not."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="faults whose name it finds")
    parser.add_argument("--check", action="store_true", help="run nothing; tell which faults are stale")
    parser.add_argument("--no-proofs", action="store_true", help="run the tests, and not the proofs of jobs")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)}, where nothing is missing")
    options = parser.parse_args()
    faults = [fault for fault in all_faults() if re.search(options.only, fault.name)]
    if stale := [reason for fault in faults if (reason := fault.stale(ROOT))]:
        print("\n".join(f"stale: {reason}" for reason in stale))
        return 1
    if options.check:
        print(f"{len(faults)} faults, none of them stale")
        return 0
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = verdicts(faults, work, proofs=not options.no_proofs)
    lines, passed = summary(found)
    print("\n".join(lines))
    if options.page and passed and not options.only:
        PAGE.write_text(page(found), encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
