"""The metadata of a model, a graph or a node: `metadata_props`, text by key."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from onnx import StringStringEntryProto


class Described(Protocol):
    """A ModelProto, GraphProto or NodeProto."""

    @property
    def metadata_props(self) -> MutableSequence[StringStringEntryProto]:
        """The entries, as onnx.proto has them."""


def properties(holder: Described) -> dict[str, str]:
    """Key -> text, in the order of the entries."""
    return {entry.key: entry.value for entry in holder.metadata_props}


def set_property(holder: Described, key: str, value: str) -> None:
    """Add an entry, or give those of the key another text."""
    from onnx import StringStringEntryProto

    there = [entry for entry in holder.metadata_props if entry.key == key]
    for entry in there:
        entry.value = value
    if not there:
        holder.metadata_props.append(StringStringEntryProto(key=key, value=value))
