"""move-padding: a padded row's padding goes in front of its tokens, where a sliding window does not meet it."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.attention.sequence_lengths import IN_FRONT as SCOPE
from surgery.attention.sequence_lengths import MASK
from surgery.errors import PassError
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.graph.node_builder import INT64, NodeBuilder
from surgery.graph.nodes import int_attribute, node_in_words
from surgery.graph.scopes import captured, reads
from surgery.graph.tensor_types import declared_types, tensor_type

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto

_EMBEDDED = ("inputs_embeds", "per_layer_inputs")
_POSITIONS = "position_ids"
_OF_TOKENS = ("input_ids", *_EMBEDDED, _POSITIONS)
_LOGITS = "logits"


@dataclass(frozen=True)
class MovePadding(Pass):
    """Sort the new tokens of each row, padding first: the source's graph then sees what left padding gives it.

        before                                     after

        tokens           a b c - - | d             - - a b c | d         past | new
        attention_mask   1 1 1 0 0 | 1             0 0 1 1 1 | 1

    ONNX Runtime GenAI pads on the right, and the exported graphs give every row the mask's length: padding would lie
    between a row's prompt and its continuation, and the sliding layers count it into their window, until the prompt is
    out of view. In front of the row nothing reads it. The caches then hold each row at their end.

        order = TopK(mask * tokens + place, ascending), over the mask's last columns
        inputs_embeds, per_layer_inputs, position_ids -> GatherND by it;  logits of every token: put back
        attention_mask -> 1 in as many of the last columns as it has ones

    Embeddings are sorted and not the ids that they are looked up by: ONNX Runtime computes a float16
    GatherBlockQuantized in float32 as soon as a node gives it its ids, and rounds otherwise than the source (0.02 in
    the logits, 1.31.1).

    A row alone keeps its mask and its order, whatever they are; a batch of one length has nothing to sort. A padded
    batch is fed in one piece, as GroupQueryAttention asks of every batch. `fast` counts each row's tokens instead.

    Requires: the interface named as rename-io names it; attention_mask [batch, tokens]; opset 15 (Shape of one axis).
    Ensures: nodes of this pass alone read attention_mask and position_ids.
    """

    name: ClassVar[str] = "move-padding"
    summary: ClassVar[str] = (
        "padding goes in front of a row's tokens, out of the window: a padded row is as it is alone"
    )

    def requires(self, model: Model) -> None:
        types, inputs = declared_types(model.graph), {value.name for value in model.graph.input}
        for name in sorted(inputs.intersection((MASK, *_OF_TOKENS))):
            declared = types.get(name)
            rank = len(declared.shape) if declared is not None and declared.shape is not None else 0
            if rank < 2 or (name == MASK and rank > 2):
                raise PassError(f"{name} is {declared}; [batch, tokens{'' if name == MASK else ', ...'}] is expected")
        if MASK in inputs and model.opset() < 15:
            raise PassError(f"it needs opset 15, the model has {model.opset()}")
        held = {name for node in model.graph.node for name in captured(node)} & {MASK, *_OF_TOKENS}
        if held:
            raise PassError(f"{min(held)} is read inside of a subgraph; nodes of the graph itself are expected")
        rotating = (node for node in model.graph.node if int_attribute(node, "do_rotary", 0))
        if MASK in inputs and (node := next(rotating, None)) is not None:
            raise PassError(
                f"{node_in_words(node)} rotates by itself, and counts positions from the front of a row, padding included",
                hint="repack with --preset fast, which leaves padding behind the rows",
            )

    def run(self, model: Model) -> list[Finding]:
        graph = model.graph
        inputs = {value.name for value in graph.input}
        if MASK not in inputs or not inputs.intersection(_OF_TOKENS):
            return [Finding("skipped", MASK, f"the graph takes no {'tokens' if MASK in inputs else MASK}")]
        if _is_done(graph):
            return [Finding("skipped", MASK, "padding goes in front already")]
        every, embedding = not _one_token(graph), _behind(graph, _EMBEDDED)
        _check_made(graph, every)
        with model.edited() as view:
            moved = _write(view, every, embedding)
        findings = [Finding("changed", name, "each row's padding goes in front of its tokens") for name in moved]
        findings.append(Finding("changed", MASK, "each row has its ones at the end"))
        return findings + ([Finding("changed", _LOGITS, "they are put back into the input's order")] if every else [])

    def ensures(self, model: Model) -> None:
        if any(value.name == MASK for value in model.graph.input) and not _is_done(model.graph):
            raise PassError(f"{MASK} is read by a node that takes padding to be in front")


def _is_done(graph: GraphProto) -> bool:
    given = {value.name for value in graph.input} & {MASK, _POSITIONS}
    readers = [node for node in graph.node if given.intersection(node.input)]
    return bool(readers) and all(node.name.startswith(SCOPE) for node in readers)


def _check_made(graph: GraphProto, every: bool) -> None:
    """Raise PassError unless nodes make what is sorted on the way: embeddings that are no input, and `every` logits."""
    made, given = producers(graph), {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.name in _EMBEDDED and tensor.name not in given:
            raise PassError(f"{tensor.name} is an initializer; embeddings of tokens are expected")
    if every and (_LOGITS not in made or all(value.name != _LOGITS for value in graph.output)):
        raise PassError(
            f"no node makes an output {_LOGITS}", hint="run rename-io first, which names the interface of a decoder"
        )


def _one_token(graph: GraphProto) -> bool:
    """Whether the logits are of one token for each row, the last one."""
    shape = next((t.shape for value in graph.output if value.name == _LOGITS and (t := tensor_type(value))), None)
    return shape is not None and len(shape) == 3 and shape[1] == 1


def _write(view: gs.Graph, every: bool, embedding: Set[str]) -> list[str]:
    """Nodes at the front of the graph find the order, one behind each value that is of tokens applies it.

    `every`: the logits are of every token, and are put back. `embedding`: values that the embeddings are made from, by
    nodes which see the ids in the order that they come in. Returns the names of the values that were sorted.
    """
    import onnx_graphsurgeon as gs

    given = {tensor.name: tensor for tensor in view.inputs}
    tensors = view.tensors()
    mask = given[MASK]
    first = next(given[name] for name in _OF_TOKENS if name in given)
    batch, new, total = mask.shape[0], first.shape[1] if first.shape else None, mask.shape[1]
    make = NodeBuilder(SCOPE)
    constant = make.constant
    zero, one = (constant(value, mask.dtype, f"constants/{mask.dtype}/{value}") for value in (0, 1))

    def places(count: gs.Variable, label: str) -> gs.Variable:
        scalar = make("Squeeze", [count], "int64", [], f"{label}/Squeeze")
        return make("Range", [constant(0), scalar, constant(1)], "int64", [None], f"{label}/Range")

    def order(keys: gs.Variable, label: str) -> tuple[gs.Variable, gs.Variable]:
        """Of [B,S] the places of the smallest key, the next one, ...: [B,S], and [B,S,1] for GatherND."""
        by = make("TopK", [keys, count], "int64", [batch, new], f"{label}/TopK", axis=1, largest=0)
        make.nodes[-1].outputs.insert(0, gs.Variable(f"{SCOPE}/{label}/TopK/values"))  # nothing reads it
        return by, make("Unsqueeze", [by, constant([2])], "int64", [batch, new, 1], f"{label}/Unsqueeze")

    alone = make("Shape", [mask], "int64", [1], "rows", start=0, end=1)
    alone = make("Equal", [alone, constant([1])], bool, [1], "alone")
    count = make("Shape", [first], "int64", [1], "tokens", start=1, end=2)
    start = make("Neg", [count], "int64", [1], "start")
    real = make("Slice", [mask, start, constant([2**63 - 1]), constant([1])], mask.dtype, [batch, new], "new")
    real = make("Where", [alone, one, real], mask.dtype, [batch, new], "real")
    real = make("Cast", [real], "int64", [batch, new], "real_int64", to=INT64)
    keys = make("Mul", [real, count], "int64", [batch, new], "real_behind")
    by, index = order(make("Add", [keys, places(count, "place")], "int64", [batch, new], "keys"), "order")
    width = make("Shape", [mask], "int64", [1], "columns", start=1, end=2)
    ones = make("Cast", [mask], "int64", [batch, total], "mask_int64", to=INT64)
    ones = make("ReduceSum", [ones, constant([1])], "int64", [batch, 1], "ones", keepdims=1)
    front = make("Sub", [width, ones], "int64", [batch, 1], "front")
    padding = make("Less", [places(width, "column"), front], bool, [batch, total], "padding")
    packed = make("Where", [padding, zero, one], mask.dtype, [batch, total], "packed")

    readers = _others(mask.outputs, make.nodes)
    _redirect(readers, mask, make("Where", [alone, mask, packed], mask.dtype, [batch, total], MASK))
    makers = [node for node in view.nodes if any(tensor.name in embedding for tensor in node.outputs)]
    moved = []
    for source in (tensors[name] for name in _OF_TOKENS if name in given or (name in _EMBEDDED and name in tensors)):
        readers = _others(source.outputs, [*make.nodes, *makers])
        if not readers:
            continue  # ids that are looked up and no more: what is looked up is sorted
        ordered = make("GatherND", [source, index], source.dtype, source.shape, source.name, batch_dims=1)
        _redirect(readers, source, ordered)
        moved.append(source.name)
        if source.name not in given:
            made = next(place for place, other in enumerate(view.nodes) if other is source.inputs[0])
            view.nodes.insert(made + 1, make.nodes.pop())
    at_front = len(make.nodes)
    if every:
        (logits,) = (tensor for tensor in view.outputs if tensor.name == _LOGITS)
        inner = gs.Variable(f"{SCOPE}/{_LOGITS}", logits.dtype, logits.shape)
        (maker,) = logits.inputs
        maker.outputs = [inner if tensor is logits else tensor for tensor in maker.outputs]
        _redirect(list(logits.outputs), logits, inner)
        make.into(logits, "GatherND", [inner, order(by, "inverse")[1]], _LOGITS, batch_dims=1)
    view.nodes[:] = [*make.nodes[:at_front], *view.nodes, *make.nodes[at_front:]]
    return moved


def _behind(graph: GraphProto, names: Iterable[str]) -> set[str]:
    """The values, and those that they are computed from."""
    made, found, pending = producers(graph), set[str](), list(names)
    while pending:
        if (name := pending.pop()) not in found:
            found.add(name)
            pending += reads(made[name]) if name in made else []
    return found


def _others(nodes: Iterable[gs.Node], but: list[gs.Node]) -> list[gs.Node]:
    return [node for node in nodes if all(node is not other for other in but)]


def _redirect(readers: Iterable[gs.Node], source: gs.Tensor, other: gs.Variable) -> None:
    """Let nodes read another value. The view's own lists would look for each node among all readers: as many steps as
    the square of their number."""
    gone = set()
    for reader in readers:
        gone.add(id(reader))
        for index, tensor in enumerate(reader.inputs):
            if tensor is source:
                list.__setitem__(reader.inputs, index, other)
                list.append(other.outputs, reader)
    list.__setitem__(source.outputs, slice(None), [node for node in source.outputs if id(node) not in gone])
