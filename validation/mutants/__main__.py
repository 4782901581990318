"""Inject each fault, one at a time, into a copy of the project, and run the tests that should tell.

    python -m validation.mutants WORK                     every fault; verdicts that still hold are not made again
    python -m validation.mutants WORK --only rename_io    those whose name this regular expression finds
    python -m validation.mutants WORK --check             only whether each fault's text is there, once

Prints what survived. Ends with 1 where something did without a written reason, where a fault is stale, or where a reason is
written for what a test tells. A verdict holds while the fault, its module and its tests are what they were.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
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
        """The tests without a fault. Raises RuntimeError where they fail: then nothing can be told."""
        if tests not in self._sound:
            self._sound[tests] = run_tests(self.root, tests, self._log, 3600)
            if failed := self._sound[tests].failed:
                print(f"without a fault, {failed}:\n{self._log.read_text()[-2000:]}", flush=True)
        return self._sound[tests]

    def run(self, fault: Fault) -> Outcome | None:
        """The tests with the fault; None where they fail without it, so that nothing can be told."""
        if (sound := self.sound(fault.tests)).failed:
            return None
        limit = int(LONGEST * sound.seconds) + 10
        path = self.root / fault.file
        times, text = path.stat(), path.read_text(encoding="utf-8")
        path.write_text(fault.applied(text), encoding="utf-8")
        os.utime(path, (times.st_atime, times.st_mtime + LATER))
        try:
            return run_tests(self.root, fault.tests, self._log, limit)
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def verdicts(faults: Sequence[Fault], work: Path) -> list[tuple[Fault, Outcome]]:
    """What became of each, from WORK/verdicts.json where that still holds."""
    path = work / "verdicts.json"
    known = _read(path)
    digests = {fault: fault.digest(ROOT) for fault in faults}
    missing = [fault for fault, digest in digests.items() if digest not in known]
    if missing:
        import_what_takes_long()
        with TemporaryDirectory(dir=work) as place:
            tree = Tree(Path(place))
            for number, fault in enumerate(missing, 1):
                outcome = tree.run(fault)
                if outcome is None:
                    continue
                made = {"fault": fault.name, "failed": outcome.failed, "seconds": round(outcome.seconds, 2)}
                known = {**_read(path), digests[fault]: made}  # another process may have written some, too
                path.write_text(json.dumps(known, indent=1) + "\n")
                told = outcome.failed.partition("\n")[0] or "SURVIVED"
                print(f"{number}/{len(missing)} {outcome.seconds:.1f} s  {fault.name}  [{told}]", flush=True)
    verdicts = ((fault, known.get(digest, {})) for fault, digest in digests.items())
    return [(fault, Outcome(verdict.get("failed", ""), verdict.get("seconds", 0.0))) for fault, verdict in verdicts]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def summary(found: Sequence[tuple[Fault, Outcome]]) -> tuple[list[str], bool]:
    """A table by module, what survived, and whether all is as it should be."""
    injected = Counter(fault.file for fault, _ in found)
    caught = Counter(fault.file for fault, outcome in found if outcome.failed)
    width = max(map(len, injected), default=0)
    lines = [f"{file:{width}}  {caught[file]:3} of {count:3} caught" for file, count in sorted(injected.items())]
    seconds = sum(outcome.seconds for _, outcome in found)
    lines.append(f"{'all':{width}}  {caught.total():3} of {injected.total():3} caught, {seconds:.0f} s of CPU time")
    survived = [fault for fault, outcome in found if not outcome.failed]
    unexplained = [fault for fault in survived if not fault.survives]
    told = [(fault, outcome) for fault, outcome in found if outcome.failed and fault.survives]
    lines += [f"survived, {fault.name}: {fault.survives}" for fault in survived if fault.survives]
    lines += [f"SURVIVED {fault.name}" for fault in unexplained]
    lines += [f"told, though a reason says it cannot be: {fault.name}, by {outcome.failed}" for fault, outcome in told]
    return lines, not unexplained and not told


def main() -> int:
    """0 where every fault is told, or has a reason why it is not."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="faults whose name it finds")
    parser.add_argument("--check", action="store_true", help="run nothing; tell which faults are stale")
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
    lines, passed = summary(verdicts(faults, work))
    print("\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
