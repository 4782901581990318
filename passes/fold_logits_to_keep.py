"""fold-logits-to-keep: num_logits_to_keep leaves the interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from passes.base import Finding, Pass
from surgery.attention.kv_wiring import slot_of_name
from surgery.attention.sequence_lengths import new_columns
from surgery.errors import PassError
from surgery.graph.index import Constants, readers
from surgery.graph.model import Model
from surgery.graph.node_builder import INT64, NodeBuilder
from surgery.graph.nodes import node_in_words
from surgery.graph.scopes import reads
from surgery.graph.tensor_types import Dim, TensorType, declared_types, tensor_type
from surgery.graph.token_inputs import token_inputs

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, NodeProto, TensorShapeProto, ValueInfoProto

INPUT = "num_logits_to_keep"
SCOPE = "/lm_head/last_token"
MASK = "attention_mask"
_ON_THE_WAY = ("Neg", "Unsqueeze", "Reshape", "Cast", "Identity")


@dataclass(frozen=True)
class FoldLogitsToKeep(Pass):
    """Decide in the graph which tokens get logits, instead of asking the caller.

        before                                          after, keep=last

        hidden [B,S,H]   num_logits_to_keep []          hidden [B,S,H]   attention_mask [B,T]
              |            |                                  |               |
              |    Neg -> Unsqueeze                           |   Slice(the new S) x Range(S) -> TopK(1)
              |            |                                  |               |
             Slice(axis 1) [B,n,H]                           GatherND [B,1,H]
              |                                               |
            lm_head -> logits [B,n,V]                       lm_head -> logits [B,1,V]

    ONNX Runtime GenAI feeds num_logits_to_keep the value 0, which means every token: a prompt of 2,048 tokens then
    costs 2.1 GB of float32 logits at a vocabulary of 262,144. With logits declared [B,1,V] it reads the one row.

    keep=last  each row's last real token, found in attention_mask. A fixed last position would be the padding of the
               shorter rows in a right-padded batch, and GenAI would sample from it without an error (measured). The new
               tokens' columns are the last ones; the first ones of a mask as wide as the caches' buffer, as it is
               under CUDA graph capture, which ends with zeros.
    keep=all   every token: the Slice goes, logits are [B,S,V].

    Requires: the input feeds one Slice of the last tokens of axis 1, through one Neg and Unsqueeze (or Reshape) alone,
    as the exporter writes it; keep=last also needs attention_mask, integer [B,T], and opset 15 (Shape of one
    axis).
    Ensures: the input is gone, and so is every node that served it.
    """

    name: ClassVar[str] = "fold-logits-to-keep"
    summary: ClassVar[str] = "num_logits_to_keep leaves the interface: logits of each row's last token, or of all"

    keep: Literal["last", "all"] = "last"

    def requires(self, model: Model) -> None:
        if not _takes_it(model.graph):
            return
        cut = _serving(model.graph)[-1]
        if self.keep == "all":
            _refuse_other_readers(model.graph, cut.output[0])
        else:
            _check_mask(model.graph)
            if model.opset() < 15:
                raise PassError(f"keep=last needs opset 15, the model has {model.opset()}")

    def run(self, model: Model) -> list[Finding]:
        graph = model.graph
        if not _takes_it(graph):
            return [Finding("skipped", INPUT, "the graph does not take it")]
        serving = _serving(graph)
        removed = [node_in_words(node) for node in serving]
        cut = serving[-1]
        mask_name = _mask_of(graph) if self.keep == "last" else ""
        size: Dim = 1 if self.keep == "last" else _tokens_of(graph, cut.input[0])
        _declare_token_axis(graph, cut.output[0], size)
        with model.edited(prune=True) as view:
            position = next(i for i, node in enumerate(view.nodes) if cut.output[0] in [t.name for t in node.outputs])
            slicing = view.nodes[position]
            hidden, kept = slicing.inputs[0], slicing.outputs[0]
            added: list[gs.Node] = []
            if self.keep == "last":
                mask = next(tensor for tensor in view.inputs if tensor.name == mask_name)
                past = next((tensor for tensor in view.inputs if _is_cache(tensor)), None)
                added = _gather_last(hidden, kept, mask, past)
            else:
                for reader in list(kept.outputs):
                    reader.inputs[[tensor.name for tensor in reader.inputs].index(kept.name)] = hidden
            view.nodes[position : position + 1] = added
            view.inputs = [tensor for tensor in view.inputs if tensor.name != INPUT]
        findings = [Finding("removed", INPUT, "graph input; the graph decides which tokens get logits")]
        findings += [Finding("removed", name, "it served the input alone") for name in removed]
        if added:
            reason = "they pick each row's last token by attention_mask; logits are [batch, 1, vocab]"
            findings.append(Finding("added", f"{len(added)} nodes", reason))
        else:
            findings.append(Finding("changed", "logits", "every token has them: [batch, sequence, vocab]"))
        return findings

    def ensures(self, model: Model) -> None:
        if _takes_it(model.graph):
            raise PassError(f"{INPUT} is still an input of the graph")


def _takes_it(graph: GraphProto) -> bool:
    return any(value.name == INPUT for value in graph.input)


def _serving(graph: GraphProto) -> list[NodeProto]:
    """The nodes that serve the input alone, its Slice last. Raises PassError for any form that is not known."""
    reading = readers(graph)
    chain: list[NodeProto] = []
    current = INPUT
    while not chain or chain[-1].op_type != "Slice":
        following = reading.get(current, [])
        if len(following) != 1 or any(value.name == current for value in graph.output):
            found = ", ".join(node_in_words(node) for node in following[:4]) or "nothing"
            raise PassError(f"{current!r} is read by {found}; one node on the way to a Slice is expected")
        node = following[0]
        known = node.op_type == "Slice" or (node.op_type in _ON_THE_WAY and list(node.input[:1]) == [current])
        if not known or not node.output or any(node is one for one in chain):
            raise PassError(f"{INPUT} reaches {node_in_words(node)}; Neg, Unsqueeze and a Slice are expected")
        chain.append(node)
        if node.op_type != "Slice":
            current = node.output[0]
    _check_slice(graph, chain, current)
    constants = [
        node
        for node in graph.node
        if node.op_type == "Constant" and all(any(r is c for c in chain) for r in reading.get(node.output[0], [None]))
    ]
    return [*constants, *chain]


def _check_slice(graph: GraphProto, chain: list[NodeProto], starts: str) -> None:
    """Raise PassError unless the Slice keeps tokens -n to the end of axis 1, n being the input."""
    cut = chain[-1]
    names = [*cut.input, "", "", ""]
    constants = Constants(graph)
    ends, axes, steps = (constants.integers(name) for name in names[2:5])
    negated = sum(1 for node in chain if node.op_type == "Neg") == 1
    whole = ends is not None and len(ends) == 1 and ends[0] >= 2**31 - 1
    if names[1] != starts or not negated or not whole or axes != [1] or not (names[4] == "" or steps == [1]):
        raise PassError(f"{node_in_words(cut)} does not keep the last tokens of axis 1, which {INPUT} is known to do")


def _refuse_other_readers(graph: GraphProto, kept: str) -> None:
    """keep=all rewires the readers of the Slice; a graph output and a subgraph cannot be."""
    inside = [node for node in graph.node if kept in reads(node) and kept not in node.input]
    if inside or any(value.name == kept for value in graph.output):
        by = f"a subgraph of {node_in_words(inside[0])}" if inside else "the interface"
        raise PassError(f"keep=all would remove {kept!r}, which is read by {by}")


def _check_mask(graph: GraphProto) -> None:
    name = _mask_of(graph)
    declared = declared_types(graph).get(
        name
    )  # an initializer of this name is a default for the input, and has its own shape
    if declared is None or all(value.name != name for value in graph.input):
        raise PassError(f"keep=last finds each row's last token in {MASK}, which the graph does not take")
    if declared.dtype not in ("INT64", "INT32") or declared.shape is None or len(declared.shape) != 2:
        raise PassError(f"{name} is {declared}; keep=last needs INT64 or INT32 [batch, tokens]")


def _mask_of(graph: GraphProto) -> str:
    """The name of the mask, which rename-io is yet to rename."""
    if any(value.name == MASK for value in graph.input):
        return MASK
    return next((name for name, role in token_inputs(graph).items() if role == MASK), MASK)


def _tokens_of(graph: GraphProto, hidden: str) -> Dim:
    """The declared number of tokens of the hidden states, or of the inputs that they come from."""
    types = declared_types(graph)
    sizes = (_token_axis(types.get(name)) for name in (hidden, "inputs_embeds", "input_ids"))
    return next((size for size in sizes if size is not None), None)


def _token_axis(declared: TensorType | None) -> Dim:
    shape = declared.shape if declared is not None else None
    return shape[1] if shape is not None and len(shape) > 1 else None


def _declare_token_axis(graph: GraphProto, kept: str, size: Dim) -> None:
    """Declare how many tokens `kept`, the logits and the values between them have now.

    The exporter calls the number num_logits_to_keep; whatever it is called is no size of an input.
    """
    downstream = {kept}
    for node in graph.node:
        if not downstream.isdisjoint(reads(node)):
            downstream.update(node.output)
    interface = {dim for value in graph.input if (t := tensor_type(value)) and t.shape for dim in t.shape}
    values = [value for value in (*graph.output, *graph.value_info) if value.name in downstream]
    outputs = {value.name for value in graph.output}
    symbols = {_token_axis(tensor_type(v)) for v in values if v.name == kept or (v.name in outputs and _rank(v) == 3)}
    symbols = {symbol for symbol in symbols if isinstance(symbol, str) and symbol not in interface}
    for value in values:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            logits = value.name in outputs and _rank(value) == 3 and axis == 1
            if logits or (value.name == kept and axis == 1) or (dim.dim_param and dim.dim_param in symbols):
                _set_dim(dim, size)


def _rank(value: ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _set_dim(dim: TensorShapeProto.Dimension, size: Dim) -> None:
    if isinstance(size, int):
        dim.dim_value = size
    elif size:
        dim.dim_param = size
    else:
        dim.ClearField("dim_value")
        dim.ClearField("dim_param")


def _is_cache(tensor: gs.Tensor) -> bool:
    return slot_of_name(tensor.name) is not None and tensor.shape is not None and len(tensor.shape) == 4


def _gather_last(hidden: gs.Variable, kept: gs.Variable, mask: gs.Variable, past: gs.Tensor | None) -> list[gs.Node]:
    """Nodes from `hidden` [B,S,H] and `mask` [B,T] to `kept` [B,1,H].

    The mask's columns of the new tokens x [0..S) are largest at the last real token, wherever the padding is; a row
    without one gives 0. Each operator has a CUDA kernel for int64 that needs no cuDNN (onnxruntime-gpu 1.31.1): ArgMax with
    select_last_index has no kernel, and ReduceMax stops in the first run where cuDNN is not installed.
    """
    import onnx_graphsurgeon as gs

    batch = mask.shape[0]
    tokens = hidden.shape[1] if hidden.shape and len(hidden.shape) > 1 else None
    make = NodeBuilder(SCOPE)
    constant = make.constant
    zero, one = constant(0), constant(1)
    count = make("Shape", [hidden], "int64", [1], "Shape_0", start=1, end=2)
    scalar = make("Squeeze", [count], "int64", [], "Squeeze_0")
    current = new_columns(make, mask, count, past)
    if mask.dtype != "int64":
        current = make("Cast", [current], "int64", [batch, tokens], "Cast_0", to=INT64)
    positions = make("Range", [zero, scalar, one], "int64", [tokens], "Range_0")
    marked = make("Mul", [current, positions], "int64", [batch, tokens], "Mul_0")
    last = make("TopK", [marked, constant([1])], "int64", [batch, 1], "TopK_0", axis=1)
    make.nodes[-1].outputs.append(gs.Variable(f"{SCOPE}/TopK_0/output_1"))  # nothing reads it
    index = make("Unsqueeze", [last, constant([2])], "int64", [batch, 1, 1], "Unsqueeze_0")
    make.into(kept, "GatherND", [hidden, index], "GatherND", batch_dims=1)
    return make.nodes
