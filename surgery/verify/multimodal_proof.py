"""Images and sound, proven in the real runtime: GenAI's processor, encoders, embeddings and decoder, on real files.

The reference is the loop that the export was made for: the source's own encoders and its two graphs, unmodified, with
the features put in the place of the placeholders by numpy. Both sides take what GenAI's processor made of the files,
so that what differs is the graphs. A prompt of text proves little here: an encoder of a wrong rank passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from surgery.choices import Modality
from surgery.errors import ModelError
from surgery.graph.model import Model
from surgery.runtime.genai import GenAI, has_chat_template, render
from surgery.runtime.sessions import Array, Feed, KVCaches, OpenGraph, Settings, host
from surgery.runtime.two_graphs import Embeddings, TwoGraphModel
from surgery.source.encoders import encoder_inputs, encoder_output
from surgery.source.export import ENCODERS, GraphPair
from surgery.verify.genai_proof import first_fault
from surgery.verify.media_samples import sample_picture, sample_sound
from surgery.verify.prompts import Case, Coverage, Skipped
from surgery.verify.recording import Answer, record
from surgery.verify.report import Gate, Section

SECTION: Section = "media"
FEATURES: dict[Modality, str] = {"image": "image_features", "audio": "audio_features"}
TENSORS: dict[Modality, tuple[str, str]] = {
    "image": ("pixel_values", "pixel_position_ids"),
    "audio": ("audio_embeds", "audio_attention_mask"),
}
"""What GenAI's processor calls the two inputs of an encoder."""
SEVERAL_IMAGES = (0, 18)
"""The first onnxruntime-genai that takes more than one image: 0.17.1 allocates the features of the first alone."""
_PIECES = 9
"""Patches of padding to try an encoder with: one token's."""
_ROUNDING = 1e-2
"""Of the largest feature: what padding may move a feature by, in float16; a token too many is far outside."""


@dataclass(frozen=True, slots=True)
class MediaPrompt:
    """A prompt with its files: images as (width, height), sounds in seconds. `chunk` is search.chunk_size."""

    name: str
    images: tuple[tuple[int, int], ...] = ()
    sounds: tuple[float, ...] = ()
    chunk: int | None = None

    @property
    def needs(self) -> set[Modality]:
        """What a folder has to take for it."""
        given: dict[Modality, bool] = {"image": bool(self.images), "audio": bool(self.sounds)}
        return {modality for modality, there in given.items() if there}


MEDIA_PROMPTS = (
    MediaPrompt("image", images=((96, 64),)),
    MediaPrompt("audio", sounds=(1.0,)),
    MediaPrompt("image and audio", images=((64, 96),), sounds=(0.7,)),
    MediaPrompt("two images", images=((96, 64), (96, 64))),
    MediaPrompt("two images of different sizes", images=((200, 48), (64, 64))),
    MediaPrompt("image, in chunks", images=((96, 64),), chunk=16),
)
CLOSING_TOKENS = frozenset({"image", "image and audio", "two images of different sizes"})
"""What a repack ends with."""


class SourceLoop:
    """The source's pair, `decoder` in place of its own, and its encoders. `answer` runs one prompt, as GenAI's
    processor prepared it."""

    def __init__(
        self, source: GraphPair, tokens: Mapping[Modality, int], settings: Settings, decoder: Model | None = None
    ) -> None:
        self._tokens = tokens
        self._pair = TwoGraphModel.open(source, settings, decoder)
        self._encoders = {modality: Encoder(source.encoder(modality), modality, settings) for modality in tokens}

    def answer(self, name: str, prepared: Mapping[str, Array], steps: int) -> Answer:
        """The prompt's logits and `steps` greedy tokens after it."""
        ids = prepared["input_ids"].astype(np.int64)
        features = {
            modality: encoder.features(prepared[TENSORS[modality][0]], prepared[TENSORS[modality][1]])
            for modality, encoder in self._encoders.items()
            if TENSORS[modality][0] in prepared
        }
        case = Case(name, "", (tuple(int(token) for token in ids[0]),))
        loop = _Scattering(self._pair, self._tokens, features, ids.shape[1])
        return record(loop, [case], steps=steps - 1).answers[0]


class Encoder:
    """An encoder in a session of its own, whatever it calls its inputs."""

    def __init__(self, path: Path, modality: Modality, settings: Settings) -> None:
        graph = Model.open(path).graph
        self._inputs, self._output = encoder_inputs(graph), encoder_output(graph, modality)
        self._sizes = next(value.type.tensor_type.shape.dim for value in graph.input if value.name == self._inputs[0])
        self._fill = -1 if modality == "image" else 0
        self._session = OpenGraph(path, settings)

    def features(self, values: Array, places: Array) -> Array:
        """[tokens, hidden]; padded to the number of patches where the graph takes no other."""
        wanted = self._sizes[1].dim_value
        if wanted > values.shape[1]:
            values, places = padded(values, places, wanted - values.shape[1], self._fill)
        found = self._session.run(dict(zip(self._inputs, (values, places), strict=True)), {})[0][self._output]
        array = host(found)
        return array.reshape(-1, array.shape[-1]).astype(np.float32)


def padded(values: Array, places: Array, count: int, fill: int) -> tuple[Array, Array]:
    """`count` patches or frames more: zeros, at places that are none."""
    widths = [(0, 0), (0, count)]
    return (
        np.pad(values, [*widths, (0, 0)]),
        np.pad(places, [*widths, *[(0, 0)] * (places.ndim - 2)], constant_values=fill),
    )


class _Scattering:
    """A Runner: the source's two graphs, with features in place of the placeholders of the prompt."""

    def __init__(
        self, pair: TwoGraphModel, tokens: Mapping[Modality, int], features: Mapping[Modality, Array], prompt: int
    ) -> None:
        self._pair = pair
        self._tokens = tokens
        self._features = features
        self._prompt = prompt

    def start(self, batch: int) -> KVCaches:
        return self._pair.start(batch)

    def step(self, feed: Feed, cache: KVCaches, keep: int) -> tuple[Array, KVCaches]:
        return self._pair.decode(self._embed(feed), feed, cache, keep)

    def _embed(self, feed: Feed) -> Embeddings:
        """Placeholders look the per-layer table up in row 0, whether or not the source masks them, as transformers
        do."""
        ids = feed.ids
        media = np.isin(ids, list(self._tokens.values()))
        embedded: dict[str, Any] = {**self._pair.embed(np.where(media, 0, ids))}
        rows = host(self._pair.embed(ids)["inputs_embeds"]).copy()
        for modality, features in self._features.items() if ids.shape[1] == self._prompt else ():
            where = ids == self._tokens[modality]
            if where.sum() != len(features):
                raise ModelError(f"{where.sum()} {modality} tokens in the prompt, {len(features)} features")
            rows[where] = features
        return {**embedded, "inputs_embeds": rows}


@dataclass
class MultimodalProof:
    """The proof of one folder: what it takes, and the runtime that it is tried in."""

    folder: Path
    tokens: Mapping[Modality, int]
    settings: Settings
    length: int
    context: int
    eos: tuple[int, ...]
    skipped: list[Skipped] = field(default_factory=list)

    def prove(
        self,
        genai: GenAI,
        source: GraphPair | None,
        scope: Coverage,
        tolerance: float,
        told: Callable[[str], None],
        decoder: Model | None = None,
    ) -> Iterator[Gate]:
        """One gate for each prompt, one for padding and one for wrong counts. `decoder` takes the place of the
        source's."""
        if "image" in self.tokens:
            yield self._padding()
        try:
            loop = SourceLoop(source, self.tokens, self.settings, decoder) if source is not None else None
        except ModelError as error:
            yield Gate(SECTION, "source's encoders run", False, detail=str(error))
            return
        with TemporaryDirectory() as place:
            files = Files(Path(place))
            for prompt in self._prompts(scope, genai.version):
                told(prompt.name)
                gate = self._prompt(genai, loop, prompt, files, tolerance)
                if gate is not None:
                    yield gate
            if "image" in self.tokens:
                told("wrong counts")
                yield self._wrong_count(genai, files)

    def _prompts(self, scope: Coverage, version: str) -> Iterator[MediaPrompt]:
        several = tuple(int(part) for part in version.split(".")[:2]) >= SEVERAL_IMAGES
        for prompt in MEDIA_PROMPTS:
            if not prompt.needs <= self.tokens.keys() or (scope != "full" and prompt.name not in CLOSING_TOKENS):
                continue
            if len(prompt.images) > 1 and not several:
                self.skipped.append(Skipped(prompt.name, f"onnxruntime-genai {version} takes one image; 0.18 several"))
                continue
            yield prompt

    def _prompt(
        self, genai: GenAI, loop: SourceLoop | None, prompt: MediaPrompt, files: Files, tolerance: float
    ) -> Gate | None:
        options: dict[str, Any] = {} if prompt.chunk is None else {"chunk_size": prompt.chunk}
        try:
            prepared = genai.prepare(self._text(genai, prompt), *files.of(prompt))
            tokens = prepared.arrays["input_ids"].shape[1]
            if tokens + self.length > self.context:
                self.skipped.append(Skipped(prompt.name, f"{tokens} tokens do not fit the context of {self.context}"))
                return None
            logits, found = genai.continued(prepared, self.length, **options)
            if loop is None:
                return Gate(SECTION, prompt.name, True, detail=f"{len(found)} tokens")
            return self._compared(prompt.name, loop.answer(prompt.name, prepared.arrays, self.length), logits, found,
                                  tolerance)  # fmt: skip
        except ModelError as error:
            return Gate(SECTION, prompt.name, False, detail=str(error))

    def _compared(self, name: str, answer: Answer, logits: Array, found: list[int], tolerance: float) -> Gate:
        expected = answer.tokens()[0]
        wanted = answer.steps[0].logits.astype(np.float32)
        difference = float(np.abs(logits.reshape(wanted.shape) - wanted).max())
        count, fault = first_fault(answer, 0, expected, found, self.eos, tolerance)
        detail = fault or f"{count} tokens after {answer.case.longest}"
        return Gate(
            SECTION, name, difference <= tolerance and not fault, tolerance, difference, detail,
            "max |difference| of the prompt's logits", "logits",
        )  # fmt: skip

    def _text(self, genai: GenAI, prompt: MediaPrompt) -> str:
        message = prompt_text(prompt)
        return render(genai.tokenizer(), message) if has_chat_template(self.folder) else f"<bos>{message}"

    def _padding(self) -> Gate:
        """Several images are padded to the largest one; an encoder that gives tokens for padding moves all that
        follow."""
        name = "padding of an image leaves no tokens"
        try:
            encoder = Encoder(self.folder / f"{ENCODERS['image']}.onnx", "image", self.settings)
            values, places = _patches(6, 3)
            alone = encoder.features(values, places)
            beside = encoder.features(*padded(values, places, _PIECES, -1))
        except ModelError as error:
            return Gate(SECTION, name, False, detail=str(error))
        if alone.shape != beside.shape:
            return Gate(SECTION, name, False, len(alone), len(beside), f"{len(beside)} tokens in place of {len(alone)}")
        difference, limit = float(np.abs(alone - beside).max()), _ROUNDING * float(np.abs(alone).max())
        return Gate(SECTION, name, difference <= limit, limit, difference, "", "max |difference| of a feature")

    def _wrong_count(self, genai: GenAI, files: Files) -> Gate:
        """Two placeholders and one image: an error, and no token."""
        name = "a wrong number of images is an error"
        one, two = MediaPrompt("", images=((96, 64),)), MediaPrompt("", images=((96, 64),) * 2)
        try:
            genai.continued(genai.prepare(self._text(genai, two), *files.of(one)), 1)
        except ModelError as error:
            return Gate(SECTION, name, True, detail=str(error)[:160])
        return Gate(SECTION, name, False, detail="two placeholders and one image gave a token")


def prompt_text(prompt: MediaPrompt) -> str:
    """A message with a placeholder for each file in front."""
    return "<|image|>" * len(prompt.images) + "<|audio|>" * len(prompt.sounds) + "hello, what is this?"


class Files:
    """The samples as files: every version of the runtime opens these."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def of(self, prompt: MediaPrompt) -> tuple[list[Path], list[Path]]:
        """The files of a prompt: images, sounds."""
        images = [
            self._written(f"{number}-{width}x{height}.png", sample_picture(width, height, 40 * number))
            for number, (width, height) in enumerate(prompt.images)
        ]
        return images, [self._written(f"{seconds}.wav", sample_sound(seconds)) for seconds in prompt.sounds]

    def _written(self, name: str, data: bytes) -> Path:
        path = self._place / name
        path.write_bytes(data)
        return path


def _patches(columns: int, rows: int) -> tuple[Array, Array]:
    """Patches of noise at the places of an image of `columns` x `rows` patches."""
    across, down = np.meshgrid(np.arange(columns), np.arange(rows))
    places = np.stack([across, down], axis=-1).reshape(1, -1, 2)
    values = np.random.default_rng(0).random((1, columns * rows, 768), dtype=np.float32)
    return values, places.astype(np.int64)
