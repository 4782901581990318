"""gemma4-surgery bench: how fast a folder is."""

from __future__ import annotations

from typing import Annotated

import typer

from surgery.commands.console import JobProgress, data, print_json
from surgery.commands.options import Against, Ep, FolderArgument, Json, Precision
from surgery.errors import RequestError


def bench(
    folder: FolderArgument,
    against: Against = None,
    precision: Precision = None,
    contexts: Annotated[str, typer.Option("--contexts", help="Lengths of the prompts, in tokens.")] = "128,1024,4096",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to generate after each.")] = 16,
    ep: Ep = "auto",
    as_json: Json = False,
) -> None:
    """Measure a folder in GenAI, and its source as two sessions: time to first token, rates, peak memory."""
    from surgery.commands.rendering import show_benchmarks
    from surgery.jobs.benchmarking import bench as run

    if not all(part.isdecimal() and int(part) for part in contexts.split(",")):
        raise RequestError(f"--contexts is {contexts!r}; whole numbers separated by commas are expected")
    lengths = [int(part) for part in contexts.split(",")]
    found = run(
        folder, against, precision=precision, provider=ep, contexts=lengths, new_tokens=new_tokens,
        listener=JobProgress(),
    )  # fmt: skip
    if as_json:
        print_json([one.to_dict() for one in found])
    else:
        show_benchmarks(data(), found)
