"""The presets beside the source pair: decoding, prefill and peak memory, each side in processes of its own.

    python -m benchmarks.fast WORK EXPORT [--precisions q4,q4f16] [--contexts 128,1024,4096] [--prompts 512,2048]
        [--source-tokens 16] [--made-up] [--sides source,compatible,fast]

EXPORT is an export in the community's layout; `python -m fixtures e2b q4 DIR` builds one of E2B's size. For each
precision the source's two graphs run in a loop of their own, `compatible` and `fast` in onnxruntime-genai, and `fast`
with the accuracy level that a repack chooses; and `fast` once more as published with --keep. A process decodes 16 tokens
behind a prompt of each context, the source --source-tokens, with --made-up behind caches of made-up numbers, where a
prompt would take minutes; others read one prompt each. Peak memory is a process's, with the pages of the weights that
it touched. The table is Markdown.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from passes.presets import accuracy, compatible, fast, lut_products
from passes.recipe import Recipe, recipe_text
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.runtime.benchmark import Benchmark, measure
from surgery.runtime.decoding import DecodeLoop
from surgery.runtime.sessions import Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, GraphPair, open_export
from surgery.verify.made_up_caches import made_up_caches, mask_of
from surgery.verify.prompts import Case


@dataclass(frozen=True, slots=True)
class Options:
    work: Path
    export: Path
    precisions: tuple[str, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    source_tokens: int
    made_up: bool
    keep: bool
    sides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """A side: the source's `pair` where there is no recipe, else the folder that the recipe makes."""

    name: str
    folder: Path
    pair: GraphPair | None


def main() -> None:
    options = _options()
    export = open_export(options.export)
    heads = ["precision", "side", *(f"decode at {n}" for n in options.contexts)]
    heads += ["peak"] if options.contexts else []
    for prompt in options.prompts:
        heads += [f"prefill of {prompt}", "peak"]
    print(_row(heads))
    print(_row(["---"] * len(heads)))
    for precision in options.precisions:
        for subject in _subjects(options, export, precision):
            print(_row([precision, subject.name, *_measure(subject, options)]), flush=True)


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fast", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path, help="for the folders, whose weights are links to the export's")
    parser.add_argument("export", type=Path)
    parser.add_argument("--precisions", default="q4,q4f16")
    parser.add_argument("--contexts", default="128,1024,4096", help="tokens before decoding; default: %(default)s")
    parser.add_argument("--prompts", default="512,2048", help="tokens of a prompt alone; default: %(default)s")
    parser.add_argument("--source-tokens", type=int, default=16, help="of a slow source, 3 tell as much")
    parser.add_argument("--made-up", action="store_true", help="the source decodes behind caches that no prompt filled")
    parser.add_argument("--sides", default="source,compatible,fast", help="default: %(default)s")
    parser.add_argument("--keep", action="store_true", help="fast without an accuracy level too")
    found = parser.parse_args()
    return Options(
        found.work,
        found.export,
        tuple(found.precisions.split(",")),
        _numbers(found.contexts),
        _numbers(found.prompts),
        found.source_tokens,
        found.made_up,
        found.keep,
        tuple(found.sides.split(",")),
    )


def _numbers(listed: str) -> tuple[int, ...]:
    return tuple(int(number) for number in listed.split(",") if number)


def _subjects(options: Options, export: Export, precision: str) -> list[Subject]:
    pair = export.pair(precision)
    decoder = Model.open(pair.decoder)
    level = accuracy(decoder, "auto", "fast", "cpu")
    recipes: dict[str, Recipe] = {
        "compatible": (*compatible(pair.embed), *accuracy(decoder, "auto", "compatible", "cpu")),
        "fast": (*fast(pair.embed), *level, *lut_products(decoder, level, "auto", "fast")),
    }
    if options.keep:
        recipes["fast, as published"] = fast(pair.embed)
    subjects = []
    for name, recipe in recipes.items():
        folder = options.work / f"{precision}-{name.replace(', ', '-')}"
        print(f"{precision} {name}", file=sys.stderr)
        build_folder(export, pair, recipe, folder, recipe_text=recipe_text(recipe), weights="link", force=True)
        subjects.append(Subject(name, folder, None))
    source = Subject("source", subjects[0].folder, pair)
    return [each for each in (source, *subjects) if each.name.partition(",")[0] in options.sides]


def _measure(subject: Subject, options: Options) -> list[str]:
    cells: list[str] = []
    if options.contexts and subject.pair is not None and options.made_up:
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            seconds, peak = alone.submit(_behind, subject.pair, options.contexts, options.source_tokens).result()
        cells = [f"{1000 * each:.0f} ms" for each in seconds] + [_gigabytes(peak)]
    elif options.contexts:
        decoding = _bench(subject, options.contexts, options.source_tokens if subject.pair else 16)
        cells = [f"{1000 / timing.decode_rate:.0f} ms" for timing in decoding.timings] + [_gigabytes(decoding.peak_rss)]
    for prompt in options.prompts:
        alone = _bench(subject, (prompt,), 2)
        cells += [f"{alone.timings[0].first_token_seconds:.1f} s", _gigabytes(alone.peak_rss)]
    return cells


def _bench(subject: Subject, contexts: Sequence[int], new_tokens: int) -> Benchmark:
    side = "source" if subject.pair is not None else "folder"
    found = measure(subject.folder, subject.pair, contexts=contexts, new_tokens=new_tokens, sides=(side,))
    return found[0]


def _behind(pair: GraphPair, contexts: Sequence[int], tokens: int) -> tuple[list[float], int]:
    """Seconds a token of the source's loop behind caches of made-up numbers, the first token left out, and the peak of
    memory."""
    source = TwoGraphModel.open(pair, Settings())
    found = []
    for context in contexts:
        loop = DecodeLoop(source, 1)
        past = Case("past", "", ((5,),), past=(context,), window=1)
        loop.begin(mask_of(past.past), made_up_caches(loop.cache, past, 0, "none"))
        step = loop.append(np.array([5]))
        started = time.perf_counter()
        for _ in range(tokens - 1):
            step = loop.append(step.greedy())
        found.append((time.perf_counter() - started) / (tokens - 1))
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _gigabytes(peak: int) -> str:
    return f"{peak / 1e9:.2f} GB"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
