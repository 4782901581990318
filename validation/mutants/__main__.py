"""Inject each fault, one at a time, into a copy of the project, and run the tests that should tell.

    python -m validation.mutants WORK                     every fault; verdicts that still hold are not made again
    python -m validation.mutants WORK --only rename_io    those whose name this regular expression finds
    python -m validation.mutants WORK --check             only whether each fault's text is there, once
    python -m validation.mutants WORK --no-proofs         the tests alone
    python -m validation.mutants WORK --minutes 10        a part of it; the next call goes on
    python -m validation.mutants WORK --page              runs nothing, and writes docs/validation/mutants.md of what is there

Prints what survived. Ends with 1 where something did without a written reason, where a fault is stale, or where a reason is
written for what a test tells. A verdict holds while the fault, its module and the test that told it, or all of them
where none did, are what they were. What the proofs of jobs say of a fault is counted beside the tests: a fault that they
alone tell has survived.
"""

from __future__ import annotations

import argparse
import compileall
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from validation.mutants.faults import Fault, all_faults
from validation.mutants.forked import Outcome, import_what_takes_long, run_tests
from validation.mutants.page import Verdict, page, summary

ROOT = Path(__file__).parents[2]
COPIED = (
    "surgery", "passes", "fixtures", "tests", "validation", "docs", "cli.py", "pyproject.toml", "README.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "NOTICE", "action.yml",
)  # fmt: skip
LONGEST = 150
"""Seconds of CPU time: a run that takes more has no end. The longest without a fault takes 40."""
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
            self._sound[tests] = run_tests(self.root, tests, self._log, LONGEST)
            if failed := self._sound[tests].failed:
                print(f"without a fault, {failed}:\n{self._log.read_text()[-2000:]}", flush=True)
        return self._sound[tests]

    def run(self, fault: Fault, tests: tuple[str, ...]) -> Outcome:
        """The tests with the fault."""
        path = self.root / fault.file
        times, text = path.stat(), path.read_text(encoding="utf-8")
        path.write_text(fault.applied(text), encoding="utf-8")
        os.utime(path, (times.st_atime, times.st_mtime + LATER))
        try:
            return run_tests(self.root, tests, self._log, LONGEST)
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@dataclass(frozen=True)
class Run:
    """A fault, and what is run with it: its tests, or the proofs of jobs."""

    fault: Fault
    tests: tuple[str, ...]

    @property
    def is_proof(self) -> bool:
        return self.tests == self.fault.proofs

    @property
    def key(self) -> str:
        return f"{self.fault.name} [proofs]" if self.is_proof else self.fault.name

    def digest(self, failed: str) -> str:
        """What a verdict rests on: the fault, its module, and the test that told it, or all where none did."""
        told = failed.partition("\n")[0]
        return self.fault.digest(ROOT, (told,) if self.has(told) else self.tests)

    def has(self, test: str) -> bool:
        """Whether a test is one of those that are run."""
        return "::" in test and any(test == one or test.startswith((f"{one}::", f"{one}[")) for one in self.tests)

    def holds(self, made: Mapping[str, Any] | None) -> bool:
        """Whether a verdict is one of this code."""
        return made is not None and made["digest"] == self.digest(made["failed"])


def runs_of(faults: Sequence[Fault], *, proofs: bool = True) -> list[Run]:
    """The tests of each fault, then the proofs."""
    kinds = [fault.tests for fault in faults], [fault.proofs if proofs else () for fault in faults]
    return [Run(fault, tests) for kind in kinds for fault, tests in zip(faults, kind, strict=True) if tests]


def make_missing(runs: Sequence[Run], work: Path, minutes: float) -> None:
    """Make each verdict that WORK/verdicts.json does not have, and write it there at once; those of older code last.

    None is begun after this many minutes.
    """
    until = time.monotonic() + 60 * minutes
    path = work / "verdicts.json"
    known = _read(path)
    missing = sorted((run for run in runs if not run.holds(known.get(run.key))), key=lambda run: run.key in known)
    if not missing:
        return
    import_what_takes_long()
    with TemporaryDirectory(dir=work) as place:
        tree = Tree(Path(place))
        likely = _likely(missing, known)
        for number, run in enumerate(missing, 1):
            if time.monotonic() > until:
                return
            outcome = _likely_first(tree, run, likely)
            if outcome is None:
                continue
            made = {
                "tests": run.tests, "failed": outcome.failed, "seconds": round(outcome.seconds, 2), "commit": _commit(),
                "digest": run.digest(outcome.failed),
            }  # fmt: skip
            _write(path, _read(path) | {run.key: made})
            told = outcome.failed.partition("\n")[0] or ("no proof tells" if run.is_proof else "SURVIVED")
            print(f"{number}/{len(missing)} {outcome.seconds:.1f} s  {run.fault.name}  [{told}]", flush=True)


def verdicts(runs: Sequence[Run], work: Path) -> list[Verdict]:
    """What is known of each fault; of older code, where nothing is of this one."""
    known = _read(work / "verdicts.json")
    found: dict[Fault, dict[bool, Any]] = {run.fault: {} for run in runs}
    for run in runs:
        made = known.get(run.key)
        if made and (run.holds(made) or not run.is_proof):
            found[run.fault][run.is_proof] = made
    new = {run.fault for run in runs if not run.is_proof and run.holds(known.get(run.key))}
    return [_verdict(fault, made.get(False, {}), made.get(True, {}), fault not in new) for fault, made in found.items()]


def _likely(runs: Sequence[Run], known: Mapping[str, Any]) -> dict[Run, str]:
    """The test that told a fault of older code, if it is there."""
    before = {run: known.get(run.key, {"failed": ""})["failed"].partition("\n")[0] for run in runs if not run.is_proof}
    return {run: told for run, told in before.items() if run.has(told) and _is_there(told)}


def _is_there(test: str) -> bool:
    file, _, name = test.partition("[")[0].partition("::")
    return f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def _likely_first(tree: Tree, run: Run, likely: Mapping[Run, str]) -> Outcome | None:
    """What tells the fault: the likely test by itself, then all tests; None where it fails without the fault, too."""
    told = likely.get(run)
    if told and (outcome := tree.run(run.fault, (told,))).failed:
        beside = sorted({one for other, one in likely.items() if other.tests == run.tests})
        if not tree.sound(tuple(beside)).failed:
            return outcome
    outcome = tree.run(run.fault, run.tests)
    if not outcome.failed:
        return outcome
    first = outcome.failed.partition("\n")[0]
    return None if tree.sound((first,) if run.has(first) else run.tests).failed else outcome


def _verdict(fault: Fault, tests: Mapping[str, Any], proofs: Mapping[str, Any], is_old: bool) -> Verdict:
    return Verdict(
        fault,
        tests.get("failed", ""),
        proofs.get("failed", ""),
        bool(proofs),
        tests.get("seconds", 0.0) + proofs.get("seconds", 0.0),
        tuple(made["commit"] for made in (tests, proofs) if made),
        is_old and bool(tests),
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _write(path: Path, known: Mapping[str, Any]) -> None:
    """At once: whoever ends this loses no verdict."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(known, indent=1) + "\n")
    beside.replace(path)


def _commit() -> str:
    said = subprocess.run(["git", "rev-parse", "--short=9", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip()


def main() -> int:
    """0 where every fault is told, or has a reason why it is not."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="faults whose name it finds")
    parser.add_argument("--check", action="store_true", help="run nothing; tell which faults are stale")
    parser.add_argument("--no-proofs", action="store_true", help="run the tests, and not the proofs of jobs")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run after as many; another call goes on"
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help=f"run nothing; write {PAGE.relative_to(ROOT)} of the verdicts that are there",
    )
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
    runs = runs_of(faults, proofs=not options.no_proofs)
    if not options.page:
        make_missing(runs, work, options.minutes)
    found = verdicts(runs, work)
    lines, passed = summary(found)
    print("\n".join(lines))
    if options.page:
        PAGE.write_text(page(found), encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
