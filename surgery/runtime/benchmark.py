"""How fast a folder is: time to first token, prefill and decode rates, peak memory; beside its source's two graphs.

Each side runs in a process of its own, so that its peak memory is its own and neither warms anything up for the
other. The prompts are random ids of given lengths, the same for both; decoding is greedy and does not stop at an eos.
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.architecture import Architecture, architecture, read_config
from surgery.choices import Provider
from surgery.errors import FolderError
from surgery.runtime.genai import PROMPT_CHUNK, load_genai
from surgery.runtime.own_process import Limits, Tell, run
from surgery.source.export import GraphPair

CONTEXTS = (128, 1024, 4096)
"""Lengths of prompts, in tokens."""

NEW_TOKENS = 16
SEED = 20261120
BenchmarkSide = Literal["folder", "source"]


@dataclass(frozen=True, slots=True)
class Timing:
    """One prompt. Rates are in tokens per second; the first token's time includes the whole prefill."""

    context: int
    first_token_seconds: float
    prefill_rate: float
    decode_rate: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One side: `folder` in onnxruntime-genai, or `source` as two sessions in a loop. Memory in bytes."""

    side: BenchmarkSide
    load_seconds: float
    timings: tuple[Timing, ...]
    peak_rss: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return asdict(self)


def measure(
    folder: Path,
    source: GraphPair | None,
    *,
    provider: Provider = "cpu",
    contexts: Sequence[int] = CONTEXTS,
    new_tokens: int = NEW_TOKENS,
    sides: Collection[BenchmarkSide] = ("folder", "source"),
    chunk: int = PROMPT_CHUNK,
    progress: Callable[[str], None] | None = None,
) -> list[Benchmark]:
    """Measure a folder, its prompts in chunks of `chunk` tokens, 0 for all at once; and its source, where one is given.

    Contexts that do not fit the model are left out, and `progress` is told so. Raises FolderError where none fits,
    and with the runtime's words where it refuses a side, ProcessEnded where it crashes on it.
    """
    arch = architecture(read_config(folder / "config.json"))
    fitting = fitting_contexts(folder, arch, contexts, new_tokens, progress)
    prompts = [random_prompt(context, arch.vocab_size) for context in fitting]
    found: list[Benchmark] = []
    for side, measure, what in (("folder", _measure_folder, folder), ("source", _measure_source, source)):
        if what is not None and side in sides:
            if progress is not None:
                progress(f"measuring the {side}")
            places = (folder,) if isinstance(what, Path) else (folder, what.decoder.parent)
            limits = Limits.of(provider, *places)
            found.append(run(measure, what, prompts, new_tokens, provider, chunk, answer=Benchmark, limits=limits))
    return found


def fitting_contexts(
    folder: Path,
    arch: Architecture,
    contexts: Sequence[int],
    new_tokens: int,
    progress: Callable[[str], None] | None = None,
) -> list[int]:
    """The contexts that fit a model with the tokens behind them; `progress` is told of the others.

    Raises FolderError where none fits.
    """
    fitting = [context for context in contexts if context + new_tokens <= arch.context_length]
    if not fitting:
        raise FolderError(f"{folder} takes {arch.context_length} tokens: no context of {list(contexts)} fits")
    if progress is not None and (skipped := [context for context in contexts if context not in fitting]):
        lengths = ", ".join(f"{context:,}" for context in skipped)
        progress(
            f"skipped    prompts of {lengths} tokens: with {new_tokens} more they do not fit the model's {arch.context_length:,}"
        )
    return fitting


def random_prompt(length: int, vocab_size: int) -> list[int]:
    """Ids that are no special tokens, the same in every run."""
    numbers = random.Random(SEED + length)
    return [numbers.randrange(4, vocab_size) for _ in range(length)]


def _measure_folder(
    _: Tell, folder: Path, prompts: list[list[int]], new_tokens: int, provider: Provider, chunk: int
) -> Benchmark:
    import numpy as np

    from surgery.folder.opened import open_genai_folder

    og = load_genai(provider)
    open_genai_folder(folder).check_weights()
    started = time.perf_counter()
    try:
        model = load_folder(og, folder, provider)
        loaded = time.perf_counter() - started
        timings = []
        for prompt in prompts:
            generator = greedy_generator(og, model, len(prompt) + new_tokens, chunk)
            ids = np.array(prompt, np.int32)

            def first(generator: Any = generator, ids: Any = ids) -> None:
                generator.append_tokens(ids)
                generator.generate_next_token()

            timings.append(_timed(len(prompt), new_tokens, first, generator.generate_next_token))
    except RuntimeError as error:
        raise FolderError(f"{folder}: the runtime says: {error}") from None
    return Benchmark("folder", loaded, tuple(timings), _peak_rss())


def load_folder(og: Any, folder: Path, provider: Provider, session: Mapping[str, str] | None = None) -> Any:
    """An og.Model that runs on `provider`, with these entries among the decoder's session options."""
    config = og.Config(str(folder))
    if session:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    config.clear_providers()
    if provider != "cpu":
        config.append_provider(provider)
    return og.Model(config)


def greedy_generator(og: Any, model: Any, length: int, chunk: int) -> Any:
    """An og.Generator that makes a sequence of `length` tokens, and takes `chunk` of the prompt in one run, 0 for all:
    min_length keeps an eos from ending the run early."""
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, min_length=length, max_length=length, chunk_size=chunk or length)
    return og.Generator(model, params)


def _measure_source(
    _: Tell, pair: GraphPair, prompts: list[list[int]], new_tokens: int, provider: Provider, chunk: int
) -> Benchmark:
    """The source takes a prompt in one piece, as a loop of one's own does."""
    from surgery.runtime.decoding import generate_tokens
    from surgery.runtime.sessions import Settings
    from surgery.runtime.two_graphs import TwoGraphModel

    started = time.perf_counter()
    source = TwoGraphModel.open(pair, Settings(provider))
    loaded = time.perf_counter() - started
    timings = []
    for prompt in prompts:
        tokens = generate_tokens(source, [prompt], new_tokens=new_tokens)

        def step(tokens: Iterator[object] = tokens) -> None:
            next(tokens)

        timings.append(_timed(len(prompt), new_tokens, step, step))
    return Benchmark("source", loaded, tuple(timings), _peak_rss())


def _timed(context: int, new_tokens: int, first: Callable[[], None], following: Callable[[], None]) -> Timing:
    started = time.perf_counter()
    first()
    first_done = time.perf_counter()
    for _ in range(new_tokens - 1):
        following()
    ended = time.perf_counter()
    seconds = first_done - started
    return Timing(context, seconds, context / seconds, (new_tokens - 1) / (ended - first_done))


def _peak_rss() -> int:
    """Peak resident memory of this process; the kernel counts in KiB on Linux and in bytes on macOS."""
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
