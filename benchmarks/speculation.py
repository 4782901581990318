"""What speculation gains and costs: a folder with it beside one without, on answers that repeat what was said and on one
that does not.

    python -m benchmarks.speculation WORK EXPORT [--precision q4] [--only echo/with] [--threads 1]

Random weights say nothing of what a model would repeat, so the answers are scripted: behind the logits of both folders one
node raises the score of the next word of a text, and everything before it is computed as ever. What is measured is then
a model of this size that gives exactly this answer; a word, a digit or a sign is one token. `prompt` is a prompt of 512
tokens alone, which a speculating folder reads with logits for each of them.

A piece is one text on one side. What it took is kept in WORK/taken.json, and a run goes on with the pieces that are not
there; --only does one. Seconds are the processor's, which other work on the machine hardly changes; --threads 0 takes
the clock's, with all cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from surgery import RepackOptions, repack
from surgery.graph.model import Model
from surgery.runtime.benchmark import random_prompt
from surgery.runtime.genai import GenAI

_TIDE = (
    "The harbour wall was built in 1787. At low tide the boats lie on the sand, and at high tide they turn with the wind. "
    "The pilot reads the height of the tide from a board at the end of the wall, and writes it down twice a day."
)
_CODE = """def price(items, tax):
    total = 0
    for item in items:
        total = total + item.price * item.count
    if tax is not None:
        total = total + total * tax
    return round(total, 2)
"""
_STORY = (
    "Every night Marie climbed ninety steps with oil for the lamp. One morning a green bottle rolled between rocks below, "
    "its cork sealed by wax. Inside lay paper, folded small: someone named Tomas asked whoever found this to plant an "
    "apple tree. She had no garden, only gulls and stone. Still, that spring, in a barrel of earth carried up by mule, "
    "something thin and brave put out two leaves."
)
TEXTS = {
    "echo": (f"Repeat this text word by word, and say nothing else:\n\n{_TIDE}", _TIDE),
    "code": (
        f"Rename the variable total to amount, and give back the whole function:\n\n{_CODE}",
        _CODE.replace("total", "amount"),
    ),
    "free": ("Write a short story about a lighthouse keeper who finds a letter in a bottle.", _STORY),
}
"""Name -> prompt and answer."""
SIDES = ("without", "with")
_FIRST_ID, _WORD = 1000, re.compile(r" ?[A-Za-z]+|\d| {2,}|\n|[^\w\s]|\s")
"""Ids of words begin behind those that mean something to the runtime."""


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of the prompt and of the answer, the answer's tokens, and the runs of the graph that these took."""

    prompt: float
    answer: float
    tokens: list[int]
    runs: int


def ids_of(texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that share their words."""
    words: dict[str, int] = {}
    return [[words.setdefault(word, _FIRST_ID + len(words)) for word in _WORD.findall(text)] for text in texts]


def scripted(folder: Path, target: Path, script: Sequence[int]) -> Path:
    """A copy of a folder, its weights linked, that says `script` from wherever it stands in it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("model.onnx*", "manifest.json", "report.*"))
    model = Model.open(folder / "model.onnx")
    graph = model.proto.graph
    for node in graph.node:
        node.output[:] = ["script/before" if name == "logits" else name for name in node.output]
    values = {
        "words": np.array(list(script), np.int64),
        "score": np.array([1e4], np.float32),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, f"script/{name}") for name, value in values.items())
    graph.node.extend(
        helper.make_node(op, [_named(name) for name in inputs], [_named(output)], f"script/{output}", **more)
        for op, inputs, output, more in _nodes()
    )
    model.save(target / "model.onnx", weights="link")
    return target


def _named(name: str) -> str:
    return name if name in ("attention_mask", "logits") else f"script/{name}"


def _nodes() -> Iterator[tuple[str, list[str], str, dict[str, Any]]]:
    """Logits are [1, rows, vocabulary]; the row behind `total` tokens says word `total`."""
    yield "Shape", ["before"], "rows", {"start": 1, "end": 2}
    yield "Shape", ["attention_mask"], "total", {"start": 1, "end": 2}
    yield "Add", ["total", "one"], "end", {}
    yield "Sub", ["end", "rows"], "begin", {}
    yield "Slice", ["words", "begin", "end"], "next", {}
    yield "Shape", ["next"], "count", {}
    yield "Unsqueeze", ["next", "last"], "column", {}
    yield "Unsqueeze", ["column", "zero"], "places", {}
    yield "Expand", ["score", "count"], "scores", {}
    yield "Unsqueeze", ["scores", "last"], "scores/column", {}
    yield "Unsqueeze", ["scores/column", "zero"], "updates", {}
    yield "ScatterElements", ["before", "places", "updates"], "logits", {"axis": 2}


def took(genai: GenAI, ids: list[int], tokens: int, clock: Callable[[], float]) -> Took:
    """One prompt, and its answer of so many tokens."""
    generator: Any = genai.generator(do_sample=False, max_length=len(ids) + tokens)
    began = clock()
    generator.append_tokens(ids)
    generator.get_logits()
    read = clock()
    while not generator.is_done():
        generator.generate_next_token()
    done = clock()
    found = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
    stats = generator.get_speculative_stats()
    runs = stats["target_forward_passes"] + stats["standard_fallback_steps"] if stats.get("rounds") else len(found) - 1
    return Took(read - began, done - read, found, runs)


def measured(options: argparse.Namespace, text: str, side: str) -> Took:
    """One piece. The folder is made where it is not there."""
    folder = options.work / side
    if not folder.exists():
        wanted = RepackOptions(
            preset="fast", precision=options.precision, weights="link", validate=False, speculative=side == "with"
        )
        repack(options.export, folder, wanted)
    asked, answer = (random_prompt(512, _FIRST_ID), [_FIRST_ID]) if text == "prompt" else ids_of(TEXTS[text])
    made = scripted(folder, options.work / f"{side}-scripted", [*asked, *answer, _FIRST_ID])
    set_threads(made, options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    genai = GenAI(made, "cpu")
    took(genai, asked[:8], 2, clock)  # the pages of the weights are there from here on
    return took(genai, asked, len(answer), clock)


def set_threads(folder: Path, threads: int) -> None:
    """Have the runtime use so many threads; 0 leaves it to ONNX Runtime."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure folders with and without speculation.")
    parser.add_argument("work", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--precision", default="q4")
    parser.add_argument("--only", help="one piece: TEXT/with or TEXT/without")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "taken.json"
    taken = {name: Took(**one) for name, one in (json.loads(kept.read_text()) if kept.exists() else {}).items()}
    for name in [options.only] if options.only else [f"{text}/{side}" for text in (*TEXTS, "prompt") for side in SIDES]:
        if name not in taken or options.only:
            taken[name] = measured(options, *name.split("/"))
            kept.write_text(json.dumps({name: asdict(one) for name, one in taken.items()}))
            one = taken[name]
            told = f"{name}: prompt {one.prompt:.1f} s, answer {one.answer:.1f} s in {one.runs} runs"
            print(told, file=sys.stderr, flush=True)
    show(taken)


def show(taken: Mapping[str, Took]) -> None:
    """The table of the texts that both sides were measured on."""
    both = {
        text: (taken[f"{text}/without"], taken[f"{text}/with"])
        for text in (*TEXTS, "prompt")
        if all(f"{text}/{side}" in taken for side in SIDES)
    }
    print("| text | tokens | same | tokens a run | ms a token without | with | |\n|---|---|---|---|---|---|---|")
    for text, (plain, guessed) in both.items():
        if text == "prompt":
            print(f"\na prompt of 512: {plain.prompt:.1f} s without, {guessed.prompt:.1f} s with")
            continue
        answer = ids_of(TEXTS[text])[1]
        after = len(answer) - 1
        print(
            f"| {text} | {len(answer)} | {'yes' if plain.tokens == guessed.tokens == answer else 'NO'} "
            f"| {after / guessed.runs:.1f} | {1000 * plain.answer / after:.0f} | {1000 * guessed.answer / after:.0f} "
            f"| x{plain.answer / guessed.answer:.2f} |"
        )


if __name__ == "__main__":
    main()
