"""Two recordings side by side: how far one model's answers are from another's, case by case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import ModelError
from surgery.recording import Answer, Recording, StoredCache
from surgery.runtime import Array
from surgery.wiring import Slot

TOP = 10


@dataclass(frozen=True, slots=True)
class Worst:
    """Where two answers are furthest apart. Steps count from 0, the pieces of the prompt first."""

    case: str
    step: int
    row: int
    token_id: int
    source: float
    merged: float


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The numbers of one case; differences are absolute, over all steps and rows.

    max_abs              logits that both graphs computed in products of the same dimensions
    regrouped_max_abs    logits of steps in which one graph computed rows that the other left out
    cosine, kl           the worst row's; KL(source || merged) in nats, float64
    top1, top10          share of rows with the same likeliest token; mean overlap of the ten likeliest
    token_faults         greedy tokens that differ, where the source prefers its own by over 2 x tolerance
    cache_max_abs        the KV owners' caches after the last step; inf where they differ and were not kept
    alias_faults         caches of borrowers that are not their owner's, bit by bit, or are not there
    source_not_finite    NaN and Inf in the source's logits; merged_not_finite: in the merged graph's alone
    """

    name: str
    covers: str
    prompt_tokens: int
    steps: int
    max_abs: float
    regrouped_max_abs: float
    mean_abs: float
    cosine: float
    kl: float
    top1: float
    top10: float
    token_faults: int
    cache_max_abs: float
    alias_faults: tuple[str, ...]
    source_not_finite: int
    merged_not_finite: int
    worst: Worst | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All cases of two recordings. `dtype` is that of the source's logits."""

    cases: tuple[CaseResult, ...]
    dtype: str

    @property
    def max_abs(self) -> float:
        return max((case.max_abs for case in self.cases), default=0.0)

    @property
    def regrouped_max_abs(self) -> float:
        return max((case.regrouped_max_abs for case in self.cases), default=0.0)

    @property
    def cache_max_abs(self) -> float:
        return max((case.cache_max_abs for case in self.cases), default=0.0)

    @property
    def smallest_tolerance(self) -> float:
        """The tolerance that logits and caches would just have passed."""
        return max(self.max_abs, self.cache_max_abs)

    @property
    def worst(self) -> Worst | None:
        found = [case.worst for case in self.cases if case.worst is not None]
        return max(found, key=lambda worst: abs(worst.source - worst.merged), default=None)


@dataclass(frozen=True, slots=True)
class _RowResult:
    max_abs: float
    total_abs: float
    cosine: float
    kl: float
    top1: bool
    top10: float
    worst_id: int


_SAME = _RowResult(0.0, 0.0, 1.0, 0.0, True, 1.0, 0)


def compare(source: Recording, merged: Recording, owners: Mapping[int, int], tolerance: float = 0.0) -> Comparison:
    """Compare the merged graph's recording with the source's.

    `owners` maps each layer to the KV owner whose cache it reads. Raises ModelError where the recordings are
    not of the same cases, or the logits not of the same vocabulary.
    """
    if [answer.case for answer in source.answers] != [answer.case for answer in merged.answers]:
        raise ModelError("the recordings are not of the same cases")
    pairs = zip(source.answers, merged.answers, strict=True)
    cases = tuple(_case(theirs, ours, owners, tolerance) for theirs, ours in pairs)
    dtype = source.answers[0].steps[0].logits.dtype.name if source.answers else ""
    return Comparison(cases, dtype)


def _case(source: Answer, merged: Answer, owners: Mapping[int, int], tolerance: float) -> CaseResult:
    case = source.case
    if len(source.steps) != len(merged.steps):
        raise ModelError(f"case {case.name}: {len(merged.steps)} steps, but {len(source.steps)} in the source")
    exact, regrouped, rows = 0.0, 0.0, []
    not_finite = [0, 0]
    worst: Worst | None = None
    for number, (theirs, ours) in enumerate(zip(source.steps, merged.steps, strict=True)):
        if theirs.logits.shape != ours.logits.shape:
            shapes = f"{list(ours.logits.shape)}, but {list(theirs.logits.shape)} in the source"
            raise ModelError(f"case {case.name}: logits are {shapes}")
        for row, (a, b) in enumerate(zip(theirs.logits, ours.logits, strict=True)):
            not_finite[0] += int(np.count_nonzero(~np.isfinite(a)))
            not_finite[1] += int(np.count_nonzero(~np.isfinite(b) & np.isfinite(a)))
            found = _row(a, b)
            rows.append(found)
            if theirs.computed_rows == ours.computed_rows:
                exact = max(exact, found.max_abs)
            else:
                regrouped = max(regrouped, found.max_abs)
            if found.max_abs > (abs(worst.source - worst.merged) if worst else 0.0):
                worst = Worst(
                    case.name, number, row, found.worst_id, float(a[found.worst_id]), float(b[found.worst_id])
                )
    return CaseResult(
        name=case.name,
        covers=case.covers,
        prompt_tokens=sum(len(row) for row in case.rows),
        steps=len(source.steps),
        max_abs=exact,
        regrouped_max_abs=regrouped,
        mean_abs=sum(row.total_abs for row in rows) / (len(rows) * source.steps[0].logits.shape[1]),
        cosine=min(row.cosine for row in rows),
        kl=max(row.kl for row in rows),
        top1=sum(row.top1 for row in rows) / len(rows),
        top10=sum(row.top10 for row in rows) / len(rows),
        token_faults=_token_faults(source, merged, tolerance),
        cache_max_abs=_owners_difference(source.caches, merged.caches),
        alias_faults=tuple(_alias_faults(source.caches, merged.caches, owners)),
        source_not_finite=not_finite[0],
        merged_not_finite=not_finite[1],
        worst=worst,
    )


def _row(a: Array, b: Array) -> _RowResult:
    """One row of logits against another, in float64. Places where the source is not finite are left out."""
    if a.dtype == b.dtype and np.array_equal(a, b):
        return _SAME
    finite = np.isfinite(a)
    x, y = np.where(finite, a, 0).astype(np.float64), np.where(finite, b, 0).astype(np.float64)
    difference = np.abs(x - y)
    difference[~np.isfinite(difference)] = np.inf
    y = np.nan_to_num(y, posinf=0, neginf=0)
    here = int(np.argmax(difference))
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    tops = len(set(_top(x).tolist()) & set(_top(y).tolist())) / min(TOP, len(x))
    return _RowResult(
        max_abs=float(difference[here]),
        total_abs=float(difference.sum()),
        cosine=float(x @ y) / norm if norm else 0.0,
        kl=_divergence(x, y),
        top1=bool(np.argmax(x) == np.argmax(y)),
        top10=tops,
        worst_id=here,
    )


def _top(row: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.argpartition(row, -min(TOP, len(row)))[-TOP:]


def _divergence(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """KL(softmax x || softmax y) in nats; rounding can leave it a hair below 0."""
    p, q = _log_softmax(x), _log_softmax(y)
    return max(0.0, float(np.sum(np.exp(p) * (p - q))))


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - x.max()
    normal: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normal


def _token_faults(source: Answer, merged: Answer, tolerance: float) -> int:
    theirs, ours = source.tokens(), merged.tokens()
    faults = 0
    for row, number in zip(*np.nonzero(theirs != ours), strict=True):
        logits = source.steps[source.prefill - 1 + int(number)].logits[row]
        faults += margin(logits, int(theirs[row, number]), int(ours[row, number])) > 2 * tolerance
    return int(faults)


def margin(logits: Array, preferred: int, other: int) -> float:
    """By how much a row of logits prefers one token to another."""
    return float(logits[preferred]) - float(logits[other])


def _owners_difference(source: Mapping[Slot, StoredCache], merged: Mapping[Slot, StoredCache]) -> float:
    return max((_cache_difference(cache, merged.get(found)) for found, cache in source.items()), default=0.0)


def _cache_difference(source: StoredCache, merged: StoredCache | None) -> float:
    if merged is None or source.shape != merged.shape:
        return float("inf")
    if source.digest == merged.digest and source.dtype == merged.dtype:
        return 0.0
    if source.values is None or merged.values is None:
        return float("inf")
    difference = np.abs(source.values.astype(np.float64) - merged.values.astype(np.float64))
    return float("inf") if not np.isfinite(difference).all() else float(difference.max())


def _alias_faults(
    source: Mapping[Slot, StoredCache], merged: Mapping[Slot, StoredCache], owners: Mapping[int, int]
) -> Iterable[str]:
    """Caches of the merged graph that the source does not have: each must be its owner's."""
    for (layer, kind), cache in merged.items():
        if (layer, kind) in source:
            continue
        owner = merged.get((owners.get(layer, -1), kind))
        if owner is None:
            yield f"layer {layer}'s {kind}: no owner's cache is in the interface"
        elif (owner.digest, owner.shape, owner.dtype) != (cache.digest, cache.shape, cache.dtype):
            yield f"layer {layer}'s {kind} is not layer {owners[layer]}'s"
    kinds = {kind for _, kind in source}
    expanded = {layer for layer, _ in merged} - {layer for layer, _ in source}
    for layer in sorted(expanded):
        for kind in sorted(kinds):
            if (layer, kind) not in merged:
                yield f"layer {layer} has no {kind}"
