"""How large the residual stream becomes, layer by layer: float16 ends at 65504, and Gemma's activations are large.

The values are outputs of one session alone: the graph is handed over as bytes, its weights are read where they are,
and no file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.graph.model import Model
from surgery.runtime.sessions import Array, Feed, KVCaches, OpenGraph, Settings, host
from surgery.verify.prompts import Case
from surgery.verify.recording import record
from surgery.verify.residual_stream import EMBEDDINGS, Carried, residual_stream

LIMIT = 65504.0
"""The largest finite float16."""


@dataclass(frozen=True, slots=True)
class LayerPeak:
    """The largest finite |activation| of the residual stream in one layer, over all cases."""

    layer: int
    value: str
    dtype: str
    max_abs: float
    not_finite: int
    case: str

    @property
    def layer_name(self) -> str:
        """`layer 4`, or `the embeddings`."""
        return "the embeddings" if self.layer == EMBEDDINGS else f"layer {self.layer}"

    @property
    def headroom(self) -> float:
        """By what factor float16's limit is above; 0 where the value is not finite."""
        if self.not_finite:
            return 0.0
        return LIMIT / self.max_abs if self.max_abs else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {**asdict(self), "headroom": self.headroom}


class _Watched:
    """A merged graph whose residual stream is looked at after each step."""

    def __init__(self, path: Path, settings: Settings, values: Sequence[Carried]) -> None:
        self._values = values
        self._graph = OpenGraph(path, settings, [carried.name for carried in values])
        self.case = ""
        self.peaks: dict[int, LayerPeak] = {}

    def start(self, batch: int) -> KVCaches:
        return self._graph.empty_cache(batch)

    def step(self, feed: Feed, cache: KVCaches, keep: int) -> tuple[Array, KVCaches]:
        outputs, presents = self._graph.run({"input_ids": feed.ids, **self._graph.steering(feed, keep)}, cache)
        for carried in self._values:
            self._look(carried, host(outputs[carried.name]))
        return self._graph.logits(outputs), presents

    def _look(self, carried: Carried, array: Array) -> None:
        finite = np.isfinite(array)
        strange = int(array.size - np.count_nonzero(finite))
        largest = float(np.max(np.abs(array, dtype=np.float32), where=finite, initial=0))
        peak = LayerPeak(carried.layer, carried.name, array.dtype.name, largest, strange, self.case)
        before = self.peaks.get(carried.layer)
        if before is None:
            self.peaks[carried.layer] = peak
        else:
            higher = peak if (peak.not_finite > 0, largest) > (before.not_finite > 0, before.max_abs) else before
            self.peaks[carried.layer] = replace(higher, not_finite=before.not_finite + strange)


def measure_headroom(
    path: Path,
    cases: Sequence[Case],
    settings: Settings,
    *,
    steps: int = 1,
    progress: Callable[[str], None] | None = None,
) -> tuple[LayerPeak, ...]:
    """Run the cases and tell each layer's peak, the embeddings' first.

    Raises ModelError where the stream cannot be found, or the graph fails.
    """
    stream = residual_stream(Model.open(path).graph)
    watched = _Watched(path, settings, stream.values)

    def told(case: str) -> None:
        watched.case = case
        if progress is not None:
            progress(case)

    record(watched, [case for case in cases if not case.past], steps=steps, budget=0, progress=told)
    return tuple(watched.peaks[layer] for layer in sorted(watched.peaks))
