"""rename-io: the interface gets the names that ONNX Runtime GenAI expects."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.attention.kv_wiring import KINDS, KeyOrValue, Slot, attentions, slot_of_name
from surgery.errors import PassError
from surgery.graph.model import Model
from surgery.graph.renaming import rename
from surgery.graph.scopes import value_names
from surgery.graph.tensor_types import TensorType, tensor_type
from surgery.graph.token_inputs import token_inputs

if TYPE_CHECKING:
    from onnx import GraphProto

_CACHE_WORDS = {"past", "present", "cache", "kv", *KINDS}


@dataclass(frozen=True)
class RenameIO(Pass):
    """Give every input and output the name that the runtime looks for; nothing else is renamed.

        before                                     after

        tokens, mask, positions                    input_ids, attention_mask, position_ids
        past_3_key  ->  [decoder]  -> k_out_3      past_key_values.3.key -> [decoder] -> present.3.key
                                   -> scores                                          -> logits

    A cache is matched by its spelling (`past_key_N`, `past.N.key`, `present_key_values.N.key`, `key_cache_N`, ...) and
    by its structure: the k-th attention core reads layer k's cache. Where the two disagree, or neither tells,
    the pass fails and shows the candidates. Token inputs are integer [batch, sequence]; the logits are the one
    floating-point output of rank 3. Inputs that the runtime does not know (inputs_embeds, num_logits_to_keep) keep
    their names: other passes remove them.

    Requires: each role has one candidate, and no inner value has a name that is needed.
    Ensures: every cache in the interface is `past_key_values.N.key|value` or `present.N.key|value`.
    """

    name: ClassVar[str] = "rename-io"
    summary: ClassVar[str] = "inputs and outputs get the names that ONNX Runtime GenAI looks for"

    def requires(self, model: Model) -> None:
        names = _plan(model.graph)
        interface = {value.name for value in (*model.graph.input, *model.graph.output)}
        inner = value_names(model.graph) - interface
        for old, new in names.items():
            if new in inner:
                raise PassError(f"{old!r} should be named {new!r}, but a value inside the graph has that name")

    def run(self, model: Model) -> list[Finding]:
        names = _plan(model.graph)
        if not names:
            return [Finding("skipped", "interface", "every input and output has the name that the runtime looks for")]
        rename(model.graph, names)
        return [Finding("changed", old, f"is now {new}") for old, new in names.items()]

    def ensures(self, model: Model) -> None:
        if left := _plan(model.graph):
            raise PassError(f"{next(iter(left))!r} still has another name")


def _plan(graph: GraphProto) -> dict[str, str]:
    """Old name -> new name of every input and output that is to be renamed."""
    inputs = {value.name: tensor_type(value) for value in graph.input}
    outputs = {value.name: tensor_type(value) for value in graph.output}
    _refuse_packed(inputs | outputs)
    names = token_inputs(graph)
    pasts = [name for name, declared in inputs.items() if _rank(declared) == 4 and name != "per_layer_inputs"]
    presents = [name for name, declared in outputs.items() if _rank(declared) == 4]
    read = _by_structure(graph)
    names |= _caches(pasts, read, "past_key_values")
    names |= _caches(presents, read, "present")
    names |= _logits(outputs)
    _refuse_two_for_one(names, {*inputs, *outputs})
    return {old: new for old, new in names.items() if old != new}


def _refuse_packed(interface: dict[str, TensorType | None]) -> None:
    for name, declared in interface.items():
        words = set(re.findall(r"[a-z]+", name.lower()))
        if (_rank(declared) or 0) > 4 and words & _CACHE_WORDS:
            raise PassError(
                f"{name!r} is {declared}, several caches in one; one [batch, kv heads, tokens, head size] "
                "for each layer's key and value is expected"
            )


def _rank(declared: TensorType | None) -> int | None:
    return len(declared.shape) if declared is not None and declared.shape is not None else None


def _by_structure(graph: GraphProto) -> dict[str, Slot]:
    """Name of a past or present -> its slot, by the first attention core that reads it."""
    slots: dict[str, Slot] = {}
    for layer, core in enumerate(attentions(graph)):
        sides: tuple[tuple[KeyOrValue, object], ...] = (("key", core.key), ("value", core.value))
        for kind, cache in sides:
            for name in (getattr(cache, "past", None), getattr(cache, "present", None)):
                if name is not None:
                    slots.setdefault(name, (layer, kind))
    return slots


def _caches(names: Iterable[str], read: dict[str, Slot], family: str) -> dict[str, str]:
    renamed = {}
    for name in names:
        spelt, found = slot_of_name(name), read.get(name)
        if spelt and found and spelt != found:
            raise PassError(
                f"{name!r} is spelt as layer {spelt[0]}'s {spelt[1]}, but attention {found[0]} reads it as its "
                f"{found[1]}; it could be {_cache_name(family, spelt)} or {_cache_name(family, found)}"
            )
        slot = found or spelt
        if slot is None:
            raise PassError(
                f"{name!r} has rank 4 as a cache has, but its name spells no layer and key or value, "
                f"and no attention reads it"
            )
        renamed[name] = _cache_name(family, slot)
    return renamed


def _cache_name(family: str, slot: Slot) -> str:
    return f"{family}.{slot[0]}.{slot[1]}"


def _logits(outputs: dict[str, TensorType | None]) -> dict[str, str]:
    if "logits" in outputs:
        return {}
    candidates = [n for n, t in outputs.items() if _rank(t) == 3 and t is not None and "FLOAT" in t.dtype]
    if len(candidates) != 1:
        found = " or ".join(candidates) or f"none of {', '.join(outputs)}"
        raise PassError(f"the logits could be {found}; one floating-point output of rank 3 is expected")
    return {candidates[0]: "logits"}


def _refuse_two_for_one(names: dict[str, str], interface: set[str]) -> None:
    by_target: dict[str, list[str]] = {}
    for old, new in names.items():
        by_target.setdefault(new, []).append(old)
    for new, olds in by_target.items():
        if len(olds) > 1:
            raise PassError(f"{' and '.join(olds)} would both be named {new}")
        if new in interface and new not in names and olds[0] != new:
            raise PassError(f"{olds[0]!r} should be named {new!r}, but another input or output has that name")
