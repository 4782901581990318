"""Steps that measure at the published size: load, prefill and decode, each token by itself, and the GPU's memory."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np

from fixtures.build import build
from surgery.architecture import read_config
from surgery.folder.genai_config import CAPTURE, CONFIG_FILE
from surgery.runtime.decoding import DecodeLoop
from surgery.runtime.genai import GenAI, load_genai
from surgery.runtime.sessions import MergedModel, Runner, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, open_export
from validation.cuda.correctness import made
from validation.cuda.fixed_buffers import FixedBuffers
from validation.cuda.steps import Found, Setting

PRECISION = "q4f16"
SEED = 20261120
COMPARED = 64
"""Tokens of a continuation that two ways of running are compared by."""
WARM = 2
"""Tokens that are left out of the median: the first runs allocate, and the second one is captured."""


class GpuMemory:
    """The most memory in use on the GPU while it is open, in MiB, asked of nvidia-smi; None where there is none."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self._smi = shutil.which("nvidia-smi")
        self._done = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuMemory:
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watching.join()

    def _watch(self) -> None:
        while self._smi and not self._done.wait(0.25):
            asked = [self._smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
            if said and said[0].isdecimal():
                self.peak = max(self.peak or 0, int(said[0]))


def export(setting: Setting) -> Found:
    """The large export with random weights, made here."""
    started = time.perf_counter()
    build(setting.large, PRECISION, setting.work / setting.large, force=True)
    root = setting.work / setting.large
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return {"fixture": setting.large, "precision": PRECISION, "bytes": size, "seconds": time.perf_counter() - started}


def genai(form: str, *, capture: bool) -> Callable[[Setting], Found]:
    """A form's folder in onnxruntime-genai."""

    def run(setting: Setting) -> Found:
        folder = _folder(setting, form, capture=capture)
        og = load_genai(setting.provider)
        with GpuMemory() as memory:
            started = time.perf_counter()
            model = og.Model(_config(og, folder, setting))
            found: Found = {
                "load_seconds": time.perf_counter() - started,
                "captured": capture and not setting.rehearsal,
            }
            found["timings"] = []
            for prompt in _prompts(setting):
                parameters = og.GeneratorParams(model)
                length = len(prompt) + WARM + setting.new_tokens
                parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
                generator = og.Generator(model, parameters)

                def first(generator: Any = generator, prompt: list[int] = prompt) -> None:
                    generator.append_tokens(np.array(prompt, np.int32))
                    generator.generate_next_token()

                found["timings"].append(_timed(setting, prompt, first, generator.generate_next_token))
                del generator  # with it goes the captured graph
        return {**found, **_memory(memory)}

    return run


def source(setting: Setting) -> Found:
    """The source's two graphs in a loop of their own, caches on the device."""
    with GpuMemory() as memory:
        started = time.perf_counter()
        model = TwoGraphModel.open(_export(setting).pair(PRECISION), Settings(setting.provider))
        found: Found = {"load_seconds": time.perf_counter() - started, "timings": _loops(setting, model)}
    return {**found, **_memory(memory)}


def runtime(*, capture: bool) -> Callable[[Setting], Found]:
    """`fast` in ONNX Runtime alone, over buffers that stay: what is left when nothing of GenAI is in the way."""

    def run(setting: Setting) -> Found:
        folder = _folder(setting, "fast", capture=capture)
        rows = max(setting.contexts) + WARM + setting.new_tokens
        on = capture and not setting.rehearsal
        with GpuMemory() as memory:
            started = time.perf_counter()
            model = FixedBuffers(folder / "model.onnx", setting.provider, rows, capture=on)
            found: Found = {"load_seconds": time.perf_counter() - started, "captured": on}
            found["timings"] = _loops(setting, model)
        return {**found, **_memory(memory)}

    return run


def tokens(setting: Setting) -> Found:
    """Greedy tokens of one model run in different ways, which ought to be the same; and how many repeat the one before.

    GenAI captured, GenAI not captured, ONNX Runtime alone, the source pair. Repeated tokens are what
    microsoft/onnxruntime-genai#2291 saw on an H200, and not on the CPU.
    """
    steps = min(COMPARED, setting.new_tokens)
    prompts = {len(prompt): prompt for prompt in _prompts(setting)}
    found: Found = {}
    ways: dict[str, dict[int, list[int]]] = {}
    for name, capture in (("GenAI, captured", True), ("GenAI, not captured", False)):
        model = GenAI(_folder(setting, "fast", capture=capture), setting.provider)
        ways[name] = {n: model.generate([prompt], 0, steps)[0] for n, prompt in prompts.items()}
        del model
    graph = _folder(setting, "fast", capture=False) / "model.onnx"
    ways["ONNX Runtime"] = {
        n: _greedy(MergedModel(graph, Settings(setting.provider)), p, steps) for n, p in prompts.items()
    }
    pair = TwoGraphModel.open(_export(setting).pair(PRECISION), Settings(setting.provider))
    ways["source pair"] = {n: _greedy(pair, prompt, steps) for n, prompt in prompts.items()}
    for name, continued in ways.items():
        found[name] = {
            str(n): {
                "tokens": len(row),
                "equal to the source pair": _equal(row, ways["source pair"][n]),
                "repeat the one before": sum(a == b for a, b in pairwise(row)),
            }
            for n, row in continued.items()
        }
    return found


def _export(setting: Setting) -> Export:
    return open_export(setting.work / setting.large)


def _folder(setting: Setting, form: str, *, capture: bool) -> Path:
    """A form's folder, with capture as it is asked for whatever the repack chose."""
    found = _export(setting)
    folder, _ = made(setting, found, found.pair(PRECISION), form)
    path = folder / CONFIG_FILE
    config = read_config(path)
    options = {"cuda": {CAPTURE: "1" if capture else "0"}}
    config["model"]["decoder"]["session_options"]["provider_options"] = [options]
    path.write_text(json.dumps(config))
    return folder


def _config(og: Any, folder: Path, setting: Setting) -> Any:
    config = og.Config(str(folder))
    config.clear_providers()
    if setting.provider == "cuda":
        config.append_provider("cuda")
    return config


def _prompts(setting: Setting) -> list[list[int]]:
    vocabulary = 128 if setting.rehearsal else 262144
    return [[Random(SEED + n).randrange(4, vocabulary) for _ in range(n)] for n in setting.contexts]


def _loops(setting: Setting, model: Runner) -> list[Found]:
    found = []
    for prompt in _prompts(setting):
        loop = DecodeLoop(model, 1)
        last: list[Any] = []

        def first(loop: DecodeLoop = loop, prompt: list[int] = prompt, last: list[Any] = last) -> None:
            last[:] = loop.prompt([prompt])

        def following(loop: DecodeLoop = loop, last: list[Any] = last) -> None:
            last[:] = [loop.append(last[-1].greedy())]

        found.append(_timed(setting, prompt, first, following))
    return found


def _greedy(model: Runner, prompt: Sequence[int], count: int) -> list[int]:
    loop = DecodeLoop(model, 1)
    (step,) = loop.prompt([prompt])
    found = [int(step.greedy()[0])]
    while len(found) < count:
        step = loop.append(step.greedy())
        found.append(int(step.greedy()[0]))
    return found


def _equal(row: list[int], other: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(row, other, strict=False)) if a != b), min(len(row), len(other)))


def _timed(setting: Setting, prompt: list[int], first: Callable[[], None], following: Callable[[], None]) -> Found:
    """Seconds to the first token, and of a token behind it: the median, and the one that 9 of 10 stay below."""
    started = time.perf_counter()
    first()
    prefill = time.perf_counter() - started
    taken = []
    for _ in range(WARM + setting.new_tokens - 1):
        started = time.perf_counter()
        following()
        taken.append(time.perf_counter() - started)
    steady = sorted(taken[WARM:])
    return {
        "context": len(prompt),
        "first_token_seconds": prefill,
        "prefill_rate": len(prompt) / prefill,
        "token_seconds": median(steady),
        "token_seconds_p90": steady[int(0.9 * (len(steady) - 1))],
        "decode_rate": 1 / median(steady),
    }


def _memory(watched: GpuMemory) -> Found:
    return {
        "gpu_peak_mib": watched.peak,
        "host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
