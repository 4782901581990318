"""The kernels of ONNX Runtime's CUDA provider: for which operators, versions and types there is one, and if not, why.

The table, kernels.json, is what the provider of one released wheel lists, with the schemas of all operators that this
runtime knows; `python -m validation.cuda.kernels` makes it. A kernel is registered for a range of operator versions and
for lists of types, one per type constraint of the operator's schema, such as T of GroupQueryAttention.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

DATA = Path(__file__).with_name("kernels.json")

Operator = tuple[str, str]
"""Domain, "" for ai.onnx, and operator."""
MatchKind = Literal["kernel", "operator", "version", "type", "unknown"]

_SHOWN = {"float": "float32", "double": "float64"}
"""Types whose name in the runtime is not the one that people use."""


def short_type(name: str) -> str:
    """tensor(float16) -> float16; other types keep their name."""
    return name.removeprefix("tensor(").removesuffix(")") if name.startswith("tensor(") else name


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of an operator. `last` is None where only operators of version `first` itself are taken."""

    first: int
    last: int | None
    types: Mapping[str, frozenset[str]]

    def covers(self, since: int) -> bool:
        """Whether it implements the operator version `since`: ONNX Runtime takes an open range for `first` alone."""
        return since == self.first if self.last is None else self.first <= since <= self.last

    def accepts(self, bound: Mapping[str, str]) -> bool:
        """Whether it takes these types; `bound` is type variable -> type, as the kernel's schema names them."""
        return all(bound[name] in allowed for name, allowed in self.types.items() if name in bound)


@dataclass(frozen=True, slots=True)
class Schema:
    """A version of an operator: for each operand the name of its type constraint, or its only type."""

    since: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, inputs: Sequence[str | None], outputs: Sequence[str | None]) -> dict[str, str]:
        """Type constraint -> type, from the types of a node's operands: "" where absent, None where not known."""
        bound: dict[str, str] = {}
        for formal, kind in self._operands(inputs, outputs):
            if kind:
                bound.setdefault(formal, kind)
        return bound

    def unbound(self, inputs: Sequence[str | None], outputs: Sequence[str | None]) -> set[str]:
        """Type constraints of operands that are there, and of which none has a known type."""
        operands = list(self._operands(inputs, outputs))
        return {formal for formal, kind in operands if kind is None} - {formal for formal, kind in operands if kind}

    def _operands(
        self, inputs: Sequence[str | None], outputs: Sequence[str | None]
    ) -> Iterator[tuple[str, str | None]]:
        """(constraint, type); what exceeds the schema belongs to its last, variadic operand."""
        for formals, types in ((self.inputs, inputs), (self.outputs, outputs)):
            if formals:
                yield from ((formals[min(index, len(formals) - 1)], kind) for index, kind in enumerate(types))

    def output_type(self, index: int, bound: Mapping[str, str]) -> str | None:
        """The type of an output, as far as the schema and the other operands tell."""
        if not self.outputs:
            return None
        formal = self.outputs[min(index, len(self.outputs) - 1)]
        return short_type(formal) if formal.startswith("tensor(") else bound.get(formal)


@dataclass(frozen=True, slots=True)
class Match:
    """Whether there is a kernel for a node. `reason` says why not; `first` is the version of the kernel found."""

    kind: MatchKind
    reason: str = ""
    first: int = 0


@dataclass(frozen=True)
class KernelTable:
    """The kernels of one release. `host` holds the inputs and outputs that a kernel takes and leaves in host memory."""

    onnxruntime: str
    wheel: str
    sha256: str
    kernels: Mapping[Operator, tuple[Kernel, ...]]
    schemas: Mapping[Operator, tuple[Schema, ...]]
    host: Mapping[tuple[str, str, int], tuple[frozenset[int], frozenset[int]]]

    def schema(self, operator: Operator, opset: int) -> Schema | None:
        """The version of an operator that a model of this opset means; None for operators that are not known."""
        versions = [schema for schema in self.schemas.get(operator, ()) if schema.since <= opset]
        return max(versions, key=lambda schema: schema.since, default=None)

    def match(
        self, operator: Operator, opset: int, inputs: Sequence[str | None], outputs: Sequence[str | None]
    ) -> Match:
        """Look for a kernel that implements the operator's version and takes the types of the operands."""
        name = operator[1]
        schema = self.schema(operator, opset)
        kernels = self.kernels.get(operator, ())
        if not kernels or schema is None:
            return Match("operator", f"the CUDA provider has no kernel for {name}")
        covering = [kernel for kernel in kernels if kernel.covers(schema.since)]
        if not covering:
            return Match("version", f"{name} is of version {schema.since}; CUDA has kernels for {_versions(kernels)}")
        bound = schema.bind(inputs, outputs)
        fitting = [kernel for kernel in covering if kernel.accepts(bound)]
        if not fitting:
            return Match("type", _why_not(name, covering, bound))
        asked = {constraint for kernel in covering for constraint in kernel.types}
        if missing := asked & schema.unbound(inputs, outputs):
            return Match("unknown", f"the types of this {name} are not declared: {', '.join(sorted(missing))}")
        return Match("kernel", first=fitting[0].first)


def _versions(kernels: Iterable[Kernel]) -> str:
    ranges = sorted({(kernel.first, kernel.last or kernel.first) for kernel in kernels})
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ranges)


def _why_not(name: str, kernels: Sequence[Kernel], bound: Mapping[str, str]) -> str:
    """The first constraint whose type no kernel takes; else the combination that none takes."""
    for constraint, kind in bound.items():
        allowed = {each for kernel in kernels for each in kernel.types.get(constraint, {kind})}
        if kind not in allowed:
            return f"{name} has CUDA kernels for {_listed(allowed)} only, {constraint} is {_SHOWN.get(kind, kind)}"
    named = {each for kernel in kernels for each in kernel.types}
    given = [f"{constraint} {_SHOWN.get(kind, kind)}" for constraint, kind in bound.items() if constraint in named]
    return f"{name} has no CUDA kernel for {' with '.join(given)}"


def _listed(types: Iterable[str]) -> str:
    names = sorted((_SHOWN.get(each, each) for each in types), key=_natural)
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else "".join(names)


def _natural(name: str) -> tuple[bool, str]:
    """float16 before bfloat16."""
    return name.startswith("b"), name


@cache
def cuda_kernels() -> KernelTable:
    """The committed table."""
    return read_table(json.loads(DATA.read_text(encoding="utf-8")))


def read_table(data: Mapping[str, Any]) -> KernelTable:
    """Read kernels.json, as `python -m validation.cuda.kernels` writes it."""
    kernels: dict[Operator, list[Kernel]] = {}
    for domain, name, first, last, types in data["kernels"]:
        allowed = {constraint: frozenset(each.split()) for constraint, each in types.items()}
        kernels.setdefault((domain, name), []).append(Kernel(first, last, allowed))
    schemas: dict[Operator, list[Schema]] = {}
    for domain, name, since, inputs, outputs in data["schemas"]:
        schemas.setdefault((domain, name), []).append(Schema(since, tuple(inputs.split()), tuple(outputs.split())))
    return KernelTable(
        onnxruntime=data["onnxruntime"],
        wheel=data["wheel"],
        sha256=data["sha256"],
        kernels={operator: tuple(each) for operator, each in kernels.items()},
        schemas={operator: tuple(each) for operator, each in schemas.items()},
        host={(d, name, first): (frozenset(i), frozenset(o)) for d, name, first, i, o in data["host"]},
    )
