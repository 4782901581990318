"""Two recordings side by side: how far one model's answers are from another's, case by case.

The second recording took the first one's tokens, so each step is compared on equal inputs. This also tells how the
two would have continued on their own: up to the first token that differs both continuations are the same, and there
they part. So a continuation agrees to its end, or in its first token, in free running exactly where it does here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.attention.kv_wiring import Slot
from surgery.errors import ModelError
from surgery.runtime.sessions import Array
from surgery.verify.recording import Answer, Recording, StoredCache

TOP = 10


@dataclass(frozen=True, slots=True)
class Worst:
    """Where two answers are furthest apart, in equal groups. Steps count from 0, the pieces of the prompt first."""

    case: str
    step: int
    row: int
    token_id: int
    source: float
    merged: float


@dataclass(frozen=True, slots=True)
class Position:
    """One row of logits, over the whole vocabulary. `token_id` is where the difference is largest.

    `regrouped` tells that one graph computed rows along with this one which the other left out. `kl` is
    KL(source || merged) in nats, in float64. `error` is the standard deviation of the differences in that of the
    source's logits. `same` tells that the likeliest token is the same, `top1` that it is, or as likely, and `top10` is
    the share of the ten likeliest tokens of which one or the other is so: see agreement_of.
    """

    step: int
    row: int
    regrouped: bool
    max_abs: float
    mean_abs: float
    cosine: float
    kl: float
    top1: bool
    top10: float
    token_id: int
    error: float
    same: bool


@dataclass(frozen=True, slots=True)
class Continuation:
    """A row's greedy tokens: how many there are, and how many agree before the first that does not."""

    row: int
    tokens: int
    agreed: int

    @property
    def exact(self) -> bool:
        """Whether every token agrees."""
        return self.agreed == self.tokens

    @property
    def first(self) -> bool:
        """Whether the first token agrees."""
        return self.agreed > 0


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The numbers of one case; differences are absolute, over all steps and rows.

    max_abs              logits that both graphs computed in products of the same dimensions
    regrouped_max_abs    logits of steps in which one graph computed rows that the other left out; caches of a padded batch
    cosine, kl           the worst position's
    top1, top10          share of positions with the same likeliest token; mean overlap of the ten likeliest
    token_faults         greedy tokens that differ, where the source prefers its own by over 2 x tolerance
    cache_max_abs        the KV source layers' caches after the last step, unless padded; inf where they differ and were not kept
    alias_faults         caches of KV-shared layers that are not their source layer's, bit by bit, or are not there
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
    continuations: tuple[Continuation, ...] = ()
    positions: tuple[Position, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Agreement:
    """All cases of two recordings. `dtype` is the coarsest number type on either side."""

    cases: tuple[CaseResult, ...]
    dtype: str

    @property
    def max_abs(self) -> float:
        """The largest |difference| of a logit that was computed in equal groups."""
        return max((case.max_abs for case in self.cases), default=0.0)

    @property
    def regrouped_max_abs(self) -> float:
        """The same where one graph computed rows that the other left out."""
        return max((case.regrouped_max_abs for case in self.cases), default=0.0)

    @property
    def cache_max_abs(self) -> float:
        """The largest |difference| of a value in a cache."""
        return max((case.cache_max_abs for case in self.cases), default=0.0)

    @property
    def smallest_tolerance(self) -> float:
        """The tolerance that logits and caches would just have passed."""
        return max(self.max_abs, self.cache_max_abs)

    @property
    def worst(self) -> Worst | None:
        """Where the logits are furthest apart; None where they are equal."""
        found = [case.worst for case in self.cases if case.worst is not None]
        return max(found, key=lambda worst: abs(worst.source - worst.merged), default=None)


def agreement_of(
    source: Recording,
    merged: Recording,
    kv_sources: Mapping[int, int],
    tolerance: float = 0.0,
    regrouped: float = 0.0,
    near: float = 0.0,
) -> Agreement:
    """Compare the merged graph's recording with the source's.

    Another token is no fault where the source prefers its own by no more than twice the tolerance: `regrouped` in steps
    that are. It counts as the likeliest one, too, where the source prefers its own by no more than `near` standard
    deviations of the position's logits, and as one of the ten likeliest, where it prefers its tenth by no more. `kv_sources` maps each layer to the KV source layer whose cache it reads. Raises
    ModelError where the recordings are not of the same cases, or the logits not of the same vocabulary.
    """
    if [answer.case for answer in source.answers] != [answer.case for answer in merged.answers]:
        raise ModelError("the recordings are not of the same cases")
    pairs = zip(source.answers, merged.answers, strict=True)
    cases = tuple(_case(theirs, ours, kv_sources, tolerance, regrouped, near) for theirs, ours in pairs)
    return Agreement(cases, coarsest(source, merged))


def coarsest(*recordings: Recording) -> str:
    """float16 where any logits or caches are, else float32: a graph may compute in float16 between float32 ends."""
    for answer in (answer for recording in recordings for answer in recording.answers):
        kinds = [step.logits.dtype for step in answer.steps[:1]]
        kinds += [np.dtype(cache.dtype) for cache in answer.caches.values()]
        if np.dtype(np.float16) in kinds:
            return "float16"
    return "float32"


def _case(
    source: Answer, merged: Answer, kv_sources: Mapping[int, int], tolerance: float, tolerated: float, near: float
) -> CaseResult:
    case = source.case
    if len(source.steps) != len(merged.steps):
        raise ModelError(f"case {case.name}: {len(merged.steps)} steps, but {len(source.steps)} in the source")
    positions: list[Position] = []
    not_finite = [0, 0]
    worst: Worst | None = None
    for number, (theirs, ours) in enumerate(zip(source.steps, merged.steps, strict=True)):
        if theirs.logits.shape != ours.logits.shape:
            shapes = f"{list(ours.logits.shape)}, but {list(theirs.logits.shape)} in the source"
            raise ModelError(f"case {case.name}: logits are {shapes}")
        regrouped = theirs.computed_rows != ours.computed_rows
        for row, (a, b) in enumerate(zip(theirs.logits, ours.logits, strict=True)):
            not_finite[0] += int(np.count_nonzero(~np.isfinite(a)))
            not_finite[1] += int(np.count_nonzero(~np.isfinite(b) & np.isfinite(a)))
            found = _position(number, row, tolerated if regrouped else None, near, a, b)
            positions.append(found)
            if not regrouped and found.max_abs > (abs(worst.source - worst.merged) if worst else 0.0):
                here = found.token_id
                worst = Worst(case.name, number, row, here, float(a[here]), float(b[here]))
    caches = _owners_difference(source, merged, kv_sources)
    others = [found.max_abs for found in positions if found.regrouped] + [caches] * case.ragged
    return CaseResult(
        name=case.name,
        covers=case.covers,
        prompt_tokens=sum(len(row) for row in case.rows),
        steps=len(source.steps),
        max_abs=max((found.max_abs for found in positions if not found.regrouped), default=0.0),
        regrouped_max_abs=max(others, default=0.0),
        mean_abs=sum(found.mean_abs for found in positions) / len(positions),
        cosine=min(found.cosine for found in positions),
        kl=max(found.kl for found in positions),
        top1=sum(found.top1 for found in positions) / len(positions),
        top10=sum(found.top10 for found in positions) / len(positions),
        token_faults=_token_faults(source, merged, tolerance, tolerated),
        cache_max_abs=0.0 if case.ragged else caches,
        alias_faults=tuple(_alias_faults(source.caches, merged.caches, kv_sources)),
        source_not_finite=not_finite[0],
        merged_not_finite=not_finite[1],
        worst=worst,
        continuations=tuple(_continuations(source, positions)),
        positions=tuple(positions),
    )


def _continuations(source: Answer, positions: Iterable[Position]) -> Iterable[Continuation]:
    rows: dict[int, list[bool]] = {}
    for found in positions:
        if found.step >= source.prefill - 1:
            rows.setdefault(found.row, []).append(found.top1)
    for row, same in rows.items():
        yield Continuation(row, len(same), len(same) if all(same) else same.index(False))


def _position(step: int, row: int, tolerated: float | None, near: float, a: Array, b: Array) -> Position:
    """One row of logits against another, in float64. Places where the source is not finite are left out.

    `tolerated` is given where the logits were computed in other groups: then a token that the source prefers by no more
    than twice that is as likely as its own.
    """
    regrouped = tolerated is not None
    if a.dtype == b.dtype and np.array_equal(a, b):
        return Position(step, row, regrouped, 0.0, 0.0, 1.0, 0.0, True, 1.0, 0, 0.0, True)
    finite = np.isfinite(a)
    x, y = np.where(finite, a, 0).astype(np.float64), np.where(finite, b, 0).astype(np.float64)
    difference = np.abs(x - y)
    difference[~np.isfinite(difference)] = np.inf
    y = np.nan_to_num(y, posinf=0, neginf=0)
    here = int(np.argmax(difference))
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    spread, theirs, ours = float(x.std()), int(np.argmax(x)), int(np.argmax(y))
    return Position(
        step=step,
        row=row,
        regrouped=regrouped,
        max_abs=float(difference[here]),
        mean_abs=float(difference.mean()),
        cosine=float(x @ y) / norm if norm else 0.0,
        kl=_divergence(x, y),
        top1=margin(x, theirs, ours) <= max(2 * (tolerated or 0.0), near * spread),
        top10=_shared(x, y, near * spread),
        token_id=here,
        error=float((y - x).std()) / spread if spread else float("inf"),
        same=theirs == ours,
    )


def _shared(x: NDArray[np.float64], y: NDArray[np.float64], allowed: float) -> float:
    """The share of the ten likeliest tokens of y that are among those of x, or less likely there than the tenth by no
    more than `allowed`."""
    tenth = float(x[_top(x)].min())
    return float((x[_top(y)] >= tenth - allowed).mean())


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


def _token_faults(source: Answer, merged: Answer, tolerance: float, tolerated: float) -> int:
    theirs, ours = source.tokens(), merged.tokens()
    faults = 0
    for row, number in zip(*np.nonzero(theirs != ours), strict=True):
        step = source.prefill - 1 + int(number)
        alike = source.steps[step].computed_rows == merged.steps[step].computed_rows
        apart = margin(source.steps[step].logits[row], int(theirs[row, number]), int(ours[row, number]))
        faults += apart > 2 * (tolerance if alike else tolerated)
    return int(faults)


def margin(logits: Array, preferred: int, other: int) -> float:
    """By how much a row of logits prefers one token to another."""
    return float(logits[preferred]) - float(logits[other])


def _owners_difference(source: Answer, merged: Answer, kv_sources: Mapping[int, int]) -> float:
    """Over the caches of KV source layers. A source may be a merged graph itself, which has its KV-shared layers'
    aliases too."""
    owned = {found: cache for found, cache in source.caches.items() if kv_sources.get(found[0], found[0]) == found[0]}
    return max((_cache_difference(cache, merged.caches.get(found)) for found, cache in owned.items()), default=0.0)


def _cache_difference(source: StoredCache, merged: StoredCache | None) -> float:
    if merged is None:
        return float("inf")
    if (source.digest, source.shape, source.dtype) == (merged.digest, merged.shape, merged.dtype):
        return 0.0
    own = own_part(source.shape, merged.shape)
    if source.values is None or merged.values is None or own is None:
        return float("inf")
    theirs, ours = source.values.astype(np.float64), merged.values.astype(np.float64, copy=True)
    difference = np.abs(theirs - ours[own])
    ours[own] = 0  # what is left is padding, and has to be 0
    found = max(float(difference.max(initial=0)), float(np.abs(ours).max(initial=0)))
    return found if np.isfinite(difference).all() and np.isfinite(ours).all() else float("inf")


def own_part(own: tuple[int, ...], padded: tuple[int, ...]) -> tuple[slice, ...] | None:
    """What a cache of shape `own` is of one with further KV heads, or with larger ones; None where it is no part."""
    if own == padded:
        return tuple(slice(None) for _ in own)
    if len(padded) != 4 or len(own) != 4 or padded[::2] != own[::2]:
        return None
    return tuple(slice(size) for size in own) if padded[1] >= own[1] and padded[3] >= own[3] else None


def _alias_faults(
    source: Mapping[Slot, StoredCache], merged: Mapping[Slot, StoredCache], kv_sources: Mapping[int, int]
) -> Iterable[str]:
    """Caches of the merged graph that the source does not have: each must be its source layer's."""
    for (layer, kind), cache in merged.items():
        if (layer, kind) in source:
            continue
        kv_source = merged.get((kv_sources.get(layer, -1), kind))
        if kv_source is None:
            yield f"layer {layer}'s {kind}: no KV source layer's cache is in the interface"
        elif (kv_source.digest, kv_source.shape, kv_source.dtype) != (cache.digest, cache.shape, cache.dtype):
            yield f"layer {layer}'s {kind} is not layer {kv_sources[layer]}'s"
    kinds = {kind for _, kind in source}
    expanded = {layer for layer, _ in merged} - {layer for layer, _ in source}
    for layer in sorted(expanded):
        for kind in sorted(kinds):
            if (layer, kind) not in merged:
                yield f"layer {layer} has no {kind}"
