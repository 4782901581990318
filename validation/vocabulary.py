"""python -m validation.vocabulary WORK: is a tokenizer of the published size, made smaller, the same on every token that stays?

A tokenizer of 262,144 tokens is trained on the text that the machine has (fixtures.gemma_tokenizer) and made smaller in
several ways; the gates of the closing proof then hold the two against each other, over that text too. Prints a table, and
writes it to docs/validation/vocabulary.md with --write. About two minutes where WORK has the tokenizer already.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from benchmarks.vocabulary import tokenizer_of
from fixtures.gemma_tokenizer import public_text
from surgery.runtime.token_counts import count_tokens
from surgery.source.bpe_tokenizer import BpeTokenizer
from surgery.source.corpus import held_out_lines
from surgery.source.kept_tokens import VOCABULARY_FILE
from surgery.source.proposed_tokens import propose
from surgery.verify.vocabulary_proof import vocabulary_gates

PAGE = Path(__file__).parent.parent / "docs" / "validation" / "vocabulary.md"
CASES: tuple[tuple[int, list[str]], ...] = (
    (32768, ["latin"]),
    (65536, ["latin"]),
    (65536, ["latin", "cyrillic", "cjk"]),
    (131072, []),
)
CHARACTERS, HELD_OUT = 30_000_000, 3_000_000
"""Of the corpus, and of its held-out part that the gates go over."""
HEAD = "| tokens | scripts | propose | prune | " + " | ".join(
    ("one to one", "characters per token", "other texts come back")
) + " |\n|---|---|---|---|---|---|---|"  # fmt: skip


def main(work: Path, *, write: bool) -> int:
    """0 where every gate passes."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, corpus = tokenizer_of(work), _corpus(work / "corpus.txt")
    counts = dict(count_tokens(work / "tokenizer.json", [corpus]).counts)
    lines = held_out_lines([corpus], HELD_OUT)
    passed, rows = True, [HEAD]
    for size, scripts in CASES:
        row, good = _case(work, tokenizer, counts, lines, size, scripts)
        rows.append(row)
        passed = passed and good
    text = "\n".join(rows)
    print(text)
    if write:
        PAGE.write_text(f"# A tokenizer of 262,144 tokens, made smaller\n\n`{__doc__.split(':')[0]}`\n\n{text}\n")
    return 0 if passed else 1


def _corpus(path: Path) -> Path:
    """A part of each text in turn, so that every language is in it."""
    if not path.is_file():
        texts = (text[:200_000] for text in public_text())
        path.write_text("\n".join(_up_to(texts, CHARACTERS)), encoding="utf-8", errors="replace")
    return path


def _up_to(texts: Iterable[str], most: int) -> Iterable[str]:
    """Every third text, until there are so many characters."""
    for text in islice(texts, 0, None, 3):
        yield text
        if (most := most - len(text)) < 0:
            return


def _case(
    work: Path, tokenizer: BpeTokenizer, counts: dict[int, int], lines: tuple[str, ...], size: int, scripts: list[str]
) -> tuple[str, bool]:
    folder = work / "pruned"
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    kept = propose(tokenizer, counts, scripts, size).kept
    proposed = time.perf_counter()
    tokenizer.check(kept)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.pruned(kept)), encoding="utf-8")
    pruned = time.perf_counter()
    (folder / VOCABULARY_FILE).write_text(kept.text({}), encoding="utf-8")
    gates = {gate.name: gate for gate in vocabulary_gates(folder, work, kept, lines)}
    for gate in gates.values():
        print(f"{'ok  ' if gate.passed else 'FAIL'}  {gate.name}: {gate.detail}", file=sys.stderr)
    same, back = (gate for name, gate in gates.items() if name.startswith("the corpus: "))
    texts, _, letters = back.detail.partition(", ")
    found = [
        f"{len(kept):,}",
        ", ".join(scripts) or "by count",
        f"{proposed - started:.1f} s",
        f"{pruned - proposed:.1f} s",
    ]
    found += [same.detail, letters, f"{texts}, {back.found} faults"]
    return f"| {' | '.join(found)} |", all(gate.passed for gate in gates.values())


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m validation.vocabulary WORK [--write]")
    sys.exit(main(Path(sys.argv[1]), write="--write" in sys.argv))
