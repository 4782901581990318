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
    chunk: Annotated[
        int, typer.Option("--chunk", min=0, help="Tokens of a prompt in one run, as in generate; 0: all at once.")
    ] = 512,
    profiled: Annotated[
        bool, typer.Option("--profile", help="Say where the folder's time goes, by operator and kind of layer.")
    ] = False,
    ep: Ep = "auto",
    as_json: Json = False,
) -> None:
    """Measure a folder in GenAI, and its source as two sessions: time to first token, rates, peak memory."""
    from surgery.commands.rendering import show_benchmarks, show_profiles
    from surgery.jobs.benchmarking import bench as run
    from surgery.jobs.benchmarking import profile

    if not all(part.isdecimal() and int(part) for part in contexts.split(",")):
        raise RequestError(f"--contexts is {contexts!r}; whole numbers separated by commas are expected")
    lengths = [int(part) for part in contexts.split(",")]
    if profiled and (against is not None or precision is not None):
        raise RequestError("--profile looks at the folder alone: leave out --against and --precision")
    if profiled:
        profiles = profile(
            folder, provider=ep, contexts=lengths, new_tokens=new_tokens, chunk=chunk, listener=JobProgress()
        )
        if as_json:
            print_json([one.to_dict() for one in profiles])
        else:
            show_profiles(data(), profiles)
        return
    found = run(
        folder, against, precision=precision, provider=ep, contexts=lengths, new_tokens=new_tokens,
        chunk=chunk, listener=JobProgress(),
    )  # fmt: skip
    if as_json:
        print_json([one.to_dict() for one in found])
    else:
        show_benchmarks(data(), found)
