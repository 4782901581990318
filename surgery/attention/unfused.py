"""Unfused attention: where it begins and ends, and the proof that it is what a fused operator computes.

    query [B,S,N*H] -> Reshape, Transpose -+
                                           MatMul -> scale, masks -> Softmax -> MatMul -> Transpose, Reshape -> [B,S,N*H]
    present key [B,K,T,H] -----------------+                                    |
    present value [B,K,T,H] ----------------------------------------------------+

A KV source layer's presents are Concat(past, new), new from flat [B,S,K*H]. How a mask is made, how KV heads meet their
queries and what the values are called is the exporter's affair: the part between the flat values is run on numbers of
our own (surgery.graph.evaluation) and held against causal attention, computed here by the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.architecture import Layer
from surgery.attention.kv_wiring import AttentionNodes
from surgery.errors import ModelError
from surgery.graph.evaluation import PROMPT, Subgraphs
from surgery.graph.index import producers, readers
from surgery.graph.nodes import node_in_words
from surgery.graph.tensor_types import TensorType

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto

    Array = NDArray[Any]

MASK = "attention_mask"
_MOVES = {"Reshape", "Transpose", "Expand", "Unsqueeze", "Squeeze", "Identity", "Mul", "Div", "Cast"}
"""Operators between a flat value and a MatMul. Whatever they do to the numbers, the proof covers."""
_MOST_MOVES = 32
"""Of them, between two values: several times what exporters write. A graph may have a ring of them."""
_TOLERANCE = 1e-4
"""|difference| of attended values of size 1, in float32: another order is worth 1e-5, a scale wrong by 1 % 5e-3."""
_DTYPES = {"FLOAT": "float32", "FLOAT16": "float32", "INT64": "int64", "INT32": "int32"}
"""Dtype of a value in the graph -> the one that a fragment takes."""
_MOST_BYTES = 2**30
"""Of keys, each repeated for its queries, or of a prompt's scores."""


@dataclass(frozen=True, slots=True)
class OwnKV:
    """What a KV source layer appends: the flat new key and value, and the pasts that they are appended to."""

    key: str
    value: str
    past_key: str
    past_value: str


@dataclass(frozen=True, slots=True)
class UnfusedAttention:
    """One layer's attention in plain operators, from `query` and the presents to `output`, all by name."""

    softmax: str
    query: str
    present_key: str
    present_value: str
    output: str
    owned: OwnKV | None


class UnfusedSearch:
    """Finds and proves the unfused attention of one model."""

    def __init__(self, model: ModelProto, heads: int, context: int) -> None:
        self._fragments = Subgraphs(model)
        self._context = context
        self._proven: set[tuple[object, ...]] = set()
        self._types = self._fragments.types
        self._producers = producers(model.graph)
        self._readers = readers(model.graph)
        self._inputs = {value.name for value in model.graph.input}
        self._outputs = {value.name for value in model.graph.output}
        self._heads = heads

    def find(self, core: AttentionNodes, layer: Layer) -> UnfusedAttention:
        """The flat values around a core. Raises ModelError, with what was met instead."""
        assert core.scores is not None and core.mixed is not None
        width = self._heads * layer.head_size
        present_key, present_value = self._present(core.scores.input[1]), self._present(core.mixed.input[1])
        owned = None
        if layer.is_kv_source:
            kv_width = layer.kv_heads * layer.head_size
            past_key, key = self._appended(present_key, kv_width)
            past_value, value = self._appended(present_value, kv_width)
            owned = OwnKV(key, value, past_key, past_value)
        query = self._flat(core.scores.input[0], width)
        output = self._following(core.mixed.output[0], width)
        return UnfusedAttention(core.node.name, query, present_key, present_value, output, owned)

    def _present(self, name: str) -> str:
        """The cache of the interface behind an operand of a MatMul."""
        return self._behind(name, lambda value: value in self._outputs, "a present")

    def _appended(self, present: str, width: int) -> tuple[str, str]:
        """The past and the flat new rows that a Concat along the tokens makes a present of."""
        maker = self._producers.get(present)
        if maker is None or maker.op_type != "Concat" or len(maker.input) != 2 or maker.input[0] not in self._inputs:
            found = node_in_words(maker) if maker is not None else "no node"
            raise ModelError(f"{present} comes from {found}; a Concat of its past and the new rows is expected")
        return maker.input[0], self._flat(maker.input[1], width)

    def _flat(self, name: str, width: int) -> str:
        """The value [batch, tokens, width] that is moved into a MatMul's operand."""
        wanted = f"a value [batch, tokens, {width}]"
        return self._behind(name, lambda value: _is_flat(self._types.get(value), width), wanted)

    def _behind(self, name: str, is_wanted: Callable[[str], bool], wanted: str) -> str:
        for _ in range(_MOST_MOVES):
            if is_wanted(name):
                return name
            maker = self._producers.get(name)
            if maker is None or maker.op_type not in _MOVES or not maker.input:
                found = node_in_words(maker) if maker is not None else f"{name!r}"
                raise ModelError(f"{found} is met where {wanted} is expected{self._undeclared(name)}")
            name = maker.input[0]
        raise ModelError(f"{name!r} is more than {_MOST_MOVES} operators behind where {wanted} is expected")

    def _following(self, name: str, width: int) -> str:
        """The value [batch, tokens, width] that the heads are joined to."""
        for _ in range(_MOST_MOVES):
            if _is_flat(self._types.get(name), width):
                return name
            reading = self._readers.get(name, [])
            if len(reading) != 1 or reading[0].op_type not in _MOVES or not reading[0].output:
                found = ", ".join(node_in_words(node) for node in reading[:3]) or "nothing"
                wanted = f"the way to a value [batch, tokens, {width}] is expected{self._undeclared(name)}"
                raise ModelError(f"{name!r} is read by {found}; {wanted}")
            name = reading[0].output[0]
        raise ModelError(f"{name!r} is {_MOST_MOVES} operators away, and no value [batch, tokens, {width}]")

    def _undeclared(self, name: str) -> str:
        return "" if name in self._types else f"; {name} has no declared type, which value_info gives"

    def prove(self, found: UnfusedAttention, layer: Layer) -> None:
        """Raises ModelError unless the layer computes causal attention with scale 1 over its window.

        Padding must be hidden, and a KV source layer's presents must be the past and the new rows after it. Tried with
        more tokens than any constant of the layer mentions, in float32; layers of one form are tried once.
        """
        presents = (found.present_key, found.present_value)
        owned = found.owned
        caches = (owned.key, owned.value, owned.past_key, owned.past_value) if owned else presents
        asked = [found.output, *(presents if owned else ())]
        fragment = self._fragments.cut(asked, {MASK, found.query, *caches})
        symbols = self._symbols(found.query, owned.past_key if owned else "")
        named = (MASK, found.query, *caches, *asked)
        known = (fragment.form(named), layer.head_size, layer.kv_heads, layer.window, str(symbols))
        if known in self._proven:
            return
        lengths = fragment.lengths(self._context)
        if self._heads * max(layer.head_size * lengths[-1], PROMPT**2) * 4 > _MOST_BYTES:
            raise ModelError(f"its constants mention {lengths[-1] - 4:,} tokens, and so many cannot be tried")
        for probe in _probes(layer.window, lengths):
            numbers = _Numbers(probe, self._heads, layer)
            feeds = {MASK: numbers.mask, found.query: numbers.query}
            if owned:
                feeds |= {owned.key: numbers.new(numbers.key), owned.value: numbers.new(numbers.value)}
                feeds |= {owned.past_key: numbers.past(numbers.key), owned.past_value: numbers.past(numbers.value)}
            else:
                feeds |= {found.present_key: numbers.key, found.present_value: numbers.value}
            typed = {name: array.astype(self._dtype(name)) for name, array in feeds.items()}
            sizes = {name: size for names, size in zip(symbols, probe.sizes, strict=True) for name in names}
            attended, *made = fragment.run(sizes, typed)
            real = numbers.mask[:, -probe.new :].astype(bool)
            view = f"over {layer.window} tokens" if layer.window else "over all tokens"
            _hold(f"attention {view}, with {probe.what}", attended, numbers.attended(), real)
            for name, array, whole in zip(presents, made, (numbers.key, numbers.value), strict=False):
                _hold(f"{name}, with {probe.what}", array, whole, True)
        self._proven.add(known)

    def _dtype(self, name: str) -> str:
        dtype = self._types[name].dtype
        if dtype not in _DTYPES:
            raise ModelError(f"{name} is {dtype}; {', '.join(_DTYPES)} are known")
        return _DTYPES[dtype]

    def _symbols(self, query: str, past: str) -> list[set[str]]:
        """What the graph calls the batch, the new tokens, all tokens and the past ones."""
        mask, flat = self._types[MASK].shape or (None, None), self._types[query].shape or (None, None)
        before = (self._types[past].shape or (None,) * 4)[2] if past else None
        dims = ((mask[0], flat[0]), (flat[1],), (mask[1],), (before,))
        return [{dim for dim in found if isinstance(dim, str)} for found in dims]


def _is_flat(declared: TensorType | None, width: int) -> bool:
    return (
        declared is not None and declared.shape is not None and len(declared.shape) == 3 and declared.shape[2] == width
    )


@dataclass(frozen=True, slots=True)
class _Probe:
    """Numbers to try: the real tokens of each row, how many tokens are new, and how scores change with the position.

    `slope` 1 lets the newest key outweigh all older ones, -1 the oldest; 0 makes scores of random numbers, and pads
    some tokens of the past.
    """

    what: str
    lengths: tuple[int, ...]
    new: int
    slope: int = 0

    @property
    def total(self) -> int:
        return max(self.lengths)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, new tokens, all tokens, past tokens."""
        return len(self.lengths), self.new, self.total, self.total - self.new


def _probes(window: int | None, lengths: Sequence[int]) -> Iterator[_Probe]:
    edge = window or 6
    yield _Probe("a padded prompt", (6, 4), 6)
    yield _Probe("one more token", (edge + 2,), 1)
    yield _Probe("the oldest key in view outweighing others", (edge + 3,), 3, -1)
    yield _Probe("the newest key in view outweighing others", (edge + 3,), 3, 1)
    for total in lengths:
        if total <= PROMPT:
            yield _Probe(f"a prompt of {total} tokens", (total,), total)
        yield _Probe(f"{total} tokens, most of them past", (total,), min(4, total))


class _Numbers:
    """What a probe feeds, and what attention makes of it by the definition; all in float32 but the mask."""

    def __init__(self, probe: _Probe, heads: int, layer: Layer) -> None:
        import numpy as np

        random = np.random.default_rng(probe.total)
        batch, self._new, total, self._before = probe.sizes
        self._layer, self._heads = layer, heads
        self.mask: Array = (np.arange(total) < np.array(probe.lengths)[:, None]).astype(np.int64)
        self.query: Array = random.standard_normal((batch, self._new, heads * layer.head_size), np.float32)
        self.query /= np.float32(layer.head_size**0.5)
        self.key: Array = random.standard_normal((batch, layer.kv_heads, total, layer.head_size), np.float32)
        self.value: Array = random.standard_normal(self.key.shape, np.float32)
        if probe.slope:
            self.query[:] = np.tile(np.eye(1, layer.head_size), heads)
            self.key[..., 0] = probe.slope * np.arange(total)
        else:
            self.mask[:, : self._before] &= random.random((batch, self._before)) < 0.8

    def new(self, cache: Array) -> Array:
        """The new rows of a cache as a layer gives them, [batch, tokens, KV heads * head size]."""
        rows: Array = cache[:, :, self._before :].transpose(0, 2, 1, 3)
        return rows.reshape(*rows.shape[:2], -1)

    def past(self, cache: Array) -> Array:
        return cache[:, :, : self._before]

    def attended(self) -> Array:
        """[batch, tokens, heads * head size]"""
        import numpy as np

        batch, new, width = self.query.shape
        groups = self._heads // self._layer.kv_heads
        query = self.query.reshape(batch, new, self._layer.kv_heads, groups, -1).transpose(0, 2, 3, 1, 4)
        key, value = self.key[:, :, None], self.value[:, :, None]
        distance = np.arange(self._before, self._before + new)[:, None] - np.arange(key.shape[3])
        visible = (distance >= 0) & (distance < (self._layer.window or key.shape[3]))
        visible = visible & (self.mask[:, None, None, None] == 1)
        scores = np.where(visible, query @ key.swapaxes(-1, -2), -np.inf)
        scores = scores - np.where(visible.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0)
        shares = np.exp(scores)
        mixed = (shares / np.maximum(shares.sum(-1, keepdims=True), 1e-30)) @ value
        attended: Array = mixed.transpose(0, 3, 1, 2, 4).reshape(batch, new, width)
        return attended


def _hold(what: str, found: Array, expected: Array, real: Array | bool) -> None:
    """Raises ModelError where a number is further from the expected one than the tolerance, or of another shape."""
    import numpy as np

    if found.shape != expected.shape:
        raise ModelError(f"it is not {what}: {list(found.shape)} comes out where {list(expected.shape)} is expected")
    difference = np.abs(found.astype(np.float64) - expected)[real]
    if not difference.max(initial=0) <= _TOLERANCE:
        raise ModelError(f"it is not {what}: up to {difference.max():.3g} lie between")
