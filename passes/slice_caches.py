"""slice-caches: attention on the CPU reads the part of a cache that is in view; new rows are written in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding
from passes.kv_sources import AttentionPass
from surgery.architecture import Architecture, Layer
from surgery.attention.gqa import BIAS, KEY, LAST, OPERATOR, PAST_KEY, QUERY, TOTAL, NoRows, window_of
from surgery.attention.kv_rows import KVRows
from surgery.attention.kv_wiring import AttentionNodes, attention_nodes
from surgery.attention.sequence_lengths import SCOPE as LENGTHS
from surgery.attention.shared_buffer import mark_shared_buffer
from surgery.graph.model import Model
from surgery.graph.node_builder import FLOAT, FLOAT16, NodeBuilder
from surgery.graph.scopes import all_names
from surgery.graph.tensor_types import declared_types

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import NodeProto


@dataclass(frozen=True)
class SliceCaches(AttentionPass):
    """Hand attention only the rows of a cache that its window shows, and write a KV source layer's new rows where they
    belong.

        before, a KV source layer                    after

        q  k  v  past [B,K,rows,H]                   past   k [B,K,S,H] at each row's end     v likewise
        GroupQueryAttention, window                  ScatterND -> present, the same buffer
          -> attended, present                       Slice(present, start, total), Cast to float32
                                                     GroupQueryAttention(q, no rows, the slice), window
                                                       -> attended
        before, its KV-shared layers                 after

        q  no rows  present of the source layer      q  no rows  the source layer's slice
        GroupQueryAttention, window                  GroupQueryAttention, window

    ONNX Runtime's CPU operator computes the scores of the whole cache for each query head, also where a window hides
    all but its last 512 rows: at 4,096 tokens a layer of E2B takes 2 ms in float32 and 5 ms in float16; the slice takes
    0.2 ms (1.31.1, 2 cores). In float16 it converts keys and values once for each query head; here they are converted
    once for a KV source layer and all its KV-shared layers, full layers included. Full layers in float32 stay as they
    are.

        start = max(0, shortest row's past tokens - window + 1)      each row's length and the total: less start

    Rows of a padded batch keep their own ends; the operator's own window cuts what the shorter ones must not see.

    The caches must be one buffer for past and present, long enough for all tokens: past_present_share_buffer in GenAI.
    ScatterND copies nothing where both are one tensor; elsewhere the whole buffer (1.1 ms for 16 MB). So there is no
    beam search, in which GenAI does not share it. The model says so in its metadata (surgery.attention.shared_buffer).

    Requires: the architecture, the interface named as rename-io names it. A node that counts lengths by other means
    than drop-attention-bias, has a bias, or rotates by itself stays, with the reason, and so do its KV-shared layers.
    Ensures: each layer reads the cache that it read before.
    """

    name: ClassVar[str] = "slice-caches"
    summary: ClassVar[str] = "for the CPU: attention reads the rows in view, in float32; new rows are written in place"

    def run(self, model: Model) -> list[Finding]:
        arch = model.require_architecture()
        found = attention_nodes(model.graph)
        types = declared_types(model.graph)
        chosen: list[Layer] = []
        reasons: dict[str, list[int]] = {}
        for kv_source in arch.kv_sources:
            group = [layer for layer in arch.layers if layer.kv_source == kv_source.index]
            half = types[f"present.{kv_source.index}.key"].dtype == "FLOAT16"
            stays = [_reason(found[layer.index].node, layer, half) for layer in group]
            if reason := next((reason for reason in stays if reason), None):
                reasons.setdefault(reason, []).extend(layer.index for layer in group)
            else:
                chosen.append(kv_source)
        findings = [Finding("skipped", f"layer {_listed(indices)}", reason) for reason, indices in reasons.items()]
        if not chosen:
            return findings
        _Slicing(model, arch, found, named=self.onnxruntime == "1.27").write(chosen)
        mark_shared_buffer(model)
        for kv_source in chosen:
            others = [
                layer.index for layer in arch.layers if layer.kv_source == kv_source.index and layer is not kv_source
            ]
            shared = f", shared with layer {_listed(others)}" if others else ""
            window = window_of(found[kv_source.index].node)
            view = f"the last {window} rows and those of new tokens" if window else "all rows"
            findings.append(
                Finding("changed", f"layer {kv_source.index}", f"new rows in place, {view} in view{shared}")
            )
        return findings


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, sorted(indices)))


def _reason(node: NodeProto, layer: Layer, half: bool) -> str:
    """Why a layer stays as it is; "" where it does not."""
    names = [*node.input, *[""] * (BIAS + 1 - len(node.input))]
    if node.op_type != OPERATOR:
        return f"its attention is {node.op_type}, not {OPERATOR}"
    if window_of(node) is None and not half:
        return "it sees all rows, in float32: there is nothing to cut off or to convert"
    if layer.is_kv_source and names[PAST_KEY] != f"past_key_values.{layer.index}.key":
        return "its cache is sliced already"
    if names[LAST] != f"{LENGTHS}/last" or any(names[TOTAL + 1 :]):
        return "its lengths are not the mask's alone: drop-attention-bias comes first"
    if any(attribute.name == "do_rotary" and attribute.i for attribute in node.attribute):
        return "it rotates by itself, and would count positions from the beginning of the slice"
    return ""


class _Slicing:
    """One edit of a graph: caches of the chosen KV source layers are written in place, and read as slices."""

    def __init__(self, model: Model, arch: Architecture, found: list[AttentionNodes], *, named: bool) -> None:
        self._model = model
        self._arch = arch
        self._outputs = {core.node.output[0]: layer for layer, core in zip(arch.layers, found, strict=True)}
        self._windows = {core.node.output[0]: window_of(core.node) for core in found}
        self._types = declared_types(model.graph)
        self._named = named
        self._make = NodeBuilder(taken=all_names(model.graph))
        self._no_rows = NoRows(self._make)
        self._slices: dict[int, tuple[gs.Variable, gs.Variable]] = {}

    def write(self, chosen: list[Layer]) -> None:
        kv_sources = {kv_source.index for kv_source in chosen}
        with self._model.edited() as view:
            self._rows = KVRows(view, self._make)
            for node in view.nodes:
                layer = self._outputs.get(node.outputs[0].name) if node.op == OPERATOR else None
                if layer is None or layer.kv_source not in kv_sources:
                    self._make.nodes.append(node)
                else:
                    self._slice(layer, node)
            view.nodes = self._make.nodes

    def _slice(self, layer: Layer, node: gs.Node) -> None:
        """A layer's node, behind what it needs now."""
        make = self._make
        if layer.is_kv_source:
            self._slices[layer.index] = self._written(layer, node)
        keys, values = self._slices[layer.kv_source]
        query, attended = node.inputs[QUERY], node.outputs[0]
        half = self._is_half(layer)
        if half:
            query = self._converted(query)
        view = self._rows.view(self._windows[attended.name])
        empty = self._no_rows.of(query, layer.kv_heads * layer.head_size)
        make.nodes.append(node)
        node.inputs = [query, empty, empty, keys, values, view.last, view.total]
        result = attended
        if half:
            result = make.variable(f"{attended.name}/float32/output_0", keys.dtype, attended.shape)
            make.into(attended, "Cast", [result], f"{node.name}/output/Cast", to=FLOAT16)
        unread = [f"{node.name}/unread_{kind}/output_0" for kind in ("key", "value")] if self._named else []
        node.outputs = [result, *(make.variable(name, keys.dtype, keys.shape) for name in unread)]

    def _written(self, layer: Layer, node: gs.Node) -> tuple[gs.Variable, gs.Variable]:
        """A KV source layer's presents, written in place; what is in view of them, in float32."""
        make = self._make
        indices = self._rows.indices(layer.kv_heads, node.inputs[KEY])
        view = self._rows.view(self._windows[node.outputs[0].name])
        slices = []
        inputs, presents = list(node.inputs), list(node.outputs[1:3])
        for place, kind in enumerate(("key", "value")):
            flat, past, present = inputs[KEY + place], inputs[PAST_KEY + place], presents[place]
            base = f"/model/layers.{layer.index}/attn/cache/{kind}"
            split = self._rows.constant([0, -1, layer.kv_heads, layer.head_size])
            batch, tokens = flat.shape[:2] if flat.shape else (None, None)
            shape = [batch, tokens, layer.kv_heads, layer.head_size]
            rows = make("Reshape", [flat, split], flat.dtype, shape, f"{base}/Reshape")
            shape = [batch, layer.kv_heads, tokens, layer.head_size]
            heads = make("Transpose", [rows], flat.dtype, shape, f"{base}/Transpose", perm=[0, 2, 1, 3])
            make.into(present, "ScatterND", [past, indices, heads], f"{base}/ScatterND")
            bounds = [view.start, view.end, self._rows.constant([2])]
            shape = [batch, layer.kv_heads, None, layer.head_size]
            cut = make("Slice", [present, *bounds], present.dtype, shape, f"{base}/Slice")
            slices.append(self._converted(cut) if self._is_half(layer) else cut)
        return slices[0], slices[1]

    def _is_half(self, layer: Layer) -> bool:
        """Whether attention is in float16: the operator has one dtype for its query, its caches and its result."""
        return self._types[f"present.{layer.kv_source}.key"].dtype == "FLOAT16"

    def _converted(self, value: gs.Variable) -> gs.Variable:
        """The value in float32."""
        label = f"{value.name.removesuffix('/output_0')}/Cast"
        return self._make("Cast", [value], "float32", value.shape, label, to=FLOAT)
