"""gemma4-surgery vocabulary: which tokens to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.console import JobProgress, data, print_json, say
from surgery.commands.options import Json, Precision, Revision, Source


def vocabulary(
    source: Source,
    corpus: Annotated[
        list[Path],
        typer.Option("--corpus", metavar="FILE", help="Text that your application reads and writes; repeatable."),
    ],
    target: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The list to write; it must not exist.")
    ],
    keep_scripts: Annotated[
        str,
        typer.Option(
            "--keep-scripts", help="Scripts whose letters stay, and whose tokens fill up: latin,cyrillic,cjk,..."
        ),
    ] = "",
    size: Annotated[
        int | None, typer.Option("--size", help="Tokens that stay at most; default: all that the corpus uses.")
    ] = None,
    precision: Precision = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Propose the tokens that stay, for repack and strip --vocabulary: what a corpus uses, and what every text needs."""
    from surgery.commands.rendering import show_vocabulary
    from surgery.jobs.proposing import VocabularyOptions
    from surgery.jobs.proposing import vocabulary as propose

    scripts = [name.strip() for name in keep_scripts.split(",") if name.strip()]
    with JobProgress() as progress:
        options = VocabularyOptions(corpus, scripts, size, precision, revision)
        found = propose(source, target, options, listener=progress)
    say(f"wrote      {found.path}")
    if as_json:
        print_json(found.to_dict())
    else:
        show_vocabulary(data(), found)
