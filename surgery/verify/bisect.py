"""Where two graphs part: the first value, in the order of computation, that is not the source's.

Both run with every value of theirs as an output, without ONNX Runtime's optimizations, which would melt nodes of one
graph together and not of the other. Passes keep the names of values, so a value is compared with its namesake. The
node that makes the first one that differs has inputs that agree: it, or a weight of its own, is at fault.
Unlike a comparison this holds both models at once, and all values of one step: it is for one short case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.attention.kv_wiring import Slot, slot_of_name
from surgery.errors import ModelError
from surgery.graph.external_data import is_external, reference
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.runtime.decoding import keep_of, next_feed, prompt_feeds
from surgery.runtime.sessions import Array, Feed, KVCaches, OpenGraph, OrtTensor, Settings, host
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import GraphPair
from surgery.source.ids_in_graph import values_of_ids
from surgery.verify.agreement import own_part
from surgery.verify.made_up_caches import made_up_caches, mask_of
from surgery.verify.prompts import Case
from surgery.verify.residual_stream import residual_stream

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

_CHUNK = 4 * 2**20
_PREFIX = "embed_tokens/"
"""What merge-embeddings puts before a name of the embedding graph that the decoder uses too."""

Values = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first value that differs, and the node that makes it.

    `layer` is None before the first layer and after the last. `unmatched` are inputs that the source does not have:
    where there are any, the fault may be in what makes them. `max_abs` is the largest difference; inf where the
    shapes differ or one side is not finite. `cause` is what a look at the two nodes shows.
    """

    case: str
    step: int
    node: str
    operator: str
    layer: int | None
    value: str
    max_abs: float
    unmatched: tuple[str, ...]
    cause: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return asdict(self)

    def __str__(self) -> str:
        where = "outside of the layers" if self.layer is None else f"in layer {self.layer}"
        unmatched = f" (the source has no {', '.join(self.unmatched)})" if self.unmatched else ""
        return (
            f"the graphs part {where}, at {self.operator} node {self.node!r}: its inputs are equal{unmatched}, "
            f"its output differs by "
            f"{self.max_abs:.3g} (case {self.case}, step {self.step}); {self.cause}"
        )


def find_divergence(
    pair: GraphPair, path: Path, case: Case, settings: Settings, *, steps: int = 0, tolerance: float = 0.0
) -> Divergence | None:
    """Run a case through both and stop at the first difference; None where every value agrees in every step.

    `tolerance` is relative to the largest |value| of the source, or 1 where that is smaller. Raises ModelError where
    a graph fails.
    """
    plain = replace(settings, optimized=False)
    source, merged = _Source(pair, plain), _Exposed(path, plain)
    theirs, ours = source.start(len(case.rows)), merged.graph.empty_cache(len(case.rows))
    steps, mask = case.steps(steps), None
    if case.past:
        own = {slot: host(value).shape for slot, value in theirs.items()}
        theirs, ours = (made_up_caches(empty, case, steps, "front", own) for empty in (theirs, ours))
        mask = mask_of(case.past)[:, ::-1]
    for number, feed in enumerate(_feeds(case, steps, source, mask)):
        expected, theirs = source.step(feed, theirs)
        outputs, ours = merged.graph.run({"input_ids": feed.ids, **merged.graph.steering(feed, keep_of(feed))}, ours)
        found = merged.values(outputs, ours)
        for place, name in merged.computed:
            known = source.namesake(expected, name, merged.slots.get(name))
            if known is None:
                continue
            apart = _apart(known, found[name], feed)
            if apart > tolerance * max(1.0, _largest(known)):
                return _Describe(source, merged, expected).parting(case.name, number, place, name, apart)
    return None


class _Exposed:
    """A graph all of whose values are outputs."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.model = Model.open(path)
        nodes = list(self.model.graph.node)
        self.computed = [(place, name) for place, node in enumerate(nodes) for name in node.output if name]
        outputs = {value.name for value in self.model.graph.output}
        self.graph = OpenGraph(path, settings, [name for _, name in self.computed if name not in outputs])
        self.slots = self.graph.presents

    def values(self, outputs: Mapping[str, OrtTensor], presents: KVCaches) -> dict[str, Array]:
        """Every value of one step by its name."""
        named = {**outputs, **{name: presents[slot] for name, slot in self.slots.items()}}
        return {name: host(value) for name, value in named.items()}


class _Source:
    """The pair, both graphs exposed; values of the decoder go before the embedding graph's."""

    def __init__(self, pair: GraphPair, settings: Settings) -> None:
        self.embed = _Exposed(pair.embed, settings)
        self.decoder = _Exposed(pair.decoder, settings)
        self._pair = TwoGraphModel(self.embed.graph, self.decoder.graph, kept=pair.kept)
        self._kept = np.array(pair.kept.ids) if pair.kept is not None else None
        self._ids = values_of_ids(self.embed.model.graph) if pair.kept is not None else set()
        self._by_slot = {slot: name for name, slot in self.decoder.slots.items()}
        self.last: Array | None = None

    def start(self, batch: int) -> KVCaches:
        return self._pair.start(batch)

    def step(self, feed: Feed, cache: KVCaches) -> tuple[dict[str, Array], KVCaches]:
        """All values; those of the embedding graph also under the prefix that a merge gives them. Where only some tokens
        stay, ids are the new ones, and logits those of these tokens."""
        outputs = self._pair.embed(feed.ids)
        decoder_outputs, presents = self._pair.outputs(outputs, feed, cache, keep_of(feed))
        embedded, decoded = self.embed.values(outputs, {}), self.decoder.values(decoder_outputs, presents)
        prefixed = {f"{_PREFIX}{name.lstrip('/')}": array for name, array in embedded.items()}
        values = {**embedded, **prefixed, **decoded}
        self.last = self.decoder.graph.logits(decoder_outputs)
        if self._kept is not None:
            size, kept = self.last.shape[-1], self._kept
            self.last = self.last[..., kept]
            values = {
                name: np.searchsorted(kept, array) if name in self._ids
                else array[..., kept] if array.shape[-1:] == (size,) else array
                for name, array in values.items()
            }  # fmt: skip
        return values, presents

    def namesake(self, values: Values, name: str, slot: Slot | None) -> Array | None:
        """The source's value of a name; a cache is known by its slot, whatever it is called."""
        if slot is not None:
            name = self._by_slot.get(slot, "")
        return values.get(name)


def _feeds(case: Case, steps: int, source: _Source, mask: Array | None) -> Iterator[Feed]:
    """The pieces of the prompt, then the source's greedy tokens. Padding is where both graphs take it alike, in
    front."""
    feed = None
    for feed in prompt_feeds(case.rows, case.pad, case.chunk, mask, "left"):
        yield feed
    assert feed is not None  # a case has tokens
    for _ in range(steps):
        assert source.last is not None
        last = source.last[:, -1] if source.last.shape[1] == 1 else _last_tokens(source.last, feed)[:, 0]
        tokens = np.argmax(last.astype(np.float32), axis=1)
        feed = next_feed(feed.mask, tokens)
        yield feed


def _last_tokens(values: Array, feed: Feed) -> Array:
    """Of values [B, S, ...] those of each row's last real token, [B, 1, ...]."""
    length = feed.ids.shape[1]
    last = (feed.mask[:, -length:] * np.arange(length)).max(axis=1)
    kept: Array = values[np.arange(len(last)), last][:, None]
    return kept


def _apart(source: Array, merged: Array, feed: Feed) -> float:
    """The largest difference. A merged graph may have kept the last token alone, or padded a cache."""
    if source.shape != merged.shape:
        length = feed.ids.shape[1]
        if source.ndim == merged.ndim >= 2 and source.shape[1] == length and merged.shape[1] == 1:
            source = _last_tokens(source, feed)
        cut = own_part(source.shape, merged.shape)
        if cut is None:
            return float("inf")
        merged = merged[cut]
    if np.array_equal(source, merged):
        return 0.0
    theirs, ours = source.astype(np.float64), merged.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isnan(theirs) & np.isnan(ours) | (theirs == ours), 0.0, np.abs(theirs - ours))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))


def _largest(values: Array) -> float:
    finite = np.abs(values[np.isfinite(values)].astype(np.float64)) if values.dtype.kind == "f" else np.zeros(0)
    return float(finite.max(initial=0.0))


class _Describe:
    """What a look at the node that parts the graphs shows."""

    def __init__(self, source: _Source, merged: _Exposed, values: Values) -> None:
        self._source, self._merged, self._values = source, merged, values
        self._weights = {tensor.name: tensor for tensor in merged.model.graph.initializer}

    def parting(self, case: str, step: int, place: int, value: str, apart: float) -> Divergence:
        node = self._merged.model.graph.node[place]
        inputs = [name for name in node.input if name and name not in self._weights]
        given = {each.name for each in self._merged.model.graph.input}
        slots = self._merged.slots
        unmatched = [
            name
            for name in dict.fromkeys(inputs)
            if name not in given and self._source.namesake(self._values, name, slots.get(name)) is None
        ]
        return Divergence(
            case, step, node.name, node.op_type, self._layer(place), value, apart, tuple(unmatched),
            self._cause(node, value),
        )  # fmt: skip

    def _layer(self, place: int) -> int | None:
        try:
            return residual_stream(self._merged.model.graph).layer_of(place)
        except ModelError:
            return None

    def _cause(self, node: NodeProto, value: str) -> str:
        for model in (self._source.decoder.model, self._source.embed.model):
            for name in _spellings(value):
                if (other := producers(model.graph).get(name)) is not None:
                    return self._difference(node, other, model)
        return "no node of the source makes this value"

    def _difference(self, node: NodeProto, other: NodeProto, source: Model) -> str:
        if node.op_type != other.op_type:
            return f"it is {node.op_type}, in the source {other.op_type}"
        ours, theirs = _attributes(node), _attributes(other)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                return f"its attribute {name} is {ours.get(name)}, in the source {theirs.get(name)}"
        if len(node.input) != len(other.input):
            return f"it has {len(node.input)} inputs, in the source {len(other.input)}"
        weights = {tensor.name: tensor for tensor in source.graph.initializer}
        for index, (mine, original) in enumerate(zip(node.input, other.input, strict=True)):
            if mine in self._weights and original in weights:
                if self._digest(mine) != _digest(source, weights[original]):
                    return f"its weight {mine} does not hold the source's values"
            elif original not in _spellings(mine) and not self._same_cache(mine, original):
                return f"its input {index} is {mine}, in the source {original}"
        return "operator, attributes and weights are the source's"

    def _same_cache(self, mine: str, original: str) -> bool:
        """Whether a pass gave a cache another name."""
        found = slot_of_name(mine)
        return found is not None and found == slot_of_name(original)

    def _digest(self, name: str) -> str:
        return _digest(self._merged.model, self._weights[name])


def _spellings(name: str) -> tuple[str, ...]:
    """The names that a value of the merged graph can have in the source."""
    plain = name.removeprefix(_PREFIX)
    return (name, plain, f"/{plain}") if plain != name else (name,)


def _attributes(node: NodeProto) -> dict[str, str]:
    from onnx.helper import get_attribute_value

    return {attribute.name: str(get_attribute_value(attribute)) for attribute in node.attribute}


def _digest(model: Model, tensor: TensorProto) -> str:
    """SHA-256 of a tensor's values, wherever they are stored."""
    from onnx.numpy_helper import to_array

    if not is_external(tensor):
        return hashlib.sha256(to_array(tensor).tobytes()).hexdigest()
    found = reference(tensor, model.weight_files)
    digest, left = hashlib.sha256(), found.length
    with found.file.open("rb") as file:
        file.seek(found.offset)
        while left and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
