"""python -m validation.runtimes WORK: write docs/validation/runtimes.md and .json; --check compares with them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from surgery.runtime.genai import load_genai
from surgery.runtime.sessions import versions
from validation.runtimes.environments import VERSIONS, Environment, Kind, PipError, make_environment
from validation.runtimes.outcomes import Outcome, ProbeError, answers, ask
from validation.runtimes.questions import OF_TEXT, Question, Undecided, make_questions
from validation.runtimes.subjects import FIXTURES, Subject, make_subjects
from validation.runtimes.table import Matrix, OtherRuntimes, Row, better, markdown, worse

DOCUMENT = Path(__file__).parents[2] / "docs" / "validation" / "runtimes"


@dataclass(frozen=True, slots=True)
class Options:
    """`light`: few folders, and of each version only the oldest ONNX Runtime that it admits. `fixtures`: those whose
    folders are asked."""

    work: Path
    versions: tuple[str, ...]
    fixtures: tuple[str, ...]
    light: bool
    check: bool

    @property
    def whole(self) -> bool:
        """Whether the document is written: all versions were asked; rows of other folders stay what they are."""
        return self.versions == VERSIONS and not self.light

    @property
    def some(self) -> bool:
        return self.fixtures != FIXTURES


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done; 1 a cell is worse than the committed table's; 2 trouble."""
    options = _options(arguments)
    started = time.perf_counter()
    try:
        matrix = run(options)
        kept = options.check or (options.whole and options.some)
        committed = Matrix.from_json(DOCUMENT.with_suffix(".json").read_text("utf-8")) if kept else None
        if committed is not None and not options.check:
            matrix = committed.with_rows(matrix)
    except (PipError, ProbeError, Undecided, OtherRuntimes, OSError) as error:
        print(f"runtimes: {error}", file=sys.stderr)
        return 2
    asked, cores = ", ".join(options.fixtures) if options.some else "All of it", len(os.sched_getaffinity(0))
    took = f"{asked} took {_duration(time.perf_counter() - started)} on {cores} core{'s' if cores > 1 else ''}."
    if committed is not None and options.check:
        return _check(committed, matrix)
    document = markdown(matrix, took)
    if options.whole:
        DOCUMENT.with_suffix(".md").write_text(document, "utf-8")
        DOCUMENT.with_suffix(".json").write_text(matrix.to_json(), "utf-8")
    else:
        print(document)
    print(took, file=sys.stderr)
    return 0


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m validation.runtimes", description=__doc__)
    parser.add_argument("work", type=Path, help="for the environments (0.3 GB each) and folders; kept for the next run")
    parser.add_argument("--versions", default=",".join(VERSIONS), help="of onnxruntime-genai; default: %(default)s")
    parser.add_argument(
        "--fixtures", default=",".join(FIXTURES), help="asked; the others keep their rows; default: %(default)s"
    )
    parser.add_argument("--light", action="store_true", help="few folders, one ONNX Runtime for each version")
    parser.add_argument("--check", action="store_true", help="exit 1 where a cell is worse than the committed table's")
    found = parser.parse_args(arguments)
    fixtures = tuple(found.fixtures.split(","))
    if unknown := [name for name in fixtures if name not in FIXTURES]:
        parser.error(f"{unknown[0]} is no fixture of the matrix; it has {', '.join(FIXTURES)}")
    return Options(found.work, tuple(found.versions.split(",")), fixtures, found.light, found.check)


def run(options: Options) -> Matrix:
    """Make folders, questions and environments, and ask."""
    with _stage("folders"):
        subjects = make_subjects(options.work, options.light, options.fixtures)
    with _stage("environments"):
        environments = make_environments(options.work / "environments", options.versions, options.light)
    with _stage("the source's answers"):
        questions = [make_all_questions(subject) for subject in subjects]
    with _stage("probes"):
        columns = [ask_all(environment, subjects, questions) for environment in environments]
    rows = tuple(
        Row(subject.layout, subject.made, question.name, tuple(column[place][number] for column in columns))
        for place, subject in enumerate(subjects)
        for number, question in enumerate(questions[place])
    )
    made_with = {**versions(), "onnxruntime-genai": str(load_genai("cpu").__version__)}
    return Matrix(tuple(environment.column for environment in environments), rows, made_with)


def make_environments(root: Path, wanted: Sequence[str], light: bool) -> list[Environment]:
    """In the order of `wanted`; a newest ONNX Runtime that is also the oldest admitted one is not tried twice."""
    kinds: tuple[Kind, ...] = ("minimum",) if light else get_args(Kind)
    environments: list[Environment] = []
    for genai in wanted:
        seen: set[str] = set()
        for kind in kinds:
            environment = make_environment(root, genai, kind)
            if environment.column.onnxruntime not in seen:
                environments.append(environment)
            seen.add(environment.column.onnxruntime)
    return environments


def make_all_questions(subject: Subject) -> list[Question]:
    first, *others = make_questions(subject)
    return [first, *answers(Path(sys.executable), subject.folder, OF_TEXT), *others]


def ask_all(
    environment: Environment, subjects: Sequence[Subject], questions: Sequence[Sequence[Question]]
) -> list[list[Outcome]]:
    """Every folder's outcomes in one environment; a process for each folder, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = [subject.folder for subject in subjects]
        return list(pool.map(ask, [environment.python] * len(folders), folders, questions))


def _check(committed: Matrix, found: Matrix) -> int:
    for sentence in better(committed, found):
        print(f"better: {sentence}")
    faults = worse(committed, found)
    for sentence in faults:
        print(f"worse: {sentence}")
    print(f"{sum(len(row.outcomes) for row in found.rows)} cells, worse than the committed table: {len(faults)}")
    return 1 if faults else 0


@contextmanager
def _stage(name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"{name}: {_duration(time.perf_counter() - started)}", file=sys.stderr)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
