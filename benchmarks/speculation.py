"""What speculation gains and costs: a folder with it beside one without, on texts that repeat themselves and on one that
does not.

    python -m benchmarks.speculation WORK EXPORT [--precision q4f16] [--tokens 128]

Both folders are made in WORK, unless they are there, their weights linked to the export's. The tokens of both are compared; a run is one call of
the graph. The prompts mean something to a model with trained weights alone: with random ones the last columns say what
the runtime's checks cost, and not how often a real model's guesses are right.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from surgery import RepackOptions, repack
from surgery.errors import FolderError
from surgery.runtime.genai import GenAI, encode, render

TEXT = (
    "The harbour wall was built in 1787. At low tide the boats lie on the sand, and at high tide they turn with the wind. "
    "The pilot reads the height of the tide from a board at the end of the wall, and writes it down twice a day."
)
CODE = """def total_price(items, tax):
    total = 0
    for item in items:
        total = total + item.price * item.count
    total = total + total * tax
    return total
"""
PROMPTS = {
    "echo": f"Repeat this text word by word, and say nothing else:\n\n{TEXT}",
    "code editing": f"Rename the variable total to amount, and give back the whole function:\n\n```python\n{CODE}```",
    "free text": "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
}


def answered(genai: GenAI, ids: list[int], tokens: int) -> tuple[list[int], float, int]:
    """Greedy tokens, the seconds behind the prompt, and the runs of the graph that they took."""
    generator: Any = genai.generator(do_sample=False, max_length=len(ids) + tokens)
    generator.append_tokens(ids)
    started = time.perf_counter()
    while not generator.is_done():
        generator.generate_next_token()
    took = time.perf_counter() - started
    found = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
    stats = generator.get_speculative_stats()
    runs = stats["target_forward_passes"] + stats["standard_fallback_steps"] if stats.get("rounds") else len(found)
    return found, took, runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure folders with and without speculation.")
    parser.add_argument("work", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--precision")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    opened = {}
    for name, speculative in (("without", False), ("with", True)):
        wanted = RepackOptions(
            preset="fast", precision=options.precision, weights="link", validate=False, speculative=speculative
        )
        if not (options.work / name).exists():
            repack(options.export, options.work / name, wanted)
        opened[name] = GenAI(options.work / name, "cpu")
    print("| text | tokens | same | tokens a second without | with | | tokens a run |\n|---|---|---|---|---|---|---|")
    for name, prompt in PROMPTS.items():
        tokenizer = opened["with"].tokenizer()
        ids = encode(tokenizer, render(tokenizer, prompt))
        best: dict[str, tuple[list[int], float, int]] = {}
        for _ in range(options.rounds):  # by turns: what else the machine does meets both
            for which, genai in opened.items():
                found = answered(genai, ids, options.tokens)
                best[which] = min(best.get(which, found), found, key=lambda one: one[1])
        (plain, slow, _), (guessed, quick, runs) = best["without"], best["with"]
        if not guessed:
            raise FolderError(f"{name}: there is no answer")
        print(
            f"| {name} | {len(guessed)} | {'yes' if plain == guessed else 'NO'} | {len(plain) / slow:.1f} "
            f"| {len(guessed) / quick:.1f} | x{slow / quick:.2f} | {len(guessed) / runs:.1f} |"
        )


if __name__ == "__main__":
    main()
