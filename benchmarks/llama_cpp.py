"""llama.cpp beside ONNX Runtime GenAI, on the same weights and the same processors.

    pip install gguf llama-cpp-python
    python -m benchmarks.llama_cpp WORK [--fixture e2b] [--contexts 128,512,1024,2048,4096] [--rounds 3]

Builds the fixture in q4 with symmetric blocks of 32, writes the same values as GGUF Q4_0, and repacks it with `fast`
(products in int8, as llama.cpp multiplies, and in float32). That llama.cpp gets the model right is shown first: the
logits of tiny-e2b beside those of Hugging Face transformers, then those of all sides. Then each side runs in processes of its own, one after the other in every round, on the same processors: a prompt of each context, then
16 tokens. The table is Markdown: medians, minima in brackets. With one thread the time is the processor's, which other
work on the machine does not lengthen; with more it is the clock's. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 gives all sides
large pages.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20261121
NEW_TOKENS = 16
CHUNK = 512
"""Tokens of a prompt that llama.cpp takes at once, its own default; GenAI takes all."""


@dataclass(frozen=True, slots=True)
class Side:
    """A model file or folder, and the function of this module that runs it."""

    name: str
    path: Path
    runner: str


@dataclass(frozen=True, slots=True)
class Options:
    work: Path
    fixture: str
    contexts: tuple[int, ...]
    rounds: int
    threads: int
    sides: str


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        _answer(sys.argv[2:])
        return
    options = _options()
    print(_beside_transformers(options))
    sides = _sides(options)
    vocab_size = _vocab_size(options.work / "export")
    print(_differences(sides, vocab_size, options.threads))
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            found[side.name].append(_run(side, "speed", options.contexts, vocab_size, options.threads))
            print(side.name, json.dumps(found[side.name][-1]), file=sys.stderr, flush=True)
    print(_table(sides, found, options.contexts))


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_cpp", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="for the export, the GGUF file and the folders; kept for the next run")
    parser.add_argument("--fixture", default="e2b")
    parser.add_argument("--contexts", default="128,512,1024,2048,4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sides", default="", help="only those whose names hold one of these, separated by commas")
    found = parser.parse_args()
    contexts = tuple(int(each) for each in found.contexts.split(","))
    return Options(found.work, found.fixture, contexts, found.rounds, found.threads, found.sides)


def _sides(options: Options) -> list[Side]:
    import surgery
    from benchmarks.gguf_export import write_gguf
    from fixtures.__main__ import parse_reading
    from fixtures.build import build
    from surgery.source.export import open_export

    export, gguf = options.work / "export", options.work / "model.gguf"
    if not export.exists():
        build(options.fixture, "q4", export, reading=parse_reading(["symmetric"]))
    if not gguf.exists():
        write_gguf(open_export(export).pair("q4"), export / "config.json", gguf)
    sides = [Side("llama.cpp, Q4_0", gguf, "llama_cpp")]
    fast: Any = {"preset": "fast", "weights": "link", "validate": False}
    made: tuple[tuple[str, str, Any], ...] = (
        ("`fast`, `--prefill int8`", "fast-int8", {"prefill": "int8"}),
        ("`fast`, int8", "fast-auto", {}),
        ("`fast`, float32", "fast-keep", {"accuracy_level": "keep"}),
    )
    for name, folder, how in made:
        if not (options.work / folder).exists():
            surgery.repack(export, options.work / folder, surgery.RepackOptions(**fast, **how))
        if folder != "fast-keep":
            sides.append(Side(f"{name}, {CHUNK} tokens at once", options.work / folder, "genai_in_chunks"))
        sides.append(Side(name, options.work / folder, "genai"))
    wanted = [part.strip() for part in options.sides.split(",")]
    return [side for side in sides if any(part in side.name for part in wanted)]


def _vocab_size(export: Path) -> int:
    from surgery.architecture import architecture, read_config

    return architecture(read_config(export / "config.json")).vocab_size


def _run(side: Side, what: str, contexts: Sequence[int], vocab_size: int, threads: int) -> dict[str, Any]:
    """One process of a side. What it answers is JSON on its last line."""
    arguments = [side.runner, what, str(side.path), ",".join(map(str, contexts)), str(vocab_size), str(threads)]
    command = [sys.executable, "-m", "benchmarks.llama_cpp", "--side", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer(arguments: Sequence[str]) -> None:
    runner, what, path, contexts, vocab_size, threads = arguments
    prompts = [_prompt(int(context), int(vocab_size)) for context in contexts.split(",")]
    sides: dict[str, Callable[[Path, int, int], Runner]] = {
        "llama_cpp": LlamaCpp, "genai": GenAi, "genai_in_chunks": GenAiInChunks,
    }  # fmt: skip
    clock = time.process_time if int(threads) == 1 else time.perf_counter
    started = clock()
    opened = sides[runner](Path(path), max(map(len, prompts)) + NEW_TOKENS, int(threads))
    loaded = clock() - started
    if what == "logits":
        print(json.dumps({"logits": [opened.prefill(prompt).tolist() for prompt in prompts]}))
        return
    timings = [_timing(opened, prompt, clock) for prompt in prompts]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"load": loaded, "timings": timings, "peak": peak}))


def _prompt(length: int, vocab_size: int) -> list[int]:
    numbers = random.Random(SEED + length)
    return [numbers.randrange(4, vocab_size) for _ in range(length)]


def _timing(runner: Runner, prompt: Sequence[int], clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of the prompt, and of a token: the median of 16."""
    started = clock()
    runner.prefill(prompt)
    prefill = clock() - started
    tokens = []
    for _ in range(NEW_TOKENS):
        started = clock()
        runner.step()
        tokens.append(clock() - started)
    return {"prefill": prefill, "token": statistics.median(tokens)}


class Runner:
    """A model that takes a prompt of ids, gives its last token's logits (float32 [vocabulary]), and decodes greedily."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        raise NotImplementedError

    def prefill(self, prompt: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError


class LlamaCpp(Runner):
    """llama.cpp through the C functions of llama-cpp-python."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prefill(self, prompt: Sequence[int]) -> np.ndarray:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        for start in range(0, len(prompt), CHUNK):
            self._decode(prompt[start : start + CHUNK])
        return self._logits()

    def step(self) -> None:
        self.decode([int(self._logits().argmax())])

    def decode(self, ids: Sequence[int]) -> np.ndarray:
        self._decode(ids)
        return self._logits()

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (self._api.llama_token * len(ids))(*ids)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")

    def _logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self._size,)).copy()


class GenAi(Runner):
    """A folder in onnxruntime-genai, on the CPU."""

    search: Mapping[str, int] = {}

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import onnxruntime_genai as og

        self._api = og
        config = og.Config(str(path))
        session = {"decoder": {"session_options": {"intra_op_num_threads": threads}}}
        config.overlay(json.dumps({"model": session, "search": self.search}))
        self._model = og.Model(config)
        self._length = length

    def prefill(self, prompt: Sequence[int]) -> np.ndarray:
        params = self._api.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, min_length=self._length, max_length=self._length)
        self._generator = self._api.Generator(self._model, params)
        self._generator.append_tokens(np.array(prompt, np.int32))
        logits: np.ndarray = np.asarray(self._generator.get_logits(), np.float32).reshape(-1)
        return logits

    def step(self) -> None:
        self._generator.generate_next_token()


def _beside_transformers(options: Options) -> str:
    """The greedy tokens and logits of llama.cpp on tiny-e2b in float32, beside those that transformers computed."""
    from benchmarks.gguf_export import write_gguf
    from fixtures.zoo import DATA
    from surgery.source.export import open_export

    source, gguf = Path("fixtures/tiny-e2b"), options.work / "tiny-e2b.gguf"
    options.work.mkdir(parents=True, exist_ok=True)
    write_gguf(open_export(source).pair("fp32"), source / "config.json", gguf)
    runner = LlamaCpp(gguf, 128, options.threads)
    equal, total, off = 0, 0, 0.0
    with np.load(DATA / "tiny_e2b_ref.npz") as stored:
        for prompt in range(6):
            ids, tokens = (stored[f"p{prompt}_{part}"].tolist() for part in ("ids", "tokens"))
            wanted = [stored[f"p{prompt}_prefill_logits"][-1], *stored[f"p{prompt}_decode_logits"]]
            logits = [runner.prefill(ids)]
            logits += [runner.decode([token]) for token in tokens]
            off = max(off, *(float(np.abs(a - b).max()) for a, b in zip(logits, wanted, strict=True)))
            equal += sum(int(a.argmax()) == token for a, token in zip(logits, tokens, strict=False))
            total += len(tokens)
    return (
        f"tiny-e2b in llama.cpp, float16 caches: {equal} of {total} tokens are those of Hugging Face transformers, "
        f"max |difference| of logits {off:.2g}\n"
    )


class GenAiInChunks(GenAi):
    """The same, a prompt in chunks: it fits where memory is short, for a batch of one row."""

    search: Mapping[str, int] = {"chunk_size": CHUNK}


def _differences(sides: Sequence[Side], vocab_size: int, threads: int) -> str:
    """How far the logits of a prompt's last token are from those of float32 products."""
    logits = {side.name: np.array(_run(side, "logits", [64], vocab_size, threads)["logits"][0]) for side in sides}
    exact = logits[sides[-1].name]
    lines = [f"Logits after 64 tokens, beside {sides[-1].name}, whose deviation is {exact.std():.3f}:"]
    for side in sides[:-1]:
        off = logits[side.name] - exact
        lines.append(
            f"- {side.name}: max |difference| {np.abs(off).max():.3g}, mean {np.abs(off).mean():.3g}, "
            f"correlation {np.corrcoef(logits[side.name], exact)[0, 1]:.6f}"
        )
    return "\n".join(lines) + "\n"


def _table(sides: Sequence[Side], found: dict[str, list[dict[str, Any]]], contexts: Sequence[int]) -> str:
    heads = [
        "side",
        "size on disk",
        "load",
        *(f"prefill of {n}" for n in contexts),
        *(f"decode at {n}" for n in contexts),
    ]
    rows = [[*heads, "peak memory"], ["---"] * (len(heads) + 1)]
    for side in sides:
        runs = found[side.name]
        cells = [
            side.name,
            f"{_bytes(side.path) / 1e9:.2f} GB",
            f"{statistics.median(run['load'] for run in runs):.1f} s",
        ]
        for i, context in enumerate(contexts):
            rates = [context / run["timings"][i]["prefill"] for run in runs]
            cells.append(f"{statistics.median(rates):.1f} tokens/s ({max(rates):.1f})")
        for i in range(len(contexts)):
            times = [run["timings"][i]["token"] * 1000 for run in runs]
            cells.append(f"{statistics.median(times):.0f} ms ({min(times):.0f})")
        rows.append([*cells, f"{max(run['peak'] for run in runs) / 1e9:.2f} GB"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.glob("*.onnx*"))


if __name__ == "__main__":
    main()
