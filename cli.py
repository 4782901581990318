"""The command line: parses, calls one library function per command, and prints.

Data goes to stdout, talk and progress to stderr. Exit codes: 0 done, 1 a gate failed or a difference was found, 2 trouble.
Imports that cost time stay inside the commands: `--help` must be quick.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from surgery.commands.console import ByteProgress, beside_git, data, git_goes_on, print_json, say, say_data
from surgery.errors import FolderError, GateFailed, RequestError, SurgeryError, defect

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from passes.recipe import Recipe
    from surgery.choices import Modality
    from surgery.choices import Provider as ProviderName
    from surgery.compare import Comparison
    from surgery.cuda.prediction import Prediction
    from surgery.folder.inspection import ExportInspection, FolderInspection, Inspection
    from surgery.folder.multimodal import Part
    from surgery.folder.publishing import Destination, Published
    from surgery.source.export import Export, Pair
    from surgery.source.hub import Download

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Repack community ONNX exports of Gemma 4 for ONNX Runtime GenAI: bit-exact, without torch or re-export.",
)


class Provider(enum.StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Preset(enum.StrEnum):
    compatible = "compatible"
    fast = "fast"


class Layout(enum.StrEnum):
    aliased = "aliased"
    unique = "unique"


class Target(enum.StrEnum):
    current = "genai-0.14"
    old = "genai-0.12"


class OnnxRuntime(enum.StrEnum):
    current = "1.31"
    old = "1.27"


class Weights(enum.StrEnum):
    copy = "copy"
    link = "link"
    consolidate = "consolidate"


class PerLayerTable(enum.StrEnum):
    as_it_is = "keep"
    one_a_layer = "split"
    one_for_all = "fused"


class AccuracyLevel(enum.StrEnum):
    float32 = "1"
    int8 = "4"


class Format(enum.StrEnum):
    terminal = "terminal"
    md = "md"
    json = "json"
    html = "html"


class ReviewFormat(enum.StrEnum):
    terminal = "terminal"
    md = "md"


class WeightsBy(enum.StrEnum):
    auto = "auto"
    reference = "reference"
    digest = "digest"


class Share(enum.StrEnum):
    copy = "copy"
    link = "link"


class Device(enum.StrEnum):
    cpu = "cpu"


Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A Hub repository (owner/name), or the folder of an export.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A GenAI folder, as repack writes it.")]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="fp32, fp16, q4, q4f16, quantized or q2f16; default: the best for the provider."),
]
Ep = Annotated[Provider, typer.Option("--ep", help="Execution provider; auto takes cuda where a GPU can be used.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Place = Annotated[
    Weights,
    typer.Option(
        "--weights",
        help="copy the weight files, link them (shares the source's bytes), or consolidate them into one aligned file.",
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repository; default: main.")
]
FailOn = Annotated[
    str, typer.Option("--fail-on", metavar="ASPECTS", help="Exit with 1 only if one of these differs; none: never.")
]
EVERY_ASPECT = "interface,caches,metadata,nodes,weights,names,config,files"
Ignore = Annotated[
    str, typer.Option("--ignore", metavar="ASPECTS", help="Show these, but do not count them as differences.")
]
PushTo = Annotated[
    str | None,
    typer.Option("--push-to", metavar="REPO", help="Upload the folder to this Hub repository (owner/name)."),
]
Private = Annotated[bool, typer.Option("--private", help="The repository of --push-to is a private one.")]
Config = Annotated[Path | None, typer.Option("--config", help="config.json of the architecture, where none is near.")]


@app.command()
def repack(
    source: Source,
    target: Out,
    precision: Precision = None,
    preset: Annotated[
        Preset,
        typer.Option(
            "--preset", help="compatible: bit by bit the source; fast: attention fused, caches updated in place."
        ),
    ] = Preset.compatible,
    kv_layout: Annotated[
        Layout | None,
        typer.Option(
            "--kv-layout",
            help="aliased: a pair of caches for every layer; unique: the owners' pairs. Default: aliased; fast: unique.",
        ),
    ] = None,
    weights: Place = Weights.copy,
    ep: Ep = Provider.auto,
    runtime: Annotated[
        Target,
        typer.Option("--target", help="Oldest GenAI that must load it; genai-0.12 pads all caches to one size."),
    ] = Target.current,
    onnxruntime: Annotated[
        OnnxRuntime | None,
        typer.Option(
            "--onnxruntime", help="Oldest ONNX Runtime that must run --preset fast; default: as new as the one here."
        ),
    ] = None,
    half: Annotated[
        bool, typer.Option("--to-fp16", help="Make float16 of a float32 precision, so that it runs on CUDA.")
    ] = False,
    accuracy_level: Annotated[
        AccuracyLevel | None,
        typer.Option(
            "--accuracy-level",
            help="4: quantised products multiply in int8 on the CPU; faster, and every number changes.",
        ),
    ] = None,
    embed_device: Annotated[
        Device | None,
        typer.Option("--embed-device", help="cpu: the token tables stay in host memory; with --ep cuda."),
    ] = None,
    modalities: Annotated[
        str,
        typer.Option(
            "--modalities", help="text; or text,image or text,image,audio: four graphs, for GenAI 0.15 and later."
        ),
    ] = "text",
    per_layer_table: Annotated[
        PerLayerTable,
        typer.Option("--per-layer-table", help="split: one a layer, for small buffers; fused: one for all layers."),
    ] = PerLayerTable.as_it_is,
    embed: Annotated[
        Path | None, typer.Option("--embed", help="The embedding graph, if it is not in SRC's layout.")
    ] = None,
    decoder: Annotated[Path | None, typer.Option("--decoder", help="The decoder graph, together with --embed.")] = None,
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Prove the folder against the source before it appears.")
    ] = True,
    force: Force = False,
    revision: Revision = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would change, and what the Hub would be asked for; write nothing."),
    ] = False,
    push_to: PushTo = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Turn an export into a folder that ONNX Runtime GenAI loads, and prove it."""
    from passes.recipe import kept_in_host_memory, per_layer_tables, text
    from surgery.commands.rendering import show_repacked
    from surgery.compare.folder_report import folder_reports, planned_report
    from surgery.compare.provenance import JSON_FILE, MARKDOWN_FILE
    from surgery.files.atomic import refuse_existing
    from surgery.folder.building import contents
    from surgery.folder.building import repack as run
    from surgery.folder.multimodal import read_modalities
    from surgery.source.opening import Choice, given_pair, look_up, open_source
    from surgery.verify.closing_proof import closing

    layout = kv_layout or (Layout.unique if preset is Preset.fast else Layout.aliased)
    _refuse_contradictions(preset, layout, runtime)
    oldest = _oldest_runtime(onnxruntime, validate and preset is Preset.fast)
    media = read_modalities(modalities)
    if media and per_layer_table is not PerLayerTable.as_it_is:
        raise RequestError(
            f"--modalities {modalities} and --per-layer-table {per_layer_table.value} do not go together: "
            "the table stays in the graph of the embeddings",
            hint="apply split-per-layer-table to that graph",
        )
    if media and (half or runtime is Target.old):
        raise RequestError(
            f"--modalities {modalities} and {'--to-fp16' if half else '--target genai-0.12'} do not go together: "
            + ("take the precision fp16 or q4f16" if half else "GenAI takes images from 0.15 on")
        )
    provider = _provider(ep)
    destination = _destination(push_to, private)
    suited = "cpu" if half else provider  # to-fp16 makes of any precision what CUDA takes
    if embed_device and (provider != "cuda" or media):
        raise RequestError(
            f"--embed-device cpu and {f'--modalities {modalities}' if media else '--ep cpu'} do not go together: "
            + ("the embeddings are a graph of their own" if media else "on the CPU all is in host memory")
        )
    choice = Choice(source, suited, precision, revision, given_pair(embed, decoder), media)
    level: Literal["1", "4"] | None = accuracy_level.value if accuracy_level else None

    def recipe_of(embed: Path) -> Recipe:
        steps = _recipe(preset, embed, layout, runtime, provider, oldest, half, level)
        return *steps, *per_layer_tables(per_layer_table.value), *kept_in_host_memory(embed_device is not None)

    parts: list[Part] = []
    if dry_run:
        found = look_up(choice, say)
        export, pair = found.export, found.pair
        recipe = recipe_of(pair.embed)
        if media:
            recipe, parts, _ = _with_media(export, pair, recipe, media)
        if destination is not None:
            reports = dict.fromkeys((JSON_FILE, MARKDOWN_FILE))
            files = {**contents(export, pair, recipe_of(pair.embed), parts, weights.value), **reports}
            _contents_dry_run(files, found.download, destination, as_json)
            return
        planned = planned_report(export, pair, recipe, provider, runtime.value, parts)
        _dry_run(found.download, planned, as_json)
        return
    refuse_existing(target, force=force)  # before gigabytes are fetched, not after
    _require_login(destination)
    found = open_source(choice, say)
    export, pair = found.export, found.pair
    recipe, recorded = recipe_of(pair.embed), recipe_of(export.below(pair.embed))
    texts: str | dict[str, str] = text(recorded)
    if media:
        recipe, parts, texts = _with_media(export, pair, recipe, media)
    say(f"source     {export.root}")
    say(f"precision  {found.reason}")
    with ByteProgress() as progress:
        check = closing(pair, provider, progress.stage) if validate else None
        result = run(
            export, pair, recipe, target,
            media=parts, recipe_text=texts,
            runtime=runtime.value,
            provider=provider, weights=weights.value, force=force, check=check,
            describe=lambda *made: folder_reports(made[0], export, pair, *made[1:]),
            started=progress.started, progress=progress.advance,
        )  # fmt: skip
    if not as_json:
        show_repacked(data(), result, layout.value)
    published = _publish(result.folder, destination, f"{pair.precision}, for ONNX Runtime GenAI")
    if as_json:
        print_json({**result.to_dict(), **({"published": published.to_dict()} if published else {})})


def _refuse_contradictions(preset: Preset, layout: Layout, runtime: Target) -> None:
    """Raise RequestError for options that `fast` cannot meet."""
    if preset is not Preset.fast:
        return
    if layout is not Layout.unique:
        raise RequestError(
            "--preset fast updates the owners' caches in place; an alias is a copy of one each step",
            hint="leave out --kv-layout, or use --preset compatible",
        )
    if runtime is not Target.current:
        raise RequestError(
            f"--preset fast has caches of two sizes, which {runtime.value} cannot allocate",
            hint="use --preset compatible with that target",
        )


def _oldest_runtime(given: OnnxRuntime | None, runs_here: bool) -> OnnxRuntime:
    """What was asked for, or what suits the onnxruntime that is here; the newest where none is.

    Raises RequestError where the closing proof would run a form that crashes the runtime.
    """
    from importlib.metadata import PackageNotFoundError, version

    found = None
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
    old = found is not None and tuple(int(part) for part in found.split(".")[:2]) < (1, 31)
    if given is OnnxRuntime.current and old and runs_here:
        raise RequestError(
            f"--onnxruntime 1.31 writes a form that crashes onnxruntime {found}, which is here to prove it",
            hint="leave out --onnxruntime, or add --no-validate",
        )
    return given or (OnnxRuntime.old if old else OnnxRuntime.current)


def _recipe(
    preset: Preset,
    embed: Path,
    layout: Layout,
    runtime: Target,
    provider: str,
    onnxruntime: OnnxRuntime,
    half: bool,
    level: Literal["1", "4"] | None,
) -> Recipe:
    from passes.recipe import compatible, fast

    if preset is Preset.fast:
        return fast(embed, provider, onnxruntime.value, half=half, accuracy_level=level)
    return compatible(embed, layout.value, runtime.value, half=half, accuracy_level=level)


def _with_media(
    export: Export, pair: Pair, recipe: Recipe, media: Sequence[Modality]
) -> tuple[Recipe, list[Part], dict[str, str]]:
    """The decoder's recipe, the graphs beside it with theirs, and all of them as the manifest records them."""
    from passes.recipe import multimodal, text
    from surgery.folder.multimodal import Part, check_export, most_patches
    from surgery.source.export import EMBED, ENCODERS

    check_export(export, media)
    tokens = {modality: export.placeholder(modality) for modality in media}
    recipes = multimodal(recipe, tokens, export.architecture.hidden_size, most_patches(export))
    sources = {EMBED: pair.embed, **{ENCODERS[modality]: pair.encoder(modality) for modality in media}}
    parts = [Part(role, path, recipes[role]) for role, path in sources.items()]
    return recipes["decoder_model_merged"], parts, {role: text(one) for role, one in recipes.items()}


@app.command()
def strip(
    source: Source,
    target: Out,
    precision: Precision = None,
    weights: Annotated[
        Share, typer.Option("--weights", help="copy the weight files, or link them (shares the source's bytes).")
    ] = Share.copy,
    ep: Ep = Provider.auto,
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Prove the folder against the source before it appears.")
    ] = True,
    force: Force = False,
    revision: Revision = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be written, and what the Hub would be asked for.")
    ] = False,
    push_to: PushTo = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Make a text-only export: the two graphs of one precision, for two-session loops and transformers.js."""
    from surgery.commands.rendering import show_stripped
    from surgery.files.atomic import refuse_existing
    from surgery.folder.text_only import contents
    from surgery.folder.text_only import strip as run
    from surgery.source.opening import Choice, look_up, open_source

    provider = _provider(ep)
    destination = _destination(push_to, private)
    choice = Choice(source, provider, precision, revision)
    if dry_run:
        found = look_up(choice, say)
        _contents_dry_run(contents(found.export, found.pair), found.download, destination, as_json)
        return
    from surgery.verify.closing_proof import closing_two_graphs  # a dry run does not wait for it

    refuse_existing(target, force=force)  # before gigabytes are fetched, not after
    _require_login(destination)
    found = open_source(choice, say)
    say(f"source     {found.export.root}")
    say(f"precision  {found.reason}")
    with ByteProgress() as progress:
        check = closing_two_graphs(found.pair, provider, progress.stage) if validate else None
        result = run(
            found.export, found.pair, target,
            weights=weights.value, force=force, check=check, started=progress.started, progress=progress.advance,
        )  # fmt: skip
    if not as_json:
        show_stripped(data(), result)
    published = _publish(result.folder, destination, f"{result.precision}, text only, as two graphs")
    if as_json:
        print_json({**result.to_dict(), **({"published": published.to_dict()} if published else {})})


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="An .onnx file, an export or a GenAI folder.")],
    precision: Precision = None,
    ep: Annotated[
        Provider | None, typer.Option("--ep", help="cuda: tell also which nodes have no CUDA kernel, and why.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in there: interface, layers, KV caches, operators, bytes. No weight is read."""
    from surgery.commands.rendering import show_inspection, show_prediction
    from surgery.folder.inspection import inspect as look

    found = look(Path(source), precision)
    predicted = _predictions(found) if ep is Provider.cuda else {}
    if as_json:
        cuda = {"cuda": {name: one.to_dict() for name, one in predicted.items()}} if predicted else {}
        print_json({**found.to_dict(), **cuda})
        return
    show_inspection(data(), found)
    for name, prediction in predicted.items():
        show_prediction(data(), name, prediction)


def _predictions(found: Inspection | ExportInspection | FolderInspection) -> dict[str, Prediction]:
    """Graph -> where its nodes would go on CUDA."""
    from surgery.cuda.prediction import predict
    from surgery.folder.inspection import ExportInspection, FolderInspection
    from surgery.graph.model import Model

    graphs = found.graphs if isinstance(found, ExportInspection | FolderInspection) else (found,)
    return {graph.path.name: predict(Model.open(graph.path)) for graph in graphs}


@app.command()
def validate(
    folder: Folder,
    against: Annotated[
        str | None, typer.Option("--against", metavar="SRC", help="The export it was made from.")
    ] = None,
    precision: Precision = None,
    ep: Ep = Provider.auto,
    against_ep: Annotated[
        Provider | None, typer.Option("--against-ep", help="Provider of the source, if it is another one.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompts in place of the shipped ones: JSON Lines, or one text a line."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=1, max=64, help="Greedy tokens compared after each prompt; default 8, 3 with --light."
        ),
    ] = None,
    light: Annotated[bool, typer.Option("--light", help="A dozen prompts, none of them long.")] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="NAME=VALUE", help="Another threshold, e.g. kl=0.01; repeatable."),
    ] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", help="Compare with a recording in place of a source.")
    ] = None,
    save_golden: Annotated[
        Path | None,
        typer.Option("--save-golden", help="Record the source's answers, or the folder's without a source."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Measure the residual stream against float16's limit, layer by layer.")
    ] = False,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Where logits differ, name the node where the graphs part.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove a folder: its structure, its numbers against the source, and the real runtime. Exit code 1 if a gate fails."""
    from surgery.commands.rendering import show_report
    from surgery.source.opening import source_pair
    from surgery.verify import Request
    from surgery.verify import validate as prove
    from surgery.verify.prompt_file import read_prompts
    from surgery.verify.thresholds import read_thresholds

    _require_folder(folder)
    request = Request(
        scope="light" if light else "full",
        tokens=tokens,
        prompts=read_prompts(prompts) if prompts else None,
        thresholds=read_thresholds(gate or []),
        source_provider=_provider(against_ep) if against_ep else None,
        golden=golden,
        save_golden=save_golden,
        watch=watch,
        bisect=bisect,
    )
    pair = source_pair(folder, against, precision)
    with ByteProgress() as progress:
        report = prove(folder, pair, provider=_provider(ep), request=request, progress=progress.stage)
    if as_json:
        print_json(report.to_dict())
    else:
        show_report(data(), report)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def diff(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", help="An .onnx file, an export (its pair of graphs) or a GenAI folder.")
    ],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="What to compare it with: any of the three.")],
    precision: Precision = None,
    form: Annotated[
        Format, typer.Option("--format", help="md is for pull requests, html is one page.")
    ] = Format.terminal,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write the report to this file, in the format of its suffix.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="On a terminal: every change, not the first of each kind.")
    ] = False,
    weights: Annotated[
        WeightsBy,
        typer.Option(
            "--weights", help="reference: by file digest, offset and length; digest: read them; auto: read small ones."
        ),
    ] = WeightsBy.auto,
    numbers: Annotated[
        Path | None,
        typer.Option("--numbers", help="What validate --json printed of AFTER; default: what repack recorded."),
    ] = None,
    fail_on: FailOn = EVERY_ASPECT,
    ignore: Ignore = "none",
    check: Annotated[
        Path | None,
        typer.Option("--check", metavar="REPORT", help="Exit with 1 if this report is not the one of these two."),
    ] = None,
) -> None:
    """Report what differs between two models. Exit code 0: nothing; 1: something; 2: trouble."""
    from surgery.compare import compare, open_sides
    from surgery.compare.comparison import read_aspects
    from surgery.compare.formats import FORMATS, format_of, is_current, write_report
    from surgery.compare.provenance import read_validation
    from surgery.compare.terminal import show_comparison

    chosen = form.value if output is None or form is not Format.terminal else format_of(output)
    failing = read_aspects(fail_on)
    sides = open_sides(before, after, precision)
    found = compare(*sides, weights_by=weights.value, ignore=read_aspects(ignore))
    if numbers is not None:
        found = replace(found, numbers=read_validation(numbers))
    if check is not None:
        if not is_current(check, found):
            sys.stderr.write(f"error: {check} is not the report of these two; diff with --output {check} writes it\n")
            raise typer.Exit(1)
        say(f"{check} is the report of these two")
        return
    if chosen == "terminal":
        show_comparison(data(), found, full=full)
    elif output is not None:
        write_report(output, FORMATS[chosen](found))
    else:
        sys.stdout.write(FORMATS[chosen](found))
    raise typer.Exit(1 if found.fails(failing) else 0)


@app.command()
def passes(as_json: Json = False) -> None:
    """List every pass: what it does, and its options."""
    from passes.recipe import describe
    from surgery.commands.rendering import show_passes

    described = [describe(name) for name in _pass_names()]
    if as_json:
        print_json(described)
        return
    show_passes(data(), described)


@app.command()
def apply(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="For example rename-io,fold-logits-to-keep{keep=all}.")
    ],
    source: Annotated[Path, typer.Argument(metavar="IN.onnx")],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx")],
    config: Config = None,
    weights: Place = Weights.copy,
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
    with ByteProgress() as progress:
        model.save(target, weights=weights.value, force=force, progress=progress.advance)
    if as_json:
        print_json({"target": str(target), "passes": [outcome.to_dict() for outcome in outcomes]})
    else:
        for outcome in outcomes:
            show_outcome(data(), outcome)


@app.command()
def generate(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A GenAI folder, or one with two graphs: an export, or a stripped one."),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture; repeatable. It stands where PROMPT says <|image|>.")
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option("--audio", help="A sound. It stands where PROMPT says <|audio|>.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="The most tokens to generate.")] = 128,
    sample: Annotated[
        bool, typer.Option("--sample", help="Use the folder's sampling values instead of greedy.")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Sample the same answer every time.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Of two graphs: which ones; default: the best for the CPU.")
    ] = None,
) -> None:
    """Try the result: one prompt through the real runtime, or through two sessions where there are two graphs."""
    from surgery.runtime.prompting import Question
    from surgery.runtime.prompting import answer as run

    question = Question(
        prompt, new_tokens, sample or seed is not None, not raw, seed, tuple(image or ()), tuple(audio or ())
    )
    runs, pieces = run(folder, question, precision)
    say(f"runs       {runs}")
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def bench(
    folder: Folder,
    against: Annotated[
        str | None, typer.Option("--against", metavar="SRC", help="The export it was made from.")
    ] = None,
    precision: Precision = None,
    contexts: Annotated[str, typer.Option("--contexts", help="Lengths of the prompts, in tokens.")] = "128,1024,4096",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens to generate after each.")] = 16,
    ep: Ep = Provider.auto,
    as_json: Json = False,
) -> None:
    """Measure a folder in GenAI, and its source as two sessions: time to first token, rates, peak memory."""
    from surgery.commands.rendering import show_benchmarks
    from surgery.runtime.benchmark import bench as run
    from surgery.source.opening import source_pair

    _require_folder(folder)
    if not all(part.isdecimal() and int(part) for part in contexts.split(",")):
        raise FolderError(f"--contexts is {contexts!r}; whole numbers separated by commas are expected")
    found = run(
        folder,
        source_pair(folder, against, precision),
        provider=_provider(ep),
        contexts=[int(part) for part in contexts.split(",")],
        new_tokens=new_tokens,
        progress=say,
    )
    if as_json:
        print_json([one.to_dict() for one in found])
    else:
        show_benchmarks(data(), found)


@app.command("git-setup")
def git_setup(
    everywhere: Annotated[
        bool, typer.Option("--global/--local", help="For all repositories of yours, or for the one you are in.")
    ] = False,
    unset: Annotated[bool, typer.Option("--unset", help="Take away what git-setup wrote.")] = False,
) -> None:
    """Make git diff, git show and git log -p show what changed in .onnx files."""
    from surgery.compare.git_setup import set_up, take_away

    scope: Literal["global", "local"] = "global" if everywhere else "local"
    if unset:
        removed = take_away(scope, Path()).settings
        for setting in removed:
            say_data(f"removed {setting.text} from {setting.file}")
        if not removed:
            say_data("nothing was there to remove")
        return
    done = set_up(scope, _program(), Path())
    for setting in done.settings:
        say_data(f"{'wrote to' if setting.changed else 'there already, in'} {setting.file}: {setting.text}")
    if done.overruled_by:
        say_data(
            f"but .gitattributes of this repository has the last word on *.onnx (diff: {done.overruled_by}); "
            "git-setup without --global wins over it"
        )
    say_data("git diff shows the report; git show and git log -p show lines of the graph, with --ext-diff the report")


@app.command("git-textconv", hidden=True)
def git_textconv(file: Path) -> None:
    """The text of one graph, for git."""
    from surgery.compare.git_drivers import text_of

    with git_goes_on():
        sys.stdout.write(text_of(file))


@app.command("git-diff", hidden=True)
def git_diff(words: list[str]) -> None:
    """The report of two versions of one graph, for git."""
    from surgery.commands.rendering import plain
    from surgery.compare.git_drivers import WEIGHTS, Versions, compared
    from surgery.compare.terminal import show_comparison

    out = beside_git()
    with git_goes_on():
        versions = Versions.parse(words)
        out.print(plain(versions.heading, "bold"), soft_wrap=True)
        found = compared(versions)
        if isinstance(found, str):
            out.print(plain(found), soft_wrap=True)
        else:
            show_comparison(out, found)
            if found.weights.uncompared:
                out.print(plain(WEIGHTS, "dim"), soft_wrap=True)
    out.print()


@app.command()
def review(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A commit: what was there before.")],
    head: Annotated[str, typer.Argument(metavar="HEAD", help="A commit: what is there now.")] = "HEAD",
    form: Annotated[ReviewFormat, typer.Option("--format", help="md is for pull requests.")] = ReviewFormat.terminal,
    fail_on: FailOn = EVERY_ASPECT,
    ignore: Ignore = "none",
) -> None:
    """Compare every model of a git repository that differs between two commits. Exit codes are those of diff."""
    from surgery.compare.commits import review as run
    from surgery.compare.commits import review_markdown
    from surgery.compare.comparison import read_aspects
    from surgery.compare.terminal import show_review

    failing = read_aspects(fail_on)
    found = run(Path(), base, head, read_aspects(ignore))
    if form is ReviewFormat.md:
        sys.stdout.write(review_markdown(found))
    else:
        show_review(data(), found)
    if any(one.problem for one in found):
        raise typer.Exit(2)
    raise typer.Exit(1 if any(one.fails(failing) for one in found) else 0)


@app.command()
def comment(
    target: Annotated[str, typer.Argument(metavar="OWNER/REPO#NUMBER", help="The pull request.")],
    file: Annotated[Path, typer.Argument(metavar="REPORT.md")],
    marker: Annotated[str, typer.Option("--marker", help="Tells apart several comments of ours.")] = "report",
    update_only: Annotated[
        bool, typer.Option("--update-only", help="Do nothing where there is no comment of ours yet.")
    ] = False,
) -> None:
    """Put a report on a pull request, as one comment that later calls update. Needs GITHUB_TOKEN."""
    from surgery.compare.pull_request import PullRequest, Site, post

    try:
        body = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{file} cannot be read: {error}") from None
    posted = post(Site.from_environment(), PullRequest.parse(target), body, marker, update_only=update_only)
    if posted is None:
        say_data("there is no comment to update")
        return
    say_data(f"{'created' if posted.created else 'updated'} {posted.url}")


def _require_folder(folder: Path) -> None:
    from surgery.folder.genai_config import CONFIG_FILE

    if not (folder / CONFIG_FILE).is_file():
        raise FolderError(f"{folder} has no {CONFIG_FILE}; a GenAI folder, as repack writes it, is expected")


def _dry_run(download: Download | None, report: Comparison, as_json: bool) -> None:
    """Say what the Hub would be asked for, if it is one, and what would change."""
    from surgery.commands.rendering import show_download
    from surgery.compare.report_json import to_dict
    from surgery.compare.terminal import show_comparison

    if as_json:
        print_json({**(download.to_dict() if download else {}), "report": to_dict(report)})
        return
    if download is not None:
        show_download(data(), download)
        data().print()
    show_comparison(data(), report)


def _contents_dry_run(
    files: Mapping[str, int | None], download: Download | None, destination: Destination | None, as_json: bool
) -> None:
    """Say what would be written, where it would be uploaded, and what the Hub would be asked for, if it is one."""
    from surgery.commands.rendering import show_contents, show_download

    if download is not None:
        files = download.sized(files)
    if as_json:
        found: dict[str, Any] = {"writes": [{"file": name, "size": count} for name, count in files.items()]}
        if destination is not None:
            found |= {"push_to": destination.repo_id, "private": destination.private}
        print_json({**(download.to_dict() if download else {}), **found})
        return
    if download is not None:
        show_download(data(), download)
        data().print()
    show_contents(data(), files, destination)


def _destination(push_to: str | None, private: bool) -> Destination | None:
    from surgery.folder.publishing import Destination

    if push_to is None:
        if private:
            raise RequestError("--private is of the repository of --push-to, and there is none")
        return None
    return Destination(push_to, private)


def _require_login(destination: Destination | None) -> None:
    """Refuse what cannot be uploaded before it is made."""
    if destination is not None:
        from surgery.folder.publishing import require_login

        say(f"upload     to {destination.repo_id}, as {require_login(destination)}")


def _publish(folder: Path, destination: Destination | None, what: str) -> Published | None:
    from surgery.commands.rendering import size
    from surgery.folder.publishing import publish

    if destination is None:
        return None
    published = publish(folder, destination, f"Upload {what}")
    say(f"uploaded   {published.files} files, {size(published.size)}: {published.url}")
    return published


def _pass_names() -> list[str]:
    from passes import PASSES

    return list(PASSES)


def _provider(ep: Provider) -> ProviderName:
    from surgery.runtime.sessions import machine_provider

    if ep is Provider.auto:
        return machine_provider()
    return "cuda" if ep is Provider.cuda else "cpu"


def _program() -> list[str]:
    """How this program is run again, from any folder: the installed command, or this file with its interpreter."""
    script = Path(sys.argv[0]).absolute()
    return [sys.executable, str(script)] if script.suffix == ".py" else [str(script)]


def _complain(error: SurgeryError) -> None:
    sys.stderr.write(f"error: {error}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")


def main() -> None:
    """Run the command line. Every way out that is not a result is exit code 2, because 1 means that a gate failed;
    a signal is 128 and its number, after what was staged is gone.
    """
    from surgery.files.atomic import unwind_when_told_to_stop

    unwind_when_told_to_stop()
    try:
        app()
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code > 128:
            _leave(stop.code)
        raise
    except SurgeryError as error:
        _complain(error)
        _leave(2)
    except GateFailed as failed:
        from surgery.commands.rendering import show_report

        show_report(data(), failed.report)
        sys.stderr.write("error: a gate failed, so the folder was not written; --no-validate writes it unproven\n")
        _leave(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(2)
    except Exception as error:
        sys.stderr.write(f"error: {defect(error)}\nhint: set GEMMA4_SURGERY_TRACEBACK=1 to see where, and report it\n")
        _leave(2)


def _leave(code: int) -> NoReturn:
    """End at once: downloads that are under way in other threads would keep a normal exit waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
