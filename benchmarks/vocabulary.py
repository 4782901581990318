"""Repack full-size exports with fewer tokens: bytes on disk, memory, the work of a token, the work of the repack.

    python -m benchmarks.vocabulary WORK [FIXTURE:PRECISION[:TOKENS] ...]      default: E2B and E4B in q4f16
    python -m benchmarks.vocabulary --bytes WORK [...]      bytes of the weights alone; default: q4 and q2f16 too

Each export is built in WORK unless it is there, with a tokenizer of 262,144 tokens that is trained once. Which tokens stay
does not matter to these numbers: they are those of the Latin script, then the others in their order. Repacks run
without the proof. Work is processor time of all threads, which other programs on the machine change little: of the
repack, and of one token in GenAI on one thread, the least of eight behind a prompt of 16. The table is Markdown.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import run
from benchmarks.scale import CLI, source_of
from fixtures.gemma_tokenizer import SIZE, gemma_tokenizer, public_text
from passes.base import apply
from passes.presets import compatible, pruned
from surgery.graph.model import Model
from surgery.source.bpe_tokenizer import BpeTokenizer
from surgery.source.export import open_export
from surgery.source.kept_tokens import KeptTokens
from surgery.source.proposed_tokens import propose

SIZES = (SIZE, 131072, 65536, 32768)
TIMED = ("e2b:q4f16", "e4b:q4f16")
EXPORTS = (*TIMED, "e2b:q4", "e4b:q4", "e2b-qat:q2f16", "e4b-qat:q2f16")
DECODE = """
import json, resource, sys, time
import numpy as np, onnxruntime_genai as og
config = og.Config(sys.argv[1])
config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
model = og.Model(config)
params = og.GeneratorParams(model)
params.set_search_options(do_sample=False, min_length=32, max_length=32)
generator = og.Generator(model, params)
generator.append_tokens(np.arange(4, 20, dtype=np.int32))
generator.generate_next_token()
spent = []
for _ in range(8):
    started = time.process_time()
    generator.generate_next_token()
    spent.append(time.process_time() - started)
print(json.dumps([min(spent), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def tokenizer_of(work: Path) -> BpeTokenizer:
    path = work / "tokenizer.json"
    if not path.is_file():
        path.write_text(json.dumps(gemma_tokenizer(public_text(), SIZE), ensure_ascii=False), encoding="utf-8")
    return BpeTokenizer.read(path)


def list_of(work: Path, size: int) -> Path | None:
    """The file with the tokens that stay, written once; None for all."""
    path = work / f"{size}.txt"
    if size == SIZE:
        return None
    if not path.is_file():
        tokenizer = tokenizer_of(work)
        first = set(propose(tokenizer, {}, ["latin"], size).kept.ids)
        others = (token for token in sorted(tokenizer.texts) if token not in first)
        found = KeptTokens.of([*first, *(token for token, _ in zip(others, range(size - len(first)), strict=False))])
        path.write_text(found.text({}), encoding="utf-8")
    return path


def planned(work: Path, source: Path, size: int) -> str:
    """The weights that a repack would write."""
    export = open_export(source)
    (pair,) = export.pairs.values()
    found = list_of(work, size)
    recipe = pruned(compatible(pair.embed), KeptTokens.read(found) if found else None)
    model, _ = apply(Model.open(pair.decoder, export.architecture), recipe)
    count = sum(model.data_ends().values()) + sum(model.converted_files().values())
    return f"| {source.name} | {size:,} | {count / 1e9:.3f} GB |"


def measured(work: Path, source: Path, size: int) -> str:
    """One repack, and a few tokens of the folder."""
    target = work / "target"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, str(CLI), "repack", str(source), str(target), "--ep", "cpu", "--no-validate"]
    before = _spent()
    made = run([*command, *(["--vocabulary", str(found)] if (found := list_of(work, size)) else [])])
    spent = _spent() - before
    count = sum(path.stat().st_size for path in target.iterdir())
    done = subprocess.run([sys.executable, "-c", DECODE, str(target)], check=True, capture_output=True, text=True)
    seconds, memory = json.loads(done.stdout)
    shutil.rmtree(target)
    return (
        f"| {source.name} | {size:,} | {count / 1e9:.3f} GB | {memory / 1e9:.2f} GB | {1000 * seconds:.0f} ms "
        f"| {spent:.1f} s | {made.peak_rss / 1e6:.0f} MB |"
    )


def _spent() -> float:
    """Processor seconds of the processes that have ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word != "--bytes"]
    alone = "--bytes" in sys.argv
    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python -m benchmarks.vocabulary [--bytes] WORK [FIXTURE:PRECISION[:TOKENS] ...]")
    work = Path(arguments[0])
    work.mkdir(parents=True, exist_ok=True)
    heads = ["export", "tokens", "weights" if alone else "on disk"]
    heads += [] if alone else ["memory", "a token", "repack", "its peak memory"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for wanted in arguments[1:] or (EXPORTS if alone else TIMED):
        name, precision, *sizes = wanted.split(":")
        source = source_of(work, name, precision)
        if not alone and BpeTokenizer.read(source / "tokenizer.json").vocab.keys() != tokenizer_of(work).vocab.keys():
            shutil.copyfile(work / "tokenizer.json", source / "tokenizer.json")
        for size in map(int, sizes or SIZES):
            print((planned if alone else measured)(work, source, size), flush=True)


if __name__ == "__main__":
    main()
