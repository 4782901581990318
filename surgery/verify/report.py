"""What a check came to: gates with a threshold, in sections, and the numbers of each case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from surgery.verify.agreement import CaseResult
from surgery.verify.fp16_headroom import LayerPeak
from surgery.verify.parity import KindError, Parity
from surgery.verify.prompts import Skipped
from surgery.verify.thresholds import LEAST

Section = Literal[
    "manifest", "structure", "numbers", "parity", "accuracy", "activations", "vocabulary", "runtime", "media"
]
Measured = float | str | None
_RUNTIMES = ("onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True, slots=True)
class Gate:
    """One check. `found` is held against `threshold`; `detail` is a sentence for the person who reads it.

    `measure` says what `found` is where that is a measured number, and `option` how a user sets the threshold.
    """

    section: Section
    name: str
    passed: bool
    threshold: Measured = None
    found: Measured = None
    detail: str = ""
    measure: str = ""
    option: str = ""

    @property
    def reading(self) -> str:
        """What was measured and what passes, as people read it; empty where nothing was measured."""
        if not self.measure or self.found is None:
            return ""
        bound = "least" if self.option in LEAST else "most"
        limit = f", at {bound} {_shown(self.threshold)}" if self.threshold is not None else ""
        return f"{self.measure} {_shown(self.found)}{limit}"


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `validate`. `seconds` is per stage; `skipped` names the cases that were left out.

    `parity` sums up the cases, where there was something to compare with; `peaks` is per layer, where it was asked
    for. `level` is what an accuracy level alone changes, `costly` the kinds of products that should not have it;
    `kinds` is what int8 changes by kind of product, where that was asked for.
    """

    gates: tuple[Gate, ...]
    cases: tuple[CaseResult, ...]
    skipped: tuple[Skipped, ...]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    parity: Parity | None = None
    peaks: tuple[LayerPeak, ...] = ()
    level: Parity | None = None
    costly: tuple[str, ...] = ()
    kinds: tuple[KindError, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that failed."""
        return tuple(gate for gate in self.gates if not gate.passed)

    @property
    def summary(self) -> str:
        """The result in one line: gates, the largest difference, and the runtimes that it was measured with."""
        good = len(self.gates) - len(self.failed)
        differs = f"; {self.differences}" if self.differences else ""
        if self.level is not None:
            differs += f"; {of_level(self.level)}"
        versions = ", ".join(f"{name} {self.versions[name]}" for name in _RUNTIMES if name in self.versions)
        return f"{good} of {len(self.gates)} gates passed in {sum(self.seconds.values()):.1f} s{differs} ({versions})"

    @property
    def differences(self) -> str:
        """How far the numbers are from the source's; "" where none was compared."""
        found: dict[str, float] = {}
        for gate in self.section("numbers"):
            if isinstance(gate.found, float):
                found.setdefault(gate.option, gate.found)
        padded = found.pop("regrouped", 0.0)
        told = f"max |difference| {max(found.values()):.3g} from the source" if found else ""
        return told + (f", {padded:.3g} in padded batches" if padded else "")

    def section(self, name: Section) -> tuple[Gate, ...]:
        """The gates of one section."""
        return tuple(gate for gate in self.gates if gate.section == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order; inf and nan, which it does not have, as strings."""
        return {
            "passed": self.passed,
            "gates": [_plain(asdict(gate)) for gate in self.gates],
            "parity": _plain(self.parity.to_dict()) if self.parity else None,
            "level": _plain(self.level.to_dict()) if self.level else None,
            "costly": list(self.costly),
            "kinds": [_plain(each.to_dict()) for each in self.kinds],
            "peaks": [_plain(peak.to_dict()) for peak in self.peaks],
            "cases": [_plain(case.to_dict()) for case in self.cases],
            "skipped": [asdict(case) for case in self.skipped],
            "seconds": {stage: round(taken, 3) for stage, taken in self.seconds.items()},
            "versions": dict(self.versions),
            "settings": dict(self.settings),
        }


def of_level(level: Parity) -> str:
    """What an accuracy level changes, which the other numbers leave out."""
    return f"the accuracy level, apart from that: worst KL {level.kl:.2g}, top-1 {level.same:.3f}"


def _shown(value: Measured) -> str:
    return f"{value:.6g}" if isinstance(value, float | int) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
