"""Gates over measured numbers: each measurement, the threshold it is held against, and where it was worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery.verify.agreement import Agreement, CaseResult
from surgery.verify.fp16_headroom import LIMIT, LayerPeak
from surgery.verify.parity import Parity, furthest, parity, parted
from surgery.verify.report import Gate
from surgery.verify.thresholds import LEAST, Thresholds


def number_gates(found: Agreement, thresholds: Thresholds) -> list[Gate]:
    """The gates of a comparison that name one fault each; `found` of a failed one is what would have passed it."""
    cases = found.cases
    broken = [case.name for case in cases if case.source_not_finite]
    strange = [case.name for case in cases if case.merged_not_finite]
    tokens = [case.name for case in cases if case.token_faults]
    aliases = [f"case {case.name}: {fault}" for case in cases for fault in case.alias_faults]
    caches = [case.name for case in cases if case.cache_max_abs > thresholds.caches]
    return [
        Gate("numbers", "source itself is finite", not broken, 0, len(broken), _listed(broken)),
        Gate("numbers", "finite where the source is", not strange, 0, len(strange), _listed(strange)),
        _difference("logits", "logits", found.max_abs, thresholds.logits, _worst(found)),
        _difference(
            "logits computed in other groups",
            "regrouped",
            found.regrouped_max_abs,
            thresholds.regrouped,
            "rows of a padded batch, with the source's of each row alone"
            + ("" if found.regrouped_max_abs <= thresholds.regrouped else "; move-padding makes them so"),
        ),
        Gate("numbers", "greedy tokens", not tokens, 0, sum(c.token_faults for c in cases), _listed(tokens)),
        _difference("KV source layers' caches", "caches", found.cache_max_abs, thresholds.caches, _listed(caches)),
        Gate(
            "numbers",
            "KV-shared layers' caches are their source layers'",
            not aliases,
            0,
            len(aliases),
            "; ".join(aliases[:3]),
        ),
    ]


def _difference(name: str, option: str, found: float, limit: float, detail: str) -> Gate:
    return Gate("numbers", name, found <= limit, limit, found, detail, "max |difference|", option)


def _worst(found: Agreement) -> str:
    worst = found.worst
    if worst is None:
        return f"{len(found.cases)} cases, {sum(case.steps for case in found.cases)} steps"
    return (
        f"worst at case {worst.case}, step {worst.step}, row {worst.row}, token id {worst.token_id}: "
        f"{worst.source:.6g} in the source, {worst.merged:.6g} here; "
        f"the smallest tolerance that passes is {found.smallest_tolerance:.3g}"
    )


def parity_gates(found: Agreement, thresholds: Thresholds) -> list[Gate]:
    """What all positions and continuations together come to."""
    total = parity(found)
    relative = [
        _statistic(
            "relative error", "error", total.error, thresholds.error, "mean", "of the logits' standard deviation"
        ),
        _statistic("mean divergence", "mean_kl", total.mean_kl, thresholds.mean_kl, "mean KL", ""),
    ]
    return [
        *(relative if thresholds.error else ()),
        _statistic("mean difference", "mean", total.mean_abs, thresholds.mean, "worst mean |difference|", ""),
        _statistic("divergence", "kl", total.kl, thresholds.kl, "worst KL", _furthest(found.cases)),
        _statistic("direction", "cosine", total.cosine, thresholds.cosine, "worst cosine", ""),
        _statistic("likeliest token", "top1", total.top1, thresholds.top1, "share", _alike(total)),
        _statistic("ten likeliest tokens", "top10", total.top10, thresholds.top10, "mean share", ""),
        _statistic("exact match", "exact", total.exact_rate, thresholds.exact, "share", _exact(total, found.cases)),
        _statistic(
            "first token",
            "first",
            total.first_rate,
            thresholds.first,
            "share",
            f"{total.first}/{total.continuations} continuations",
        ),
    ]


def accuracy_gates(found: Agreement, thresholds: Thresholds, level: str, how: str) -> list[Gate]:
    """What an accuracy level changes. `how` says against what it was measured."""
    logits = max(found.max_abs, found.regrouped_max_abs)
    gates = [
        _difference("logits", "logits", logits, thresholds.logits, _worst(found)),
        *parity_gates(found, thresholds),
    ]
    shown = Gate("accuracy", f"accuracy level {level}", True, detail=how)
    return [shown, *(replace(gate, section="accuracy", name=f"{gate.name} at level {level}") for gate in gates)]


def _statistic(name: str, option: str, found: float, limit: float, measure: str, detail: str) -> Gate:
    passed = found >= limit if option in LEAST else found <= limit
    return Gate("parity", name, passed, limit, found, detail, measure, option)


def _furthest(cases: Sequence[CaseResult]) -> str:
    worst = furthest(cases)
    if worst is None or worst[1].max_abs == 0:
        return ""
    case, position = worst
    return f"at case {case}, step {position.step}, row {position.row}"


def _alike(total: Parity) -> str:
    same = round(total.same * total.positions)
    others = f", the same in {same}, in the others as likely as it" if total.top1 > total.same else ""
    return f"{total.positions} positions{others}"


def _exact(total: Parity, cases: Sequence[CaseResult]) -> str:
    counted = f"{total.exact}/{total.continuations} continuations"
    others = [f"{case} row {row.row} parts after {row.agreed} of {row.tokens} tokens" for case, row in parted(cases)]
    return "; ".join([counted, *others[:3]])


def activation_gates(peaks: Sequence[LayerPeak], thresholds: Thresholds) -> list[Gate]:
    """The residual stream: finite, and in float16 below its limit by a factor."""
    strange = [f"{peak.layer_name} has {peak.not_finite} NaN and Inf" for peak in peaks if peak.not_finite]
    highest = max(peaks, key=lambda peak: peak.max_abs)
    half = highest.dtype == "float16"
    where = (
        f"largest in {highest.layer_name}, at {highest.value}, case {highest.case}: {highest.max_abs:.6g} of {LIMIT:g}"
    )
    return [
        Gate("activations", "residual stream is finite", not strange, 0, len(strange), "; ".join(strange[:3])),
        Gate(
            "activations",
            "residual stream fits float16",
            not half or highest.headroom > thresholds.headroom,
            thresholds.headroom if half else None,
            highest.headroom,
            where if half else f"{where}; the graph computes it in {highest.dtype}, so this is for information",
            "headroom",
            "headroom",
        ),
    ]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"cases {shown}{' and more' if len(names) > 5 else ''}" if names else ""
