"""Two graphs as one model: embed_tokens makes embeddings of tokens, decoder_model_merged makes logits of those.

    input_ids -> embed_tokens -> inputs_embeds [B, S, hidden]
                                 per_layer_inputs [B, S, layers, size], where the model has them
                                   |  <- a change between the graphs: features of an image, say
                                   v
    caches ------------> decoder_model_merged -> logits, caches

The outputs of the first graph feed the inputs of the second by name, so that any further one goes along.

    from surgery.runtime.two_graphs import open_two_graphs

    folder = open_two_graphs(Path("out"))
    for piece in folder.answer("Hello"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from surgery.errors import RequestError
from surgery.folder.genai_config import generation_settings, token_ids
from surgery.graph.model import Model
from surgery.runtime.decoding import generate_tokens
from surgery.runtime.sampling import Sampler, Sampling, read_sampling
from surgery.runtime.sessions import Array, Feed, KVCaches, OpenGraph, OrtTensor, Settings
from surgery.runtime.tokenizer import Tokenizer
from surgery.source.export import GraphPair, open_export
from surgery.source.kept_tokens import KeptTokens

Embeddings: TypeAlias = "Mapping[str, Array | OrtTensor]"
"""What goes from the first graph to the second, by name: numpy arrays, or values on the device."""
Change: TypeAlias = "Callable[[Feed, Embeddings], Embeddings]"
"""Puts other embeddings in place; `feed` tells which tokens they are of."""


class TwoGraphModel:
    """A Runner of two sessions. `step` is `embed`, the change between the graphs if there is one, and `decode`.

    `also` is what the first graph takes beside token ids. `kept` are tokens of the graphs that stay elsewhere: ids come
    in as they are there, and logits go out as there; `inside` counts how often the likeliest token of all was one of
    them.
    """

    def __init__(
        self,
        embed: OpenGraph,
        decoder: OpenGraph,
        change: Change | None = None,
        also: Mapping[str, Array] | None = None,
        kept: KeptTokens | None = None,
    ) -> None:
        self._embed = embed
        self._decoder = decoder
        self._change = change
        self._also = also or {}
        self._kept = kept
        self._own_ids = np.array(kept.ids) if kept is not None else None
        self.inside: Counter[bool] = Counter()

    @classmethod
    def open(cls, pair: GraphPair, settings: Settings, decoder: Model | None = None) -> TwoGraphModel:
        """`decoder` takes the place of the pair's. Raises ModelError where ONNX Runtime cannot load a graph,
        RuntimeMissing where it is not there.
        """
        return cls(OpenGraph(pair.embed, settings), OpenGraph(decoder or pair.decoder, settings), kept=pair.kept)

    def changing(self, change: Change) -> TwoGraphModel:
        """The same two sessions with a change between them."""
        return TwoGraphModel(self._embed, self._decoder, change, self._also, self._kept)

    def start(self, batch: int) -> KVCaches:
        """Empty caches for a batch of so many rows."""
        return self._decoder.empty_cache(batch)

    def step(self, feed: Feed, cache: KVCaches, keep: int) -> tuple[Array, KVCaches]:
        """One run of both graphs: logits of the last `keep` positions, [B, keep, V] (0: of all), and the caches after it."""
        embedded = self.embed(feed.ids)
        return self.decode(embedded if self._change is None else self._change(feed, embedded), feed, cache, keep)

    def embed(self, ids: Array) -> dict[str, OrtTensor]:
        """The embeddings of token ids, int64 [B, S]."""
        return self._embed.run({"input_ids": self._ids(ids), **self._also}, {})[0]

    def decode(self, embedded: Embeddings, feed: Feed, cache: KVCaches, keep: int) -> tuple[Array, KVCaches]:
        """Logits and caches, as Runner.step gives them; of `feed`, the ids are read by a decoder that takes them
        too."""
        outputs, presents = self.outputs(embedded, feed, cache, keep)
        logits = self._decoder.logits(outputs)
        if self._own_ids is None:
            return logits, presents
        stay: Array = logits[..., self._own_ids]
        self.inside.update((logits[:, -1].max(axis=-1) == stay[:, -1].max(axis=-1)).tolist())
        return stay, presents

    def _ids(self, ids: Array) -> Array:
        """The graphs' own ids."""
        return ids if self._own_ids is None else self._own_ids[ids]

    def outputs(
        self, embedded: Embeddings, feed: Feed, cache: KVCaches, keep: int
    ) -> tuple[dict[str, OrtTensor], KVCaches]:
        """Everything that the decoder gives beside its caches; more than logits where its session exposes more."""
        values = {"input_ids": self._ids(feed.ids), **embedded, **self._decoder.steering(feed, keep)}
        return self._decoder.run(values, cache)


@dataclass(frozen=True)
class TwoGraphFolder:
    """A two-graph folder that is ready to answer.

    `stop`, `pad` and `sampling` are generation_config.json's; `context_length` is in tokens.
    """

    pair: GraphPair
    model: TwoGraphModel
    tokenizer: Tokenizer
    sampling: Sampling
    stop: tuple[int, ...]
    pad: int
    context_length: int

    def answer(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        new_tokens: int = 128,
        sampling: Sampling | None = None,
        template: bool = True,
        chunk: int | None = None,
    ) -> Iterator[str]:
        """Yield the pieces of the answer to a text, or to a conversation of messages with `role` and `content`.

        `sampling` takes the place of the folder's; `template` is whether a text goes through the chat template.
        """
        ids = self.encode(prompt, template=template)
        yield from self.continued(ids, new_tokens=new_tokens, sampling=sampling, chunk=chunk)

    def encode(self, prompt: str | Sequence[Mapping[str, Any]], *, template: bool = True) -> list[int]:
        """The ids of a prompt, as `answer` takes it."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(self._asked(prompt) if template else prompt)
        return self.tokenizer.encode(self.tokenizer.render(prompt))

    def continued(
        self,
        ids: Sequence[int],
        *,
        new_tokens: int = 128,
        sampling: Sampling | None = None,
        chunk: int | None = None,
    ) -> Iterator[str]:
        """Yield what follows a prompt, in pieces of text."""
        piece_of = self.tokenizer.stream()
        for (token,) in self.generate([ids], new_tokens=new_tokens, sampling=sampling, chunk=chunk):
            if token is not None and (piece := piece_of(token)):
                yield piece

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        *,
        new_tokens: int = 128,
        sampling: Sampling | None = None,
        chunk: int | None = None,
    ) -> Iterator[tuple[int | None, ...]]:
        """Yield a token for each row of token ids, None for a row that has ended; the prompt in chunks of `chunk`.

        Raises RequestError for rows that cannot be fed, ModelError where the graph fails.
        """
        room = self.context_length - max((len(row) for row in rows), default=0)
        if room < 1:
            raise RequestError(
                f"the prompt has {self.context_length - room} tokens, and the context {self.context_length}"
            )
        chooser = Sampler(sampling or self.sampling, rows)
        most = min(new_tokens, room)
        return generate_tokens(
            self.model, rows, new_tokens=most, choose=chooser, stop=self.stop, pad=self.pad, chunk=chunk
        )

    def _asked(self, prompt: str) -> str:
        return self.tokenizer.render([{"role": "user", "content": prompt}])


def open_two_graphs(folder: Path, precision: str | None = None, settings: Settings | None = None) -> TwoGraphFolder:
    """Open a two-graph folder: an export, or what `strip` wrote. Without `precision`, the best for the provider.

    Raises SurgeryError for a folder that is not one, RuntimeMissing without onnxruntime, tokenizers or jinja2.
    """
    settings = settings or Settings()
    export = open_export(folder)
    pair = export.pair(precision) if precision else export.best(settings.provider)[0]
    ids = token_ids(export)
    tokenizer = Tokenizer(export)  # before gigabytes are loaded
    return TwoGraphFolder(
        pair=pair,
        model=TwoGraphModel.open(pair, settings),
        tokenizer=tokenizer,
        sampling=read_sampling(generation_settings(export)),
        stop=ids.get("eos_token_id", ()),
        pad=next(iter(ids.get("pad_token_id", ())), 0),
        context_length=export.architecture.context_length,
    )
