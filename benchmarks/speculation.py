"""What speculation gains and costs: a folder with it beside one without, on answers that repeat what was said and on one
that does not.

    python -m benchmarks.speculation WORK EXPORT [--precision q4] [--texts echo,code,free] [--prompt 512]

Random weights say nothing that repeats, so the answers are scripted: behind the logits of both folders one node raises
the score of the next word of a text, and everything before it is computed as ever. What is measured is then a model of
this size that gives exactly this answer; a word, a number or a sign is one token. Each row is printed when it is
measured, and a text is about a minute at E2B's size on one core: run them one by one where time is short. The folders
are made in WORK, unless they are there, with links to the export's weights. --prompt measures a prompt of that many
tokens too, which a speculating folder reads with logits for each of them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
_FIRST_ID, _WORD = 1000, re.compile(r" ?[A-Za-z]+|\d| {2,}|\n|[^\w\s]|\s")
"""Ids of words begin behind those that mean something to the runtime."""


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of the prompt and of the answer, the answer's tokens, and the runs of the graph that these took."""

    prompt: float
    answer: float
    tokens: tuple[int, ...]
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


def took(genai: GenAI, ids: list[int], tokens: int) -> Took:
    """One prompt, and its answer of so many tokens."""
    generator: Any = genai.generator(do_sample=False, max_length=len(ids) + tokens)
    began = time.perf_counter()
    generator.append_tokens(ids)
    generator.get_logits()
    read = time.perf_counter()
    while not generator.is_done():
        generator.generate_next_token()
    done = time.perf_counter()
    found = tuple(int(token) for token in generator.get_sequence(0)[len(ids) :])
    stats = generator.get_speculative_stats()
    runs = stats["target_forward_passes"] + stats["standard_fallback_steps"] if stats.get("rounds") else len(found) - 1
    return Took(read - began, done - read, found, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure folders with and without speculation.")
    parser.add_argument("work", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--precision", default="q4")
    parser.add_argument("--texts", default=",".join(TEXTS))
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prompt to measure alone")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    folders = {name: options.work / name for name in ("without", "with")}
    for name, folder in folders.items():
        wanted = RepackOptions(
            preset="fast", precision=options.precision, weights="link", validate=False, speculative=name == "with"
        )
        if not folder.exists():
            repack(options.export, folder, wanted)
    print("| text | tokens | same | tokens a run | tokens a second without | with | |\n|---|---|---|---|---|---|---|")
    for text in options.texts.split(",") if options.texts else ():
        asked, answer = ids_of(TEXTS[text])
        script = [*asked, *answer, _FIRST_ID]
        opened = {
            name: GenAI(scripted(folder, options.work / f"{name}-{text}", script), "cpu")
            for name, folder in folders.items()
        }
        best = _best(opened, asked, len(answer), options.rounds)
        plain, guessed = best["without"], best["with"]
        same = plain.tokens == guessed.tokens == tuple(answer)
        rates = [(len(answer) - 1) / each.answer for each in (plain, guessed)]
        print(
            f"| {text} | {len(answer)} | {'yes' if same else 'NO'} | {(len(answer) - 1) / guessed.runs:.1f} "
            f"| {rates[0]:.1f} | {rates[1]:.1f} | x{rates[1] / rates[0]:.2f} |",
            flush=True,
        )
    if options.prompt:
        ids = random_prompt(options.prompt, _FIRST_ID)
        best = _best({name: GenAI(folder, "cpu") for name, folder in folders.items()}, ids, 1, options.rounds)
        print(
            f"\na prompt of {options.prompt}: {best['without'].prompt:.1f} s without, {best['with'].prompt:.1f} s with"
        )


def _best(opened: dict[str, GenAI], ids: list[int], tokens: int, rounds: int) -> dict[str, Took]:
    """The quickest of the rounds, taken by turns: what else the machine does meets both."""
    best: dict[str, Took] = {}
    for _ in range(rounds):
        for name, genai in opened.items():
            found = took(genai, ids, tokens)
            best[name] = min(best.get(name, found), found, key=lambda one: one.prompt + one.answer)
    return best


if __name__ == "__main__":
    main()
