"""Repack full-size exports with fewer tokens: bytes on disk, memory, milliseconds a token, seconds of the repack.

    python -m benchmarks.vocabulary WORK [FIXTURE:PRECISION[:TOKENS] ...]      default: E2B and E4B in q4f16, q4 and q2f16
    python -m benchmarks.vocabulary --bytes WORK [...]      bytes on disk alone, which other work on the machine does not change

Each export is built in WORK unless it is there, with a tokenizer of 262,144 tokens that is trained once. Which tokens stay
does not matter to these numbers: they are those of the Latin script, then the others in their order. Repacks run
without the proof; a folder decodes a few tokens behind short prompts, in GenAI. The table is Markdown.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks.measure import run
from benchmarks.scale import CLI, source_of
from fixtures.gemma_tokenizer import SIZE, gemma_tokenizer, public_text
from surgery.runtime.benchmark import Benchmark, measure
from surgery.source.bpe_tokenizer import BpeTokenizer
from surgery.source.kept_tokens import KeptTokens
from surgery.source.proposed_tokens import propose

SIZES = (SIZE, 131072, 65536, 32768)
EXPORTS = ("e2b:q4f16", "e2b:q4", "e2b-qat:q2f16", "e4b:q4f16", "e4b:q4", "e4b-qat:q2f16")
CONTEXTS, TOKENS = tuple(range(16, 40, 3)), 5
"""Several short prompts, a few tokens behind each: the quickest of them was disturbed the least."""


def tokenizer_of(work: Path) -> BpeTokenizer:
    path = work / "tokenizer.json"
    if not path.is_file():
        path.write_text(json.dumps(gemma_tokenizer(public_text(), SIZE), ensure_ascii=False), encoding="utf-8")
    return BpeTokenizer.read(path)


def list_of(work: Path, size: int) -> Path:
    """The file with the tokens that stay, written once."""
    path = work / f"{size}.txt"
    if not path.is_file():
        tokenizer = tokenizer_of(work)
        first = set(propose(tokenizer, {}, ["latin"], size).kept.ids)
        others = (token for token in sorted(tokenizer.texts) if token not in first)
        found = KeptTokens.of([*first, *(token for token, _ in zip(others, range(size - len(first)), strict=False))])
        path.write_text(found.text({}), encoding="utf-8")
    return path


def row(work: Path, source: Path, size: int, *, timed: bool) -> str:
    target = work / "target"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, str(CLI), "repack", str(source), str(target), "--ep", "cpu", "--no-validate"]
    made = run(command if size == SIZE else [*command, "--vocabulary", str(list_of(work, size))])
    count = sum(path.stat().st_size for path in target.iterdir())
    if not timed:
        shutil.rmtree(target)
        return f"| {source.name} | {size:,} | {count / 1e9:.2f} GB |"
    found: Benchmark = measure(target, None, contexts=CONTEXTS, new_tokens=TOKENS)[0]
    shutil.rmtree(target)
    milliseconds = 1000 / max(timing.decode_rate for timing in found.timings)
    return (
        f"| {source.name} | {size:,} | {count / 1e9:.2f} GB | {found.peak_rss / 1e9:.2f} GB | {milliseconds:.0f} ms "
        f"| {made.seconds:.1f} s | {made.peak_rss / 1e6:.0f} MB |"
    )


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word != "--bytes"]
    timed = "--bytes" not in sys.argv
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python -m benchmarks.vocabulary [--bytes] WORK [FIXTURE:PRECISION[:TOKENS] ...]")
    work = Path(arguments[0])
    work.mkdir(parents=True, exist_ok=True)
    heads = [
        "export",
        "tokens",
        "on disk",
        *(["memory", "decode, a token", "repack", "its peak memory"] if timed else []),
    ]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for wanted in arguments[1:] or EXPORTS:
        name, precision, *sizes = wanted.split(":")
        source = source_of(work, name, precision)
        if BpeTokenizer.read(source / "tokenizer.json").vocab.keys() != tokenizer_of(work).vocab.keys():
            shutil.copyfile(work / "tokenizer.json", source / "tokenizer.json")
        for size in map(int, sizes or SIZES):
            print(row(work, source, size, timed=timed), flush=True)


if __name__ == "__main__":
    main()
