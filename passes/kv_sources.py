"""What each layer's attention reads, held against the architecture: before and after the passes that rewire it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import REORDERED, Numerics, Pass
from surgery.architecture import Architecture, Layer
from surgery.attention.cache_padding import own_sizes
from surgery.attention.gqa import window_faults
from surgery.attention.kv_wiring import KVCache, attentions
from surgery.choices import OnnxRuntime
from surgery.errors import PassError
from surgery.graph.model import Model
from surgery.graph.tensor_types import Dim, interface_types

if TYPE_CHECKING:
    from onnx import GraphProto


@dataclass(frozen=True)
class AttentionPass(Pass):
    """A pass that rewrites attention: each layer reads the same cache before and after it.

    onnxruntime  the oldest ONNX Runtime that must run the result: 1.27 names present outputs of KV-shared layers, which
                 nothing reads. surgery.attention.gqa says what other versions make of either form.
    """

    numerics: ClassVar[Numerics] = REORDERED

    onnxruntime: OnnxRuntime = "1.31"

    def requires(self, model: Model) -> None:
        check_kv_sources(model.graph, model.require_architecture())

    def ensures(self, model: Model) -> None:
        check_kv_sources(model.graph, model.require_architecture())


def check_windows(graph: GraphProto, arch: Architecture) -> None:
    """Raise PassError where a layer's fused attention has another window than the architecture."""
    if fault := next(window_faults(graph, arch.layers, "config.json"), None):
        raise PassError(
            fault, hint="the graph and config.json are of different models: use the export's own config.json"
        )


def check_kv_sources(graph: GraphProto, arch: Architecture) -> None:
    """Raise PassError unless each layer's attention reads the cache, and has the window, that the architecture
    gives."""
    cores = attentions(graph)
    if len(cores) != len(arch.layers):
        raise PassError(
            f"the graph has {len(cores)} attention cores, but config.json has {len(arch.layers)} layers; "
            "KV source layers cannot be checked against the graph"
        )
    for layer, core in zip(arch.layers, cores, strict=True):
        for kind, cache in (("key", core.key), ("value", core.value)):
            _check_owner(layer, kind, cache, core.node)
    _check_sizes(graph, arch)
    check_windows(graph, arch)


def _check_owner(layer: Layer, kind: str, cache: KVCache | None, node: str) -> None:
    expected = KVCache(f"past_key_values.{layer.kv_source}.{kind}", f"present.{layer.kv_source}.{kind}")
    if cache is None:
        raise PassError(
            f"layer {layer.index}: no {kind} cache was found behind {node!r}; {expected.present} is expected"
        )
    if cache != expected:
        role = "has its own cache" if layer.is_kv_source else f"reads the cache of layer {layer.kv_source}"
        raise PassError(
            f"layer {layer.index} {role} by config.json ({expected.past} -> {expected.present}), "
            f"but {node!r} reads {cache.past} -> {cache.present}"
        )


def _check_sizes(graph: GraphProto, arch: Architecture) -> None:
    declared, own = interface_types(graph), own_sizes(graph)
    for layer in arch.kv_sources:
        for kind in ("key", "value"):
            for name in (f"past_key_values.{layer.index}.{kind}", f"present.{layer.index}.{kind}"):
                shape = declared[name].shape
                if shape is None or len(shape) != 4:
                    raise PassError(
                        f"{name} is {declared[name]}; rank 4, [batch, kv heads, tokens, head size], is expected"
                    )
                heads, size = own[name]
                check_size(name, "KV heads", heads, layer.kv_heads)
                check_size(name, "head size", size, layer.head_size)


def check_size(name: str, what: str, found: Dim, expected: int) -> None:
    """Raise PassError where a number in the interface is not the architecture's; a symbolic size may be any."""
    if isinstance(found, int) and found != expected:
        raise PassError(f"{name} has {what} {found}, but config.json gives {expected}")
