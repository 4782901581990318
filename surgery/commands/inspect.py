"""gemma4-surgery inspect: what is in there."""

from __future__ import annotations

from typing import Annotated

import typer

from surgery.choices import ProviderChoice
from surgery.commands.console import JobProgress, data, print_json
from surgery.commands.options import Json, Precision


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="An .onnx file, an export (a folder or a Hub repository) or a GenAI folder."
        ),
    ],
    precision: Precision = None,
    ep: Annotated[
        ProviderChoice | None, typer.Option("--ep", help="cuda: tell also which nodes have no CUDA kernel, and why.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in there: interface, layers, KV caches, operators, bytes. No weight is read."""
    from surgery.commands.rendering import show_inspection, show_prediction
    from surgery.jobs.inspecting import inspect as look
    from surgery.jobs.inspecting import predict_cuda

    found = look(source, precision=precision, listener=JobProgress())
    predicted = predict_cuda(found) if ep == "cuda" else {}
    if as_json:
        cuda = {"cuda": {name: one.to_dict() for name, one in predicted.items()}} if predicted else {}
        print_json({**found.to_dict(), **cuda})
        return
    show_inspection(data(), found)
    for name, prediction in predicted.items():
        show_prediction(data(), name, prediction)
