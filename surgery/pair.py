"""Two graphs as one model: embed_tokens makes embeddings of tokens, decoder_model_merged makes logits of those.

    input_ids -> embed_tokens -> inputs_embeds [B, S, hidden]
                                 per_layer_inputs [B, S, layers, size], where the model has them
                                   |  <- a change between the graphs: features of an image, say
                                   v
    caches ------------> decoder_model_merged -> logits, caches

The outputs of the first graph feed the inputs of the second by name, so that any further one goes along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from surgery.export import Pair
from surgery.runtime import Array, Cache, Feed, OpenGraph, Settings, Value

Embeddings: TypeAlias = "Mapping[str, Array | Value]"
"""What goes from the first graph to the second, by name: numpy arrays, or values on the device."""
Change: TypeAlias = "Callable[[Feed, Embeddings], Embeddings]"
"""Puts other embeddings in place; `feed` tells which tokens they are of."""


class PairModel:
    """A Runner of two sessions. `step` is `embed`, the change between the graphs if there is one, and `decode`."""

    def __init__(self, embed: OpenGraph, decoder: OpenGraph, change: Change | None = None) -> None:
        self._embed = embed
        self._decoder = decoder
        self._change = change

    @classmethod
    def open(cls, pair: Pair, settings: Settings) -> PairModel:
        """Raises ModelError where ONNX Runtime cannot load a graph, RuntimeMissing where it is not there."""
        return cls(OpenGraph(pair.embed, settings), OpenGraph(pair.decoder, settings))

    def changing(self, change: Change) -> PairModel:
        """The same two sessions with a change between them."""
        return PairModel(self._embed, self._decoder, change)

    def start(self, batch: int) -> Cache:
        return self._decoder.empty_cache(batch)

    def step(self, feed: Feed, cache: Cache, keep: int) -> tuple[Array, Cache]:
        embedded = self.embed(feed.ids)
        return self.decode(embedded if self._change is None else self._change(feed, embedded), feed, cache, keep)

    def embed(self, ids: Array) -> dict[str, Value]:
        """The embeddings of token ids, int64 [B, S]."""
        return self._embed.run({"input_ids": ids}, {})[0]

    def decode(self, embedded: Embeddings, feed: Feed, cache: Cache, keep: int) -> tuple[Array, Cache]:
        """Logits and caches, as Runner.step gives them; of `feed`, the mask and the positions are read."""
        outputs, presents = self.outputs(embedded, feed, cache, keep)
        return self._decoder.logits(outputs), presents

    def outputs(self, embedded: Embeddings, feed: Feed, cache: Cache, keep: int) -> tuple[dict[str, Value], Cache]:
        """Everything that the decoder gives beside its caches; more than logits where its session exposes more."""
        return self._decoder.run({**embedded, **self._decoder.steering(feed, keep)}, cache)
