"""expand-shared-kv: every layer gets its own pair of past and present."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from passes.kv_sources import check_kv_sources
from surgery.architecture import Layer
from surgery.errors import PassError
from surgery.graph.model import Model
from surgery.graph.node_builder import NodeBuilder
from surgery.graph.tensor_types import declared_types, tensor_type

if TYPE_CHECKING:
    from onnx import GraphProto


@dataclass(frozen=True)
class ExpandSharedKV(Pass):
    """Give each KV-shared layer a pair in the interface: its present aliases its source layer's, its past is not read.

        before (layer 15 reads 13's)              after

        past_key_values.13.key -> [13] -> present.13.key     past_key_values.13.key -> [13] -> present.13.key
                                               |                                                 |
                                              [15]                                              [15]
                                                                                                 |
                                                       past_key_values.15.key        Identity -> present.15.key

    The interface ends in layer order, as runtimes that count layers expect it. Each alias costs a copy of the cache
    per step and the memory of one more pair.

    Requires: the architecture; the interface named as `rename-io` names it; one attention core per layer; and
    agreement, layer by layer, between the source layer that the architecture gives and the cache that the graph reads.
    Ensures: `past_key_values.N.*` and `present.N.*` exist for every layer, shaped as the source layer's.
    """

    name: ClassVar[str] = "expand-shared-kv"
    summary: ClassVar[str] = (
        "every layer gets a past and a present; a KV-shared layer's present aliases its source layer's"
    )

    def requires(self, model: Model) -> None:
        arch = model.require_architecture()
        check_kv_sources(model.graph, arch)
        for layer in arch.kv_shared_layers:
            _refuse_half_a_pair(model.graph, layer)

    def run(self, model: Model) -> list[Finding]:
        arch = model.require_architecture()
        declared = declared_types(model.graph)
        present = {value.name for value in model.graph.output}
        missing = [layer for layer in arch.kv_shared_layers if f"present.{layer.index}.key" not in present]
        if not missing:
            reason = "each has its pair already" if arch.kv_shared_layers else "every layer has its own cache"
            return [Finding("skipped", "KV-shared layers", reason)]
        findings = []
        with model.edited() as view:
            tensors, make = view.tensors(), NodeBuilder(nodes=view.nodes)
            for layer in missing:
                for kind in ("key", "value"):
                    source = tensors[f"present.{layer.kv_source}.{kind}"]
                    alias = make.variable(f"present.{layer.index}.{kind}", source.dtype, source.shape)
                    label = f"/model/layers.{layer.index}/attn/present/{kind}"
                    view.outputs.append(make.into(alias, "Identity", [source], label))
                    kv_source = tensors[f"past_key_values.{layer.kv_source}.{kind}"]
                    past = f"past_key_values.{layer.index}.{kind}"
                    view.inputs.append(make.variable(past, kv_source.dtype, kv_source.shape))
                shape = declared[f"present.{layer.kv_source}.key"]
                findings.append(
                    Finding("added", f"present.{layer.index}.key|value", f"alias of layer {layer.kv_source}'s, {shape}")
                )
        return findings

    def ensures(self, model: Model) -> None:
        arch = model.require_architecture()
        inputs = {value.name: tensor_type(value) for value in model.graph.input}
        outputs = {value.name: tensor_type(value) for value in model.graph.output}
        for layer in arch.layers:
            for kind in ("key", "value"):
                past, present = f"past_key_values.{layer.index}.{kind}", f"present.{layer.index}.{kind}"
                if past not in inputs or present not in outputs:
                    raise PassError(f"layer {layer.index} has no {past if past not in inputs else present}")
                if inputs[past] != inputs[f"past_key_values.{layer.kv_source}.{kind}"]:
                    raise PassError(f"{past} is {inputs[past]}, not shaped as layer {layer.kv_source}'s")


def _refuse_half_a_pair(graph: GraphProto, layer: Layer) -> None:
    has = {value.name for value in (*graph.input, *graph.output)}
    names = [f"{family}.{layer.index}.{kind}" for family in ("past_key_values", "present") for kind in ("key", "value")]
    missing = [name for name in names if name not in has]
    if 0 < len(missing) < len(names):
        found = next(name for name in names if name in has)
        raise PassError(f"layer {layer.index} has {found} but not {missing[0]}; all of its caches or none are expected")
