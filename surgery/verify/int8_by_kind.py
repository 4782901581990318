"""What int8 costs by kind of product: the folder with int8 in one kind of its products alone, against the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from passes.base import apply
from passes.int8_prefill import Int8Prefill
from passes.set_accuracy_level import SetAccuracyLevel, kind_of
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.verify.agreement import agreement_of
from surgery.verify.parity import KindError, parity
from surgery.verify.recording import Recording
from surgery.verify.thresholds import NEAR
from surgery.verify.whole_numbers import between, two_sided

if TYPE_CHECKING:
    from onnx import NodeProto

ALL = "all"
_PARTS = {"/mlp/": "MLP", "/attn/": "attention", "per_layer": "per-layer inputs", "lm_head": "lm_head"}
"""The first that is in a product's name tells what it is for."""


@dataclass(frozen=True)
class _Form:
    """A folder's decoder with int8 in some of its products."""

    by: str
    kind: str
    products: int
    decoder: Model


def errors_by_kind(
    plain: Model,
    level: SetAccuracyLevel | None,
    many: int | None,
    theirs: Recording,
    answers: Callable[[Model, Recording], Recording],
) -> Iterator[KindError]:
    """One after the other, `all` of a pass first. `plain` is the folder's decoder without the `level` of its recipe; of
    products with another side from `many` tokens on, those prompts count that have as many.

    `theirs` is what the source answers, `answers` gives what a decoder answers to the same.
    """
    forms = [*(_with_level(plain, level) if level else ()), *(_with_sides(plain) if many else ())]
    for form in forms:
        least = many or 0 if form.by == Int8Prefill.name else 0
        chosen = Recording(tuple(a for a in theirs.answers if not a.case.heavy and a.case.run_tokens >= least))
        found = agreement_of(chosen, answers(form.decoder, chosen), {}, near=NEAR)
        yield KindError(form.by, form.kind, form.products, parity(found))


def _with_level(plain: Model, step: SetAccuracyLevel) -> Iterator[_Form]:
    bare = _limited(plain, ())
    products = step.concerns(bare)
    for kind in _kinds(products):
        chosen = {kind_of(node) for node in products if kind in (ALL, _part(node))}
        others = {kind_of(node) for node in products} - chosen
        only = replace(step, but=" ".join([*step.but.split(), *sorted(others)]))
        yield _Form(f"{step.name} {step.level}", kind, len(only.concerns(bare)), apply(bare, [only])[0])


def _with_sides(plain: Model) -> Iterator[_Form]:
    products = [node for sides in two_sided(plain.graph) for node in sides.products]
    for kind in _kinds(products):
        chosen = [node.name for node in products if kind in (ALL, _part(node))]
        yield _Form(Int8Prefill.name, kind, len(chosen), _limited(plain, chosen))


def _kinds(products: Iterable[NodeProto]) -> list[str]:
    kinds = sorted({_part(node) for node in products})
    return [ALL, *kinds] if len(kinds) > 1 else [ALL]


def _part(node: NodeProto) -> str:
    return next((name for mark, name in _PARTS.items() if mark in node.name), "others")


def _limited(model: Model, products: Sequence[str]) -> Model:
    """A copy in which the sides for many tokens stay empty, but those of these products: all tokens are a few for them."""
    model = model.copy()
    made = producers(model.graph)
    cuts = [
        node
        for sides in two_sided(model.graph)
        if not any(product.name in products for product in sides.products)
        for node in between(model.graph, sides)
        if node.op_type == "Slice"
    ]
    for node in cuts:
        for place, name in enumerate(node.input):
            if name in made and made[name].op_type == "Where":  # 0 of many tokens, else how many there are
                node.input[place] = made[name].input[1]
    return model
