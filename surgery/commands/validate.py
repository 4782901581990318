"""gemma4-surgery validate: the proof of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.choices import ProviderChoice
from surgery.commands.console import JobProgress, data, print_json, say
from surgery.commands.help import SOURCE, TRIED
from surgery.commands.options import Against, Ep, FolderArgument, Json, Precision


def validate(
    folder: FolderArgument,
    against: Against = None,
    precision: Precision = None,
    ep: Ep = "auto",
    against_ep: Annotated[
        ProviderChoice | None,
        typer.Option("--against-ep", rich_help_panel=SOURCE, help="Provider of the source, if it is another one."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            rich_help_panel=TRIED,
            help="Prompts in place of the shipped ones: JSON Lines, or one text a line.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            rich_help_panel=TRIED,
            min=1,
            max=64,
            help="Greedy tokens compared after each prompt; default 8, 3 with --quick.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", rich_help_panel=TRIED, help="A dozen prompts, none of them long.")
    ] = False,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            "--threshold",
            rich_help_panel=TRIED,
            metavar="NAME=VALUE",
            help="Another threshold, e.g. kl=0.01; repeatable.",
        ),
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option(
            "--golden", rich_help_panel=TRIED, help="Compare with a recording, on its prompts, in place of a source."
        ),
    ] = None,
    save_golden: Annotated[
        Path | None,
        typer.Option(
            "--save-golden",
            rich_help_panel=TRIED,
            help="Record the source's answers, or the folder's without a source.",
        ),
    ] = None,
    fp16_headroom: Annotated[
        bool,
        typer.Option(
            "--fp16-headroom",
            rich_help_panel=TRIED,
            help="Measure the residual stream against float16's limit, layer by layer.",
        ),
    ] = False,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", rich_help_panel=TRIED, help="Where logits differ, name the node where the graphs part."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove a folder: its structure, its numbers against the source, and the real runtime. Exit code 1 if a gate
    fails."""
    from surgery.commands.rendering import show_report
    from surgery.jobs.validating import validate as prove
    from surgery.runtime.sessions import provider_of
    from surgery.verify.prompt_file import read_prompts
    from surgery.verify.request import Request
    from surgery.verify.thresholds import read_thresholds

    request = Request(
        scope="light" if quick else "full",
        tokens=tokens,
        prompts=read_prompts(prompts) if prompts else None,
        thresholds=read_thresholds(threshold or []),
        source_provider=provider_of(against_ep) if against_ep else None,
        golden=golden,
        save_golden=save_golden,
        watch=fp16_headroom,
        by_kind=not quick,
        bisect=bisect,
    )
    with JobProgress() as progress:
        report = prove(folder, against, precision=precision, provider=ep, request=request, listener=progress)
    if save_golden is not None:
        say(f"wrote      {save_golden}")
    if as_json:
        print_json(report.to_dict())
    else:
        show_report(data(), report)
    raise typer.Exit(0 if report.passed else 1)
