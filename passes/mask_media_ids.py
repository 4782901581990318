"""mask-media-ids: placeholder tokens read row 0 of the per-layer table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.errors import ModelError, PassError
from surgery.graph.evaluation import Subgraphs
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.graph.node_builder import NodeBuilder
from surgery.graph.nodes import node_in_words
from surgery.graph.scopes import reads
from surgery.graph.tensor_types import tensor_type

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    from onnx import GraphProto, NodeProto

IDS = "input_ids"
PER_LAYER = "per_layer_inputs"
SCOPE = "/model/media/per_layer_ids"
_LOOKUPS = ("Gather", "GatherBlockQuantized")


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
        """The placeholder ids that are given."""
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

    lookup = _lookup(model.graph)
    ids = next((tensor_type(value) for value in model.graph.input if value.name == IDS), None)
    if ids is None or ids.dtype not in ("INT64", "INT32"):
        raise PassError(f"{IDS} is {ids or 'no input'}; token ids, INT64 or INT32, are expected")
    if lookup.input[1] == IDS:
        return {token: token for token in tokens}
    try:
        part = Subgraphs(model.proto).cut([lookup.input[1]], {IDS})
        (found,) = part.run({}, {IDS: np.array([tokens], ids.dtype.lower())})
        rows = [int(row) for row in found.reshape(len(tokens))]
    except (ModelError, ValueError) as error:
        raise PassError(f"what {node_in_words(lookup)} looks a token up by cannot be computed: {error}") from None
    return dict(zip(tokens, rows, strict=True))


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
