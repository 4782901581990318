"""From a probe's answers to cells. A probe that dies costs one cell: it is started again with the questions left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from validation.runtimes.questions import Question

PROBE = Path(__file__).parent / "probe.py"
PATIENCE = 120.0
"""Seconds for all questions to one folder; they take about one."""

Verdict = Literal["ok", "refused", "wrong", "crash"]
BADNESS: Mapping[Verdict, int] = {"ok": 0, "refused": 1, "wrong": 2, "crash": 3}
"""A refusal tells the user; wrong tokens do not."""

LONGEST = 200
_NODE = re.compile(r"Non-zero status code returned while running (\w+) node\. Name:'[^']*' Status Message: ")
_SIGNATURE = re.compile(r"/onnxruntime_src/\S+\.(?:cc|h):\d+ [^()]*\([^()]*\)(?: const)? ")
_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_PATH = re.compile(r"(?<![\w.])/\S+/")


class ProbeError(RuntimeError):
    """A probe did not do what the matrix rests on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One cell. `detail` is the runtime's message, the first difference, or the signal."""

    verdict: Verdict
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail}" if self.detail else self.verdict


def ask(python: Path, folder: Path, questions: Sequence[Question], patience: float = PATIENCE) -> list[Outcome]:
    """The outcome of each question, asked in a process that runs `python`."""
    outcomes: list[Outcome] = []
    while left := questions[len(outcomes) :]:
        replies, death = _probe(python, folder, left, patience)
        outcomes += [judge(question, reply) for question, reply in zip(left, replies, strict=False)]
        if death and len(outcomes) < len(questions):
            outcomes.append(Outcome("crash", death))
    return outcomes


def answers(python: Path, folder: Path, asked: Mapping[str, Mapping[str, Any]]) -> list[Question]:
    """Questions whose expected answers are those that `python` gives. Raises ProbeError where it gives none."""
    replies, death = _probe(python, folder, [Question(name, each, None) for name, each in asked.items()], PATIENCE)
    if faults := [death] if death else [str(reply["error"]) for reply in replies if "error" in reply]:
        raise ProbeError(f"the environment that runs the matrix cannot answer for {folder.name}: {faults[0]}")
    return [Question(reply["name"], asked[reply["name"]], reply["answer"]) for reply in replies]


def probed(python: Path, folder: Path, asked: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The reply to each question, for a caller that judges them itself. Raises ProbeError where a process died."""
    replies, death = _probe(python, folder, [Question(name, each, None) for name, each in asked.items()], PATIENCE)
    if death:
        raise ProbeError(f"{folder.name}: {death}")
    return replies


def _probe(
    python: Path, folder: Path, questions: Sequence[Question], patience: float
) -> tuple[list[dict[str, Any]], str]:
    """The replies, and what the process died of before it gave them all."""
    plan = {"folder": str(folder), "questions": [{"name": each.name, **each.asked} for each in questions]}
    try:
        done = subprocess.run(
            [str(python), str(PROBE)], input=json.dumps(plan), capture_output=True, text=True, timeout=patience
        )
    except subprocess.TimeoutExpired as expired:
        written = expired.stdout or b""
        return _replies(written.decode() if isinstance(written, bytes) else written), f"no answer in {patience:.0f} s"
    replies = _replies(done.stdout)
    return replies, "" if len(replies) == len(questions) else _death(done.returncode, done.stderr)


def _replies(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _death(code: int, stderr: str) -> str:
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}: {shortened(' '.join(stderr.split())[-LONGEST:])}"


def judge(question: Question, reply: Mapping[str, Any]) -> Outcome:
    if reply["name"] != question.name:
        raise ProbeError(f"the probe answers {reply['name']!r} where {question.name!r} was asked")
    if "error" in reply:
        return Outcome("refused", shortened(str(reply["error"])))
    if reply["answer"] == question.expected:
        return Outcome("ok")
    return Outcome("wrong", difference(question.expected, reply["answer"]))


def difference(expected: Any, found: Any, where: str = "") -> str:
    """The first place where two answers differ."""
    if not isinstance(expected, list) or not isinstance(found, list):
        return f"{where or 'answer'} is {found!r}; {expected!r} is expected"[:LONGEST]
    for index, (wanted, got) in enumerate(zip(expected, found, strict=False)):
        if wanted != got:
            return difference(wanted, got, f"{where}[{index}]")
    return f"{where or 'answer'} has {len(found)} items; {len(expected)} are expected"


def shortened(message: str) -> str:
    """The runtime's words on one line, without C++ signatures, node names and machine paths."""
    text = _NODE.sub(r"\1: ", " ".join(message.split()))
    for noise in (_SIGNATURE, _CODE, _PATH):
        text = noise.sub("", text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "..."
