"""gemma4-surgery strip: the two graphs for text."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from surgery.commands.console import JobProgress, data, print_json
from surgery.commands.help import WRITTEN
from surgery.commands.options import (
    Corpus,
    Ep,
    Force,
    Json,
    Out,
    Precision,
    Private,
    Prove,
    PushTo,
    Revision,
    Source,
    Verbose,
    Vocabulary,
)


def strip(
    source: Source,
    target: Out,
    precision: Precision = None,
    weights: Annotated[
        Literal["copy", "link"],
        typer.Option(
            "--weights",
            rich_help_panel=WRITTEN,
            help="copy the weight files, or link them (shares the source's bytes).",
        ),
    ] = "copy",
    vocabulary: Vocabulary = None,
    corpus: Corpus = None,
    ep: Ep = "auto",
    validate: Prove = True,
    force: Force = False,
    revision: Revision = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=WRITTEN,
            help="List what would be written, and what the Hub would be asked for.",
        ),
    ] = False,
    push_to: PushTo = None,
    private: Private = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Make a text-only export: the two graphs of one precision, for two-session loops and transformers.js."""
    from surgery.commands.rendering import show_contents, show_download, show_stripped
    from surgery.jobs.stripping import StripOptions, plan_strip
    from surgery.jobs.stripping import strip as run

    options = StripOptions(
        precision=precision,
        weights=weights,
        vocabulary=vocabulary,
        corpus=corpus or (),
        provider=ep,
        validate=validate,
        force=force,
        revision=revision,
        push_to=push_to,
        private=private,
    )
    with JobProgress() as progress:
        if not dry_run:
            result = run(source, target, options, listener=progress)
        else:
            plan = plan_strip(source, options, listener=progress)
    if as_json:
        print_json(plan.to_dict() if dry_run else result.to_dict())
    elif not dry_run:
        show_stripped(data(), result, verbose=verbose)
    else:
        if plan.download is not None:
            show_download(data(), plan.download)
            data().print()
        show_contents(data(), plan.files, plan.destination)
