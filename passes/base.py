"""What a pass is, and how passes are applied: on a copy, with the contract checked, with the change measured."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from surgery.errors import ModelError, PassError, SurgeryError, WeightsAbsent
from surgery.graph.changes import Finding, ModelThing, Snapshot, Verb, snapshot, touched
from surgery.graph.definitions import check_definitions
from surgery.graph.model import Model
from surgery.graph.operands import check_graph

__all__ = ["EXACT", "LOSSY", "NOT_TRIED", "REORDERED", "Finding", "Numerics", "Outcome", "Pass", "Verb", "apply"]


@dataclass(frozen=True, slots=True)
class Numerics:
    """What a pass does to the numbers that a model computes: the closing proof asks each pass of a recipe.

    exact      nothing: each number is the source's, bit by bit
    reordered  the same sums and products, in another order
    lossy      numbers are rounded where the source's are not; `bound` says how far the results may then be off, by
               the names of surgery.verify.thresholds.Thresholds (`logits`, `kl`, ...). What it does not name may be as
               far off as float16 in place of float32 is.
    """

    kind: Literal["exact", "reordered", "lossy"]
    bound: Mapping[str, float] = field(default_factory=dict, hash=False)


EXACT, REORDERED, LOSSY = Numerics("exact"), Numerics("reordered"), Numerics("lossy")


@dataclass(frozen=True)
class Pass(ABC):
    """One change to a model. A subclass is a frozen dataclass: its fields are the options of the pass.

    A pass is stateless and idempotent: a second run finds nothing to do and says so. It never reads a weight that it
    does not change, and never renames what it does not own. What a subclass says of itself is what the rest of
    the program knows of it:

    name              what recipes call it: small letters, digits and hyphens
    summary           one line for lists of passes
    numerics          what it does to numbers; a folder is held to equality unless a pass says otherwise
    rewrites_weights  whether weights are written anew, in other data files than the source's
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    numerics: ClassVar[Numerics] = EXACT
    rewrites_weights: ClassVar[bool] = False

    def requires(self, model: Model) -> None:  # noqa: B027 - most passes have something to require, some have nothing
        """Raise PassError, and change nothing, unless the pass can run on this model."""

    @abstractmethod
    def run(self, model: Model) -> list[Finding]:
        """Change the model in place; return what was done to what, or why nothing was.

        Raises PassError with the tensor's name, what was expected and what was found.
        """

    def ensures(self, model: Model) -> None:  # noqa: B027
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
    touched: frozenset[ModelThing] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {
            "pass": self.name,
            "changed": self.changed,
            "operators": self.operators,
            "findings": [{"verb": f.verb, "subject": f.subject, "reason": f.reason} for f in self.findings],
        }


def apply(
    model: Model,
    passes: Sequence[Pass],
    observe: Callable[[Outcome], None] | None = None,
    *,
    weights_absent: bool = False,
) -> tuple[Model, list[Outcome]]:
    """Apply passes in order to a copy of `model`; the model that was given stays as it is, whatever happens.

    Returns the changed copy, and what each pass came to. `observe` is called with each outcome as it comes.
    With `weights_absent`, for a plan before anything is fetched, a pass that reads a data file which is not there is left
    out, and its finding says so.
    Raises PassError with the names of the passes that went before: where a pass cannot be applied, where the graph
    that it leaves is broken, and where what it says of its change is not what is measured. Raises ModelError for a
    graph that is broken before any pass: no pass need expect one.
    """
    _refuse_misuse(model, passes)
    check_graph(model)
    current = model.copy()
    things = snapshot(current.proto)
    outcomes: list[Outcome] = []
    for step in passes:
        before = current.copy() if weights_absent else current
        try:
            outcome, things = _apply_one(current, step, things)
        except SurgeryError as error:
            if weights_absent and isinstance(error, WeightsAbsent):
                current, outcome = before, Outcome(step.name, (NOT_TRIED,), {}, False, 0.0)
                outcomes.append(outcome)
                continue
            trail = " after " + ", ".join(earlier.name for earlier in outcomes) if outcomes else ""
            raise PassError(f"{step.name}{trail}: {error}", hint=error.hint) from error
        outcomes.append(outcome)
        if observe is not None:
            observe(outcome)
    return current, outcomes


NOT_TRIED = Finding("skipped", "weights", "not tried: it reads weights that are not fetched yet")
"""What a pass comes to in a plan, where it cannot be tried."""


def _refuse_misuse(model: object, passes: object) -> None:
    """Raise PassError for arguments of other types, with what to write in their place."""
    if not isinstance(model, Model):
        hint = "Model.from_proto(proto) takes a ModelProto, Model.open(path) a file"
        raise PassError(f"apply takes a surgery.graph.model.Model; a {type(model).__name__} is given", hint=hint)
    for step in passes if isinstance(passes, Sequence) else [passes]:
        if not isinstance(passes, Sequence) or not isinstance(step, Pass):
            found = f"the class {step.__name__}" if isinstance(step, type) else f"a {type(step).__name__}"
            hint = "write [RenameIO()], or passes.recipe.parse('rename-io') for the text of a recipe"
            raise PassError(f"apply takes a sequence of passes; {found} is given", hint=hint)


def _apply_one(model: Model, step: Pass, before: Snapshot) -> tuple[Outcome, Snapshot]:
    """What one pass came to, and what is in the model afterwards."""
    started = time.perf_counter()
    fingerprint = model.fingerprint()
    operators, converted = _operators(model), dict(model.converted)
    step.requires(model)
    findings = tuple(step.run(model))
    step.ensures(model)
    try:
        check_definitions(model.proto)
    except ModelError as error:
        raise PassError(f"it left a broken graph: {error}") from error
    changed = model.fingerprint() != fingerprint
    claimed = any(finding.verb != "skipped" for finding in findings)
    if changed != claimed:
        said = "it reports a change" if claimed else "it reports no change"
        raise PassError(f"{said}, but the model {'changed' if changed else 'did not change'}")
    if model.converted != converted and not step.rewrites_weights:
        raise PassError("it has weights written anew, but does not say so: rewrites_weights is False")
    delta = _operators(model)
    delta.subtract(operators)
    counts = {op: n for op, n in sorted(delta.items()) if n}
    seconds = time.perf_counter() - started
    after = snapshot(model.proto) if changed else before
    return Outcome(step.name, findings, counts, changed, seconds, touched(before, after)), after


def _operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)
