"""The sum of a comparison: the few numbers that others publish, and the gates that hold them to their thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from surgery.verify.agreement import Agreement, CaseResult, Continuation, Position


@dataclass(frozen=True, slots=True)
class Parity:
    """One line of a table of parity.

    `exact` and `first` count continuations that agree to their end, and in their first token. `max_abs` is over all
    logits but regrouped ones; `mean_abs`, `kl` and `cosine` are the worst position's; `top1` and `top10` shares of
    the positions, `same` of those whose likeliest token is the same one; `error` and `mean_kl` are means over them.
    `smallest_tolerance` is what logits and caches, computed in equal groups, would just have passed.
    """

    prompts: int
    positions: int
    continuations: int
    exact: int
    first: int
    max_abs: float
    regrouped_max_abs: float
    mean_abs: float
    kl: float
    cosine: float
    top1: float
    top10: float
    smallest_tolerance: float
    error: float = 0.0
    mean_kl: float = 0.0
    same: float = 1.0

    @property
    def exact_rate(self) -> float:
        """Share of continuations that are equal to their end."""
        return self.exact / self.continuations if self.continuations else 0.0

    @property
    def first_rate(self) -> float:
        """Share of continuations whose first token is equal."""
        return self.first / self.continuations if self.continuations else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"exact match {self.exact}/{self.continuations}, first token {self.first}/{self.continuations}, "
            f"max |difference| {self.max_abs:.3g}, worst KL {self.kl:.3g}"
        )


@dataclass(frozen=True, slots=True)
class KindError:
    """What a pass changes with int8 in the products of one kind alone, or in `all` that it gives int8."""

    by: str
    kind: str
    products: int
    parity: Parity

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {**asdict(self), "parity": self.parity.to_dict()}


def parity(found: Agreement) -> Parity:
    """Sum up a comparison."""
    positions = [position for case in found.cases for position in case.positions]
    continuations = [row for case in found.cases for row in case.continuations]
    return Parity(
        prompts=len(found.cases),
        positions=len(positions),
        continuations=len(continuations),
        exact=sum(row.exact for row in continuations),
        first=sum(row.first for row in continuations),
        max_abs=found.max_abs,
        regrouped_max_abs=found.regrouped_max_abs,
        mean_abs=max((position.mean_abs for position in positions), default=0.0),
        kl=max((position.kl for position in positions), default=0.0),
        cosine=min((position.cosine for position in positions), default=1.0),
        top1=_share([position.top1 for position in positions]),
        top10=_share([position.top10 for position in positions]),
        error=_mean([position.error for position in positions]),
        mean_kl=_mean([position.kl for position in positions]),
        same=_share([position.same for position in positions]),
        smallest_tolerance=found.smallest_tolerance,
    )


def _share(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 1.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def parted(cases: Sequence[CaseResult]) -> list[tuple[str, Continuation]]:
    """The continuations that do not agree to their end, with their case."""
    return [(case.name, row) for case in cases for row in case.continuations if not row.exact]


def furthest(cases: Sequence[CaseResult]) -> tuple[str, Position] | None:
    """The position with the largest KL, with its case."""
    found = [(case.name, position) for case in cases for position in case.positions]
    return max(found, key=lambda each: each[1].kl, default=None)
