"""flatten-per-layer-inputs: layers and sizes in one axis, on either side of the interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from passes.base import Finding, Pass
from surgery.errors import PassError
from surgery.graph.model import Model
from surgery.graph.node_builder import NodeBuilder
from surgery.graph.renaming import fresh, rename
from surgery.graph.scopes import value_names
from surgery.graph.tensor_types import TensorType, tensor_type

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto

InterfaceSide = Literal["input", "output"]
PER_LAYER = "per_layer_inputs"
SCOPE = "/model/per_layer_inputs"


@dataclass(frozen=True)
class FlattenPerLayerInputs(Pass):
    """Give per_layer_inputs rank 3 in the interface; inside the graph it keeps rank 4.

        before                                        after

        [embed_tokens] -> per_layer_inputs [B,S,L,D]  [embed_tokens] -> Reshape -> per_layer_inputs [B,S,L*D]

        per_layer_inputs [B,S,L,D] -> [decoder]       per_layer_inputs [B,S,L*D] -> Reshape -> [decoder]

    ONNX Runtime GenAI allocates it as [batch, sequence, the last dimension of the embedding's output] and gives the
    same buffer to the decoder; of rank 4 it says `Invalid rank for output: per_layer_inputs Got: 3 Expected: 4`.

    Requires: layers and size are numbers; an output comes from a node.
    Ensures: per_layer_inputs is [B,S,L*D] on every side of the interface where it is. The bytes are the same.
    """

    name: ClassVar[str] = "flatten-per-layer-inputs"
    summary: ClassVar[str] = "per_layer_inputs [B,S,layers,size] becomes [B,S,layers*size] in the interface"

    def requires(self, model: Model) -> None:
        made = {name for node in model.graph.node for name in node.output}
        for side, declared in _sides(model.graph).items():
            if not _is_flat(declared) and not _is_split(declared):
                raise PassError(
                    f"{PER_LAYER} is {declared}; [batch, sequence, layers, size] with numbers for layers and size is "
                    "expected"
                )
            if side == "output" and PER_LAYER not in made:
                raise PassError(f"output {PER_LAYER!r} comes from no node")

    def run(self, model: Model) -> list[Finding]:
        graph = model.graph
        sides = _sides(graph)
        if not sides:
            return [Finding("skipped", PER_LAYER, "the graph neither takes nor gives it")]
        if not (split := {side: declared for side, declared in sides.items() if _is_split(declared)}):
            return [Finding("skipped", PER_LAYER, f"it is {next(iter(sides.values()))} already")]
        findings = []
        for side, declared in split.items():
            inner = fresh(f"{SCOPE}/{PER_LAYER}", value_names(graph))
            rename(graph, {PER_LAYER: inner})
            with model.edited() as view:
                flat = _to_flat(view, inner) if side == "output" else _from_flat(view, inner)
            findings.append(Finding("changed", PER_LAYER, f"graph {side}, {declared}; it is {flat} now"))
        return findings

    def ensures(self, model: Model) -> None:
        for side, declared in _sides(model.graph).items():
            if not _is_flat(declared):
                raise PassError(f"{side} {PER_LAYER} is {declared}; [batch, sequence, layers * size] is expected")


def _sides(graph: GraphProto) -> dict[InterfaceSide, TensorType | None]:
    sides: dict[InterfaceSide, TensorType | None] = {}
    for value in graph.input:
        if value.name == PER_LAYER:
            sides["input"] = tensor_type(value)
    for value in graph.output:
        if value.name == PER_LAYER:
            sides["output"] = tensor_type(value)
    return sides


def _is_flat(declared: TensorType | None) -> bool:
    return declared is not None and len(declared.shape or ()) == 3 and isinstance((declared.shape or ())[2], int)


def _is_split(declared: TensorType | None) -> bool:
    shape = declared.shape if declared is not None else None
    return shape is not None and len(shape) == 4 and all(isinstance(size, int) for size in shape[2:])


def _to_flat(view: gs.Graph, inner: str) -> str:
    """A Reshape at the end of the graph, from the value `inner` to the output."""
    split = next(tensor for tensor in view.outputs if tensor.name == inner)
    flat = _flat(split)
    _reshape(flat, split, [0, 0, flat.shape[2]], "Flatten", view.nodes)
    view.outputs[view.outputs.index(split)] = flat
    return _listed(flat)


def _from_flat(view: gs.Graph, inner: str) -> str:
    """A Reshape at the beginning of the graph, from the input to the value `inner`."""
    split = next(tensor for tensor in view.inputs if tensor.name == inner)
    flat = _flat(split)
    view.inputs[view.inputs.index(split)] = flat
    view.nodes[:0] = _reshape(split, flat, [0, 0, *split.shape[2:]], "Split", [])
    return _listed(flat)


def _listed(tensor: gs.Variable) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _flat(split: gs.Variable) -> gs.Variable:
    batch, tokens, layers, size = split.shape
    return NodeBuilder().variable(PER_LAYER, split.dtype, [batch, tokens, layers * size])


def _reshape(
    result: gs.Variable, source: gs.Variable, shape: list[int], label: str, nodes: list[gs.Node]
) -> list[gs.Node]:
    make = NodeBuilder(SCOPE, nodes=nodes)
    make.into(result, "Reshape", [source, make.constant(shape, label=f"constants/{label}")], label)
    return make.nodes
