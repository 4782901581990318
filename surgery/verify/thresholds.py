"""What a comparison must keep to, by name: the defaults with their reasons, and how a user sets others.

Two settings decide the defaults: what the recipe's passes do to the arithmetic, where both sides ran on one provider,
and the coarser of the two sides' number types.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from surgery.architecture import read_config
from surgery.errors import ArchitectureError, RequestError, nearest
from surgery.folder.manifest import NAME as MANIFEST_FILE

EXACT_PASSES = frozenset(
    {
        "merge-embeddings", "fold-logits-to-keep", "rename-io", "expand-shared-kv", "annotate-head-sizes",
        "uniform-heads", "scatter-features", "mask-media-ids", "flatten-per-layer-inputs", "tie-lm-head",
        "host-embeddings",
        "fit-encoder",
        "split-per-layer-table", "fuse-per-layer-table",
    }
)  # fmt: skip
"""Passes that move and name values but compute none anew: what they make is its source bit by bit.
mask-media-ids changes what a placeholder looks up; the source is run with that id too."""

REORDERING_PASSES = frozenset({"fuse-attention", "drop-attention-bias", "slice-caches"})
"""Passes that compute the same sums and products in another order."""

ROW_PASSES = frozenset({"drop-attention-bias"})
"""Passes after which a padded row is what it is alone: the source's graphs see padding between its tokens."""

LOSSY_PASSES = frozenset({"set-accuracy-level"})
"""Passes that round activations to fewer bits, for speed: greedy tokens change with them."""

Arithmetic = Literal["same", "reordered", "other", "int8"]
"""What is left of the source's arithmetic; `other` also where the two sides run on different providers."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The most, or the least where the name is among LEAST, that passes.

    logits       |difference| of a logit that both sides computed in products of the same dimensions
    regrouped    the same, of logits that one side computed along with rows which the other left out
    caches       |difference| of a value in a KV owner's cache
    mean         mean |difference| over the vocabulary, the worst position's
    kl           KL(source || here) in nats, the worst position's
    cosine       cosine of the two rows of logits, the worst position's
    top1         share of positions with the same likeliest token
    top10        mean share of the ten likeliest tokens that are the same
    exact        share of greedy continuations that are equal to their end
    first        share of continuations whose first token is equal
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

    def with_values(self, given: Mapping[str, float]) -> Thresholds:
        return replace(self, **given)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


LEAST = frozenset({"cosine", "top1", "top10", "exact", "first", "headroom"})
NAMES = tuple(field.name for field in fields(Thresholds))


def default_thresholds(dtype: str, arithmetic: Arithmetic) -> Thresholds:
    """The defaults for what is left of the source's arithmetic; `same` asks for equality."""
    return _DEFAULTS[arithmetic][dtype == "float16"]


_REGROUPED_SINGLE = Thresholds(
    logits=0, regrouped=1e-3, caches=0, mean=1e-4, kl=1e-6, cosine=0.999999, top1=1, top10=0.99, exact=1, first=1
)
"""Equal, except in a product of other dimensions, which may add in another order. Another order in every layer is
worth 1e-5 in the logits, 3e-6 in their mean, 1e-11 in the KL (the fixtures with ONNX Runtime's optimizations off)."""

_REGROUPED_HALF = Thresholds(
    logits=0, regrouped=5e-2, caches=0, mean=1e-2, kl=1e-3, cosine=0.9999, top1=1, top10=0.95, exact=1, first=1
)
"""As above. Logits go to 30, the softcap, where float16 steps by 0.016: three steps."""

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


_INT8 = Thresholds(
    logits=3.0, regrouped=3.0, caches=1.5, mean=0.75, kl=0.25, cosine=0.97, top1=0.9, top10=0.9, exact=0.2, first=0.7
)
"""Activations in int8 (set-accuracy-level), five small models, 24 tokens: up to 1.4 in the logits, 0.57 in the caches,
0.35 in the mean, 0.095 in the KL, 0.011 short of 1 in the cosine; top-1 0.957, top-10 0.959, exact 16 of 35, first 30 of
35. Twice that passes; a fault, as above, is still outside."""


_DEFAULTS: dict[Arithmetic, tuple[Thresholds, Thresholds]] = {
    "same": (_REGROUPED_SINGLE, _REGROUPED_HALF),
    "reordered": (_REORDERED_SINGLE, _REORDERED_HALF),
    "other": (_SINGLE, _HALF),
    "int8": (_INT8, _INT8),
}
"""For float32 and for float16."""


def arithmetic_of(folder: Path) -> Arithmetic:
    """What the recipe in a folder's manifest makes of the arithmetic. Without a manifest it has to be the same."""
    names = recipe_names(folder)
    if names & LOSSY_PASSES:
        return "int8"
    if names <= EXACT_PASSES:
        return "same"
    return "reordered" if names <= EXACT_PASSES | REORDERING_PASSES else "other"


def rows_stand_alone(folder: Path) -> bool:
    """Whether the recipe in a folder's manifest makes a padded row what it is alone."""
    return bool(recipe_names(folder) & ROW_PASSES)


def recipe_names(folder: Path) -> set[str]:
    """The passes of the recipe in a folder's manifest; none without a manifest."""
    try:
        recipe = read_config(folder / MANIFEST_FILE).get("recipe")
    except (ArchitectureError, OSError):
        return set()
    recipes = recipe.values() if isinstance(recipe, dict) else [recipe]
    return {name for one in recipes if isinstance(one, str) for name in _pass_names(one)}


def _pass_names(recipe: str) -> set[str]:
    """The names in `a,b{x=1,y=2},c`; a quoted value may hold any of these marks."""
    names, depth, quoted, word = set(), 0, False, ""
    for mark in recipe.replace("\\\\", "").replace('\\"', "") + ",":
        if mark == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif mark in "{}":
            depth += 1 if mark == "{" else -1
        elif mark == "," and depth == 0:
            names.add(word.strip())
            word = ""
        elif depth == 0:
            word += mark
    return names - {""}


def read_thresholds(given: Iterable[str]) -> dict[str, float]:
    """Thresholds as a user writes them, `NAME=VALUE` each. Raises RequestError."""
    found: dict[str, float] = {}
    for text in given:
        name, mark, value = text.partition("=")
        if name not in NAMES:
            known = ", ".join(NAMES)
            raise RequestError(f"no gate is named {name!r}{nearest(name, list(NAMES))}; there are {known}")
        if not mark:
            raise RequestError(f"gate {name} has no value; write {name}=NUMBER")
        found[name] = _number(name, value)
    return found


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise RequestError(f"gate {name} is {value!r}; a number >= 0 is expected")
    return number
