"""fold-logits-to-keep: num_logits_to_keep leaves the interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from surgery.engine import Finding
from surgery.errors import PassError
from surgery.graph import declare, describe, reads
from surgery.model import Model

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, NodeProto

INPUT = "num_logits_to_keep"
SCOPE = "/lm_head/last_token"
_TO_THE_END = 2**63 - 1


@dataclass(frozen=True)
class FoldLogitsToKeep:
    """Decide in the graph which tokens get logits, instead of asking the caller.

        before                                          after, keep=last

        hidden [B,S,H]   num_logits_to_keep []          hidden [B,S,H]   attention_mask [B,T]
              |            |                                  |               |
              |    Neg -> Unsqueeze                           |   Slice(last S) x Range(S) -> ReduceMax
              |            |                                  |               |
             Slice(axis 1) [B,n,H]                           GatherND [B,1,H]
              |                                               |
            lm_head -> logits [B,n,V]                       lm_head -> logits [B,1,V]

    ONNX Runtime GenAI feeds num_logits_to_keep the value 0, which means every token: a prompt of 2,048 tokens then
    costs 2.1 GB of float32 logits at a vocabulary of 262,144. With logits declared [B,1,V] it reads the one row.

    keep=last  each row's last real token, found in attention_mask. A fixed last position would be the padding of the
               shorter rows in a right-padded batch, and GenAI would sample from it without an error (measured).
    keep=all   every token: the Slice goes, logits are [B,S,V].

    Requires: the input feeds one Slice along axis 1 through Neg and Unsqueeze (or Reshape) alone, as the exporter
    writes it; keep=last also needs attention_mask, integer [B,T], and opset 18 (ReduceMax with axes as an input).
    Ensures: the input is gone, and so is every node that served it.
    """

    name: ClassVar[str] = "fold-logits-to-keep"
    summary: ClassVar[str] = "num_logits_to_keep leaves the interface: logits of each row's last token, or of all"

    keep: Literal["last", "all"] = "last"

    def requires(self, model: Model) -> None:
        if _input(model.graph) is None:
            return
        _the_slice(model.graph)
        if self.keep == "last":
            if "attention_mask" not in {value.name for value in model.graph.input}:
                raise PassError("keep=last finds each row's last token in attention_mask, which the graph does not take")
            if model.opset() < 18:
                raise PassError(f"keep=last needs opset 18, the model has {model.opset()}")

    def run(self, model: Model) -> list[Finding]:
        graph = model.graph
        if _input(graph) is None:
            return [Finding("skipped", INPUT, "the graph does not take it")]
        served = {node.name: describe(node) for node in _the_slice(graph)}
        symbol = _size_symbol(graph)
        with model.edited() as view:
            nodes = [node for node in view.nodes if node.name in served]
            cut = nodes[-1]
            hidden, kept = cut.inputs[0], cut.outputs[0]
            if self.keep == "last":
                mask = next(tensor for tensor in view.inputs if tensor.name == "attention_mask")
                replacement = _gather_last(hidden, kept, mask)
            else:
                replacement = []
                for reader in list(kept.outputs):
                    reader.inputs[[tensor.name for tensor in reader.inputs].index(kept.name)] = hidden
            position = next(index for index, node in enumerate(view.nodes) if node is cut)
            rest = [node for node in view.nodes if node.name not in served]
            position -= len(nodes) - 1
            view.nodes = [*rest[:position], *replacement, *rest[position:]]
            view.inputs = [tensor for tensor in view.inputs if tensor.name != INPUT]
        size: int | str | None = 1
        if self.keep == "all":
            hidden_type = declare(graph).get(hidden.name)
            size = hidden_type.shape[1] if hidden_type and hidden_type.shape else None
        _declare_size(graph, symbol, size)
        findings = [Finding("removed", INPUT, "graph input; the graph decides which tokens get logits")]
        findings += [Finding("removed", name, "it served the input alone") for name in served.values()]
        if self.keep == "last":
            reason = "they pick each row's last token by attention_mask; logits are [batch, 1, vocab]"
            findings.append(Finding("added", f"{len(replacement)} nodes", reason))
        else:
            findings.append(Finding("changed", "logits", "every token has them: [batch, sequence, vocab]"))
        return findings

    def ensures(self, model: Model) -> None:
        if _input(model.graph) is not None:
            raise PassError(f"{INPUT} is still an input of the graph")


def _input(graph: GraphProto) -> str | None:
    return next((value.name for value in graph.input if value.name == INPUT), None)


def _the_slice(graph: GraphProto) -> list[NodeProto]:
    """The nodes between the input and its Slice, and the Slice last. Raises PassError for any other form."""
    chain: list[NodeProto] = []
    current = INPUT
    while True:
        readers = [node for node in graph.node if current in reads(node)]
        if len(readers) != 1:
            found = ", ".join(describe(node) for node in readers) or "nothing"
            raise PassError(f"{current!r} is read by {found}; one node on the way to a Slice is expected")
        node = readers[0]
        chain.append(node)
        if node.op_type == "Slice":
            break
        if node.op_type not in ("Neg", "Unsqueeze", "Reshape", "Cast", "Identity"):
            raise PassError(f"{INPUT} reaches {describe(node)}; Neg, Unsqueeze and a Slice are expected")
        current = node.output[0]
    cut = chain[-1]
    if len(cut.input) < 4 or cut.input[1] != current or not _along_axis_one(graph, cut.input[3]):
        raise PassError(f"{describe(cut)} does not cut the last tokens of axis 1, which {INPUT} is known to do")
    return chain


def _along_axis_one(graph: GraphProto, axes: str) -> bool:
    from surgery.graph import integers

    return any(tensor.name == axes and integers(tensor) == [1] for tensor in graph.initializer)


def _size_symbol(graph: GraphProto) -> str | None:
    """The symbolic size of the logits' token axis, which the exporter calls num_logits_to_keep."""
    declared = declare(graph).get("logits")
    size = declared.shape[1] if declared and declared.shape and len(declared.shape) == 3 else None
    return size if isinstance(size, str) and size == INPUT else None


def _declare_size(graph: GraphProto, symbol: str | None, size: int | str | None) -> None:
    """Declare the token axis of the logits, and of every value of the same symbolic size, as what it is now."""
    for value in (*graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if (symbol and dim.dim_param == symbol) or (value.name == "logits" and len(dims) == 3 and axis == 1):
                if isinstance(size, int):
                    dim.dim_value = size
                elif size:
                    dim.dim_param = size
                else:
                    dim.Clear()


def _gather_last(hidden: gs.Variable, kept: gs.Variable, mask: gs.Variable) -> list[gs.Node]:
    """Nodes from `hidden` [B,S,H] and `mask` [B,T] to `kept` [B,1,H].

    mask[:, -S:] x [0..S) is largest at the last real token, wherever the padding is; a row without one gives 0.
    Each operator has a CUDA kernel for int64 (ArgMax with select_last_index has none, onnxruntime-gpu 1.31.1).
    """
    import numpy as np
    import onnx_graphsurgeon as gs

    batch, tokens = (mask.shape or ["batch_size", None])[0], (hidden.shape or [None, "sequence_length"])[1]
    nodes: list[gs.Node] = []

    def constant(label: str, values: object) -> gs.Constant:
        return gs.Constant(f"{SCOPE}/constants/{label}", np.array(values, dtype=np.int64))

    def node(op: str, inputs: list[gs.Tensor], dtype: object, shape: list[object], **attrs: object) -> gs.Variable:
        label = f"{SCOPE}/{op}_{sum(1 for other in nodes if other.op == op)}"
        output = gs.Variable(f"{label}/output_0", dtype=dtype, shape=shape)
        nodes.append(gs.Node(op, name=label, attrs=dict(attrs), inputs=inputs, outputs=[output]))
        return output

    int64 = np.int64
    zero, one = constant("0", 0), constant("1", 1)
    axis_one, axis_two, end = constant("[1]", [1]), constant("[2]", [2]), constant("end", [_TO_THE_END])
    count = node("Shape", [hidden], int64, [1], start=1, end=2)
    scalar = node("Squeeze", [count], int64, [])
    start = node("Neg", [count], int64, [1])
    current = node("Slice", [mask, start, end, axis_one], mask.dtype, [batch, tokens])
    if mask.dtype != np.int64:
        current = node("Cast", [current], int64, [batch, tokens], to=7)
    positions = node("Range", [zero, scalar, one], int64, [tokens])
    marked = node("Mul", [current, positions], int64, [batch, tokens])
    last = node("ReduceMax", [marked, axis_one], int64, [batch, 1], keepdims=1)
    index = node("Unsqueeze", [last, axis_two], int64, [batch, 1, 1])
    kept.inputs.clear()
    nodes.append(gs.Node("GatherND", f"{SCOPE}/GatherND", {"batch_dims": 1}, inputs=[hidden, index], outputs=[kept]))
    return nodes
