"""Token ids in a graph: which values they are, and the constants among them, which get other numbers with the
tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import PassError
from surgery.graph.embedding_tables import drop
from surgery.graph.index import Constants, use_counts
from surgery.graph.model import Model
from surgery.graph.nodes import node_in_words
from surgery.graph.renaming import fresh
from surgery.graph.scopes import all_names, reads
from surgery.graph.tensor_types import tensor_type
from surgery.graph.token_inputs import token_role
from surgery.source.kept_tokens import KeptTokens

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, ValueInfoProto

IDS = "input_ids"
LOOKUPS = {"Gather", "GatherBlockQuantized"}

_CARRIED = {
    "Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators whose output is ids where their first input is."""
_JOINED = {"Where", "Concat"}
_LOWER, _UPPER = {"Less", "GreaterOrEqual"}, {"Greater", "LessOrEqual"}
_FLIPPED = {"Less": "Greater", "Greater": "Less", "LessOrEqual": "GreaterOrEqual", "GreaterOrEqual": "LessOrEqual"}


def values_of_ids(graph: GraphProto) -> set[str]:
    """The values that are token ids. Raises PassError for a node that computes with them."""
    ids = {value.name for value in graph.input if token_role(value.name) == IDS and _is_whole(value)}
    for node in graph.node:
        held = [name for name in node.input if name in ids]
        if ids & (reads(node) - set(node.input)):
            raise PassError(f"{node_in_words(node)} reads token ids in a subgraph; they are expected in the main graph")
        if not held or node.op_type in ("Shape", "Size", "Equal", *_FLIPPED):
            continue
        if node.op_type in _JOINED or (node.op_type in _CARRIED and node.input[0] in ids):
            ids.add(node.output[0])
        elif node.op_type not in LOOKUPS or node.input[1] not in ids:
            raise PassError(
                f"{node_in_words(node)} computes with token ids, which would be other numbers; "
                "they are expected to be compared and looked up"
            )
    return ids


def _is_whole(value: ValueInfoProto) -> bool:
    declared = tensor_type(value)
    return declared is not None and declared.dtype in ("INT64", "INT32")


@dataclass(frozen=True)
class NewConstant:
    """An input of a node that is a constant id, and the values that it gets."""

    node: NodeProto
    index: int
    old: list[int]
    new: list[int]

    @property
    def values(self) -> str:
        """What becomes what, in words."""
        old, new = (", ".join(map(str, values)) for values in (self.old, self.new))
        return f"id {old} -> {new}"


def renumbered_constants(graph: GraphProto, kept: KeptTokens, size: int) -> list[NewConstant]:
    """The constants that ids are compared with, or replaced by. Raises PassError for an id that does not stay."""
    ids, constants, found = values_of_ids(graph), Constants(graph), []
    for node in graph.node:
        compares = node.op_type == "Equal" or node.op_type in _FLIPPED
        if not (compares or node.op_type in _JOINED) or not ids & set(node.input):
            continue
        first = 1 if node.op_type == "Where" else 0
        for index, name in enumerate(node.input):
            if index < first or name in ids:
                continue
            old = constants.integers(name)
            if old is None:
                raise PassError(f"{node_in_words(node)}: {name!r} stands beside token ids, and is no constant")
            operator = _FLIPPED.get(node.op_type, node.op_type) if compares and index == 0 else node.op_type
            new = [_new_value(operator, value, kept, size, node) for value in old]
            if new != old:
                found.append(NewConstant(node, index, old, new))
    return found


def _new_value(operator: str, value: int, kept: KeptTokens, size: int, node: NodeProto) -> int:
    if operator in _LOWER:
        return kept.below(value)
    if operator in _UPPER:
        return kept.below(value + 1) - 1
    if operator == "Equal" and not 0 <= value < size:
        return value if value < 0 else value - size + len(kept)  # no id is that
    if (new := kept.new(value)) is None:
        raise PassError(
            f"{node_in_words(node)} holds token {value}, which does not stay",
            hint=f"add {value} to the tokens that stay",
        )
    return new


def replace_constants(model: Model, changes: Sequence[NewConstant]) -> None:
    """Give each of the nodes a constant of its own: the old one may be a size or an axis elsewhere."""
    import numpy as np
    from onnx.helper import tensor_dtype_to_np_dtype
    from onnx.numpy_helper import from_array

    graph = model.graph
    taken, given = all_names(graph), dict[tuple[str, tuple[int, ...]], str]()
    inline = {tensor.name: tensor for tensor in graph.initializer}
    for change in changes:
        name = change.node.input[change.index]
        like = inline.get(name)
        dims = list(like.dims) if like is not None else [] if len(change.old) == 1 else [len(change.old)]
        dtype = tensor_dtype_to_np_dtype(like.data_type) if like is not None else np.int64
        key = name, tuple(change.new)
        if key not in given:
            words = str(change.new if dims else change.new[0])
            given[key] = fresh(f"/model/constants/vocabulary/{words}", taken)
            graph.initializer.append(from_array(np.array(change.new, dtype).reshape(dims), given[key]))
        change.node.input[change.index] = given[key]
    left = use_counts(graph)
    drop(model, {name for name, _ in given if name in inline and name not in left})
