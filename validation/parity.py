"""The table of parity: repack, run source and folder on the same prompts, and count what agrees.

    python -m validation.parity WORK [EXPORT:PRECISION ...] [--tokens N] [--scope full|closing|light] [--passes RECIPE]

EXPORT is the name of a fixture, which is built in WORK, or the folder of an export. Without any, it is every precision
of tiny-e2b, tiny-e4b and their QAT exports. RECIPE is applied after the passes of a repack. Prints Markdown. An exact match is a continuation of N greedy tokens that is the source's to
its end; differences are over the whole vocabulary, at every position. Where a repack sets an accuracy level, they are those
with it on both sides, and "int8 alone" is what the level changes. Exit code 1 where a gate fails.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import cast

import fixtures
from passes.presets import accuracy, compatible
from passes.recipe import Recipe, parse, recipe_text
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.source.export import Export, open_export
from surgery.verify import Request, prove_folder
from surgery.verify.prompts import Coverage
from surgery.verify.report import Report

DEFAULT = tuple(
    f"{name}:{precision.name}"
    for name in ("tiny-e2b", "tiny-e4b", "tiny-e2b-qat", "tiny-e4b-qat")
    for precision in fixtures.FIXTURES[name].precisions
)
HEADS = (
    "model", "precision", "prompts", "positions", "exact match", "first token", "max abs difference",
    "in other groups", "worst KL", "int8 alone", "seconds",
)  # fmt: skip


def source(work: Path, name: str, precision: str) -> Export:
    """A fixture, built unless it is there, or the export in a folder."""
    if name not in fixtures.FIXTURES:
        return open_export(Path(name))
    built = work / f"{name}-{precision}"
    if not (built / "config.json").exists():
        fixtures.build(name, precision, built)
    return open_export(built)


def measure(work: Path, target: str, more: Recipe, request: Request) -> tuple[str, Report]:
    """One line of the table, and the report that it is from."""
    name, _, precision = target.rpartition(":")
    export = source(work, name, precision)
    pair = export.pair(precision)
    folder = work / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    level = accuracy(Model.open(pair.decoder), "auto", "compatible", "cpu")
    recipe = (*compatible(pair.embed), *level, *more)
    build_folder(export, pair, recipe, folder, recipe_text=recipe_text(recipe), weights="link")
    report = prove_folder(
        folder, pair, request=request, progress=lambda stage: print(stage, file=sys.stderr, flush=True)
    )
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return _row(Path(name).name, precision, report, seconds), report


def _row(name: str, precision: str, report: Report, seconds: float) -> str:
    total = report.parity
    if total is None:
        return _line((name, precision, *("-",) * (len(HEADS) - 2)))
    cells = (
        name,
        precision,
        total.prompts,
        total.positions,
        f"{total.exact}/{total.continuations}",
        f"{total.first}/{total.continuations}",
        f"{total.max_abs:.3g}",
        f"{total.regrouped_max_abs:.3g}",
        f"{total.kl:.3g}",
        f"KL {report.level.kl:.2g}, top-1 {report.level.same:.3f}" if report.level else "",
        f"{seconds:.0f}",
    )
    return _line(cells)


def _line(cells: tuple[object, ...]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m validation.parity", description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("targets", nargs="*", default=DEFAULT, metavar="EXPORT:PRECISION")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--scope", choices=("full", "closing", "light"), default="full")
    parser.add_argument("--passes", type=parse, default=(), metavar="RECIPE")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    print(_line(HEADS))
    print(_line(("---",) * len(HEADS)), flush=True)
    reports = []
    for target in given.targets or DEFAULT:
        row, report = measure(
            given.work, target, given.passes, Request(scope=cast(Coverage, given.scope), tokens=given.tokens)
        )
        reports.append(report)
        print(row, flush=True)
    runtime = ", ".join(f"{name} {version}" for name, version in reports[0].versions.items())
    added = f", and {recipe_text(given.passes)} added" if given.passes else ""
    print(f"\n{given.tokens} tokens per prompt, {given.scope} scope{added}; {runtime}, {platform.machine()} CPU")
    failed = [f"{gate.name}: {gate.detail}" for report in reports for gate in report.failed]
    if failed:
        sys.exit("gates failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
