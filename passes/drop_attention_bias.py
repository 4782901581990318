"""drop-attention-bias: fused attention learns each row's length from the mask, and needs no bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from passes.base import REORDERED, Finding, Numerics, Pass
from passes.fuse_attention import unfused
from surgery.attention.gqa import BIAS, LAST, OPERATOR, TOTAL
from surgery.attention.kv_wiring import attention_nodes
from surgery.attention.sequence_lengths import MASK, SCOPE, sequence_lengths
from surgery.errors import ModelError, PassError
from surgery.graph.evaluation import PROMPT, Subgraphs
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.graph.nodes import node_in_words
from surgery.graph.tensor_types import tensor_type

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import GraphProto, NodeProto

    Array = NDArray[Any]


@dataclass(frozen=True)
class DropAttentionBias(Pass):
    """Count each row's tokens in attention_mask, instead of adding the most negative number where the mask is 0.

        before                                               after

        Shape(mask) - 1, the same for every row              ReduceSum(mask) - 1, of each row
                 |                                                    |
        GroupQueryAttention <- bias [B,1,S,T]                GroupQueryAttention

    With one length for all rows, a right-padded row's next token is written behind its padding, its window spans
    padding in place of tokens, and the bias of a prompt of 2,048 tokens takes 17 MB in float32. With its own length a
    row's tokens lie side by side. Padding must be on the right, as ONNX Runtime GenAI pads.

    What lengths and bias mean is tried, past each number of tokens that their constants mention and past 4,096: a node
    whose bias hides anything but padding is left alone, with the reason.

    Requires: attention_mask, and no unfused attention: it takes a row to be as long as the mask is.
    Ensures: each GroupQueryAttention that was changed reads the counted lengths.
    """

    name: ClassVar[str] = "drop-attention-bias"
    summary: ClassVar[str] = "row lengths counted from the mask's values; the bias [batch, 1, tokens, all tokens] goes"
    numerics: ClassVar[Numerics] = REORDERED

    def requires(self, model: Model) -> None:
        declared = next((tensor_type(value) for value in model.graph.input if value.name == MASK), None)
        if declared is None or declared.shape is None or len(declared.shape) != 2:
            raise PassError(f"{MASK} is {declared}; [batch, tokens] is expected among the inputs")
        for index, core in enumerate(attention_nodes(model.graph)):
            if core.mixed is not None:
                why = unfused(model).get(index) if model.architecture is not None else None
                because = f": fuse-attention leaves it, because {why}" if why else ""
                raise PassError(
                    f"layer {index}'s attention is unfused ({node_in_words(core.node)}), and takes all rows to be of one "
                    f"length{because}",
                    hint="leave drop-attention-bias out, or repack with --preset compatible"
                    if why
                    else "run fuse-attention first",
                )
            if core.node.op_type != OPERATOR:
                raise PassError(
                    f"layer {index}'s attention is {node_in_words(core.node)}, and takes all rows to be of one length; "
                    f"{OPERATOR} is expected",
                    hint="leave drop-attention-bias out, or repack with --preset compatible",
                )

    def run(self, model: Model) -> list[Finding]:
        fused = [core.node for core in attention_nodes(model.graph) if core.node.op_type == OPERATOR]
        reasons = _Reasons(model)
        kept = {node.output[0]: reason for node in fused if (reason := reasons.of(node))}
        change = {node.output[0] for node in fused} - kept.keys()
        findings: dict[str, int] = {}
        for reason in kept.values():
            findings[reason] = findings.get(reason, 0) + 1
        told = [Finding("skipped", f"{count} attention nodes", reason) for reason, count in findings.items()]
        if not change:
            return told or [Finding("skipped", "attention", "no GroupQueryAttention is there")]
        biased, made = 0, producers(model.graph)
        with model.edited(prune=True) as view:
            lengths = sequence_lengths(view)
            for node in view.nodes:
                if node.outputs and node.outputs[0].name in change:
                    biased += len(node.inputs) > BIAS and bool(node.inputs[BIAS].name)
                    inputs = [*node.inputs[:LAST], lengths.last, lengths.total, *node.inputs[TOTAL + 1 : BIAS]]
                    while not inputs[-1].name:
                        inputs.pop()
                    node.inputs = inputs
        gone = {id(made[name]) for name in made.keys() - producers(model.graph).keys()}
        told.append(Finding("changed", f"{len(change)} attention nodes", "each row's length is counted in the mask"))
        if biased:
            told.append(Finding("removed", f"bias of {biased} attention nodes", "it hid padding alone"))
        if gone:
            told.append(Finding("removed", f"{len(gone)} nodes", "they served lengths and bias alone"))
        return told

    def ensures(self, model: Model) -> None:
        counted = f"{SCOPE}/last"
        for core in attention_nodes(model.graph):
            node = core.node
            if len(node.input) > LAST and node.input[LAST] == counted and len(node.input) > BIAS and node.input[BIAS]:
                raise PassError(f"{node_in_words(node)} still reads a bias")


class _Reasons:
    """Why a node has to stay, found once for each set of lengths and bias."""

    def __init__(self, model: Model) -> None:
        self._fragments = Subgraphs(model.proto)
        self._symbols = _symbols(model.graph)
        self._context = model.architecture.context_length if model.architecture else 2**20
        self._known: dict[tuple[str, ...], str] = {}

    def of(self, node: NodeProto) -> str:
        """ "" for a node that can be changed."""
        names = [*node.input, *[""] * (BIAS + 1 - len(node.input))]
        lengths = (names[LAST], names[TOTAL], names[BIAS])
        if lengths == (f"{SCOPE}/last", f"{SCOPE}/total", ""):
            return "each row's length is counted in the mask already"
        if any(names[BIAS + 1 :]):
            return "it has inputs behind the bias"
        if lengths not in self._known:
            try:
                self._try(*lengths)
                self._known[lengths] = ""
            except ModelError as error:
                self._known[lengths] = str(error)
        return self._known[lengths]

    def _try(self, last: str, total: str, bias: str) -> None:
        """Raises ModelError unless lengths are the mask's, or its rows', and the bias hides padding and nothing
        else."""
        import numpy as np

        fragment = self._fragments.cut([last, total, *([bias] if bias else [])], {MASK})
        for new, numbers in _masks(fragment.lengths(self._context)):
            batch, tokens = numbers.shape
            sizes = {
                name: size for names, size in zip(self._symbols, (batch, new, tokens), strict=True) for name in names
            }
            rows, whole, *hidden = fragment.run(sizes, {MASK: numbers})
            ends = ([tokens - 1] * batch, (numbers.sum(1) - 1).tolist())
            if rows.reshape(-1).tolist() not in ends or whole.reshape(-1).tolist() != [tokens]:
                raise ModelError(f"{last} and {total} are neither the mask's length nor its rows', for {tokens} tokens")
            for values in hidden:
                causal = np.tri(new, tokens, tokens - new, dtype=bool)
                shown = np.broadcast_to(numbers[:, None, None] == 1, values.shape) & causal
                padding = np.broadcast_to(numbers[:, None, None] == 0, values.shape)
                if values[shown].any() or not (values[padding] <= -1e4).all():
                    raise ModelError(f"{bias} is no mask of padding alone: {tokens} tokens tell it")


def _masks(lengths: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """How many tokens are new, and a mask [2, tokens]: a row of ones and one with padding."""
    import numpy as np

    for tokens in (6, *lengths):
        padded = np.ones((2, tokens), np.int64)
        padded[1, tokens * 3 // 5 :] = 0
        if tokens <= PROMPT:
            yield tokens, padded
        if tokens > 3:
            padded[1, -2:] = 1
            yield 2, padded


def _symbols(graph: GraphProto) -> list[set[str]]:
    """What the graph calls the batch, the new tokens and all tokens."""
    shapes = {value.name: t.shape for value in graph.input if (t := tensor_type(value)) and t.shape is not None}
    mask = shapes[MASK]
    tokens = [shape for name in ("input_ids", "inputs_embeds") if (shape := shapes.get(name)) is not None]
    dims = ([mask[0], *(shape[0] for shape in tokens)], [shape[1] for shape in tokens], [mask[1]])
    return [{dim for dim in found if isinstance(dim, str)} for found in dims]
