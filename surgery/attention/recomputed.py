"""KV-shared layers that make the new rows of a cache once more, as some exporters write them: are they the same rows?

    hidden -> k_proj -> GroupQueryAttention of layer 13 (past 13) -> present 13
           -> k_proj -> GroupQueryAttention of layer 15 (past 13), no present

Two values are the same where the same operators make them of the same values and weights, all the way back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_QUERY_ALONE = {0, 10, 11, 14}
"""Inputs of GroupQueryAttention that do not reach its presents: query, bias, sink, the norm of queries."""
_ATTENDING = {"num_heads", "scale", "softcap", "local_window_size", "smooth_softmax", "qk_output"}
"""Attributes that do not reach them."""
_LARGE = 4096


class SameValues:
    """Which values of a graph are the same, by how they are made. Linear in the graph; no weight outside of it is
    read."""

    def __init__(self, graph: GraphProto) -> None:
        self._classes: dict[object, int] = {}
        self._of = {tensor.name: self._class(_weight(tensor)) for tensor in graph.initializer}
        for node in graph.node:
            made = (*_operator(node), *(self._value(name) for name in node.input))
            for index, name in enumerate(node.output):
                self._of[name] = self._class((*made, index))

    def same_rows(self, one: NodeProto, other: NodeProto) -> bool:
        """Whether two GroupQueryAttentions append the same rows to the same past."""
        return list(self._appended(one)) == list(self._appended(other))

    def _appended(self, node: NodeProto) -> Iterator[object]:
        yield node.op_type, _attributes(node, _ATTENDING)
        given = {index: name for index, name in enumerate(node.input) if name and index not in _QUERY_ALONE}
        yield from ((index, self._value(name)) for index, name in given.items())

    def _value(self, name: str) -> int:
        return self._of[name] if name in self._of else self._class(("given", name))

    def _class(self, made: object) -> int:
        return self._classes.setdefault(made, len(self._classes))


def _weight(tensor: TensorProto) -> object:
    """What a weight holds: its bytes, or where they are."""
    if tensor.data_location == 1:
        return tensor.data_type, tuple(tensor.dims), tuple((each.key, each.value) for each in tensor.external_data)
    twin = type(tensor)()
    twin.CopyFrom(tensor)
    for field in ("name", "doc_string"):
        twin.ClearField(field)
    data = twin.SerializeToString(deterministic=True)
    return data if len(data) < _LARGE else hashlib.sha256(data).digest()


def _operator(node: NodeProto) -> tuple[object, ...]:
    """What a node does; of one with a body, or with numbers of chance, that it is this one."""
    body = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    unlike = node.output[0] if body or "Random" in node.op_type or node.op_type in ("Bernoulli", "Multinomial") else ""
    return node.domain, node.op_type, _attributes(node, set()), unlike


def _attributes(node: NodeProto, but: set[str]) -> bytes:
    found = sorted((each.name, each.SerializeToString(deterministic=True)) for each in node.attribute)
    return b"".join(data for name, data in found if name not in but)
