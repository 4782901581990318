"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.choices import Policy, ProviderChoice, WeightMode

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A Hub repository (owner/name, owner/name@revision), or the folder of an export."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A GenAI folder, as repack writes it.")]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="SRC", help="The export it was made from: a folder, or a Hub repository."),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="fp32, fp16, q4, q4f16, quantized or q2f16; default: the best for the provider."),
]
Ep = Annotated[
    ProviderChoice, typer.Option("--ep", help="Execution provider; auto takes cuda where a GPU can be used.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every pass with its findings, and every gate.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Place = Annotated[
    WeightMode,
    typer.Option(
        "--weights",
        help="copy the weight files, link them (shares the source's bytes), or consolidate them into one file.",
    ),
]
Prove = Annotated[
    bool, typer.Option("--validate/--no-validate", help="Prove the folder against the source before it appears.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repository; default: main.")
]
Vocabulary = Annotated[
    Path | None,
    typer.Option(
        "--vocabulary", metavar="FILE", help="Tokens that stay, one id a line; `vocabulary` proposes such a list."
    ),
]
Corpus = Annotated[
    list[Path] | None,
    typer.Option(
        "--corpus", metavar="FILE", help="Text that the vocabulary is proven with, beside what is shipped; repeatable."
    ),
]
EVERY_ASPECT = "interface,caches,metadata,nodes,weights,names,config,files"
FailOn = Annotated[
    str, typer.Option("--fail-on", metavar="ASPECTS", help="Exit with 1 only if one of these differs; none: never.")
]
PolicyOption = Annotated[
    Policy | None,
    typer.Option("--policy", help="Exit with 1 from this on, in place of --fail-on; numerics: numbers may differ."),
]
Ignore = Annotated[
    str, typer.Option("--ignore", metavar="ASPECTS", help="Show these, but do not count them as differences.")
]
PushTo = Annotated[
    str | None,
    typer.Option("--push-to", metavar="REPO", help="Upload the folder to this Hub repository (owner/name)."),
]
Private = Annotated[bool, typer.Option("--private", help="The repository of --push-to is a private one.")]
