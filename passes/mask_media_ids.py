"""mask-media-ids: placeholder tokens read row 0 of the per-layer table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.errors import PassError
from surgery.graph.external_data import is_external
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.graph.node_builder import NodeBuilder
from surgery.graph.nodes import node_in_words
from surgery.graph.scopes import reads
from surgery.graph.tensor_types import TensorType, tensor_type

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, NodeProto

IDS = "input_ids"
PER_LAYER = "per_layer_inputs"
SCOPE = "/model/media/per_layer_ids"
_LOOKUPS = ("Gather", "GatherBlockQuantized")
_MOST_NODES = 64
"""More than any exporter has between the ids and a lookup (9 in the community's); beyond it something else is met."""


@dataclass(frozen=True)
class MaskMediaIds(Pass):
    """Look placeholder tokens up in row 0, the pad token's, of the per-layer table.

        before                            after, image=258880, audio=258881

        input_ids                         input_ids -> Equal(258880) Or Equal(258881)
            |                                 |             |
            |                                Where(it, 0, input_ids)
            |                                 |
        Gather(per-layer table)           Gather(per-layer table)

    A placeholder has no embedding of its own: transformers replaces its id by the pad id before the lookup, and its
    row in the table is noise (logits were 3.9 off with it). The community's graphs mask these ids already. Whether
    one does is found out by computing, with onnx's own reference, what row each id is looked up in: the nodes between
    input_ids and the lookup are integer arithmetic on a handful of ids, whatever form they have.

    Requires: per_layer_inputs, where the graph gives it, comes from one Gather or GatherBlockQuantized whose rows
    depend on input_ids through inline constants alone.
    Ensures: the given ids are looked up in row 0. Other ids, and the token embeddings, are left as they are.
    """

    name: ClassVar[str] = "mask-media-ids"
    summary: ClassVar[str] = "placeholder tokens read row 0 of the per-layer table, as transformers does"

    image: int | None = None
    audio: int | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for token in (self.image, self.audio) if token is not None)

    def requires(self, model: Model) -> None:
        if not self.tokens:
            raise PassError("no placeholder token is given; write image=ID, audio=ID or both")
        if _gives_per_layer(model.graph):
            _rows(model, self.tokens)

    def run(self, model: Model) -> list[Finding]:
        if not _gives_per_layer(model.graph):
            return [Finding("skipped", PER_LAYER, "the graph has no per-layer table")]
        rows = _rows(model, self.tokens)
        findings = [Finding("skipped", f"token {t}", "it is looked up in row 0 already") for t in rows if not rows[t]]
        unmasked = [token for token in rows if rows[token]]
        if unmasked:
            lookup = _lookup(model.graph)
            with model.edited() as view:
                shown = next(node for node in view.nodes if node.outputs[0].name == lookup.output[0])
                _mask(view, shown, unmasked)
            findings += [Finding("changed", f"token {token}", "it is looked up in row 0 now") for token in unmasked]
        return findings

    def ensures(self, model: Model) -> None:
        if _gives_per_layer(model.graph):
            for token, row in _rows(model, self.tokens).items():
                if row:
                    raise PassError(f"token {token} is looked up in row {row} of the per-layer table")


def _gives_per_layer(graph: GraphProto) -> bool:
    return any(value.name == PER_LAYER for value in graph.output)


def _lookup(graph: GraphProto) -> NodeProto:
    """The Gather of the per-layer table: the first on the way back from per_layer_inputs."""
    made = producers(graph)
    pending = [PER_LAYER]
    seen: set[str] = set()
    found: dict[str, NodeProto] = {}
    while pending:
        node = made.get(pending.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type in _LOOKUPS:
            found[node.output[0]] = node
        else:
            pending.extend(reads(node))
    if len(found) != 1:
        named = ", ".join(node_in_words(node) for node in found.values()) or "none"
        raise PassError(f"{PER_LAYER} comes from one lookup in a table, {' or '.join(_LOOKUPS)}; {named} is found")
    return next(iter(found.values()))


def _rows(model: Model, tokens: tuple[int, ...]) -> dict[int, int]:
    """Token id -> the row of the per-layer table that it is looked up in."""
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    lookup = _lookup(model.graph)
    operand = lookup.input[1]
    if operand == IDS:
        return {token: token for token in tokens}
    from onnx.helper import make_graph, make_model, make_tensor_value_info

    ids = _ids(model.graph)
    nodes, constants = _between(model.graph, operand)
    dtype = next(value.type.tensor_type.elem_type for value in model.graph.input if value.name == IDS)
    graph = make_graph(
        nodes,
        "rows",
        [make_tensor_value_info(IDS, dtype, [1, len(tokens)])],
        [make_tensor_value_info(operand, dtype, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in constants],
    )
    whole = make_model(graph, opset_imports=list(model.proto.opset_import), ir_version=model.proto.ir_version)
    try:
        feed = np.array([tokens], np.int64 if ids.dtype == "INT64" else np.int32)
        (found,) = ReferenceEvaluator(whole).run(None, {IDS: feed})
        rows = [int(row) for row in np.asarray(found).reshape(len(tokens))]
    except Exception as error:  # the evaluator raises whatever numpy raises
        raise PassError(f"what {node_in_words(lookup)} looks a token up by cannot be computed: {error}") from None
    return dict(zip(tokens, rows, strict=True))


def _ids(graph: GraphProto) -> TensorType:
    declared = {value.name: tensor_type(value) for value in graph.input}.get(IDS)
    if declared is None or declared.dtype not in ("INT64", "INT32"):
        raise PassError(f"{IDS} is {declared or 'no input'}; token ids, INT64 or INT32, are expected")
    return declared


def _between(graph: GraphProto, operand: str) -> tuple[list[NodeProto], set[str]]:
    """The nodes between input_ids and `operand` in their order, and the initializers that they read."""
    made = producers(graph)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    pending = [operand]
    needed: set[str] = set()
    constants: set[str] = set()
    while pending:
        name = pending.pop()
        if name in needed or name in constants or name == IDS:
            continue
        if name in initializers:
            if is_external(initializers[name]):
                raise PassError(
                    f"the per-layer table's rows depend on the weight {name!r}; token ids alone are expected"
                )
            constants.add(name)
        elif name in made and len(needed) < _MOST_NODES:
            needed.add(name)
            pending.extend(reads(made[name]))
        else:
            raise PassError(f"the per-layer table's rows depend on {name!r}; {IDS} alone is expected")
    return [node for node in graph.node if needed.intersection(node.output)], constants


def _mask(view: gs.Graph, lookup: gs.Node, tokens: list[int]) -> None:
    """Nodes before `lookup` that put 0 in place of the tokens."""
    ids = next(tensor for tensor in view.inputs if tensor.name == IDS)
    rows = lookup.inputs[1]
    make = NodeBuilder(SCOPE)
    is_media = None
    for token in tokens:
        equal = make("Equal", [ids, make.constant(token, ids.dtype)], bool, ids.shape, f"Equal_{token}")
        is_media = make("Or", [is_media, equal], bool, ids.shape, f"Or_{token}") if is_media is not None else equal
    dtype = rows.dtype or ids.dtype
    row_zero = make.constant(0, dtype, "constants/row")
    lookup.inputs[1] = make("Where", [is_media, row_zero, rows], dtype, ids.shape, "Where")
    position = next(index for index, other in enumerate(view.nodes) if other is lookup)
    view.nodes[position:position] = make.nodes
