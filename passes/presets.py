"""Presets: the recipes that `repack` applies, and what its options add to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from passes.annotate_head_sizes import AnnotateHeadSizes
from passes.base import Pass
from passes.drop_attention_bias import DropAttentionBias
from passes.expand_shared_kv import ExpandSharedKV
from passes.fit_encoder import FitEncoder
from passes.flatten_per_layer_inputs import FlattenPerLayerInputs
from passes.fold_logits_to_keep import FoldLogitsToKeep
from passes.fuse_attention import FuseAttention
from passes.fuse_per_layer_table import FusePerLayerTable
from passes.host_embeddings import HostEmbeddings
from passes.int8_prefill import Int8Prefill
from passes.lut_products import LutProducts
from passes.mask_media_ids import MaskMediaIds
from passes.merge_embeddings import MergeEmbeddings
from passes.move_padding import MovePadding
from passes.prune_vocabulary import PruneVocabulary
from passes.recipe import Recipe
from passes.rename_io import RenameIO
from passes.scatter_features import ScatterFeatures
from passes.set_accuracy_level import SetAccuracyLevel, quantised_products
from passes.slice_caches import SliceCaches
from passes.split_per_layer_table import SplitPerLayerTable
from passes.tie_lm_head import TieLmHead
from passes.to_fp16 import ToFp16
from passes.uniform_heads import UniformHeads
from surgery.choices import (
    AccuracyChoice,
    KVLayout,
    Modality,
    OnnxRuntime,
    PerLayerTable,
    PrefillChoice,
    Preset,
    Provider,
    Target,
)
from surgery.graph.look_up_tables import BITS
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute
from surgery.source.export import ENCODERS
from surgery.source.kept_tokens import KeptTokens


def compatible(
    embed: Path | Model,
    kv_layout: KVLayout = "aliased",
    target: Target = "genai-0.15",
    *,
    half: bool = False,
) -> Recipe:
    """The main recipe. `aliased` gives every layer a pair of caches, `unique` leaves the source layers' pairs alone.

    `embed` is the graph of the embeddings. `target` is the oldest runtime that must load the folder; below 0.14 all
    caches get one size. `half` makes float16 of a float32 precision, which CUDA needs; every number then changes a
    little.
    """
    return (
        MergeEmbeddings(embed),
        FoldLogitsToKeep(),
        RenameIO(),
        MovePadding(),
        *_where(kv_layout == "aliased", ExpandSharedKV()),
        AnnotateHeadSizes(),
        *_where(target == "genai-0.12", UniformHeads()),
        *_where(half, ToFp16()),
    )


def fast(
    embed: Path | Model,
    provider: str = "cpu",
    onnxruntime: OnnxRuntime = "1.31",
    *,
    half: bool = False,
    every_token: bool = False,
) -> Recipe:
    """The recipe for speed: all attention in GroupQueryAttention, the source layers' caches alone, updated in place.

    The arithmetic is the source's in another order. On the CPU attention reads no more of a cache than is in view.
    `onnxruntime` is the oldest ONNX Runtime that must run it. `embed` and `half` as in `compatible`;
    `every_token` gives logits for each token of a run, which speculation compares.
    """
    return (
        MergeEmbeddings(embed),
        TieLmHead(),
        FoldLogitsToKeep("all" if every_token else "last"),
        RenameIO(),
        FuseAttention(onnxruntime),
        DropAttentionBias(),
        AnnotateHeadSizes(),
        *_where(half, ToFp16()),
        *_where(provider == "cpu", SliceCaches(onnxruntime)),
    )


def _where(asked: bool, step: Pass) -> Recipe:
    return (step,) if asked else ()


def pruned(recipe: Recipe, keep: Path | KeptTokens | None) -> Recipe:
    """A recipe with prune-vocabulary in it, where tokens to keep are given: behind what brings and ties the tables."""
    if keep is None:
        return recipe
    place = max((n for n, step in enumerate(recipe, 1) if isinstance(step, (MergeEmbeddings, TieLmHead))), default=0)
    return *recipe[:place], PruneVocabulary(keep), *recipe[place:]


def accuracy(
    decoder: Model, choice: AccuracyChoice, preset: Preset, provider: Provider, costly: Sequence[str] = ()
) -> Recipe:
    """What follows a recipe for the accuracy level of a decoder's quantised products. `costly` are kinds that `auto` is
    not to give one."""
    if choice == "keep":
        return ()
    if choice != "auto":
        return (SetAccuracyLevel(choice),)
    step = SetAccuracyLevel("4", "all" if preset == "fast" else "slow", " ".join(costly))
    return _where(provider == "cpu" and bool(step.concerns(decoder)), step)


def lut_products(decoder: Model, level: Recipe, choice: AccuracyChoice, preset: Preset) -> Recipe:
    """What follows last, where `auto` gives products of 2 bits the accuracy level: with `fast` look-up tables for them."""
    of_two_bits = any(int_attribute(node, "bits", 4) == BITS for node in quantised_products(decoder))
    return _where(choice == "auto" and preset == "fast" and bool(level) and of_two_bits, LutProducts())


def prefill(choice: PrefillChoice) -> Recipe:
    """What follows a recipe for runs of many tokens; behind what changes weights."""
    return _where(choice == "int8", Int8Prefill())


def per_layer_tables(choice: PerLayerTable) -> Recipe:
    """What follows a recipe: the table of per-layer inputs as it is, cut into one a layer, or put together."""
    recipes: dict[PerLayerTable, Recipe] = {
        "keep": (),
        "split": (SplitPerLayerTable(),),
        "fused": (FusePerLayerTable(),),
    }
    return recipes[choice]


def kept_in_host_memory(asked: bool) -> Recipe:
    """What follows a recipe where the token tables are to stay in host memory; behind what changes the tables."""
    return _where(asked, HostEmbeddings())


def multimodal(
    merged: Recipe,
    tokens: Mapping[Modality, int],
    hidden: int,
    patches: int | None = None,
    keep: Path | KeptTokens | None = None,
) -> dict[str, Recipe]:
    """The recipes of a folder that takes images or sound too: one for each of its graphs, by role.

    The decoder's is `merged`, the recipe for text, without the embeddings in the graph. `tokens` are the placeholders'
    ids (the new ones, where tokens to `keep` are given), `hidden` is the text model's size, `patches` the most that an
    image has.
    """
    ids = {str(modality): token for modality, token in tokens.items()}
    decoder = tuple(step for step in merged if not isinstance(step, MergeEmbeddings))
    recipes: dict[str, Recipe] = {
        "decoder_model_merged": (*decoder, FlattenPerLayerInputs()),
        "embed_tokens": pruned((ScatterFeatures(**ids), MaskMediaIds(**ids), FlattenPerLayerInputs()), keep),
    }
    for modality in tokens:
        recipes[ENCODERS[modality]] = (FitEncoder(modality, hidden, patches if modality == "image" else None),)
    return recipes
