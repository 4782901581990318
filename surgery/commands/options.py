"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from surgery.choices import Policy, ProviderChoice, WeightMode
from surgery.commands.help import COUNTS, GENERAL, MADE, RUNTIME, SOURCE, WRITTEN

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A Hub repository (owner/name, owner/name@revision), or the folder of an export."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")]
FolderArgument = Annotated[
    str,
    typer.Argument(metavar="FOLDER", help="A GenAI folder, as repack writes it; or a Hub repository that holds one."),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        rich_help_panel=SOURCE,
        metavar="SRC",
        help="The export it was made from: a folder, or a Hub repository.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        rich_help_panel=SOURCE,
        help="fp32, fp16, q4, q4f16, quantized or q2f16; default: the best for the provider.",
    ),
]
Ep = Annotated[
    ProviderChoice,
    typer.Option("--ep", rich_help_panel=RUNTIME, help="Execution provider; auto takes cuda where a GPU can be used."),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=GENERAL, help="Print JSON for programs.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", rich_help_panel=GENERAL, help="Print every pass with its findings, and every gate."
    ),
]
Force = Annotated[bool, typer.Option("--force", rich_help_panel=WRITTEN, help="Replace what is there.")]
Place = Annotated[
    WeightMode,
    typer.Option(
        "--weights",
        rich_help_panel=WRITTEN,
        help="copy the weight files, link them (shares the source's bytes), or consolidate them into one file.",
    ),
]
Prove = Annotated[
    bool,
    typer.Option(
        "--validate/--no-validate",
        rich_help_panel=WRITTEN,
        help="Prove the folder against the source before it appears.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", rich_help_panel=SOURCE, help="Branch, tag or commit of a Hub repository; default: main."
    ),
]
Vocabulary = Annotated[
    Path | None,
    typer.Option(
        "--vocabulary",
        rich_help_panel=MADE,
        metavar="FILE",
        help="Tokens that stay, one id a line; `vocabulary` proposes such a list.",
    ),
]
Corpus = Annotated[
    list[Path] | None,
    typer.Option(
        "--corpus",
        rich_help_panel=MADE,
        metavar="FILE",
        help="Text that the vocabulary is proven with, beside what is shipped; repeatable.",
    ),
]
EVERY_ASPECT = "interface,caches,metadata,nodes,weights,names,config,files"
FailOn = Annotated[
    str,
    typer.Option(
        "--fail-on",
        rich_help_panel=COUNTS,
        metavar="ASPECTS",
        show_default="all",
        help="Exit with 1 only if one of these differs; none: never.",
    ),
]
PolicyOption = Annotated[
    Policy | None,
    typer.Option(
        "--policy",
        rich_help_panel=COUNTS,
        help="Exit with 1 from this on, in place of --fail-on; numerics: numbers may differ.",
    ),
]
Ignore = Annotated[
    str,
    typer.Option(
        "--ignore", rich_help_panel=COUNTS, metavar="ASPECTS", help="Show these, but do not count them as differences."
    ),
]
ReportForm = Annotated[
    Literal["terminal", "md", "json", "html", "svg", "junit", "github"],
    typer.Option(
        "--format",
        rich_help_panel=WRITTEN,
        help="md is for pull requests, html is one page, svg one picture, junit for CI, github for annotations in its log.",
    ),
]
ReportFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        rich_help_panel=WRITTEN,
        help="Write .md, .json, .html, .svg or .xml (JUnit) to this file; repeatable.",
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        rich_help_panel=WRITTEN,
        metavar="REPO",
        help="Upload the folder to this Hub repository (owner/name).",
    ),
]
Private = Annotated[
    bool, typer.Option("--private", rich_help_panel=WRITTEN, help="The repository of --push-to is a private one.")
]
