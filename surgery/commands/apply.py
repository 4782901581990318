"""gemma4-surgery apply: one pass or several, on any ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.console import JobProgress, data, print_json, say
from surgery.commands.options import Force, Json, Place


def apply(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="Passes, separated by commas, with their options: rename-io,fold-logits-to-keep{keep=all}.",
        ),
    ],
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The graph to read; its data files lie beside it.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.onnx", help="The graph to write; its data files are put beside it.")
    ],
    config: Annotated[
        Path | None, typer.Option("--config", help="config.json of the architecture, where none is near.")
    ] = None,
    weights: Place = "copy",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Apply one pass or several to any ONNX file."""
    from passes.base import apply as run
    from passes.recipe import parse
    from surgery.architecture import architecture, read_config
    from surgery.commands.rendering import show_outcome
    from surgery.folder.inspection import nearby_architecture
    from surgery.graph.model import Model

    steps = parse(recipe)
    arch = architecture(read_config(config)) if config else nearby_architecture(source)
    model, outcomes = run(Model.open(source, arch), steps)
    with JobProgress() as progress:
        placed = model.save(target, weights=weights, force=force, progress=progress.advanced)
    for name in (target.name, *(file.location for file in placed)):
        say(f"wrote      {target.with_name(name)}")
    if as_json:
        print_json({"target": str(target), "passes": [outcome.to_dict() for outcome in outcomes]})
    else:
        for outcome in outcomes:
            show_outcome(data(), outcome)
