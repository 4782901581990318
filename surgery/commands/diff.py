"""gemma4-surgery diff: what differs between two models."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from surgery.commands.console import data, say, say_commands
from surgery.commands.help import COUNTS, WRITTEN
from surgery.commands.options import (
    EVERY_ASPECT,
    FailOn,
    Ignore,
    Json,
    PolicyOption,
    Precision,
    ReportFiles,
    ReportForm,
)


def diff(
    before: Annotated[
        str,
        typer.Argument(
            metavar="BEFORE", help="An .onnx file, an export or a GenAI folder; the last two may be Hub repositories."
        ),
    ],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="What to compare it with: any of the three.")],
    precision: Precision = None,
    form: ReportForm = "terminal",
    output: ReportFiles = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", rich_help_panel=WRITTEN, help="On a terminal: every change, not the first of each kind."
        ),
    ] = False,
    weights: Annotated[
        Literal["auto", "reference", "digest"],
        typer.Option(
            "--weights",
            rich_help_panel=COUNTS,
            help="reference: by file digest, offset and length; digest: read them; auto: read small ones.",
        ),
    ] = "auto",
    numbers: Annotated[
        Path | None,
        typer.Option(
            "--numbers",
            rich_help_panel=COUNTS,
            help="What validate --json printed of AFTER; default: what repack recorded.",
        ),
    ] = None,
    policy: PolicyOption = None,
    fail_on: FailOn = EVERY_ASPECT,
    ignore: Ignore = "none",
    as_json: Json = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            rich_help_panel=COUNTS,
            metavar="REPORT",
            help="Exit with 1 if this report is not the one of these two.",
        ),
    ] = None,
) -> None:
    """Report what differs between two models. Exit code 0: nothing; 1: something; 2: trouble."""
    from surgery.compare.comparison import read_aspects
    from surgery.compare.formats import FORMATS, is_current, known_suffix
    from surgery.compare.impact import impact_of
    from surgery.compare.review_formats import FORMATS as JUDGED
    from surgery.compare.review_formats import SUFFIXES as WRITTEN_TO
    from surgery.compare.review_formats import Judged
    from surgery.compare.terminal import show_comparison
    from surgery.files.atomic import write_file
    from surgery.jobs.diffing import diff as run

    form = "json" if as_json else form
    formats = {path: known_suffix(path, WRITTEN_TO) if form == "terminal" else form for path in output or ()}
    failing = read_aspects(fail_on)
    compared = functools.partial(
        run, before, after, precision=precision, weights=weights, ignore=read_aspects(ignore), numbers=numbers
    )
    found = compared()
    if check is not None:
        # What repack wrote goes by the digests of its own manifest, which a later comparison has to read the files for.
        if not is_current(check, found) and not is_current(check, compared(manifests="read")):
            sys.stderr.write(f"error: {check} is not the report of these two; diff with --output {check} writes it\n")
            raise typer.Exit(1)
        say(f"{check} is the report of these two")
        return
    fails = found.fails(failing) if policy is None else impact_of(found).fails(policy)

    def text_in(wanted: str) -> str:
        return FORMATS[wanted](found) if wanted in FORMATS else JUDGED[wanted](Judged.one(before, after, found, fails))

    for path, written in formats.items():
        write_file(path, text_in(written).encode())
        say(f"wrote      {path}")
    if not formats and form == "terminal":
        show_comparison(data(), found, full=full)
    elif not formats and form == "github":
        say_commands(text_in(form))
    elif not formats:
        sys.stdout.write(text_in(form))
    raise typer.Exit(1 if fails else 0)
