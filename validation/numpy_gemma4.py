"""python -m validation.numpy_gemma4: measure the activations of the tiny QAT fixtures, and write their scales.

A second Gemma 4, in numpy and float64, that shares no code with the graphs: with a checkpoint's weights it gives the
logits of transformers, so that with rounded weights and rounded activations it is a reference for them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fixtures.architecture import Architecture
from fixtures.embed import embedding_scale
from fixtures.precision import Codes
from fixtures.quantize import dequantise, quantise
from fixtures.rope import full_frequencies, sliding_frequencies
from fixtures.zoo import DATA, FIXTURES

LENGTH = 64
"""Random tokens that the activations are measured on."""


@dataclass
class NumpyGemma:
    """A dense text model. `codes` says how the matrix of a node is quantised; `scales` are those of the activations of
    quantised products, by node and end: without any they are not rounded. `largest` is the largest |activation| seen.
    """

    architecture: Architecture
    arrays: Mapping[str, np.ndarray]
    codes: Callable[[str], Codes | None] = lambda _: None
    scales: Mapping[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """ids [S] -> [S, vocabulary]"""
        sizes = self.architecture
        hidden, width, layers = sizes.hidden_size, sizes.hidden_size_per_layer_input, sizes.num_layers
        x = self._matrix("/model/embed_tokens", "model.embed_tokens.weight")[ids] * embedding_scale(sizes, hidden)
        rows = self._matrix("/model/embed_tokens_per_layer", "model.embed_tokens_per_layer.weight")[ids]
        tokens = (rows * embedding_scale(sizes, width)).reshape(len(ids), layers, width)
        context = self._product("/model/per_layer_projection", x, "model.per_layer_model_projection.weight")
        context = self._norm((context * hidden**-0.5).reshape(tokens.shape), "model.per_layer_projection_norm.weight")
        per_layer = (context + tokens) * 2**-0.5
        kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for layer in range(layers):
            x = self._layer(layer, x, per_layer[:, layer], kept)
        x = self._product("/lm_head", self._norm(x, "model.norm.weight"), "model.embed_tokens.weight")
        found: np.ndarray = np.tanh(x / sizes.final_logit_softcapping) * sizes.final_logit_softcapping
        return found

    def _layer(
        self, layer: int, x: np.ndarray, per_layer: np.ndarray, kept: dict[int, tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        node, name = f"/model/layers.{layer}", f"model.layers.{layer}"
        attended = self._attention(layer, self._norm(x, f"{name}.input_layernorm.weight"), kept)
        x = x + self._norm(attended, f"{name}.post_attention_layernorm.weight")
        normal = self._norm(x, f"{name}.pre_feedforward_layernorm.weight")
        both = [f"{name}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        gate, up = np.split(self._product(f"{node}/mlp/gate_up_proj", normal, *both), 2, axis=-1)
        fed = self._product(f"{node}/mlp/down_proj", _gelu(gate) * up, f"{name}.mlp.down_proj.weight")
        x = x + self._norm(fed, f"{name}.post_feedforward_layernorm.weight")
        gate = self._product(f"{node}/per_layer/per_layer_input_gate", x, f"{name}.per_layer_input_gate.weight")
        projection = f"{name}.per_layer_projection.weight"
        injected = self._product(f"{node}/per_layer/per_layer_projection", _gelu(gate) * per_layer, projection)
        x = x + self._norm(injected, f"{name}.post_per_layer_input_norm.weight")
        scaled: np.ndarray = x * self.arrays[f"{name}.layer_scalar"]
        return scaled

    def _attention(self, layer: int, x: np.ndarray, kept: dict[int, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        sizes, size = self.architecture, self.architecture.head_size(layer)
        node, name = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"

        def heads(part: str, norm: str | None) -> np.ndarray:
            split = self._product(f"{node}/{part}_proj", x, f"{name}.{part}_proj.weight").reshape(len(x), -1, size)
            return self._norm(split, norm)

        frequencies = full_frequencies if sizes.is_full(layer) else sliding_frequencies
        angles = np.outer(np.arange(len(x)), frequencies(size))[:, None]
        query = _rotate(heads("q", f"{name}.q_norm.weight"), angles)
        if sizes.is_owner(layer):
            kept[layer] = _rotate(heads("k", f"{name}.k_norm.weight"), angles), heads("v", None)
        groups = sizes.num_attention_heads // sizes.kv_heads(layer)
        key, value = (np.repeat(part, groups, axis=1) for part in kept[sizes.owner_of(layer)])
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        window = len(x) if sizes.is_full(layer) else sizes.sliding_window
        scores = np.where((distance >= 0) & (distance < window), np.einsum("shd,thd->hst", query, key), -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        attended = np.einsum("hst,thd->shd", shares, value).reshape(len(x), -1)
        return self._product(f"{node}/o_proj", attended, f"{name}.o_proj.weight")

    def _product(self, node: str, x: np.ndarray, *names: str) -> np.ndarray:
        matrix = self._matrix(node, *names)
        if self.codes(node) is None:
            plain: np.ndarray = x @ matrix.T
            return plain
        return self._rounded(f"{node}/output", self._rounded(f"{node}/input", x) @ matrix.T)

    def _rounded(self, end: str, x: np.ndarray) -> np.ndarray:
        self.largest[end] = max(self.largest.get(end, 0.0), float(np.abs(x).max()))
        if not self.scales:
            return x
        rounded: np.ndarray = np.clip(np.round(x / self.scales[end]), -128, 127) * self.scales[end]
        return rounded

    def _matrix(self, node: str, *names: str) -> np.ndarray:
        matrix = np.concatenate([self.arrays[name] for name in names])
        codes = self.codes(node)
        if codes is not None:
            matrix = dequantise(quantise(matrix, codes), codes, matrix.shape[1])
        return matrix.astype(np.float64)

    def _norm(self, x: np.ndarray, name: str | None) -> np.ndarray:
        normal: np.ndarray = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.architecture.rms_norm_eps)
        return normal if name is None else normal * self.arrays[name]


def _gelu(x: np.ndarray) -> np.ndarray:
    gelu: np.ndarray = 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return gelu


def _rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def numpy_gemma(name: str, scales: Mapping[str, float]) -> NumpyGemma:
    """A tiny fixture, its matrices rounded as those of its one precision, or not at all where it has several."""
    fixture = FIXTURES[name]
    with np.load(DATA / fixture.checkpoint) as stored:
        arrays = {key: stored[key] for key in stored.files}
    if len(fixture.precisions) > 1:
        return NumpyGemma(fixture.architecture, arrays)
    return NumpyGemma(fixture.architecture, arrays, fixture.precisions[0].codes, scales)


def read_scales(name: str) -> dict[str, float]:
    """The stored scales of a tiny QAT fixture's activations."""
    scales: dict[str, float] = json.loads((DATA / FIXTURES[name].scales).read_text(encoding="utf-8"))
    return scales


def main() -> int:
    """Scales are float16 numbers: graphs of either float type divide by the same."""
    for name in ("tiny-e2b-qat", "tiny-e4b-qat"):
        model = numpy_gemma(name, {})
        vocabulary = model.architecture.vocab_size
        model.logits(np.random.Generator(np.random.PCG64(1)).integers(0, vocabulary, LENGTH))
        scales = {end: float(np.float16(largest / 127)) for end, largest in model.largest.items()}
        target = DATA / FIXTURES[name].scales
        target.write_text(json.dumps(scales, indent=0) + "\n", encoding="utf-8", newline="\n")
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
