"""The evidence for CUDA, in one command:

    python -m validation.cuda OUT [--rehearse] [--stubs DIR] [--seconds 530] [--only NAME,...]

Runs the steps of validation.cuda.steps one after the other, each in a process of its own, and writes each one's result
to OUT/NAME.json, and OUT/cuda.md, a page of all of them. A step that fails, hangs or crashes leaves the others alone. A
call ends after --seconds; the next one goes on where it ended, and runs again what failed. `--rehearse` runs the same
on the CPU provider with small sizes: it shows that the steps work, and nothing about CUDA. Exit code 1 where a step
is not done.

    python -m validation.cuda OUT --page        writes docs/validation/cuda.md from the results; never of a rehearsal
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from validation.cuda.evidence import EVIDENCE, page, results
from validation.cuda.steps import Setting, Step, steps
from validation.cuda.stubs import ROOT

SHORTEST = 20.0
"""Seconds that must be left to start a step."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.cuda", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU provider, with small sizes")
    parser.add_argument("--stubs", type=Path, help="with --rehearse: a folder for the provider over stub libraries")
    parser.add_argument("--seconds", type=float, default=530.0, help="of this call; default: %(default)s")
    parser.add_argument("--only", default="", help="names of steps, with commas between them")
    parser.add_argument(
        "--page", action="store_true", help=f"write {EVIDENCE.name} from what is there, and run nothing"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(options.out.absolute(), options.rehearse, options.stubs and options.stubs.absolute())
    if options.step:
        return run_step(setting, options.step)
    if options.page:
        found = results(setting.out)
        if not found or any(result["provider"] != "cuda" for result in found.values()):
            print(f"{setting.out} has no results of a GPU alone: no page is written", file=sys.stderr)
            return 1
        EVIDENCE.write_text(page(found), encoding="utf-8")
        return 0
    return run(setting, options.seconds, [name for name in options.only.split(",") if name])


def run(setting: Setting, seconds: float, only: list[str]) -> int:
    """Run what is not done: what was not run yet, and what others need, first; then what failed."""
    setting.work.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    chosen = [step for step in steps() if not only or step.name in only]
    if strange := set(only) - {step.name for step in steps()}:
        print(f"no such step: {', '.join(sorted(strange))}", file=sys.stderr)
        return 2
    known = results(setting.out)
    needed = {name for step in chosen for name in step.needs}
    for step in sorted(chosen, key=lambda step: step.name in known and step.name not in needed):
        if known.get(step.name, {}).get("outcome") == "done":
            continue
        left = until - time.monotonic()
        if left < SHORTEST:
            break
        print(f"{step.name:<24}", end="", flush=True)
        result = in_own_process(setting, step, left)
        _write(setting, step.name, result)
        known[step.name] = result
        (setting.out / EVIDENCE.name).write_text(page(results(setting.out)), encoding="utf-8")
        print(f"{result['outcome']:<12}{result['seconds']:6.1f} s  {result.get('error', '')[:150]}", flush=True)
    return 0 if all(known.get(step.name, {}).get("outcome") == "done" for step in chosen) else 1


def in_own_process(setting: Setting, step: Step, seconds: float) -> dict[str, Any]:
    """The result of a step, whatever becomes of its process."""
    known = results(setting.out)
    base = {"step": step.name, "title": step.title, "provider": setting.provider}
    missing = [name for name in step.needs if known.get(name, {}).get("outcome") != "done"]
    if missing:
        return {**base, "outcome": "not run", "seconds": 0.0, "error": f"it needs {', '.join(missing)}"}
    command = [sys.executable, "-m", "validation.cuda", str(setting.out), "--step", step.name]
    command += ["--rehearse"] if setting.rehearsal else []
    command += ["--stubs", str(setting.stubs)] if setting.stubs else []
    started = time.perf_counter()
    answer = setting.work / f"{step.name}.answer.json"
    answer.unlink(missing_ok=True)
    log = setting.out / f"{step.name}.log"
    outcome, error = "failed", ""
    with log.open("wb") as written:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
            error = f"its process ended with code {code}; see {log.name}"
        except subprocess.TimeoutExpired:
            outcome, error = "out of time", f"it was not done in {seconds:.0f} s"
    taken = round(time.perf_counter() - started, 2)
    if answer.is_file():
        return {**base, "seconds": taken, **json.loads(answer.read_text())}
    return {**base, "outcome": outcome, "seconds": taken, "error": error}


def run_step(setting: Setting, name: str) -> int:
    """In the step's own process: run it, and leave its answer or its error where the other process looks."""
    step = next(step for step in steps() if step.name == name)
    try:
        answer: dict[str, object] = {"outcome": "done", "found": step.run(setting)}
    except Exception as error:  # whatever it is, it is the result
        traceback.print_exc()
        answer = {"outcome": "failed", "error": f"{type(error).__name__}: {error}"}
    (setting.work / f"{name}.answer.json").write_text(json.dumps(answer, default=str))
    return 0


def _write(setting: Setting, name: str, result: dict[str, object]) -> None:
    (setting.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
