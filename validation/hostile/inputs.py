"""Many damaged inputs, each by its number, over all processors; what is counted is what must never happen."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import attacks
from attacks import COMMANDS, Command, Ground, Outcome

KINDS = ("write outside", "execution", "defect", "hang")
PORTION = 25
"""Inputs that a process takes at a time."""

_ground: list[Ground] = []


def outcomes(work: Path, numbers: Sequence[int], names: Sequence[str]) -> Iterator[Outcome]:
    """What came of each attack, in no order. `names` are the commands that are tried."""
    commands = [command for command in COMMANDS if command.name in names]
    portions = [numbers[at : at + PORTION] for at in range(0, len(numbers), PORTION)]
    Ground(work / "rehearsal").rehearse()  # the processes are forked from this one
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, _prepare, (work,)) as pool:
        for found in pool.map(_attacked, portions, [commands_index(commands)] * len(portions)):
            yield from found


def recorded(file: Path) -> list[Outcome]:
    """What an earlier run wrote down, a line for each attack."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def record(file: Path, one: Outcome) -> None:
    with file.open("a") as writer:
        writer.write(f"{json.dumps(dataclasses.asdict(one))}\n")


def commands_index(commands: Sequence[Command]) -> list[int]:
    """Commands as numbers: what they are made of cannot be sent to another process."""
    return [COMMANDS.index(command) for command in commands]


def _prepare(work: Path) -> None:
    _ground.append(Ground(work / f"ground-{os.getpid()}"))


def _attacked(numbers: Sequence[int], commands: Sequence[int]) -> list[Outcome]:
    chosen = [COMMANDS[index] for index in commands]
    return [attacks.attack(_ground[0], number, chosen) for number in numbers]


def summary(found: Sequence[Outcome]) -> str:
    """A line for each command, and the counts that must be 0."""
    lines = [f"| command | inputs | done | 1 | refused | worst CPU s | worst MB |\n|{'---|' * 7}"]
    for name in dict.fromkeys(command.name for command in COMMANDS):
        mine = [one for one in found if one.command == name]
        if mine:
            codes = Counter(one.code for one in mine)
            worst = max(one.seconds for one in mine), max(one.memory for one in mine) / 1e6
            cells = (
                name,
                f"{len(mine):,}",
                *(f"{codes[code]:,}" for code in (0, 1, 2)),
                f"{worst[0]:.1f}",
                f"{worst[1]:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    faults = Counter(kind for one in found for kind in one.faults)
    counts = ", ".join(f"{faults[kind]:,} {kind}{'' if faults[kind] == 1 else 's'}" for kind in KINDS)
    counts = counts.replace("write outsides", "writes outside")
    return "\n".join([*lines, "", f"{len(found):,} inputs: {counts}"])
