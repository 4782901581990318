"""gemma4-surgery repack: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from surgery.choices import AccuracyChoice, KVLayout, OnnxRuntime, PerLayerTable, PrefillChoice, Preset, Target
from surgery.commands.console import JobProgress, data, print_json
from surgery.commands.help import MADE, RUNTIME, SOURCE, WRITTEN
from surgery.commands.options import (
    Corpus,
    Ep,
    Force,
    Json,
    Out,
    Place,
    Precision,
    Private,
    Prove,
    PushTo,
    Revision,
    Source,
    Verbose,
    Vocabulary,
)

if TYPE_CHECKING:
    from surgery.jobs.repacking import RepackOptions


def repack(
    source: Source,
    target: Out,
    precision: Precision = None,
    preset: Annotated[
        Preset,
        typer.Option(
            "--preset",
            rich_help_panel=MADE,
            help="compatible: bit by bit the source; fast: attention fused, caches updated in place.",
        ),
    ] = "compatible",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            rich_help_panel=MADE,
            help="Passes of your own after merge-embeddings, in place of the preset's.",
        ),
    ] = None,
    kv_layout: Annotated[
        KVLayout | None,
        typer.Option(
            "--kv-layout",
            rich_help_panel=MADE,
            help="aliased: a pair of caches for every layer; unique: the KV source layers' pairs. "
            "Default: aliased; fast: unique.",
        ),
    ] = None,
    weights: Place = "copy",
    ep: Ep = "auto",
    speculative: Annotated[
        bool,
        typer.Option(
            "--speculative",
            rich_help_panel=MADE,
            help="Guess tokens from what was said before, and check many at once: for GenAI 0.18, with --preset fast.",
        ),
    ] = False,
    target_runtime: Annotated[
        Target,
        typer.Option(
            "--target",
            rich_help_panel=RUNTIME,
            help="Oldest GenAI that must load it; genai-0.12 pads all caches to one size, 0.14 has no ids of tool calls.",
        ),
    ] = "genai-0.15",
    onnxruntime: Annotated[
        OnnxRuntime | None,
        typer.Option(
            "--onnxruntime",
            rich_help_panel=RUNTIME,
            help="Oldest ONNX Runtime that must run --preset fast; default: as new as the one here.",
        ),
    ] = None,
    to_fp16: Annotated[
        bool,
        typer.Option(
            "--to-fp16", rich_help_panel=MADE, help="Make float16 of a float32 precision, so that it runs on CUDA."
        ),
    ] = False,
    accuracy_level: Annotated[
        AccuracyChoice,
        typer.Option(
            "--accuracy-level",
            rich_help_panel=MADE,
            help="4: quantised products multiply in int8 on the CPU, faster, and every number changes; keep: as published; "
            "auto: on the CPU 4 with --preset fast, and for 2 and 8 bits.",
        ),
    ] = "auto",
    prefill: Annotated[
        PrefillChoice,
        typer.Option(
            "--prefill",
            rich_help_panel=MADE,
            help="int8: on the CPU long prompts multiply in int8: faster, larger, and every number changes.",
        ),
    ] = "keep",
    embed_device: Annotated[
        Literal["cpu"] | None,
        typer.Option(
            "--embed-device",
            rich_help_panel=RUNTIME,
            help="cpu: the embedding tables stay in host memory; with --ep cuda.",
        ),
    ] = None,
    modalities: Annotated[
        str,
        typer.Option(
            "--modalities",
            rich_help_panel=MADE,
            help="text; or text,image or text,image,audio: four graphs, for GenAI 0.15 and later.",
        ),
    ] = "text",
    per_layer_table: Annotated[
        PerLayerTable,
        typer.Option(
            "--per-layer-table",
            rich_help_panel=MADE,
            help="split: one a layer, for small buffers; fused: one for all layers.",
        ),
    ] = "keep",
    vocabulary: Vocabulary = None,
    corpus: Corpus = None,
    embed: Annotated[
        Path | None,
        typer.Option("--embed", rich_help_panel=SOURCE, help="The embedding graph, if it is not in SRC's layout."),
    ] = None,
    decoder: Annotated[
        Path | None, typer.Option("--decoder", rich_help_panel=SOURCE, help="The decoder graph, together with --embed.")
    ] = None,
    validate: Prove = True,
    force: Force = False,
    revision: Revision = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=WRITTEN,
            help="Print what would change, and what the Hub would be asked for; write nothing.",
        ),
    ] = False,
    push_to: PushTo = None,
    private: Private = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Turn an export into a folder that ONNX Runtime GenAI loads, and prove it."""
    from surgery.commands.rendering import show_repacked
    from surgery.folder.multimodal import read_modalities
    from surgery.jobs.repacking import RepackOptions
    from surgery.jobs.repacking import repack as run

    options = RepackOptions(
        precision=precision,
        preset=preset,
        recipe=recipe,
        kv_layout=kv_layout,
        weights=weights,
        provider=ep,
        target=target_runtime,
        speculative=speculative,
        onnxruntime=onnxruntime,
        to_fp16=to_fp16,
        accuracy_level=accuracy_level,
        prefill=prefill,
        host_embeddings=embed_device is not None,
        modalities=read_modalities(modalities),
        per_layer_table=per_layer_table,
        vocabulary=vocabulary,
        corpus=corpus or (),
        embed=embed,
        decoder=decoder,
        validate=validate,
        force=force,
        revision=revision,
        push_to=push_to,
        private=private,
    )
    if dry_run:
        _show_plan(source, options, as_json)
        return
    with JobProgress() as progress:
        result = run(source, target, options, listener=progress)
    if as_json:
        print_json(result.to_dict())
    else:
        show_repacked(data(), result, options.layout, verbose=verbose)


def _show_plan(source: str, options: RepackOptions, as_json: bool) -> None:
    """Say what the Hub would be asked for, if it is one, what would change, and what would be uploaded."""
    from surgery.commands.rendering import show_contents, show_download
    from surgery.compare.terminal import show_comparison
    from surgery.jobs.repacking import plan_repack

    with JobProgress() as progress:
        plan = plan_repack(source, options, listener=progress)
    if as_json:
        print_json(plan.to_dict())
        return
    if plan.download is not None:
        show_download(data(), plan.download)
        data().print()
    if plan.destination is not None:
        show_contents(data(), plan.files, plan.destination)
    else:
        show_comparison(data(), plan.report)
    if plan.untried:
        data().print(f"not tried  {', '.join(plan.untried)}: reads weights that are not fetched yet")
