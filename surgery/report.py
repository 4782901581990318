"""What a check came to: gates with a threshold, in sections, and the numbers of each case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from surgery.comparison import CaseResult
from surgery.prompts import Skipped

Section = Literal["manifest", "structure", "numbers", "runtime"]
Value = float | str | None


@dataclass(frozen=True, slots=True)
class Gate:
    """One check. `found` is held against `threshold`; `detail` is a sentence for the person who reads it."""

    section: Section
    name: str
    passed: bool
    threshold: Value = None
    found: Value = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `validate`. `seconds` is per stage; `skipped` names the cases that were left out."""

    gates: tuple[Gate, ...]
    cases: tuple[CaseResult, ...]
    skipped: tuple[Skipped, ...]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    @property
    def failed(self) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.gates if not gate.passed)

    def section(self, name: Section) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.gates if gate.section == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order; inf and nan, which it does not have, as strings."""
        return {
            "passed": self.passed,
            "gates": [_plain(asdict(gate)) for gate in self.gates],
            "cases": [_plain(case.to_dict()) for case in self.cases],
            "skipped": [asdict(case) for case in self.skipped],
            "seconds": {stage: round(taken, 3) for stage, taken in self.seconds.items()},
            "versions": dict(self.versions),
            "settings": dict(self.settings),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
