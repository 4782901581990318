"""The runtime matrix: what it asks, how it judges, what it writes. No environment is made here."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from validation.runtimes import __main__ as command
from validation.runtimes.environments import VERSIONS, Column, PipError, minimum
from validation.runtimes.notes import NOTES
from validation.runtimes.outcomes import Outcome, ProbeError, ask, difference, judge, shortened
from validation.runtimes.questions import (
    CHUNK,
    MARGIN,
    OF_TEXT,
    SCRIPTS,
    STEPS,
    Question,
    Script,
    Source,
    Undecided,
    decided,
)
from validation.runtimes.subjects import FIXTURES, LAYOUTS, Subject, make_subjects
from validation.runtimes.table import Matrix, OtherRuntimes, Row, better, markdown, worse

OLD = Column("0.14.1", "minimum", "1.26.0", "2.4.6")
OLD_NEWEST = Column("0.14.1", "newest", "1.31.1", "2.4.6")
NEW = Column("0.18.0", "minimum", "1.31.0", "2.4.6")
OK, WRONG, CRASH = Outcome("ok"), Outcome("wrong", "[0][3] is 5; 4 is expected"), Outcome("crash", "SIGSEGV")
REFUSED = Outcome("refused", "index 5 is too large")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return make_subjects(tmp_path_factory.mktemp("runtimes"), light=True)


@pytest.fixture(scope="module")
def source(subjects: list[Subject]) -> Source:
    return Source(subjects[0])


def matrix(*rows: Row, columns: tuple[Column, ...] = (OLD, NEW)) -> Matrix:
    return Matrix(columns, rows, {"onnxruntime": "1.31.1"})


def row(*outcomes: Outcome, made: str = "tiny-e2b fp32", question: str = "generates", layout: str = "aliased") -> Row:
    return Row(layout, made, question, outcomes)


def test_the_current_runtime_answers_as_the_committed_table_says(subjects: list[Subject]) -> None:
    """One folder, through the real probe, in the environment that runs the tests."""
    subject = subjects[0]
    questions = command.make_all_questions(subject)
    outcomes = dict(zip((q.name for q in questions), ask(Path(sys.executable), subject.folder, questions), strict=True))
    assert list(outcomes) == ["loads", *OF_TEXT, *SCRIPTS]
    for name in ("loads", *OF_TEXT, "generates", "prompt in chunks", "batch of 2", "ragged batch of 2"):
        assert outcomes[name] == OK, name
    assert outcomes["appends after the end"] == OK
    assert "wrong" not in {outcome.verdict for outcome in outcomes.values()}
    assert "crash" not in {outcome.verdict for outcome in outcomes.values()}


def test_a_wrong_token_is_seen_by_the_probe(subjects: list[Subject], source: Source) -> None:
    script = decided(source, SCRIPTS["generates"])
    (expected,) = script.expected
    question = Question("generates", script.asked(), [[*expected[:-1], expected[-1] + 1]])
    (outcome,) = ask(Path(sys.executable), subjects[0].folder, [question])
    assert outcome == Outcome("wrong", f"[0][{len(expected) - 1}] is {expected[-1]}; {expected[-1] + 1} is expected")


def test_an_overlay_of_the_configuration_reaches_the_runtime(subjects: list[Subject], source: Source) -> None:
    """Generation ends before the token that the overlay declares; the folder's own configuration goes past it."""
    script = decided(source, SCRIPTS["appends after the end"])
    more = script.actions[2][1][0]
    short = [list(script.expected[0][: -len(more) - STEPS])]
    cut = replace(script, actions=script.actions[:2])
    asked = [Question("cut", cut.asked(), short), Question("whole", replace(cut, overlay={}).asked(), short)]
    found = ask(Path(sys.executable), subjects[0].folder, asked)
    assert [outcome.verdict for outcome in found] == ["ok", "wrong"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_plain_and_the_same_every_time(source: Source, name: str) -> None:
    script = decided(source, SCRIPTS[name])
    assert script == decided(source, SCRIPTS[name])
    assert len({len(expected) for expected in script.expected}) == 1
    assert [action for action, _ in script.actions][-1] == "generate"
    assert ("chunk_size" in script.asked()["overlay"]) == ("chunks" in name)


def test_no_choice_of_the_source_is_close(source: Source) -> None:
    script = decided(source, SCRIPTS["generates"])
    ((prompt,),) = (argument for action, argument in script.actions if action == "append")
    assert source.continued(prompt) == [script.expected[0][len(prompt) :]]
    assert MARGIN > 0
    assert len(prompt) > 2 * CHUNK > STEPS


def test_a_close_choice_asks_for_another_prompt() -> None:
    seen: list[float] = []

    def fussy(source: Source, numbers: random.Random) -> Script:
        seen.append(numbers.random())
        if len(seen) < 3:
            raise Undecided
        return Script([], [])

    assert decided(None, fussy) == Script([], [])  # type: ignore[arg-type]
    assert len(set(seen)) == 3


def test_a_source_that_never_decides_is_said() -> None:
    def never(source: Source, numbers: random.Random) -> Script:
        raise Undecided

    with pytest.raises(Undecided, match="no prompt of"):
        decided(None, never)  # type: ignore[arg-type]


def test_light_subjects_have_every_layout(subjects: list[Subject]) -> None:
    assert {subject.layout for subject in subjects} == {layout.name for layout in LAYOUTS}
    assert all((subject.folder / "genai_config.json").is_file() for subject in subjects)


def fake_python(folder: Path, body: str) -> Path:
    """An interpreter that stands for a probe: it sees the plan's questions one by one as `name`."""
    script = folder / "python"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    script.write_text(
        f"#!{sys.executable}\nimport json, os, signal, sys, time\n"
        f"for question in json.load(sys.stdin)['questions']:\n    name = question['name']\n{lines}\n"
        "    print(json.dumps({'name': name, 'answer': True}), flush=True)\n"
    )
    script.chmod(0o755)
    return script


def questions(*names: str) -> list[Question]:
    return [Question(name, {"kind": "load"}, True) for name in names]


def test_a_crash_costs_one_cell(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "if name == 'dies':\n    os.kill(os.getpid(), signal.SIGSEGV)")
    assert ask(python, tmp_path, questions("a", "dies", "b")) == [OK, CRASH, OK]


def test_every_question_may_crash(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "os.kill(os.getpid(), signal.SIGABRT)")
    assert ask(python, tmp_path, questions("a", "b")) == [Outcome("crash", "SIGABRT")] * 2


def test_a_crash_in_the_middle_of_a_line_is_no_answer(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "if name == 'dies':\n    print('{\"na', end='', flush=True); os._exit(3)")
    found = ask(python, tmp_path, questions("a", "dies", "b"))
    assert [outcome.verdict for outcome in found] == ["ok", "crash", "ok"]
    assert found[1].detail.startswith("exit code 3")


def test_a_hang_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would wait for ever ends and says so, and the time is over then: how long the start takes is no matter."""
    run, waits = subprocess.run, 75

    def impatient(command: list[str], *, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = run(command, **options)
        if done.returncode == waits:
            raise subprocess.TimeoutExpired(command, timeout, done.stdout.encode())
        return done

    monkeypatch.setattr("subprocess.run", impatient)
    python = fake_python(tmp_path, f"if name == 'hangs':\n    os._exit({waits})")
    found = ask(python, tmp_path, questions("a", "hangs"), patience=1.0)
    assert found == [OK, Outcome("crash", "no answer in 1 s")]


def test_judging() -> None:
    question = Question("generates", {}, [[1, 2, 3]])
    assert judge(question, {"name": "generates", "answer": [[1, 2, 3]]}) == OK
    assert judge(question, {"name": "generates", "answer": [[1, 2, 4]]}).detail == "[0][2] is 4; 3 is expected"
    assert judge(question, {"name": "generates", "error": "no  such\nthing"}) == Outcome("refused", "no such thing")
    with pytest.raises(ProbeError, match="'loads' where 'generates'"):
        judge(question, {"name": "loads", "answer": True})


def test_a_shorter_answer_is_told_by_its_length() -> None:
    assert difference([[1, 2]], [[1]]) == "[0] has 1 items; 2 are expected"
    assert difference("a", "b") == "answer is 'b'; 'a' is expected"


def test_messages_lose_paths_signatures_and_node_names() -> None:
    said = (
        "Non-zero status code returned while running Concat node. Name:'/model/layers.4/Concat' Status Message: "
        "/onnxruntime_src/onnxruntime/core/framework/execution_frame.cc:160 onnxruntime::common::Status "
        "onnxruntime::IExecutionFrame::Get(int, const onnxruntime::Node&) shape was false."
    )
    assert shortened(said) == "Concat: shape was false."
    assert shortened("cannot open /home/someone/folder/model.onnx now") == "cannot open model.onnx now"
    assert len(shortened("word " * 200)) <= 200


def test_a_matrix_survives_its_json() -> None:
    found = matrix(row(REFUSED, REFUSED), row(WRONG, CRASH, question="loads"))
    assert Matrix.from_json(found.to_json()) == found
    assert found.to_json().count("index 5 is too large") == 1


def test_worse_and_better_cells() -> None:
    before = matrix(row(OK, REFUSED))
    assert worse(before, before) == better(before, before) == []
    assert worse(before, matrix(row(REFUSED, REFUSED))) == [
        "tiny-e2b fp32 aliased, generates, onnxruntime-genai 0.14.1 on 1.26.0: "
        "refused: index 5 is too large, where the table has ok"
    ]
    assert len(worse(before, matrix(row(OK, WRONG)))) == 1  # silently wrong is worse than refused
    assert len(worse(before, matrix(row(CRASH, CRASH)))) == 2
    assert len(better(before, matrix(row(OK, OK)))) == 1
    assert worse(before, matrix(row(OK, Outcome("refused", "other words")))) == []


def test_a_part_of_the_matrix_is_compared_with_its_cells_alone() -> None:
    """Another ONNX Runtime of the same kind is the same column: the newest one moves."""
    before = matrix(row(OK, OK, REFUSED), columns=(OLD, OLD_NEWEST, NEW))
    moved = Column("0.14.1", "newest", "1.32.0", "2.5.0")
    assert worse(before, matrix(row(OK), columns=(moved,))) == []
    assert len(worse(before, matrix(row(REFUSED), columns=(moved,)))) == 1


def test_a_cell_without_a_counterpart_is_a_fault() -> None:
    assert "the table has no such cell" in worse(matrix(row(OK, OK)), matrix(row(OK, OK, question="new")))[0]


def test_the_document() -> None:
    found = markdown(
        matrix(
            row(OK, OK, OK),
            row(REFUSED, REFUSED, OK, made="tiny-31b fp32"),
            row(REFUSED, OK, OK, made="tiny-31b q4f16"),
            columns=(OLD, OLD_NEWEST, NEW),
        ),
        "It took 1 s.",
    )
    assert "## KV layout aliased: tiny-e2b\n" in found
    assert "| 0.14.1<br>ORT 1.26.0, 1.31.1 | 0.18.0<br>ORT 1.31.0 |" in found  # equal verdicts share a column
    assert "| generates | refused[^1] | ok |" in found
    assert "## KV layout aliased: tiny-31b q4f16\n" in found
    assert "| 0.14.1<br>ORT 1.26.0 | 0.14.1<br>ORT 1.31.1 | 0.18.0<br>ORT 1.31.0 |" in found
    assert found.endswith("[^1]: `index 5 is too large`\n")
    assert "0.14 does not run 31B" in found


def test_messages_that_differ_in_numbers_share_a_footnote() -> None:
    other = Outcome("refused", "index 7 is too large")
    assert markdown(matrix(row(REFUSED, other)), "").count("is too large") == 1


def test_notes_speak_of_questions_that_are_asked() -> None:
    asked = {"loads", *OF_TEXT, *SCRIPTS}
    assert {question for note in NOTES for question in note.questions} <= asked


def test_the_least_onnxruntime_is_read_from_the_wheel() -> None:
    assert minimum(["numpy>=1.21.6", "onnxruntime>=1.26.0"]) == "1.26.0"
    with pytest.raises(PipError, match="numpy"):
        minimum(["numpy>=1.21.6"])


def test_check_exits_with_1_where_a_cell_is_worse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "DOCUMENT", tmp_path / "runtimes")
    (tmp_path / "runtimes.json").write_text(matrix(row(OK, OK)).to_json())
    for outcome, code in ((OK, 0), (WRONG, 1)):
        monkeypatch.setattr(command, "run", lambda options, outcome=outcome: matrix(row(OK, outcome)))
        assert command.main([str(tmp_path), "--check", "--light"]) == code
    assert list(tmp_path.iterdir()) == [tmp_path / "runtimes.json"]


def test_only_the_whole_matrix_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "DOCUMENT", tmp_path / "runtimes")
    monkeypatch.setattr(command, "run", lambda options: matrix(row(OK, OK)))
    for part in (["--light"], ["--versions", VERSIONS[0]]):
        assert command.main([str(tmp_path), *part]) == 0
        assert not list(tmp_path.iterdir())
    assert command.main([str(tmp_path)]) == 0
    assert Matrix.from_json((tmp_path / "runtimes.json").read_text()) == matrix(row(OK, OK))


def test_rows_of_some_folders_take_the_place_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "DOCUMENT", tmp_path / "runtimes")
    before = matrix(row(OK, OK), row(OK, OK, made="tiny-31b fp32"))
    (tmp_path / "runtimes.json").write_text(before.to_json())
    found = matrix(row(OK, WRONG, made="tiny-e2b-qat q2f16"), row(OK, REFUSED))
    monkeypatch.setattr(command, "run", lambda options: found)
    assert command.main([str(tmp_path), "--fixtures", FIXTURES[0]]) == 0
    assert Matrix.from_json((tmp_path / "runtimes.json").read_text()).rows == (
        found.rows[1], before.rows[1], found.rows[0]
    )  # fmt: skip
    assert f"share a table. {FIXTURES[0]} took 0 s" in (tmp_path / "runtimes.md").read_text()


def test_rows_of_other_runtimes_are_refused() -> None:
    with pytest.raises(OtherRuntimes, match=r"is of onnxruntime 1.31.1, onnxruntime 1.26.0, .* rows are of .*ask all"):
        matrix(row(OK, OK)).with_rows(matrix(row(OK, OK), columns=(OLD_NEWEST, NEW)))


def test_the_committed_table_is_that_of_its_json() -> None:
    text = command.DOCUMENT.with_suffix(".md").read_text("utf-8")
    took = re.search(r"(?<=share a table\. ).* cores?\.", text)
    committed = Matrix.from_json(command.DOCUMENT.with_suffix(".json").read_text("utf-8"))
    assert took and markdown(committed, took[0]) == text
    assert {column.genai for column in committed.columns} == set(VERSIONS)
    bad = {
        (each.layout, each.question, outcome.verdict)
        for each in committed.rows
        for outcome in each.outcomes
        if outcome.verdict in ("wrong", "crash")
    }
    noted = {(question, note.verdict) for note in NOTES for question in note.questions}
    assert {(question, verdict) for _, question, verdict in bad if verdict == "wrong"} <= noted
    assert {layout for layout, _, verdict in bad if verdict == "crash"} == {"fast"}, "below ONNX Runtime 1.31"
    assert {layout for layout, _, verdict in bad} == {"fast", "fast, for ONNX Runtime 1.27"}
