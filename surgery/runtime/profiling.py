"""Where a folder's time goes: by operator and kind of layer, beside the bytes that are read and what memory gives.

onnxruntime-genai runs the folder with ONNX Runtime's profile switched on. Its events name each node that ran, how long,
and how large its activations were (format of onnxruntime 1.31.1); the sizes of weights come from the graph. The last runs of
the model are a token each; those before them are the prompt, in one piece or several.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.architecture import Architecture, architecture, read_config
from surgery.choices import Provider
from surgery.errors import FolderError, ModelError
from surgery.files.safe_reading import read_regular
from surgery.graph.external_data import byte_size
from surgery.graph.model import Model
from surgery.graph.tensor_types import initializer_type
from surgery.runtime.benchmark import fitting_contexts, greedy_generator, load_folder, random_prompt
from surgery.runtime.genai import PROMPT_CHUNK, load_genai
from surgery.runtime.own_process import Limits, Tell, run

MAX_BYTES = 2**30
"""The largest profile that is read."""
KERNEL_TIME = "_kernel_time"
"""How the name of an event ends that is one run of a node."""
_LAYER = re.compile(r"layers\.(\d+)[./]")
_READ = 2**28
"""Bytes that each thread reads to measure the memory."""


@dataclass(frozen=True, slots=True)
class TimeShare:
    """One operator in one kind of layer, in one run of the model: milliseconds, their share of the run, bytes of weights,
    activations and caches that its nodes take and give."""

    operator: str
    layers: str
    nodes: int
    milliseconds: float
    share: float
    bytes: int

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.milliseconds * 1000 if self.milliseconds else 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """A phase, `prefill` or `decode`, at a prompt of `context` tokens: what one run takes, the largest share first.

    `milliseconds` is the whole run: what the shares leave is between the nodes. `bandwidth`, in bytes per second, is
    what the threads read from memory at the same time of day.
    """

    phase: str
    context: int
    milliseconds: float
    bandwidth: float
    shares: tuple[TimeShare, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return asdict(self)


def profile_folder(
    folder: Path,
    contexts: Sequence[int],
    new_tokens: int,
    provider: Provider,
    chunk: int = PROMPT_CHUNK,
    progress: Callable[[str], None] | None = None,
) -> tuple[Profile, ...]:
    """Prefill, in chunks of `chunk` tokens or, with 0, at once, and decode of a folder at prompts of `contexts` tokens, in
    a process of its own. `progress` is told which do not fit.

    Raises FolderError where none fits, and with the runtime's words where it refuses the folder, ProcessEnded where it
    crashes on it.
    """
    arch = architecture(read_config(folder / "config.json"))
    fitting = fitting_contexts(folder, arch, contexts, new_tokens, progress)
    limits = Limits.of(provider, folder)
    return run(_profile, folder, fitting, new_tokens, provider, chunk, answer=tuple[Profile, ...], limits=limits)


def _profile(
    _: Tell, folder: Path, contexts: Sequence[int], new_tokens: int, provider: Provider, chunk: int
) -> tuple[Profile, ...]:
    from surgery.folder.opened import open_genai_folder

    opened = open_genai_folder(folder)
    opened.check_weights()
    arch, weights = architecture(read_config(folder / "config.json")), weight_bytes(opened.model)
    bandwidth = memory_bandwidth()
    found = []
    for context in contexts:
        events = _events_of(folder, random_prompt(context, arch.vocab_size), new_tokens, provider, chunk)
        runs = model_runs(events)
        prompt = len(runs) - new_tokens + 1  # the first token is chosen from the prompt's logits
        if prompt < 1:
            raise ModelError(f"{folder}: its profile holds {len(runs)} runs; {new_tokens} and more are expected")
        for phase, chosen in (("prefill", [_together(runs[:prompt])]), ("decode", runs[prompt:])):
            whole = sum(each.milliseconds for each in chosen) / len(chosen)
            found.append(Profile(phase, context, whole, bandwidth, time_shares(chosen, weights, arch)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class ModelRun:
    """One run of the model, and the events of its nodes."""

    milliseconds: float
    nodes: tuple[Mapping[str, Any], ...]


def _together(runs: Sequence[ModelRun]) -> ModelRun:
    """The chunks of a prompt as one run."""
    return ModelRun(sum(each.milliseconds for each in runs), tuple(node for each in runs for node in each.nodes))


def model_runs(events: Sequence[Mapping[str, Any]]) -> list[ModelRun]:
    """The runs that a profile holds, in order; a node belongs to the run in whose time it began."""
    whole = sorted((each for each in events if each.get("name") == "model_run"), key=lambda each: each["ts"])
    nodes = [each for each in events if each.get("cat") == "Node" and str(each.get("name")).endswith(KERNEL_TIME)]
    starts = [each["ts"] for each in whole]
    inside: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for node in nodes:
        inside[bisect_right(starts, node["ts"]) - 1].append(node)
    return [ModelRun(each["dur"] / 1000, tuple(inside[i])) for i, each in enumerate(whole)]


def time_shares(runs: Sequence[ModelRun], weights: Mapping[str, int], arch: Architecture) -> tuple[TimeShare, ...]:
    """By operator and kind of layer, means over the runs; `weights` are bytes by the name of the node that reads them.

    A node whose result has no rows, as one side of a product in int8 does, reads none.
    """
    micros: dict[tuple[str, str], float] = defaultdict(float)
    moved: dict[tuple[str, str], int] = defaultdict(int)
    count: dict[tuple[str, str], int] = defaultdict(int)
    for node in (node for one in runs for node in one.nodes):
        name, arguments = node["name"].removesuffix(KERNEL_TIME), node["args"]
        key = arguments["op_name"], _kind_of_layer(name, arch)
        micros[key] += node["dur"]
        count[key] += 1
        if made := int(arguments["output_size"]):
            moved[key] += weights.get(name, 0) + int(arguments["activation_size"]) + made
    total = sum(one.milliseconds for one in runs) * 1000
    shares = [
        TimeShare(*key, count[key] // len(runs), time / len(runs) / 1000, time / total, moved[key] // len(runs))
        for key, time in micros.items()
    ]
    return tuple(sorted(shares, key=lambda share: -share.milliseconds))


def _kind_of_layer(node: str, arch: Architecture) -> str:
    """`sliding`, `full`, the same with `KV-shared`, `lm_head`, or `-` for what is in no layer."""
    found = _LAYER.search(node)
    if found is None or int(found[1]) >= len(arch.layers):
        return "lm_head" if "lm_head" in node else "-"
    layer = arch.layers[int(found[1])]
    return layer.attention if layer.is_kv_source else f"KV-shared {layer.attention}"


def weight_bytes(model: Model) -> dict[str, int]:
    """Node -> bytes of the initializers that it reads whole; a look-up reads a few rows, which count as its output."""
    sizes = {each.name: byte_size(initializer_type(each).dtype, each.dims) for each in model.graph.initializer}
    return {
        node.name: sum(sizes.get(name, 0) for name in node.input)
        for node in model.graph.node
        if not node.op_type.startswith("Gather")
    }


def memory_bandwidth() -> float:
    """Bytes per second that all processors together read from memory: the best of five sums over arrays that no cache holds."""
    import numpy as np

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arrays = [np.ones(_READ // 8, np.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(np.sum, arrays))
            best = max(best, threads * _READ / (time.perf_counter() - started))
    return best


def _events_of(
    folder: Path, prompt: Sequence[int], new_tokens: int, provider: Provider, chunk: int
) -> list[Mapping[str, Any]]:
    """The events of a prompt and the tokens behind it. The runtime writes them when the model goes."""
    import gc

    import numpy as np

    og = load_genai(provider)
    with tempfile.TemporaryDirectory(prefix="gemma4-surgery-") as there:
        written = {"enable_profiling": str(Path(there) / "profile")}
        try:
            model = load_folder(og, folder, provider, written)
            generator = greedy_generator(og, model, len(prompt) + new_tokens, chunk)
            generator.append_tokens(np.array(prompt, np.int32))
            for _ in range(new_tokens):
                generator.generate_next_token()
        except RuntimeError as error:
            raise FolderError(f"{folder}: the runtime says: {error}") from None
        del generator, model
        gc.collect()
        files = sorted(Path(there).iterdir(), key=lambda file: -file.stat().st_size)
        if not files:
            raise ModelError(f"{folder}: onnxruntime-genai wrote no profile")
        return read_events(files[0])


def read_events(path: Path) -> list[Mapping[str, Any]]:
    """The events of a profile. Raises ModelError where the file is not one."""
    try:
        events = json.loads(read_regular(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a profile of ONNX Runtime: {error}") from None
    return [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
