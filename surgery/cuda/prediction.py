"""Which nodes of a model ONNX Runtime puts on CUDA, which on the CPU and why: predicted from the graph, without a GPU.

Four things decide, in this order (ONNX Runtime 1.31.1; docs/validation/cuda-placement.md compares the result with
the real provider's, node by node):

1. An annotation that keeps a node on the CPU: surgery.cuda.layering. It holds where the session is told of it, as it is
   in a folder that repack writes.
2. Whether there is a CUDA kernel for the operator, its version and its types: surgery.cuda.kernels.
3. Whether the node computes with small tensors that lie in host memory anyway, such as what Shape gives. ONNX Runtime
   leaves it on the CPU on purpose (GetCpuPreferredNodes in core/framework/fallback_cpu_capability.cc).
4. Limits of a kernel that its registration does not tell, so that the node would fail when it runs:
surgery.cuda.limits.

Values that cross between the two memories get a copy, a Memcpy node, once in each direction
(core/optimizer/transformer_memcpy.cc).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from surgery.attention.sequence_lengths import reads_by_width
from surgery.cuda.kernels import KernelTable, Match, Schema, cuda_kernels
from surgery.cuda.layering import stays_on_cpu
from surgery.cuda.limits import broken_limit
from surgery.errors import ModelError
from surgery.graph.model import Model
from surgery.graph.nodes import node_in_words
from surgery.graph.scopes import subgraphs
from surgery.graph.tensor_types import TensorType, declared_types

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Where = Literal["cuda", "cpu", "unknown"]
Why = Literal["kernel", "operator", "version", "type", "shape", "follows", "asked", "limit", "never", "unknown"]
"""kernel: CUDA has one. operator, version, type: it has none. shape, follows: it has, but its inputs are in host
memory. asked: it has, and an annotation keeps the node on the CPU. limit, never: it has, and the kernel fails in this version, in every known one."""

ALLOWED_ON_CPU: Mapping[Why, str] = {
    "shape": "computes with small tensors in host memory; ONNX Runtime prefers the CPU for that",
    "asked": "is to stay in host memory, as host-embeddings has annotated it",
    "follows": "reads what a node without a CUDA kernel computed; ONNX Runtime leaves it on the CPU with that one",
}
"""What a decoder may have on the CPU, with the reason: nodes that go there although CUDA has a kernel.
Every other node on the CPU is a fault; no operator of the exports that are known lacks a CUDA kernel altogether."""

CONTROL_FLOW = ("If", "Loop", "Scan")
"""What ONNX Runtime captures no graph with."""
SMALL = 100
"""Elements of the largest constant that a node on the CPU may read, in ONNX Runtime's rule for shape arithmetic."""
NEVER_BY_CHOICE = ("FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
"""A node that reads one of these is not put on the CPU by that rule."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a node goes. `why` sorts the reasons; `reason` is a sentence, empty where CUDA simply has a kernel."""

    node: str
    operator: str
    provider: Where
    why: Why
    reason: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether a model with this node should not be given to CUDA."""
        return self.why in ("limit", "never") or (self.provider == "cpu" and self.why not in ALLOWED_ON_CPU)


@dataclass(frozen=True, slots=True)
class Copy:
    """A value that crosses between the memories: a Memcpy node, in every run."""

    value: str
    to: Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that are not on CUDA for the same reason."""

    operator: str
    why: Why
    reason: str
    nodes: tuple[str, ...]
    is_fault: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {**asdict(self), "nodes": list(self.nodes)}


@dataclass(frozen=True)
class Prediction:
    """Every node of a model in node order, bodies after the graph that holds them, but for Constant nodes.

    `runtime` is the version whose rules were used. `by_width` is a node that reads attention_mask
    in a way that is not known to be right for one as wide as the caches.
    """

    assignments: tuple[Assignment, ...]
    copies: tuple[Copy, ...]
    runtime: str
    by_width: str = ""

    def on(self, provider: Where) -> tuple[Assignment, ...]:
        """The nodes that are predicted to run there: `cuda`, `cpu` or `unknown`."""
        return tuple(each for each in self.assignments if each.provider == provider)

    @cached_property
    def faults(self) -> tuple[Assignment, ...]:
        """The nodes that should run on CUDA and will not."""
        return tuple(each for each in self.assignments if each.is_fault)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """What is not simply on CUDA, by operator and reason: faults first, then by the number of nodes."""
        found: dict[tuple[str, Why, str], list[Assignment]] = {}
        for each in self.assignments:
            if each.why != "kernel":
                found.setdefault((each.operator, each.why, each.reason), []).append(each)
        ordered = sorted(found.items(), key=lambda entry: (not entry[1][0].is_fault, -len(entry[1]), entry[0]))
        return tuple(Group(*key, tuple(each.node for each in group), group[0].is_fault) for key, group in ordered)

    @property
    def can_be_captured(self) -> bool:
        """Whether ONNX Runtime takes the graph with CUDA graph capture on."""
        branches = any(each.operator in CONTROL_FLOW for each in self.assignments)
        return not (self.faults or self.on("unknown") or self.copies or branches)

    @property
    def ready_for_capture(self) -> bool:
        """Whether it answers alike under capture, where GenAI's mask is as wide as the caches' buffer."""
        return self.can_be_captured and not self.by_width

    @property
    def capture(self) -> str:
        """The same in one sentence.

        It refuses one with a copy between the memories ("... all compute graph nodes have not been partitioned to the
        CUDAExecutionProvider"); nodes on the CPU are let through where nothing crosses, as shape arithmetic's are.
        """
        if self.faults or self.on("unknown"):
            return "CUDA graph capture: no, or not known, because of these nodes"
        if self.copies:
            more = f", and {len(self.copies) - 1} more" if len(self.copies) > 1 else ""
            return f"CUDA graph capture: no, {self.copies[0].value!r} crosses between the memories{more}"
        if not self.can_be_captured:
            return "CUDA graph capture: no, the graph branches"
        if self.by_width:
            return (
                "CUDA graph capture: the provider takes it, no value crosses between the memories; but GenAI's mask is then "
                f"max_length wide, and {self.by_width!r} is not known to read such a mask right"
            )
        return "CUDA graph capture: yes, no value crosses between the memories"

    @property
    def advice(self) -> str:
        """What to do about it, in one sentence."""
        if not self.faults:
            return "every node that computes has a CUDA kernel"
        if any(fault.operator == "GroupQueryAttention" and fault.why == "type" for fault in self.faults):
            return "attention would run on the CPU: take fp16 or q4f16"
        if all(fault.why == "limit" for fault in self.faults):
            return "install the onnxruntime-gpu that the reason names"
        if all(fault.why == "never" and fault.operator == "GatherBlockQuantized" for fault in self.faults):
            return "keep the tables in host memory with --embed-device cpu, or run it with --ep cpu"
        return "run it with --ep cpu"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {
            "runtime": self.runtime,
            "on_cuda": len(self.on("cuda")),
            "on_cpu": len(self.on("cpu")),
            "unknown": len(self.on("unknown")),
            "copies": [asdict(copy) for copy in self.copies],
            "not_on_cuda": [group.to_dict() for group in self.groups],
            "faults": len(self.faults),
            "advice": self.advice,
            "capture": self.capture,
        }


def predict(model: Model, runtime: str | None = None, table: KernelTable | None = None) -> Prediction:
    """Where the nodes of a model would go. `runtime`: the version of onnxruntime-gpu, where it is not the table's.

    The kernels are the table's for every version; the limits are those of `runtime`. A node whose types are neither
    declared nor follow from its operator's schema is `unknown`. Within the bodies of If, Loop and Scan the same rules
    are used body by body.
    """
    kernels = table or cuda_kernels()
    opsets = {_domain(entry.domain): entry.version for entry in model.proto.opset_import}
    local = {(_domain(function.domain), function.name) for function in model.proto.functions}
    version = runtime or kernels.onnxruntime
    assignments: list[Assignment] = []
    copies: list[Copy] = []
    pending: list[tuple[GraphProto, Mapping[str, TensorType]]] = [(model.graph, {})]
    for graph, outer in pending:
        scope = _Scope(graph, outer, opsets, local, kernels, version)
        assignments.extend(scope.assignments())
        copies.extend(scope.copies())
        pending.extend((body, scope.types) for node in graph.node for body in subgraphs(node))
    return Prediction(tuple(assignments), tuple(copies), version, reads_by_width(model.graph))


def require_cuda(model: Model, runtime: str | None = None) -> None:
    """Raise ModelError, naming the first node, where a part of the model would not run on CUDA."""
    found = predict(model, runtime)
    if found.faults:
        first = found.faults[0]
        count = "1 node" if len(found.faults) == 1 else f"{len(found.faults)} nodes"
        raise ModelError(
            f"{model.path}: {count} would not run on CUDA, the first is {first.operator} {first.node!r}: {first.reason}",
            hint=found.advice,
        )


class _Scope:
    """One graph or body, and what was found out about its nodes."""

    def __init__(
        self,
        graph: GraphProto,
        outer: Mapping[str, TensorType],
        opsets: Mapping[str, int],
        local: set[tuple[str, str]],
        table: KernelTable,
        runtime: str,
    ) -> None:
        self._graph = graph
        self._opsets = opsets
        self._local = local
        self._table = table
        self._runtime = runtime
        self.types: dict[str, TensorType] = {**outer, **declared_types(graph)}
        self._matches = [self._match(node) for node in graph.node]
        unknown = {index for index, match in enumerate(self._matches) if match.kind == "unknown"}
        host = [self._host(index) for index in range(len(graph.node))]
        self._by_choice = _wanted_on_cpu(graph, self.types, host, unknown)
        asked: Why = "asked"
        self._by_choice |= {index: asked for index, node in enumerate(graph.node) if stays_on_cpu(node)}

    def assignments(self) -> Iterator[Assignment]:
        for index, node in enumerate(self._graph.node):
            if _is_constant(node):
                continue
            match = self._matches[index]
            name = node.name or node_in_words(node)
            if why := self._by_choice.get(index):
                yield Assignment(name, node.op_type, "cpu", why, ALLOWED_ON_CPU[why])
            elif match.kind == "kernel":
                limit = broken_limit(node, self.types, self._runtime)
                kind: Why = "kernel" if limit is None else "limit" if limit.since else "never"
                yield Assignment(name, node.op_type, "cuda", kind, limit.told(self._runtime) if limit else "")
            else:
                where: Where = "unknown" if match.kind == "unknown" else "cpu"
                yield Assignment(name, node.op_type, where, match.kind, match.reason)

    def copies(self) -> Iterator[Copy]:
        """Values that are written in one memory and read in the other; graph inputs that are read in both."""
        device_reads, host_reads = set[str](), set[str]()
        device_writes, host_writes = dict[str, None](), dict[str, None]()
        for index, node in enumerate(self._graph.node):
            if _is_constant(node):
                continue
            host = self._host(index) if index not in self._by_choice else None
            for position, name in enumerate(node.input):
                (device_reads if host and position not in host[0] else host_reads).add(name)
            for position, name in enumerate(node.output):
                (device_writes if host and position not in host[1] else host_writes)[name] = None
        for value in self._graph.input:
            if value.name in device_reads & host_reads:
                yield Copy(value.name, "cuda")
        yield from (Copy(name, "cuda") for name in host_writes if name and name in device_reads)
        yield from (Copy(name, "cpu") for name in device_writes if name and name in host_reads)

    def _host(self, index: int) -> tuple[frozenset[int], frozenset[int]] | None:
        """The operands that the node's CUDA kernel has in host memory; None where it has no CUDA kernel."""
        match = self._matches[index]
        if match.kind != "kernel":
            return None
        node = self._graph.node[index]
        return self._table.host.get((_domain(node.domain), node.op_type, match.first), (frozenset(), frozenset()))

    def _match(self, node: NodeProto) -> Match:
        """Look up a node's kernel; the types of its outputs are inferred where they are not declared."""
        operator = (_domain(node.domain), node.op_type)
        if operator in self._local:
            return Match("unknown", f"{node.op_type} is a function of the model; ONNX Runtime places the nodes inside")
        opset = self._opsets.get(operator[0], 1)
        inputs = [self._type(name) for name in node.input]
        schema = self._table.schema(operator, opset)
        if schema is not None:
            self._infer(node, schema, inputs)
        found = self._table.match(operator, opset, inputs, [self._type(name) for name in node.output])
        if found.kind == "operator" and _is_function(operator, opset):
            return Match("unknown", f"ONNX defines {node.op_type} by other operators; ONNX Runtime may place those")
        return found

    def _infer(self, node: NodeProto, schema: Schema, inputs: list[str | None]) -> None:
        bound = schema.bind(inputs, ())
        for index, name in enumerate(node.output):
            if name and name not in self.types:
                kind = schema.output_type(index, bound) or _attribute_type(node)
                if kind is not None:
                    self.types[name] = TensorType(kind.upper(), None)

    def _type(self, name: str) -> str | None:
        """As in Schema.bind: "" for an operand that is left out, None for a type that is not known."""
        known = self.types.get(name) if name else None
        return known.dtype.lower() if known else None if name else ""


def _wanted_on_cpu(
    graph: GraphProto,
    types: Mapping[str, TensorType],
    host: Sequence[tuple[frozenset[int], frozenset[int]] | None],
    unknown: set[int],
) -> dict[int, Why]:
    """Nodes with a CUDA kernel that ONNX Runtime leaves on the CPU, and which of the two choices that is.

    The way starts at readers of values that CUDA kernels leave in host memory. A node stays on the CPU if each of its
    inputs is such a value, a small constant or a graph input, none is of a half-precision type, and its kernel would
    fetch such values to the device; its own outputs are then such values too. A node without a CUDA kernel that is met
    on the way passes its outputs on likewise.
    """
    readers = _readers(graph)
    free = {value.name for value in graph.input} | _small_constants(graph)
    in_host: dict[str, Why] = {}
    pending: list[int] = []
    for index, node in enumerate(graph.node):
        sides = host[index]
        for position in sides[1] if sides else ():
            if position < len(node.output):
                in_host[node.output[position]] = "shape"
                pending.extend(readers.get(node.output[position], ()))
    heapq.heapify(pending)
    seen, chosen = set[int](), dict[int, Why]()
    while pending:
        index = heapq.heappop(pending)
        if index in seen:
            continue
        seen.add(index)
        node, sides = graph.node[index], host[index]
        if index in unknown:
            continue
        if sides is not None and not _all_in_host(node, types, sides[0], free, in_host):
            continue
        why: Why = "follows"
        if sides is not None:
            if all(in_host.get(name, "shape") == "shape" for name in node.input):
                why = "shape"
            chosen[index] = why
        for name in node.output:
            in_host[name] = why
            for reader in readers.get(name, ()):
                heapq.heappush(pending, reader)
    return chosen


def _all_in_host(
    node: NodeProto,
    types: Mapping[str, TensorType],
    fetched: frozenset[int],
    free: set[str],
    in_host: Mapping[str, Why],
) -> bool:
    for position, name in enumerate(node.input):
        known = types.get(name)
        if known is not None and known.dtype in NEVER_BY_CHOICE:
            return False
        if name not in free and (name not in in_host or position in fetched):
            return False
    return True


def _readers(graph: GraphProto) -> dict[str, list[int]]:
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in dict.fromkeys(node.input):
            if name:
                readers.setdefault(name, []).append(index)
    return readers


def _small_constants(graph: GraphProto) -> set[str]:
    """Initializers of few elements, and Constant nodes, which ONNX Runtime turns into initializers when it loads."""
    small = {tensor.name for tensor in graph.initializer if math.prod(tensor.dims) <= SMALL}
    for node in filter(_is_constant, graph.node):
        if all(math.prod(attribute.t.dims) <= SMALL for attribute in node.attribute):
            small.update(node.output)
    return small


def _is_constant(node: NodeProto) -> bool:
    return node.op_type == "Constant" and not _domain(node.domain)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


_CONSTANTS = {"value_float": "float", "value_floats": "float", "value_int": "int64", "value_ints": "int64"}
"""Attributes of a Constant node that hold its value -> type of the value."""


def _attribute_type(node: NodeProto) -> str | None:
    """The type that an attribute gives to a node's outputs: Cast's `to`, and the value of a constant."""
    from onnx import TensorProto

    known = {value: name.lower() for name, value in TensorProto.DataType.items()}
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to":
            return known.get(attribute.i)
        if node.op_type in ("Constant", "ConstantOfShape") and attribute.name == "value":
            return known.get(attribute.t.data_type)
        if node.op_type == "Constant" and attribute.name in _CONSTANTS:
            return _CONSTANTS[attribute.name]
    return "float" if node.op_type == "ConstantOfShape" else None


def _is_function(operator: tuple[str, str], opset: int) -> bool:
    """Whether ONNX gives the operator a body of other operators."""
    from onnx import defs

    domain, name = operator
    if not defs.has(name, domain):
        return False
    try:
        schema = defs.get_schema(name, opset, domain)
    except defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]
