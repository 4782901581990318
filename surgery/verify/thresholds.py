"""What a comparison must keep to, by name: the defaults with their reasons, and how a user sets others.

Two settings decide the defaults: what the recipe's passes do to the arithmetic, where both sides ran on one provider,
and the coarser of the two sides' number types.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from passes.base import Numerics, Pass
from passes.recipe import StepT, known_passes, steps_of
from surgery.architecture import read_config
from surgery.errors import ArchitectureError, RequestError, nearest
from surgery.folder.manifest import NAME as MANIFEST_FILE
from surgery.source.export import DECODER


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The most, or the least where the name is among LEAST, that passes.

    logits       |difference| of a logit that both sides computed in products of the same dimensions
    regrouped    the same, of logits that one side computed along with rows which the other left out
    caches       |difference| of a value in a KV source layer's cache
    mean         mean |difference| over the vocabulary, the worst position's
    kl           KL(source || here) in nats, the worst position's
    cosine       cosine of the two rows of logits, the worst position's
    top1         share of positions with the same likeliest token
    top10        mean share of the ten likeliest tokens that are the same
    exact        share of greedy continuations that are equal to their end
    first        share of continuations whose first token is equal
    error        where activations are rounded to whole numbers: the standard deviation of the differences in that of the
                 source's logits, mean of all positions
    mean_kl      there, the mean KL
    near         there, how many standard deviations of the source's logits two tokens may be apart to count as alike
    headroom     65504 over the largest |activation| of the residual stream, where it is float16
    """

    logits: float
    regrouped: float
    caches: float
    mean: float
    kl: float
    cosine: float
    top1: float
    top10: float
    exact: float
    first: float
    headroom: float = 1.0
    error: float = 0.0
    mean_kl: float = 0.0
    near: float = 0.0

    def with_values(self, given: Mapping[str, float]) -> Thresholds:
        """The same with some others, by name."""
        return replace(self, **given)

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON, keys in a fixed order."""
        return asdict(self)


LEAST = frozenset({"cosine", "top1", "top10", "exact", "first", "headroom"})
NAMES = tuple(field.name for field in fields(Thresholds))


def default_thresholds(dtype: str, numerics: Sequence[Numerics] = ()) -> Thresholds:
    """The defaults for results of a dtype, after passes that do this to numbers; equality where each is exact.

    The laxest of the passes decides; of two that state a bound, the wider. Raises RequestError for a bound that
    names no gate.
    """
    worst = max((each.kind for each in numerics), key=list(_DEFAULTS).index, default="exact")
    found = _DEFAULTS[worst][dtype == "float16"]
    for name, bound in (entry for each in numerics for entry in each.bound.items()):
        _refuse_unknown(name)
        wider = min if name in LEAST else max
        found = found.with_values({name: wider(bound, getattr(found, name))})
    return found


_REGROUPED_SINGLE = Thresholds(
    logits=0, regrouped=1e-3, caches=0, mean=1e-4, kl=1e-6, cosine=0.999999, top1=1, top10=0.99, exact=1, first=1
)
"""Equal, except in a product of other dimensions, which may add in another order. Another order in every layer is
worth 1e-5 in the logits, 3e-6 in their mean, 1e-11 in the KL (the fixtures with ONNX Runtime's optimizations off)."""

_REGROUPED_HALF = Thresholds(
    logits=0, regrouped=0.1, caches=0, mean=0.03, kl=1e-3, cosine=0.9999, top1=1, top10=0.95, exact=1, first=1
)
"""As above. A row of a padded batch is 0.047 from the row alone in the fixtures, 0.0081 in the mean: as far as float16
is in another order, below. A window of one token more or less is worth 1 and more
(tests/verify/test_window_faults.py)."""

_REORDERED_SINGLE = Thresholds(
    logits=1e-4, regrouped=1e-4, caches=1e-4, mean=3e-5, kl=1e-8, cosine=0.999999, top1=1, top10=0.99, exact=1, first=1
)
"""Fused attention in the fixtures, 18 layers: 2.2e-5 in the logits, 8e-6 in the caches, 6e-6 in the mean, 2e-11 in the
KL, every token equal. A window of one token less is worth 0.01 and more in the logits."""

_REORDERED_HALF = Thresholds(
    logits=0.1, regrouped=0.1, caches=0.05, mean=0.03, kl=5e-4, cosine=0.9999, top1=0.99, top10=0.95, exact=0.95,
    first=0.98,
)  # fmt: skip
"""The same in float16: 0.037 in the logits, 0.0083 in the caches, 0.009 in the mean, 5e-5 in the KL, every token equal.
Logits go to 30, where float16 steps by 0.016."""

_SINGLE = Thresholds(
    logits=1e-2, regrouped=1e-2, caches=1e-2, mean=1e-3, kl=1e-5, cosine=0.9999, top1=0.99, top10=0.98, exact=0.95,
    first=0.98,
)  # fmt: skip
"""A thousand times what another order is worth: for more layers, and for CUDA, which multiplies float32 as TF32."""

_HALF = Thresholds(
    logits=1.0, regrouped=1.0, caches=1.0, mean=0.25, kl=2e-2, cosine=0.998, top1=0.95, top10=0.9, exact=0.75,
    first=0.85,
)  # fmt: skip
"""Float16 for float32 in the fixtures, 18 layers: 0.14 in the logits, 0.04 in their mean, 1.1e-3 in the KL, 1.1e-4
short of 1 in the cosine; top-1 0.994, top-10 0.997, exact 31 of 35, first 34 of 35. Here is room for twice the layers
and another order besides. A fault is far outside: a doubled embedding scale is worth 11 in the logits, 8 in the KL."""


_DEFAULTS = {
    "exact": (_REGROUPED_SINGLE, _REGROUPED_HALF),
    "reordered": (_REORDERED_SINGLE, _REORDERED_HALF),
    "lossy": (_SINGLE, _HALF),
}
"""For float32 and for float16, from the strictest to the laxest."""

NEAR = 0.25
"""Where activations are rounded, a token counts as the likeliest, or as one of the ten likeliest, too if the source
prefers its own, or its tenth, by no more standard deviations of the position's logits than this. Rounding moves the
logits by 0.05 of one, at full size as in the small exports. Of random weights the likeliest tokens are nearly alike: 10
of 100 positions have another one then, none by more than 0.17; of E2B in `quantized` one in ten of the ten likeliest."""

RESUMMED = Numerics(
    "lossy",
    {
        "logits": 1.5, "regrouped": 1.5, "caches": 0.5, "mean": 0.5, "kl": 0.05, "cosine": 0.98, "top1": 0.98, "top10": 0.98,
        "exact": 0.9, "first": 0.95, "error": 0.1, "mean_kl": 5e-3, "near": NEAR,
    },
)  # fmt: skip
"""Another order of summation with int8 products on both sides: a sum that differs in its last bit becomes the next
whole number, and the layers after it enlarge that, at full size to nearly what the rounding is worth. `fast` of E2B:
0.34 in the logits, 0.17 in the caches, 0.037 in the relative error, 9.5e-4 in the mean KL, cosine 0.9986.
In the small exports 0.34, 0.10, 0.003, 2e-4; there the worst KL is 0.0061. So this finds gross faults alone, and a
source whose products are slow answers two prompts as published, where the bounds of another order hold:
surgery.verify.accuracy."""

ROUNDED = Numerics(
    "lossy",
    {
        "logits": 4.5, "regrouped": 4.5, "caches": 1.5, "mean": 1.2, "kl": 0.6, "cosine": 0.95, "top1": 0.95, "top10": 0.8,
        "exact": 0.7, "first": 0.9, "error": 0.2, "mean_kl": 0.1, "near": NEAR,
    },
)  # fmt: skip
"""A graph that rounds activations itself, with or without int8 products: two readings of the QAT exports. In the small
ones up to 2.2 in the logits, 0.40 in the caches, 0.56 in the mean, 0.33 in the KL, 0.051 in its mean, 0.112 in the
relative error, 0.021 short of 1 in the cosine; top-1 0.984, top-10 0.893. Twice that passes."""


def regrouped_at_least(rounding: Numerics, passes: Sequence[Numerics]) -> Numerics:
    """What rounding forgives beside these passes. Where each is exact, the rows of a padded batch alone have another order of
    summation: what was computed in equal groups is equal, and `logits` and `caches` hold that."""
    if any(each.kind != "exact" for each in passes):
        return rounding
    return Numerics(
        "exact", {name: value for name, value in rounding.bound.items() if name not in ("logits", "caches")}
    )


def passes_of(folder: Path) -> list[type[Pass]]:
    """The passes of the recipes in a folder's manifest; none without a manifest.

    One that is not known here is left out, which is the strictest reading: nothing is forgiven for its sake.
    """
    try:
        recipe = read_config(folder / MANIFEST_FILE).get("recipe")
    except (ArchitectureError, OSError):
        return []
    recipes = recipe.values() if isinstance(recipe, dict) else [recipe]
    return [step for one in recipes if isinstance(one, str) for step in known_passes(one)]


def numerics_of(folder: Path, *but: type[Pass]) -> list[Numerics]:
    """What each pass of the recipe in a folder's manifest does to the numbers, `but` some."""
    return [step.numerics for step in passes_of(folder) if step not in but]


def decoder_steps(folder: Path, kind: type[StepT]) -> list[StepT]:
    """The passes of one kind, with their options, in the recipe of a folder's decoder; none without a manifest."""
    try:
        recipe = read_config(folder / MANIFEST_FILE).get("recipe")
    except (ArchitectureError, OSError):
        return []
    text = recipe.get(DECODER) if isinstance(recipe, dict) else recipe
    return steps_of(text, kind) if isinstance(text, str) else []


def read_thresholds(given: Iterable[str]) -> dict[str, float]:
    """Thresholds as a user writes them, `NAME=VALUE` each. Raises RequestError."""
    found: dict[str, float] = {}
    for text in given:
        name, mark, value = text.partition("=")
        _refuse_unknown(name)
        if not mark:
            raise RequestError(f"gate {name} has no value; write {name}=NUMBER")
        found[name] = _number(name, value)
    return found


def _refuse_unknown(name: str) -> None:
    if name not in NAMES:
        raise RequestError(f"no gate is named {name!r}{nearest(name, list(NAMES))}; there are {', '.join(NAMES)}")


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise RequestError(f"gate {name} is {value!r}; a number >= 0 is expected")
    return number
