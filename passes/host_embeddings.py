"""host-embeddings: the token tables stay in host memory while the decoder runs on CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.engine import Finding
from surgery.errors import PassError
from surgery.graph import initializer_type, integer_attribute, producers
from surgery.layering import keep_on_cpu, stays_on_cpu
from surgery.model import Model
from surgery.weights import byte_size

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_AXIS = {"Gather": "axis", "GatherBlockQuantized": "gather_axis"}
"""Operators that look rows up, and the attribute that says along which axis."""

_METADATA_IR = 10
"""The first IR version whose nodes have metadata."""


@dataclass(frozen=True)
class HostEmbeddings:
    """Annotate the lookups of tokens, and what computes their row numbers, to stay on the CPU.

        before, on CUDA                                     after

        input_ids -> ids -> Gather -> x -> decoder          input_ids -> ids -> Gather -> x --copy--> decoder
                            table: device memory                                table: host memory, mapped

    Of E2B in q4f16 these are 1.59 of 3.11 GB, of which a token reads two rows: 10 kB. The rows are what crosses to the
    device. The session has to be told (surgery.layering); `repack` writes that into genai_config.json. On the CPU
    the annotation changes nothing.

    It excludes CUDA graph capture, which takes no graph with a copy between the memories.

    Leaves alone: tables that are looked up by what the decoder computes, and every number.
    Requires: IR 10, whose nodes have metadata. Ensures: no lookup of a table by token is without the annotation.
    """

    name: ClassVar[str] = "host-embeddings"
    summary: ClassVar[str] = "the token tables stay in host memory while the decoder runs on CUDA"

    def requires(self, model: Model) -> None:
        if model.proto.ir_version < _METADATA_IR:
            raise PassError(
                f"{model.path} has IR version {model.proto.ir_version}; nodes have metadata from {_METADATA_IR} on"
            )

    def run(self, model: Model) -> list[Finding]:
        lookups = _lookups(model.graph)
        if not lookups:
            reason = "none is looked up by what the graph takes in; merge-embeddings brings the tables"
            return [Finding("skipped", "tables", reason)]
        before = _with_row_numbers(model.graph, [node for node, _ in lookups])
        new = [node for node in before if not stays_on_cpu(node)]
        if not new:
            return [Finding("skipped", f"{len(lookups)} tables", "their lookups are to stay on the CPU already")]
        for node in new:
            keep_on_cpu(node)
        reason = "they look tokens up, and stay on the CPU"
        return [
            Finding("changed", f"{len(new)} nodes", reason),
            *(Finding("changed", table, f"{size:,} bytes stay in host memory") for table, size in _sizes(lookups)),
        ]

    def ensures(self, model: Model) -> None:
        for node, table in _lookups(model.graph):
            if not stays_on_cpu(node):
                raise PassError(f"{node.name!r} would take {table.name!r} to the device")


def _lookups(graph: GraphProto) -> list[tuple[NodeProto, TensorProto]]:
    """Nodes that take rows out of a weight by numbers that follow from graph inputs of integers alone."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    integers = {value.name for value in graph.input if value.type.tensor_type.elem_type in (6, 7)}  # INT32, INT64
    known = integers | weights.keys()
    found = []
    for node in graph.node:
        if node.op_type in _AXIS and (table := weights.get(node.input[0])) is not None and len(table.dims) > 1:
            by_row = integer_attribute(node, _AXIS[node.op_type], 0) == 0
            if by_row and node.input[1] in known and node.input[1] not in weights:
                found.append((node, table))
        elif node.op_type not in ("Shape", "Size") and all(name in known for name in node.input if name):
            known.update(node.output)
    return found


def _with_row_numbers(graph: GraphProto, lookups: list[NodeProto]) -> list[NodeProto]:
    """The lookups and every node before them, each once."""
    made = producers(graph)
    found: dict[int, NodeProto] = {}
    pending = list(lookups)
    while pending:
        node = pending.pop()
        if id(node) not in found:
            found[id(node)] = node
            pending.extend(made[name] for name in node.input if name in made)
    return list(found.values())


def _sizes(lookups: list[tuple[NodeProto, TensorProto]]) -> list[tuple[str, int]]:
    return [(table.name, byte_size(initializer_type(table).dtype, table.dims)) for _, table in lookups]
