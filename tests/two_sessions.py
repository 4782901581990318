"""Runs the two graphs of a fixture as two sessions, beside the reference numbers in fixtures/data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from fixtures import PRECISIONS
from fixtures.zoo import DATA

TOLERANCE = 1e-4
PROMPTS = range(6)


class Pair:
    """embed_tokens and decoder_model_merged as two sessions, with the cache fed back."""

    def __init__(self, directory: Path, precision: str) -> None:
        suffix = PRECISIONS[precision].suffix
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.embed, self.decoder = (
            ort.InferenceSession(
                str(directory / "onnx" / f"{stem}{suffix}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            for stem in ("embed_tokens", "decoder_model_merged")
        )
        self.start()

    def start(self, batch: int = 1) -> None:
        """An empty cache."""
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.length = 0
        self.past = {
            value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtypes[value.type])
            for value in self.decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def embeddings(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        names = [value.name for value in self.embed.get_outputs()]
        return dict(zip(names, self.embed.run(names, {"input_ids": ids}), strict=True))

    def step(
        self,
        ids: np.ndarray,
        keep: int = 0,
        mask: np.ndarray | None = None,
        positions: np.ndarray | None = None,
    ) -> np.ndarray:
        """ids [S] or [B, S] -> logits f32 [B, kept, vocabulary]; keep = 0 keeps all."""
        ids = np.atleast_2d(np.asarray(ids, np.int64))
        batch, count = ids.shape
        total = self.length + count
        if mask is None:
            mask = np.ones((batch, total), np.int64)
        if positions is None:
            positions = np.tile(np.arange(self.length, total, dtype=np.int64), (batch, 1))
        feeds = {
            **self.embeddings(ids),
            **self.past,
            "attention_mask": mask,
            "position_ids": positions,
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        names = [value.name for value in self.decoder.get_outputs()]
        results = dict(zip(names, self.decoder.run(names, feeds), strict=True))
        logits: np.ndarray = results.pop("logits").astype(np.float32)
        self.past = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        self.length = total
        return logits


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a prompt led to: its logits [S, V], those of each decode step [24, V], greedy tokens [24]."""

    prefill: np.ndarray
    decode: np.ndarray
    tokens: np.ndarray

    def distance(self, other: Trace) -> float:
        """The largest |difference| of any logit."""
        return max(float(np.abs(self.prefill - other.prefill).max()), float(np.abs(self.decode - other.decode).max()))


def reference(name: str) -> list[Trace]:
    with np.load(DATA / f"{name}_ref.npz") as stored:
        return [
            Trace(stored[f"p{i}_prefill_logits"], stored[f"p{i}_decode_logits"], stored[f"p{i}_tokens"])
            for i in PROMPTS
        ]


def prompts(name: str) -> list[np.ndarray]:
    with np.load(DATA / f"{name}_ref.npz") as stored:
        return [stored[f"p{i}_ids"] for i in PROMPTS]


def stored_name(name: str) -> str:
    return name.replace("-", "_")


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
