"""The inputs of a graph that are made of tokens: ids, mask and positions, whatever they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.errors import PassError
from surgery.graph.tensor_types import TensorType, tensor_type

if TYPE_CHECKING:
    from onnx import GraphProto

SPELLINGS = {
    "input_ids": ("tokens", "token_ids", "input_tokens", "ids", "input"),
    "attention_mask": ("mask", "attn_mask", "attention_masks", "input_mask"),
    "position_ids": ("positions", "position", "pos_ids", "input_positions", "position_id"),
}
"""Canonical name -> other spellings seen in exports."""


def token_role(name: str) -> str | None:
    """What a token input is called by the runtime, by the spelling of its name; None for no spelling that is known."""
    return next((role for role, spelt in SPELLINGS.items() if name == role or name.lower() in spelt), None)


def token_inputs(graph: GraphProto) -> dict[str, str]:
    """Name -> what the runtime calls it, for each token input with another name. Raises PassError where that is
    unclear."""
    inputs = {value.name: tensor_type(value) for value in graph.input}
    candidates = [
        n for n, t in inputs.items() if t is not None and t.dtype in ("INT64", "INT32") and len(t.shape or ()) == 2
    ]
    unclaimed = [name for name in candidates if name not in SPELLINGS]
    names: dict[str, str] = {}
    for role in SPELLINGS:
        if role in inputs:
            continue
        matching = [name for name in unclaimed if token_role(name) == role]
        if len(matching) > 1:
            raise PassError(f"{role} could be {' or '.join(matching)}; rename one of them")
        if matching:
            names[matching[0]] = role
            unclaimed.remove(matching[0])
    for name in unclaimed:
        left = [role for role in SPELLINGS if role not in inputs and role not in names.values()]
        found = _role_by_structure(graph, name, inputs)
        if found is None or found not in left:
            could = " or ".join(left) or "no role that is left"
            raise PassError(f"input {name!r} ({inputs[name]}) is not understood; it could be {could}")
        names[name] = found
    return names


def _role_by_structure(graph: GraphProto, name: str, inputs: dict[str, TensorType | None]) -> str | None:
    """Positions feed RotaryEmbedding; token ids index a table; the mask has a token axis of its own."""
    readers = [(node.op_type, list(node.input).index(name)) for node in graph.node if name in node.input]
    if any(op == "RotaryEmbedding" for op, _ in readers):
        return "position_ids"
    if any(op in ("Gather", "GatherBlockQuantized") and index == 1 for op, index in readers):
        return None if "inputs_embeds" in inputs else "input_ids"  # with embeddings, positions may index a table
    declared = inputs[name]
    others = {t.shape[1] for n, t in inputs.items() if n != name and t and t.shape and len(t.shape) in (2, 3)}
    if declared and declared.shape and declared.shape[1] not in others:
        return "attention_mask"
    return None
