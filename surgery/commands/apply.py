"""gemma4-surgery apply: one pass or several, on any ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.console import JobProgress, data, print_json
from surgery.commands.options import Force, Json, Place


def apply(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="For example rename-io,fold-logits-to-keep{keep=all}.")
    ],
    source: Annotated[Path, typer.Argument(metavar="IN.onnx")],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx")],
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
        model.save(target, weights=weights, force=force, progress=progress.advanced)
    if as_json:
        print_json({"target": str(target), "passes": [outcome.to_dict() for outcome in outcomes]})
    else:
        for outcome in outcomes:
            show_outcome(data(), outcome)
