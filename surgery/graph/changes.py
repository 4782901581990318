"""What a change to a model came to: what the one who made it says, and what is measured, thing by thing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from surgery.graph.metadata_props import properties
from surgery.graph.scopes import graphs

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Verb = Literal["added", "removed", "changed", "skipped"]

ThingKind = Literal["node", "input", "output", "type", "weight", "field"]

ModelThing = tuple[ThingKind, str]
"""A thing of a model by kind and name: a node by `node_name`, a field by its key among `model_fields`, the declared
type of an inner value by the value's name."""

Snapshot = dict[ModelThing, list[int]]
"""Thing -> a hash of each one of that name, valid in this process."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was done to one thing, or why it was left alone. `reason` is a sentence without a full stop."""

    verb: Verb
    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.verb} {self.subject}: {self.reason}"


def snapshot(proto: ModelProto) -> Snapshot:
    """Every thing of a model, bodies and functions included; linear, and no weight outside of the graph is read."""
    found: Snapshot = {}
    for thing, content in _things(proto):
        found.setdefault(thing, []).append(hash(content))
    return found


def touched(before: Snapshot, after: Snapshot) -> frozenset[ModelThing]:
    """What was added, removed or changed; a renamed thing by both of its names. Its place in the order is no
    content."""
    return frozenset(thing for thing in before.keys() | after.keys() if before.get(thing) != after.get(thing))


def node_name(node: NodeProto) -> str:
    """A node's name; of an unnamed one, its first output's."""
    return node.name or next((name for name in node.output if name), "")


def _things(proto: ModelProto) -> Iterator[tuple[ModelThing, bytes | str]]:
    nodes: list[Iterable[NodeProto]] = [graph.node for graph in graphs(proto.graph)]
    for each in (*nodes, *(function.node for function in proto.functions)):
        for node in each:
            yield ("node", node_name(node)), node.SerializeToString(deterministic=True)
    for value in proto.graph.input:
        yield ("input", value.name), value.SerializeToString(deterministic=True)
    for value in proto.graph.output:
        yield ("output", value.name), value.SerializeToString(deterministic=True)
    for value in proto.graph.value_info:
        yield ("type", value.name), value.SerializeToString(deterministic=True)
    for tensor in proto.graph.initializer:
        yield ("weight", tensor.name), tensor.SerializeToString(deterministic=True)
    for key, value in model_fields(proto).items():
        yield ("field", key), value


def model_fields(proto: ModelProto) -> dict[str, str]:
    """What a model says beside its graph, as text by key: `opset com.microsoft`, `metadata KEY`; empty ones left
    out."""
    found = {"ir_version": str(proto.ir_version)}
    for entry in proto.opset_import:
        found[f"opset {entry.domain or 'ai.onnx'}"] = str(entry.version)
    plain = {
        "producer_name": proto.producer_name,
        "producer_version": proto.producer_version,
        "domain": proto.domain,
        "model_version": str(proto.model_version) if proto.model_version else "",
        "doc_string": proto.doc_string,
        "graph name": proto.graph.name,
        "graph doc_string": proto.graph.doc_string,
        "training_info": f"{len(proto.training_info)} entries" if proto.training_info else "",
    }
    found |= {key: value for key, value in plain.items() if value}
    found |= {f"metadata {key}": value for key, value in properties(proto).items()}
    found |= {f"graph metadata {key}": value for key, value in properties(proto.graph).items()}
    for function in proto.functions:
        name = "::".join(part for part in (function.domain, function.name, function.overload) if part)
        found[f"function {name}"] = f"({', '.join(function.input)}) -> ({', '.join(function.output)})"
    return found
