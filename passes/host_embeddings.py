"""host-embeddings: the token tables stay in host memory while the decoder runs on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.cuda.layering import keep_on_cpu, stays_on_cpu
from surgery.errors import PassError
from surgery.graph.embedding_tables import TableLookup, table_lookups
from surgery.graph.external_data import byte_size
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.graph.tensor_types import initializer_type

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_INTEGERS = (6, 7)
"""INT32 and INT64 of TensorProto.DataType."""

_METADATA_IR = 10
"""The first IR version whose nodes have metadata."""


@dataclass(frozen=True)
class HostEmbeddings(Pass):
    """Annotate the lookups of tokens, and what computes their row numbers, to stay on the CPU.

        before, on CUDA                                     after

        input_ids -> ids -> Gather -> x -> decoder          input_ids -> ids -> Gather -> x --copy--> decoder
                            table: device memory                                table: host memory, mapped

    Of E2B in q4f16 these are 1.59 of 3.11 GB, of which a token reads two rows: 10 kB. The rows are what crosses to the
    device. The session has to be told (surgery.cuda.layering); `repack` writes that into genai_config.json. On the CPU
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
        found = _by_token(model.graph)
        if not found:
            reason = "none is looked up by what the graph takes in; merge-embeddings brings the tables"
            return [Finding("skipped", "tables", reason)]
        before = _with_row_numbers(model.graph, [lookup.node for lookup in found])
        new = [node for node in before if not stays_on_cpu(node)]
        if not new:
            return [Finding("skipped", f"{len(found)} tables", "their lookups are to stay on the CPU already")]
        for node in new:
            keep_on_cpu(node)
        reason = "they look tokens up, and stay on the CPU"
        return [
            Finding("changed", f"{len(new)} nodes", reason),
            *(Finding("changed", each.node.input[0], f"{_size(each):,} bytes stay in host memory") for each in found),
        ]

    def ensures(self, model: Model) -> None:
        for lookup in _by_token(model.graph):
            if not stays_on_cpu(lookup.node):
                raise PassError(f"{lookup.node.name!r} would take {lookup.node.input[0]!r} to the device")


def _by_token(graph: GraphProto) -> list[TableLookup]:
    """Look-ups by numbers that follow from graph inputs of integers alone."""
    known = {value.name for value in graph.input if value.type.tensor_type.elem_type in _INTEGERS}
    known.update(tensor.name for tensor in graph.initializer)
    found = list(table_lookups(graph))
    rows = {lookup.node.output[0] for lookup in found}
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and not rows & set(node.output) and known.issuperset(_given(node)):
            known.update(node.output)
    return [lookup for lookup in found if lookup.ids in known]


def _given(node: NodeProto) -> Iterator[str]:
    return (name for name in node.input if name)


def _with_row_numbers(graph: GraphProto, nodes: list[NodeProto]) -> list[NodeProto]:
    """The look-ups and every node before them, each once."""
    made = producers(graph)
    found: dict[int, NodeProto] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if id(node) not in found:
            found[id(node)] = node
            pending.extend(made[name] for name in node.input if name in made)
    return list(found.values())


def _size(lookup: TableLookup) -> int:
    tensors = (matrix.tensor for matrix in lookup.matrices.values())
    return sum(byte_size(initializer_type(tensor).dtype, tensor.dims) for tensor in tensors)
