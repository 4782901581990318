"""python -m validation.hostile WORK [costs|inputs]: what strangers' files cost, and what they do.

`costs` prints CPU seconds of every command on every small file that asks for much work, as it grows: linear, or a fault.
`inputs` runs every command on damaged files, each a number, and counts writes outside, executions, defects and hangs.
Without either, both. Exit code 1 where a row grows faster, or a count is not 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import confined
from adversarial import FORMS
from attacks import COMMANDS, Ground

from validation.hostile import costs, inputs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m validation.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", default=list(PARTS), help="costs, inputs; default: both")
    parser.add_argument("--inputs", type=int, default=20_000, metavar="N", help="damaged inputs to try")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number of the first one")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write each outcome down; those that are there count"
    )
    parser.add_argument("--size", type=int, default=1000, metavar="N", help="the smallest size of a form")
    parser.add_argument("--commands", default="", help="some of them, separated by commas; default: all")
    parser.add_argument("--forms", default="", help="some of them, separated by commas; default: all")
    given = parser.parse_args()
    if unknown := set(given.parts) - {*PARTS}:
        parser.error(f"{unknown.pop()} is no part; {', '.join(PARTS)} are")
    given.work = given.work.resolve()  # commands are run elsewhere
    given.work.mkdir(parents=True, exist_ok=True)
    confined.preload()
    sys.exit(not all([PARTS[part](given) for part in given.parts]))


def _words(text: str, known: Sequence[str]) -> list[str]:
    """Some of the names that are known, or all of them."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if unknown := set(found) - set(known):
        raise SystemExit(f"there is no {unknown.pop()!r}; there are {', '.join(dict.fromkeys(known))}")
    return found or list(known)


def _costs(given: argparse.Namespace) -> bool:
    commands, forms = _words(given.commands, list(costs.COMMANDS)), _words(given.forms, list(FORMS))
    ground = Ground(given.work / "costs")
    ground.rehearse()
    print(costs.HEAD)
    passed = True
    for row in costs.rows(ground, commands, forms, given.size):
        print(row, flush=True)
        passed &= row.passed
    return passed


def _inputs(given: argparse.Namespace) -> bool:
    commands = _words(given.commands, [command.name for command in COMMANDS])
    found = inputs.recorded(given.record) if given.record else []
    done = {one.number for one in found}
    numbers = [number for number in range(given.first, given.first + given.inputs) if number not in done]
    for one in inputs.outcomes(given.work, numbers, commands):
        found.append(one)
        if given.record:
            inputs.record(given.record, one)
        if one.faults:
            print(one, file=sys.stderr, flush=True)
    print(f"\n{inputs.summary(found)}")
    return not any(one.faults for one in found)


PARTS = {"costs": _costs, "inputs": _inputs}

if __name__ == "__main__":
    main()
