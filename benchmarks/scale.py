"""Repack full-size exports: wall time against `cp`, and peak memory, per way of placing the weights.

    python -m benchmarks.scale WORK [FIXTURE:PRECISION ...]      default: e2b:q4f16 e4b:q4f16

Each export is built in WORK unless it is there. In one run, in turns: `cp` of the same data files to the same disk,
then each mode of `repack --no-validate`, both followed by a flush to disk inside the measured time. The page cache
is warm for all of them alike: the sources are read once before. The table is Markdown.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from pathlib import Path

import fixtures
from benchmarks.measure import Run, run

ROUNDS = 3
MODES = ("copy", "link", "consolidate")
CLI = Path(__file__).parent.parent / "cli.py"


def source_of(work: Path, name: str, precision: str) -> Path:
    source = work / f"{name}-{precision}"
    if not source.is_dir():
        fixtures.build(name, precision, source)
    return source


def data_files(source: Path) -> list[Path]:
    return sorted((source / "onnx").glob("*.onnx_data*"))


def copied(source: Path, target: Path) -> Run:
    target.mkdir()
    names = " ".join(f"'{path}'" for path in data_files(source))
    return run(["sh", "-c", f"cp {names} '{target}' && sync -f '{target}'/*"])


def repacked(source: Path, target: Path, mode: str) -> Run:
    command = [sys.executable, str(CLI), "repack", str(source), str(target), "--ep", "cpu", "--no-validate"]
    return run([*command, "--weights", mode])


def measure(source: Path, work: Path) -> dict[str, list[Run]]:
    """Runs of `cp` and of each mode, in turns, so that a slow moment of the disk meets all of them."""
    runs: dict[str, list[Run]] = {"cp": [], **{mode: [] for mode in MODES}}
    for _ in range(ROUNDS):
        for what in runs:
            target = work / "target"
            shutil.rmtree(target, ignore_errors=True)
            runs[what].append(copied(source, target) if what == "cp" else repacked(source, target, what))
    shutil.rmtree(work / "target", ignore_errors=True)
    return runs


def rows(name: str, source: Path, runs: dict[str, list[Run]]) -> list[str]:
    total = sum(path.stat().st_size for path in data_files(source))
    base = statistics.median(run.seconds for run in runs["cp"])
    lines = []
    for what, found in runs.items():
        seconds = statistics.median(run.seconds for run in found)
        peak = max(run.peak_rss for run in found)
        label = "`cp` and flush" if what == "cp" else f"`--weights {what}`"
        lines.append(
            f"| {name} | {total / 1e9:.2f} GB | {label} | {seconds:.1f} s | {seconds / base:.2f} | {peak / 1e6:.0f} MB |"
        )
    return lines


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m benchmarks.scale WORK [FIXTURE:PRECISION ...]")
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    print("| export | weights | how | wall time | of `cp` | peak RSS |")
    print("|---|---|---|---|---|---|")
    for wanted in sys.argv[2:] or ("e2b:q4f16", "e4b:q4f16"):
        name, _, precision = wanted.partition(":")
        source = source_of(work, name, precision)
        for line in rows(f"{name} {precision}", source, measure(source, work)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
