"""What a pass is, and how passes are applied: on a copy, with the contract checked, with the change measured."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from surgery.errors import ModelError, PassError, SurgeryError
from surgery.graph.changes import Snapshot, Thing, snapshot, touched
from surgery.graph.model import Model
from surgery.graph.protos import check_structure

Verb = Literal["added", "removed", "changed", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a pass did to one thing, or why it left it alone. `reason` is a sentence without a full stop."""

    verb: Verb
    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.verb} {self.subject}: {self.reason}"


@runtime_checkable
class Pass(Protocol):
    """One change to a model: a frozen dataclass of options with a name, a summary and a contract.

    A pass is stateless and idempotent, never reads a weight that it does not change, and never renames what it
    does not own. It fails with a PassError that names the tensor, what was expected and what was found.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def requires(self, model: Model) -> None:
        """Raise PassError unless the pass can run on this model."""

    def run(self, model: Model) -> list[Finding]:
        """Change the model in place, and say what was done to what."""

    def ensures(self, model: Model) -> None:
        """Raise PassError unless the model is now as the pass promises."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one pass came to: its findings, the operators it added and removed, and whether the model changed.

    `touched` are the things that are not as they were, by their names before and after.
    """

    name: str
    findings: tuple[Finding, ...]
    operators: dict[str, int]
    changed: bool
    seconds: float
    touched: frozenset[Thing] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {
            "pass": self.name,
            "changed": self.changed,
            "operators": self.operators,
            "findings": [{"verb": f.verb, "subject": f.subject, "reason": f.reason} for f in self.findings],
        }


def apply(
    model: Model, passes: Sequence[Pass], observe: Callable[[Outcome], None] | None = None
) -> tuple[Model, list[Outcome]]:
    """Apply passes in order to a copy of `model`; the model that was given stays as it is, whatever happens.

    `observe` is called after each pass. Raises PassError with the names of the passes that went before.
    """
    current = model.copy()
    things = snapshot(current.proto)
    outcomes: list[Outcome] = []
    for step in passes:
        try:
            outcome, things = _apply_one(current, step, things)
        except SurgeryError as error:
            trail = " after " + ", ".join(before.name for before in outcomes) if outcomes else ""
            raise PassError(f"{step.name}{trail}: {error}", hint=error.hint) from error
        outcomes.append(outcome)
        if observe is not None:
            observe(outcome)
    return current, outcomes


def _apply_one(model: Model, step: Pass, before: Snapshot) -> tuple[Outcome, Snapshot]:
    """What one pass came to, and what is in the model afterwards."""
    started = time.perf_counter()
    fingerprint = model.fingerprint()
    operators = _operators(model)
    step.requires(model)
    findings = tuple(step.run(model))
    step.ensures(model)
    try:
        check_structure(model.proto)
    except ModelError as error:
        raise PassError(f"it left a broken graph: {error}") from error
    changed = model.fingerprint() != fingerprint
    claimed = any(finding.verb != "skipped" for finding in findings)
    if changed != claimed:
        said = "it reports a change" if claimed else "it reports no change"
        raise PassError(f"{said}, but the model {'changed' if changed else 'did not change'}")
    delta = _operators(model)
    delta.subtract(operators)
    counts = {op: n for op, n in sorted(delta.items()) if n}
    seconds = time.perf_counter() - started
    after = snapshot(model.proto) if changed else before
    return Outcome(step.name, findings, counts, changed, seconds, touched(before, after)), after


def _operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)
