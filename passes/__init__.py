"""The passes, and the registry that recipes and the command line read.

Each pass has a file of its own. To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

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
from passes.mask_media_ids import MaskMediaIds
from passes.merge_embeddings import MergeEmbeddings
from passes.rename_io import RenameIO
from passes.scatter_features import ScatterFeatures
from passes.set_accuracy_level import SetAccuracyLevel
from passes.slice_caches import SliceCaches
from passes.split_per_layer_table import SplitPerLayerTable
from passes.tie_lm_head import TieLmHead
from passes.to_fp16 import ToFp16
from passes.uniform_heads import UniformHeads

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        MergeEmbeddings,
        FoldLogitsToKeep,
        RenameIO,
        ExpandSharedKV,
        AnnotateHeadSizes,
        ScatterFeatures,
        MaskMediaIds,
        FlattenPerLayerInputs,
        FitEncoder,
        UniformHeads,
        TieLmHead,
        SetAccuracyLevel,
        ToFp16,
        HostEmbeddings,
        FuseAttention,
        DropAttentionBias,
        SliceCaches,
        SplitPerLayerTable,
        FusePerLayerTable,
    )
}
"""Every pass by name: those of the main recipe in its order, then those for images and sound, for older runtimes, for
other devices and for speed."""

__all__ = [
    "PASSES",
    "AnnotateHeadSizes",
    "DropAttentionBias",
    "ExpandSharedKV",
    "FitEncoder",
    "FlattenPerLayerInputs",
    "FoldLogitsToKeep",
    "FuseAttention",
    "FusePerLayerTable",
    "HostEmbeddings",
    "MaskMediaIds",
    "MergeEmbeddings",
    "RenameIO",
    "ScatterFeatures",
    "SetAccuracyLevel",
    "SliceCaches",
    "SplitPerLayerTable",
    "TieLmHead",
    "ToFp16",
    "UniformHeads",
]
