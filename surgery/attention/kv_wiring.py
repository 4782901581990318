"""Which KV cache each attention reads: found from the graph's own wiring, whatever its values are called.

Every decoder layer has one attention core: a fused operator (GroupQueryAttention, MultiHeadAttention, Attention),
or the Softmax between two MatMuls of unfused attention. The k-th core in node order is layer k's. From its key and
its value operand, the way back over operators that only move data ends at a cache: a `past` input, a `present`
output, or both (a KV source layer concatenates past and new). A KV-shared layer ends at its source layer's `present`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from surgery.attention.recomputed import SameValues
from surgery.graph.index import readers
from surgery.graph.tensor_types import TensorType, interface_types

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_MOVES_DATA = {
    "Cast", "Concat", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze", "Gather", "GatherND", "ScatterND", "TensorScatter",
}  # fmt: skip
_MASKS = {"Add", "Where", "Mul", "Div", "Sub", "Cast", "Tanh", "Clip", "Reshape", "Identity", "Max", "Min"}
_PAST_AND_PRESENT = {"GroupQueryAttention": (3, 1), "MultiHeadAttention": (6, 1), "Attention": (4, 1)}
"""Fused operator -> (input index of past_key, output index of present_key); value follows key."""
_FIRST_KEY = 1
"""Input index of the new key in each of them."""


KeyOrValue = Literal["key", "value"]
Slot = tuple[int, KeyOrValue]
"""A KV cache of an interface, whatever it is called: layer number, key or value."""

KINDS: dict[str, KeyOrValue] = {
    "key": "key",
    "keys": "key",
    "k": "key",
    "value": "value",
    "values": "value",
    "v": "value",
}


def slot_of_name(name: str) -> Slot | None:
    """The slot that a cache's name spells: one number, and one of key or value. None for any other name.

    >>> spelling("past_key_values.3.value"), spelling("key_cache_12"), spelling("past.0")
    ((3, 'value'), (12, 'key'), None)
    """
    words = re.findall(r"[a-z]+|\d+", name.lower())
    joined = [i for i in range(len(words) - 1) if words[i] == "key" and words[i + 1] in ("values", "value")]
    if joined:  # the family name past_key_values says nothing of the kind
        del words[joined[0] : joined[0] + 2]
    numbers = [int(word) for word in words if word.isdecimal() and len(word) < 6]
    kinds = [KINDS[word] for word in words if word in KINDS]
    return (numbers[0], kinds[0]) if len(numbers) == 1 and len(kinds) == 1 else None


@dataclass(frozen=True, slots=True)
class KVCache:
    """One KV cache as the graph's interface has it: names of graph inputs and outputs, None where there is none."""

    past: str | None
    present: str | None


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention core. `key` and `value` are the caches it reads; None where the way back ends elsewhere."""

    operator: str
    node: str
    key: KVCache | None
    value: KVCache | None


@dataclass(frozen=True, slots=True)
class AttentionNodes:
    """The nodes of one attention core: a fused operator alone, or a Softmax with the MatMuls around it."""

    node: NodeProto
    scores: NodeProto | None = None
    mixed: NodeProto | None = None


def attention_nodes(graph: GraphProto) -> list[AttentionNodes]:
    """The attention cores of a graph in node order; linear in the graph."""
    return _cores(graph, _Trace(graph))


def attentions(graph: GraphProto) -> list[Attention]:
    """The attention cores of a graph in node order, with the caches that they read; linear in the graph."""
    trace = _Trace(graph)
    cores = _cores(graph, trace)
    found = [_fused(core.node, trace) if core.mixed is None else _unrolled(core, trace) for core in cores]
    if any(each.key is not None and each.key.present is None for each in found):
        return _with_recomputed(graph, cores, found)
    return found


def _with_recomputed(graph: GraphProto, cores: list[AttentionNodes], found: list[Attention]) -> list[Attention]:
    """A fused core without presents that appends to another's past what that one appends reads the other's cache.

    That is what such a GroupQueryAttention means. ONNX Runtime's CPU kernel up to 1.31.1 computes something else behind a
    past: with rows of its own, a past and no name for its presents its output is up to 2 from the right one, which it
    gives as soon as they have names (one KV head, normal numbers; without a past both are right). An export of this form
    answers wrongly on the CPU as it was published, and so does what is made of it.
    """
    same = SameValues(graph)
    kept = {
        each.key.past: (core.node, each)
        for core, each in zip(cores, found, strict=True)
        if each.key is not None and each.key.present is not None and core.mixed is None
    }
    read = []
    for core, each in zip(cores, found, strict=True):
        source = kept.get(each.key.past) if each.key is not None and each.key.present is None else None
        if source is not None and core.mixed is None and same.same_rows(core.node, source[0]):
            each = replace(each, key=source[1].key, value=source[1].value)
        read.append(each)
    return read


def _cores(graph: GraphProto, trace: _Trace) -> list[AttentionNodes]:
    following = readers(graph)
    found = []
    for node in graph.node:
        if node.op_type in _PAST_AND_PRESENT:
            found.append(AttentionNodes(node))
        elif node.op_type == "Softmax":
            scores, mixed = trace.scores.get(_at(node.input, 0)), _forward_to_matmul(node, following)
            if scores is not None and mixed is not None:
                found.append(AttentionNodes(node, scores, mixed))
    return found


def _is_cache(declared: TensorType | None) -> bool:
    floats = ("FLOAT", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT8E5M2")
    return declared is not None and declared.dtype in floats and declared.shape is not None and len(declared.shape) == 4


class _Trace:
    """What stands behind each value: the cache that it comes from, and the MatMul of scores that it was made of.

    Both are carried from each node to its outputs, in the graph's own order: once through it, whatever is asked later.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.scores: dict[str, NodeProto] = {}
        """Value -> the MatMul upstream of it, through masking and scaling."""
        self._caches: dict[str, KVCache] = {}
        types = interface_types(graph)
        self._presents = _presents(graph, types)
        for value in graph.input:
            if _is_cache(types.get(value.name)):
                self._caches[value.name] = KVCache(value.name, self._presents.get(value.name))
        for node in graph.node:
            self._carry(node)

    def _carry(self, node: NodeProto) -> None:
        for name in node.output:
            cache, present = self._behind(node, name), self._presents.get(name)
            if cache is not None or present is not None:
                past, made_from = (cache.past, cache.present) if cache is not None else (None, None)
                self._caches[name] = KVCache(past, present or made_from)
        if _is_product(node) or node.op_type in _MASKS:
            behind = (self.scores.get(name) for name in reversed(node.input))
            scores = node if _is_product(node) else next((found for found in behind if found is not None), None)
            if scores is not None:
                self.scores.update((name, scores) for name in node.output)

    def _behind(self, node: NodeProto, output: str) -> KVCache | None:
        """The cache that one of a node's outputs is made from."""
        if node.op_type in _PAST_AND_PRESENT:
            return self.cache(_past_of(node, output))
        if node.op_type == "Concat":
            found = [cache for name in reversed(node.input) if (cache := self.cache(name)) is not None]
            past = next((cache.past for cache in found if cache.past), None)
            present = next((cache.present for cache in found if cache.present), None)
            return KVCache(past, present) if found else None
        return self.cache(_at(node.input, 0)) if node.op_type in _MOVES_DATA else None

    def cache(self, name: str) -> KVCache | None:
        """The cache behind `name`. A `present` that is met on the way wins over the `past` that it was made from."""
        return self._caches.get(name)

    def present(self, name: str) -> str | None:
        """The output that a value is as a cache, padded or not; None for any other value."""
        return self._presents.get(name)


def _presents(graph: GraphProto, types: Mapping[str, TensorType]) -> dict[str, str]:
    """Value -> the output that it is as a cache: the layers read what is padded, the interface has the padded one."""
    found = {value.name: value.name for value in graph.output if _is_cache(types.get(value.name))}
    for node in graph.node:
        if node.op_type == "Pad" and node.input and (name := _at(node.output, 0)) in found:
            found.setdefault(node.input[0], name)
    return found


def _past_of(node: NodeProto, output: str) -> str:
    """The past that a fused operator appends to for one of its outputs; '' where it has none."""
    first_past, first_present = _PAST_AND_PRESENT[node.op_type]
    for step in (0, 1):
        if _at(node.output, first_present + step) == output:
            return _at(node.input, first_past + step)
    return ""


def _at(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else ""


def _fused(node: NodeProto, trace: _Trace) -> Attention:
    """The past of a fused operator decides: its own, or a KV-shared layer's, whose past or key is the source layer's
    present."""
    first_past, first_present = _PAST_AND_PRESENT[node.op_type]
    caches: list[KVCache | None] = []
    for step in (0, 1):
        found = trace.cache(_at(node.input, first_past + step) or _at(node.input, _FIRST_KEY + step))
        own = trace.present(_at(node.output, first_present + step))
        if own is not None and (found is None or found.present is None):
            found = KVCache(found.past if found else None, own)
        caches.append(found)
    return Attention(node.op_type, node.name, *caches)


def _unrolled(core: AttentionNodes, trace: _Trace) -> Attention:
    """Unfused attention: MatMul(query, key) -> mask and scale -> Softmax -> MatMul(., value)."""
    key, value = (trace.cache(_at(node.input, 1)) if node else None for node in (core.scores, core.mixed))
    return Attention("Softmax", core.node.name, key, value)


def _is_product(node: NodeProto) -> bool:
    return node.op_type == "MatMul" and len(node.input) == 2 and len(node.output) == 1


def _forward_to_matmul(node: NodeProto, following: Mapping[str, list[NodeProto]]) -> NodeProto | None:
    name = _at(node.output, 0)
    for _ in range(4):  # at most a Cast, a Dropout or a Reshape in between
        reading = following.get(name, [])
        if len(reading) != 1:
            return None
        if _is_product(reading[0]) and reading[0].input[0] == name:
            return reading[0]
        name = _at(reading[0].output, 0)
    return None
