"""python -m validation.transformers_js WORK: does transformers.js read what `strip` writes, and answer as surgery.runtime.two_graphs does?

Installs the library from the npm registry into WORK, strips the small export in each precision, and compares greedy
tokens. Needs node and npm; prints a table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from surgery.commands.rendering import show_rows
from surgery.folder.text_only import build_text_only
from surgery.runtime.decoding import generate_tokens
from surgery.runtime.sessions import Settings
from surgery.runtime.two_graphs import TwoGraphModel, open_two_graphs
from surgery.source.export import open_export
from surgery.source.kept_tokens import KeptTokens
from surgery.source.pruned_export import pruned_export

VERSION = "4.3.1"
SOURCE = Path(__file__).parent.parent / "fixtures" / "tiny-e2b"
PROGRAM = Path(__file__).with_suffix(".mjs")
PROMPTS = [[2], [2, 88, 115, 75, 99, 107, 31, 9], [2, 40, 38, 112, 117, 3, 65, 105, 19]]
TOKENS = 12
LETTERS = KeptTokens.of(set(range(128)) - {*range(99, 105), 108, 110, 112, 115, *range(117, 125), 126, 127})
"""Without the tokens that are merged from others."""


def main(work: Path) -> int:
    """0 where every way of loading gives the tokens, 1 where one does not."""
    library = install(work)
    export, rows = open_export(SOURCE), []
    for precision in export.pairs:
        folder = work / f"stripped-{precision}"
        build_text_only(export, export.pair(precision), folder, force=True)
        rows += answers(precision, folder, library, PROMPTS)
    with TemporaryDirectory() as place:
        small, pair = pruned_export(export, export.pair("q4"), LETTERS, Path(place))
        build_text_only(small, pair, work / "stripped-tokens", force=True)
        assert pair.kept is not None
        prompts = [[pair.kept.ids.index(token) for token in prompt if token in pair.kept] for prompt in PROMPTS]
        rows += answers(f"q4, {len(pair.kept)} of 128 tokens", work / "stripped-tokens", library, prompts)
    from rich.console import Console

    show_rows(Console(width=120), f"transformers.js {VERSION}, node, CPU", ("precision", "way", "tokens"), rows)
    return 0 if all(row[2] == told(0, 0) for row in rows) else 1


def answers(name: str, folder: Path, library: Path, prompts: list[list[int]]) -> list[tuple[str, str, str]]:
    """One row for each way of loading a folder."""
    wanted = expected(folder, prompts)
    command = ["node", str(PROGRAM), str(folder), str(library), json.dumps(prompts)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return [(name, way, told(tokens, wanted)) for way, tokens in found.items()]


def install(work: Path) -> Path:
    """The module to import. Without install scripts: onnxruntime-node brings its CPU library along."""
    work.mkdir(parents=True, exist_ok=True)
    package = f"@huggingface/transformers@{VERSION}"
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", package]
    subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
    return work.absolute() / "node_modules" / "@huggingface" / "transformers" / "dist" / "transformers.node.mjs"


def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, each prompt on its own."""
    opened = open_two_graphs(folder)
    model = TwoGraphModel.open(opened.pair, Settings())
    return [
        [token for (token,) in generate_tokens(model, [ids], new_tokens=TOKENS, stop=opened.stop) if token is not None]
        for ids in prompts
    ]


def told(tokens: Any, wanted: Any) -> str:
    return "surgery.runtime.two_graphs's" if tokens == wanted else str(tokens)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
