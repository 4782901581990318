"""gemma4-surgery generate: try the result."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.console import JobProgress
from surgery.printing import spoken


def generate(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A GenAI folder, or one with two graphs: an export, or a stripped one."),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture; repeatable. It stands where PROMPT says <|image|>.")
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option("--audio", help="A sound. It stands where PROMPT says <|audio|>.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="The most tokens to generate.")] = 128,
    sample: Annotated[
        bool, typer.Option("--sample", help="Use the folder's sampling values instead of greedy.")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Sample the same answer every time.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Of two graphs: which ones; default: the best for the CPU.")
    ] = None,
) -> None:
    """Try the result: one prompt through the real runtime, or through two sessions where there are two graphs."""
    from surgery.jobs.generating import generate as run

    pieces = run(
        folder, prompt, new_tokens=new_tokens, sample=sample, seed=seed, template=not raw,
        images=image or (), sounds=audio or (), precision=precision, listener=JobProgress(),
    )  # fmt: skip
    with contextlib.closing(pieces):  # its process ends also where nobody reads on
        for piece in pieces:
            sys.stdout.write(spoken(piece))
            sys.stdout.flush()
    sys.stdout.write("\n")
