"""fuse-attention: attention in plain operators becomes GroupQueryAttention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding
from passes.kv_sources import AttentionPass, check_kv_sources
from surgery.architecture import Architecture, Layer
from surgery.attention.gqa import BIAS, DOMAIN, LAST, OPERATOR, NoRows
from surgery.attention.kv_wiring import AttentionNodes, attention_nodes
from surgery.attention.sequence_lengths import MASK, sequence_lengths
from surgery.attention.unfused import UnfusedAttention, UnfusedSearch
from surgery.errors import ModelError, PassError
from surgery.graph.model import Model
from surgery.graph.node_builder import NodeBuilder
from surgery.graph.scopes import all_names

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class FuseAttention(AttentionPass):
    """Let one operator compute what the exporter wrote out for heads of 512 and for shared caches.

        before, a KV source layer                            after

        q, k, v [B,S,heads * size]                           q  k  v  past  row lengths
        Reshape, Transpose, Concat(past, new) -> present      \\  \\  |  /     /
        Unsqueeze, Expand, Reshape  (each KV head N times)    GroupQueryAttention -> present
        MatMul, Where(mask), Softmax, MatMul                          |
        Transpose, Reshape -> attended                             attended

        before, a KV-shared layer                            after

        q      present of its source layer                   q   no rows   present of its source layer as past   row lengths
        Reshape, Transpose, MatMul, Where(causal),           GroupQueryAttention, local_window_size of the layer
        Where(window), Softmax, MatMul, ...                          |
        -> attended                                               attended

    scale is 1.0, written out: 0 would mean 1/sqrt(size). Queries and keys are rotated already: do_rotary is 0. New keys
    and values of a KV-shared layer are empty tensors, [B,0,KV heads * size]; an input left out is read as a packed
    query.

    A layer is fused only if it is proven: the part of the graph between the flat query, the caches and the flat result
    runs on numbers, past each length that its constants mention and past 4,096 tokens, and must give causal attention
    over the layer's window (surgery.attention.unfused). A layer that does not is left alone, with the reason. So are
    all layers that share a cache with one, where the source layer is unfused.

    A KV-shared layer takes lengths and bias of a KV source layer that is fused already; drop-attention-bias replaces
    both. An unfused KV source layer and its KV-shared layers take their lengths from the values of attention_mask: a
    right-padded row ends where its tokens end, and its next token is written there.

    Requires: the architecture, the interface named as rename-io names it, one attention core per layer, attention_mask.
    Ensures: each layer reads the cache that it read before.
    """

    name: ClassVar[str] = "fuse-attention"
    summary: ClassVar[str] = "unfused attention becomes GroupQueryAttention, shared caches included"

    def requires(self, model: Model) -> None:
        super().requires(model)
        if all(value.name != MASK for value in model.graph.input):
            raise PassError(f"the graph takes no {MASK}, which gives each row's length")

    def run(self, model: Model) -> list[Finding]:
        arch = model.require_architecture()
        found = attention_nodes(model.graph)
        unfused_layers = {layer.index for layer, core in zip(arch.layers, found, strict=True) if core.mixed is not None}
        if not unfused_layers:
            return [Finding("skipped", "attention", f"each of {len(found)} layers is fused already")]
        matches, reasons = _matches(model, arch, found)
        findings = [Finding("skipped", f"layer {index}", reason) for index, reason in reasons.items()]
        if matches:
            _Fusion(model, arch, found, matches, named=self.onnxruntime == "1.27").write()
            findings += _summaries(arch, matches, len(found) - len(unfused_layers))
        return findings


def unfused(model: Model) -> dict[int, str]:
    """Why each layer that is unfused stays so, by number; those that can be fused are left out.

    Raises PassError where the layers are not those of the architecture.
    """
    arch = model.require_architecture()
    check_kv_sources(model.graph, arch)
    return _matches(model, arch, attention_nodes(model.graph))[1]


def _matches(
    model: Model, arch: Architecture, found: list[AttentionNodes]
) -> tuple[dict[int, UnfusedAttention], dict[int, str]]:
    """Proven layers, and for each of the other unfused ones why it stays."""
    unrolling = UnfusedSearch(model.proto, arch.attention_heads, arch.context_length)
    matches: dict[int, UnfusedAttention] = {}
    reasons: dict[int, str] = {}
    for layer, core in zip(arch.layers, found, strict=True):
        if core.mixed is None:
            continue
        source = found[layer.kv_source]
        if source.mixed is None and source.node.op_type != OPERATOR:
            reasons[layer.index] = (
                f"layer {layer.kv_source}, whose cache it reads, has {source.node.op_type}, not {OPERATOR}"
            )
            continue
        try:
            match = unrolling.find(core, layer)
            unrolling.prove(match, layer)
            matches[layer.index] = match
        except ModelError as error:
            reasons[layer.index] = str(error)
    for kv_source in (
        arch.kv_sources
    ):  # a KV source layer that counts its rows by the mask, and a KV-shared layer that does not, part in padding
        group = [layer.index for layer in arch.layers if layer.kv_source == kv_source.index]
        stuck = next((index for index in group if index in reasons), None)
        if found[kv_source.index].mixed is not None and stuck is not None:
            for index in group:
                if matches.pop(index, None):
                    reasons[index] = f"layer {stuck}, which reads the same cache, stays unfused"
    return matches, dict(sorted(reasons.items()))


def _summaries(arch: Architecture, matches: Mapping[int, UnfusedAttention], already: int) -> list[Finding]:
    kinds: dict[str, list[int]] = {}
    for index in matches:
        layer = arch.layers[index]
        window = f"{layer.window} tokens in view" if layer.window else "all tokens in view"
        role = "KV source layer" if layer.is_kv_source else f"KV-shared layer of layer {layer.kv_source}"
        kinds.setdefault(f"{role}, heads of {layer.head_size}, {window}", []).append(index)
    findings = [
        Finding("changed", f"layer {', '.join(map(str, indices))}", f"{OPERATOR} now: {kind}")
        for kind, indices in kinds.items()
    ]
    if already:
        findings.append(Finding("skipped", f"{already} layers", "fused already"))
    return findings


class _Fusion:
    """One edit of a graph: the proven layers become fused nodes, and what served them alone goes."""

    def __init__(
        self,
        model: Model,
        arch: Architecture,
        found: list[AttentionNodes],
        matches: Mapping[int, UnfusedAttention],
        *,
        named: bool,
    ) -> None:
        self._model = model
        self._arch = arch
        self._cores = found
        self._matches = matches
        self._named = named
        self._make = NodeBuilder(taken=all_names(model.graph))
        self._no_rows = NoRows(self._make)

    def write(self) -> None:
        with self._model.edited(prune=True) as view:
            self._tensors = view.tensors()
            self._lengths = sequence_lengths(view)
            self._fused = {node.outputs[0].name: node for node in view.nodes if node.op == OPERATOR and node.outputs}
            results = {match.output: index for index, match in self._matches.items()}
            for node in view.nodes:
                index = next((results[t.name] for t in node.outputs if t.name in results), None)
                if index is None:
                    self._make.nodes.append(node)
                else:
                    self._fuse(self._arch.layers[index], self._matches[index])
            view.nodes = self._make.nodes

    def _fuse(self, layer: Layer, match: UnfusedAttention) -> None:
        """The fused node of a layer, behind the empty rows that it needs."""
        import onnx_graphsurgeon as gs

        query = self._tensors[match.query]
        lengths, bias = self._lengths_of(layer)
        if match.owned:
            owned = match.owned
            rows = [self._tensors[name] for name in (owned.key, owned.value, owned.past_key, owned.past_value)]
            presents = [self._tensors[match.present_key], self._tensors[match.present_value]]
        else:
            empty = self._no_rows.of(query, layer.kv_heads * layer.head_size)
            rows = [empty, empty, self._tensors[match.present_key], self._tensors[match.present_value]]
            presents = self._unread_presents(layer, rows[2]) if self._named else []
        outputs = [self._tensors[match.output], *presents]
        for tensor in outputs:
            tensor.inputs.clear()
        padding = [gs.Variable.empty() for _ in range(3)] if bias is not None else []
        fused = gs.Node(
            OPERATOR,
            self._make.named(f"/model/layers.{layer.index}/attn/{OPERATOR}"),
            self._attributes(layer),
            inputs=[query, *rows, *lengths, *padding, *([bias] if bias is not None else [])],
            outputs=outputs,
            domain=DOMAIN,
        )
        self._make.nodes.append(fused)

    def _attributes(self, layer: Layer) -> dict[str, int | float]:
        return {
            "num_heads": self._arch.attention_heads,
            "kv_num_heads": layer.kv_heads,
            "scale": 1.0,
            "local_window_size": layer.window or -1,
            "softcap": 0.0,
            "do_rotary": 0,
            "rotary_interleaved": 0,
        }

    def _lengths_of(self, layer: Layer) -> tuple[list[gs.Tensor], gs.Tensor | None]:
        """Row lengths, total and bias: those of a KV source layer that was fused before, so that both see rows
        alike."""
        core = self._cores[layer.kv_source]
        if core.mixed is not None:
            return [self._lengths.last, self._lengths.total], None
        kv_source = self._fused[core.node.output[0]]
        bias = kv_source.inputs[BIAS] if len(kv_source.inputs) > BIAS and kv_source.inputs[BIAS].name else None
        return list(kv_source.inputs[LAST : LAST + 2]), bias

    def _unread_presents(self, layer: Layer, cache: gs.Variable) -> list[gs.Variable]:
        names = (f"/model/layers.{layer.index}/attn/{OPERATOR}/unread_{kind}" for kind in ("key", "value"))
        return [self._make.variable(name, cache.dtype, cache.shape) for name in names]
