"""The main job: an export in, a proven folder for ONNX Runtime GenAI out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.choices import (
    AccuracyChoice,
    KVLayout,
    Modality,
    OnnxRuntime,
    PerLayerTable,
    PrefillChoice,
    Preset,
    Provider,
    ProviderChoice,
    Target,
    WeightMode,
)
from surgery.errors import GateFailed, RequestError
from surgery.jobs.fewer_tokens import held_out, of_fewer_tokens, refuse_corpus
from surgery.jobs.listener import SILENT, Listener
from surgery.jobs.uploading import announce, destination_of, refuse_private, upload

if TYPE_CHECKING:
    from passes.base import Pass
    from passes.recipe import Recipe
    from surgery.compare.comparison import Comparison
    from surgery.folder.building import Repacked
    from surgery.folder.multimodal import GraphPlan
    from surgery.folder.publishing import Destination
    from surgery.graph.model import Model
    from surgery.source.export import Export, GraphPair
    from surgery.source.hub import Download
    from surgery.source.opening import OpenedSource, SourceRequest
    from surgery.verify.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackOptions:
    """What a repack can be asked for; every field is the command's option of that name.

    precision         fp32, fp16, q4, q4f16, quantized or q2f16; None takes the best for the provider
    preset            `compatible` gives the source's numbers bit by bit, `fast` in another order of summation
    recipe            a recipe as text, in place of the preset's passes that follow merge-embeddings
    kv_layout         None: aliased, and unique with `fast`
    weights           how the data files get to the folder
    provider          what the folder is made for, and proven on
    target            the oldest onnxruntime-genai that must load it
    onnxruntime       the oldest ONNX Runtime that must run `fast`; None: as new as the one that is installed
    to_fp16           make float16 of a float32 precision, which CUDA needs
    accuracy_level    of quantized MatMuls: 4 multiplies in int8, 1 in float32, `keep` leaves the source's; `auto` is 4 on the
                      CPU, for all of them with `fast`, else for those of 2 and 8 bits, which are unusable there without
    prefill           int8: on the CPU, long prompts multiply in int8, by weights beside the codes: faster, larger, lossy
    host_embeddings   keep the embedding tables in host memory, with provider cuda (the command's --embed-device cpu)
    modalities        what the folder takes beside text
    speculative       guess tokens from what was said before, and check many in one run: GenAI 0.18, --preset fast, CPU
    per_layer_table   the table of per-layer inputs: as it is, split, or fused
    vocabulary        a list of the tokens that stay (surgery.vocabulary proposes one); None: all
    corpus            text files that such a vocabulary is proven with: their held-out part
    embed, decoder    the two graphs, where the source is not in the community's layout
    validate          prove the folder before it appears
    force             replace a folder that a repack wrote
    revision          branch, tag or commit of a Hub repository
    push_to, private  upload the folder to this Hub repository (owner/name)

    Raises RequestError for options that do not go together.
    """

    precision: str | None = None
    preset: Preset = "compatible"
    recipe: str | None = None
    kv_layout: KVLayout | None = None
    weights: WeightMode = "copy"
    provider: ProviderChoice = "auto"
    target: Target = "genai-0.15"
    onnxruntime: OnnxRuntime | None = None
    to_fp16: bool = False
    accuracy_level: AccuracyChoice = "auto"
    prefill: PrefillChoice = "keep"
    host_embeddings: bool = False
    modalities: Sequence[Modality] = ()
    speculative: bool = False
    per_layer_table: PerLayerTable = "keep"
    vocabulary: Path | None = None
    corpus: Sequence[Path] = ()
    embed: Path | None = None
    decoder: Path | None = None
    validate: bool = True
    force: bool = False
    revision: str | None = None
    push_to: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        _refuse_fast(self)
        _refuse_modalities(self)
        _refuse_speculation(self)
        _refuse_prefill(self)
        if self.recipe is not None and self.modalities:
            raise RequestError("--recipe and --modalities do not go together: a recipe is for one graph")
        if self.provider == "cpu" and self.host_embeddings:
            raise RequestError("--embed-device cpu and --ep cpu do not go together: on the CPU all is in host memory")
        refuse_private(self.push_to, self.private)
        refuse_corpus(self.vocabulary, self.corpus)

    @property
    def layout(self) -> KVLayout:
        """The KV layout that was asked for, or the preset's own."""
        return self.kv_layout or ("unique" if self.preset == "fast" else "aliased")


def _refuse_fast(options: RepackOptions) -> None:
    if options.preset != "fast":
        return
    if options.kv_layout == "aliased":
        raise RequestError(
            "--preset fast updates the KV source layers' caches in place; an alias is a copy of one each step",
            hint="leave out --kv-layout, or use --preset compatible",
        )
    if options.target == "genai-0.12":
        raise RequestError(
            f"--preset fast has caches of two sizes, which {options.target} cannot allocate",
            hint="use --preset compatible with that target",
        )


def _refuse_speculation(options: RepackOptions) -> None:
    if not options.speculative:
        return
    if options.preset != "fast" or options.recipe is not None:
        raise RequestError(
            "--speculative takes back tokens that were wrong, so its caches have to be cut",
            hint="use --preset fast, whose caches are one buffer",
        )
    if options.modalities:
        raise RequestError("--speculative and --modalities do not go together: GenAI speculates on text alone")
    if options.provider == "cuda":
        raise RequestError("--speculative is for the CPU: captured CUDA graphs run one token at a time")


def _refuse_prefill(options: RepackOptions) -> None:
    if options.prefill == "keep":
        return
    if options.provider == "cuda":
        raise RequestError(_PREFILL_ON_CUDA)
    if options.to_fp16:
        raise RequestError(
            "--prefill int8 and --to-fp16 do not go together: int8 weights are made from stored ones",
            hint="take the precision q4f16",
        )
    if options.recipe is not None:
        raise RequestError(
            "--prefill int8 and --recipe do not go together", hint="write int8-prefill at the end of the recipe"
        )


_PREFILL_ON_CUDA = "--prefill int8 and --ep cuda do not go together: products in int8 are for the CPU"


def _refuse_modalities(options: RepackOptions) -> None:
    if not options.modalities:
        return
    asked = f"--modalities {','.join(('text', *options.modalities))}"
    if options.per_layer_table != "keep":
        raise RequestError(
            f"{asked} and --per-layer-table {options.per_layer_table} do not go together: "
            "the table stays in the graph of the embeddings",
            hint="apply split-per-layer-table to that graph",
        )
    if options.to_fp16:
        raise RequestError(f"{asked} and --to-fp16 do not go together: take the precision fp16 or q4f16")
    if options.target == "genai-0.12":
        raise RequestError(f"{asked} and --target genai-0.12 do not go together: GenAI takes images from 0.15 on")
    if options.host_embeddings:
        raise RequestError(
            f"{asked} and --embed-device cpu do not go together: the embeddings are a graph of their own"
        )


@dataclass(frozen=True)
class RepackPlan:
    """What a repack would do. `files` are those of the folder with their bytes, None for what is written anew;
    `report` is what would change; `download` is what the Hub would be asked for, None for a local source."""

    files: Mapping[str, int | None]
    report: Comparison
    download: Download | None
    destination: Destination | None

    @property
    def untried(self) -> tuple[str, ...]:
        """The passes that `report` leaves out, because they read weights that are not fetched yet."""
        from passes.base import NOT_TRIED

        made = self.report.passes
        return tuple(one.name for one in made if any(found.reason == NOT_TRIED.reason for found in one.findings))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        from surgery.compare.report_json import to_dict

        fetched = self.download.to_dict() if self.download else {}
        if self.destination is None:
            return {**fetched, "report": to_dict(self.report)}
        writes = [{"file": name, "size": count} for name, count in self.files.items()]
        return {**fetched, "writes": writes, **self.destination.to_dict()}


def repack(
    source: str | Path, target: str | Path, options: RepackOptions | None = None, *, listener: Listener = SILENT
) -> Repacked[Report]:
    """Write `target`, a folder that ONNX Runtime GenAI loads: it appears complete and proven, or not at all.

    `source` is a Hub repository (owner/name) or the folder of an export. Raises SurgeryError for everything that a user
    can mend, GateFailed where the proof fails.

        surgery.repack("onnx-community/gemma-4-E2B-it-ONNX", "out", surgery.RepackOptions(preset="fast"))
    """
    from surgery.files.atomic import refuse_existing, require_writable
    from surgery.folder.manifest import refuse_foreign
    from surgery.source.opening import open_source
    from surgery.verify.closing_proof import require_runtimes

    options = options or RepackOptions()
    target = Path(target)
    provider = _provider(options)
    destination = destination_of(options.push_to, options.private)
    runtime = _onnxruntime(options)
    refuse_existing(target, refuse_foreign if options.force else None)  # before gigabytes are fetched, not after
    require_writable(target)
    if options.validate:
        require_runtimes(provider)
    announce(destination, listener)
    whole = options.vocabulary is None and not options.to_fp16  # otherwise the folder has fewer bytes
    opened = open_source(
        _choice(source, options, provider), listener,
        target=target if whole else None, linked=options.weights == "link",
        tried=lambda found: _Work.of(found, options, provider, runtime),
    )  # fmt: skip
    listener.said(f"source     {opened.export.root}")
    listener.said(f"precision  {opened.reason}")
    with of_fewer_tokens(opened, options.vocabulary, listener) as found:
        result = _proven(found, target, options, provider, runtime, listener)
    return upload(result, destination, f"{found.pair.precision}, for ONNX Runtime GenAI", listener)


def _proven(
    found: OpenedSource,
    target: Path,
    options: RepackOptions,
    provider: Provider,
    runtime: OnnxRuntime,
    listener: Listener,
) -> Repacked[Report]:
    """Build the folder, with its proof; once more, without what is too costly, where an accuracy level fails it."""
    from surgery.compare.folder_report import folder_reports
    from surgery.folder.building import build_folder as build
    from surgery.verify.closing_proof import closing_proof

    export, pair, corpus = found.export, found.pair, held_out(options.corpus)

    def built(costly: Sequence[str]) -> Repacked[Report]:
        work = _Work.of(found, options, provider, runtime, costly)
        if work.level:
            listener.said(f"level      {work.level}")
        return build(
            export, pair, work.recipe, target,
            media=work.parts, recipe_text=work.texts, runtime=options.target, provider=provider,
            speculative=options.speculative, weights=options.weights, force=options.force,
            check=closing_proof(pair, export.root, provider, listener.stage, corpus) if options.validate else None,
            describe=lambda *made: folder_reports(made[0], export, pair, *made[1:]),
            started=listener.started, progress=listener.advanced,
        )  # fmt: skip

    try:
        return built(())
    except GateFailed as failed:
        if options.accuracy_level != "auto" or not failed.report.costly:
            raise
        listener.said("level      too costly for some products: they keep float32, and all is proven again")
        return built(failed.report.costly)


def plan_repack(source: str | Path, options: RepackOptions | None = None, *, listener: Listener = SILENT) -> RepackPlan:
    """What `repack` would write and change. Of a Hub repository the graphs alone are fetched; nothing is written."""
    from surgery.compare.folder_report import planned_report
    from surgery.compare.provenance import JSON_FILE, MARKDOWN_FILE
    from surgery.folder.building import planned_files
    from surgery.source.opening import look_up

    options = options or RepackOptions()
    provider = _provider(options)
    opened = look_up(_choice(source, options, provider), listener.said)
    with of_fewer_tokens(opened, options.vocabulary, listener) as found:
        work = _Work.of(found, options, provider, _onnxruntime(replace(options, validate=False)))
        files = planned_files(found.export, found.pair, work.recipe, work.parts, options.weights)
        files = {**files, **dict.fromkeys((JSON_FILE, MARKDOWN_FILE))}
        report = planned_report(
            found.export, found.pair, work.recipe, provider, options.target, work.parts, options.speculative
        )
    sized = opened.download.sized(files) if opened.download else files
    return RepackPlan(sized, report, opened.download, destination_of(options.push_to, options.private))


@dataclass(frozen=True)
class _Work:
    """What is done to each graph: the decoder's recipe, the other graphs with theirs, and all as the manifest has
    it."""

    recipe: Recipe
    parts: Sequence[GraphPlan]
    texts: str | Mapping[str, str]
    level: str = ""

    @classmethod
    def of(
        cls,
        found: OpenedSource,
        options: RepackOptions,
        provider: Provider,
        runtime: OnnxRuntime,
        costly: Sequence[str] = (),
    ) -> _Work:
        """`costly` are the kinds of products that no accuracy level is chosen for. No weight is read. Raises PassError where
        the source's products cannot be as they are asked for."""
        from passes.presets import accuracy, lut_products, prefill, pruned
        from passes.recipe import recipe_text
        from surgery.graph.model import Model

        export, pair = found.export, found.pair
        decoder = Model.open(pair.decoder)
        level = accuracy(decoder, options.accuracy_level, options.preset, provider, costly)
        last = lut_products(decoder, level, options.accuracy_level, options.preset)
        for step in (*level, *prefill(options.prefill)) if options.recipe is None else ():
            step.requires(decoder)
        recipe = pruned(_recipe(pair.embed, options, provider, runtime, level, last), pair.kept)
        if options.modalities:
            work = _with_media(export, pair, recipe, options.modalities)
        else:
            below = pruned(_recipe(export.below(pair.embed), options, provider, runtime, level, last), pair.kept)
            texts = recipe_text(tuple(map(_named, below)))
            work = cls(recipe, (), texts)
        chosen = options.recipe is None and options.accuracy_level == "auto"
        return replace(work, level=_level_in_words(decoder, level, last)) if chosen else work


def _level_in_words(decoder: Model, level: Recipe, last: Recipe) -> str:
    """What was chosen, why, and how to turn it off; empty where nothing was."""
    from passes.set_accuracy_level import SetAccuracyLevel

    for step in level:
        assert isinstance(step, SetAccuracyLevel)  # `accuracy` gives nothing else
        count = len(step.concerns(decoder))
        why = " of 2 or 8 bits, which are unusably slow on the CPU without it" if step.products == "slow" else ""
        tables = ", those of 2 bits by look-up tables (--accuracy-level 4: without them)" if last else ""
        return (
            f"4 for {count} quantized MatMuls{why}: they multiply in int8{tables}; --accuracy-level keep turns it off"
        )
    return ""


def _recipe(
    embed: Path, options: RepackOptions, provider: Provider, runtime: OnnxRuntime, level: Recipe, last: Recipe
) -> Recipe:
    from passes import MergeEmbeddings
    from passes.presets import compatible, fast, kept_in_host_memory, per_layer_tables, prefill
    from passes.recipe import parse

    if options.recipe is not None:
        return MergeEmbeddings(embed), *parse(options.recipe)
    if options.preset == "fast":
        steps = fast(embed, provider, runtime, half=options.to_fp16, every_token=options.speculative)
    else:
        steps = compatible(embed, options.layout, options.target, half=options.to_fp16)
    tables, kept = per_layer_tables(options.per_layer_table), kept_in_host_memory(options.host_embeddings)
    return *steps, *level, *tables, *prefill(options.prefill), *last, *kept


def _with_media(export: Export, pair: GraphPair, recipe: Recipe, media: Sequence[Modality]) -> _Work:
    from passes.presets import multimodal
    from passes.recipe import recipe_text
    from surgery.folder.multimodal import GraphPlan, check_export, most_patches
    from surgery.source.export import EMBED, ENCODERS

    check_export(export, media)
    tokens = {modality: export.placeholder(modality) for modality in media}
    recipes = multimodal(recipe, tokens, export.architecture.hidden_size, most_patches(export), pair.kept)
    sources = {EMBED: pair.embed, **{ENCODERS[modality]: pair.encoder(modality) for modality in media}}
    parts = [GraphPlan(role, path, recipes[role]) for role, path in sources.items()]
    texts = {role: recipe_text(tuple(map(_named, one))) for role, one in recipes.items()}
    return _Work(recipes["decoder_model_merged"], parts, texts)


def _named(step: Pass) -> Pass:
    """A pass as a manifest names it: a list of tokens by the file that it is in the folder."""
    from passes import PruneVocabulary
    from surgery.source.kept_tokens import VOCABULARY_FILE

    return PruneVocabulary(Path(VOCABULARY_FILE)) if isinstance(step, PruneVocabulary) else step


def _choice(source: str | Path, options: RepackOptions, provider: Provider) -> SourceRequest:
    from surgery.source.opening import SourceRequest, given_pair

    suited = "cpu" if options.to_fp16 else provider  # to-fp16 makes of any precision what CUDA takes
    given = given_pair(options.embed, options.decoder)
    return SourceRequest(str(source), suited, options.precision, options.revision, given, options.modalities)


def _provider(options: RepackOptions) -> Provider:
    """The provider that is meant. Raises RequestError where host memory is asked for and there is no other."""
    from surgery.runtime.sessions import provider_of

    provider = provider_of(options.provider)
    if provider == "cuda" and options.prefill == "int8":
        raise RequestError(_PREFILL_ON_CUDA, hint="add --ep cpu")
    if provider != "cuda" and options.host_embeddings:
        raise RequestError("--embed-device cpu and --ep cpu do not go together: on the CPU all is in host memory")
    return provider


def _onnxruntime(options: RepackOptions) -> OnnxRuntime:
    """What was asked for, or what suits the onnxruntime that is installed; the newest where none is.

    Raises RequestError where the closing proof would run a form that crashes the runtime.
    """
    from surgery.runtime.sessions import installed_onnxruntime

    found = installed_onnxruntime()
    old = found is not None and tuple(int(part) for part in found.split(".")[:2]) < (1, 31)
    if options.onnxruntime == "1.31" and old and options.validate and options.preset == "fast":
        raise RequestError(
            f"--onnxruntime 1.31 writes a form that crashes onnxruntime {found}, which is here to prove it",
            hint="leave out --onnxruntime, or add --no-validate",
        )
    return options.onnxruntime or ("1.27" if old else "1.31")
