"""uniform-heads: every cache of the interface gets the largest one's size, for runtimes that know only one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.attention.cache_padding import AXES, declared_sizes, own_sizes
from surgery.errors import PassError
from surgery.graph.index import producers
from surgery.graph.model import Model
from surgery.graph.nodes import copied
from surgery.graph.renaming import fresh, rename
from surgery.graph.scopes import all_names, reads
from surgery.graph.tensor_types import tensor_type

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

SCOPE = "/model/uniform_heads"
MIN_OPSET = 11
"""The first opset in which Slice and Pad take their bounds as inputs."""

Size = tuple[int, int]
"""KV heads and head size."""

_CACHE = re.compile(r"(?:past_key_values|present)\.(\d+)\.(key|value)")


@dataclass(frozen=True)
class UniformHeads(Pass):
    """Pad every cache of the interface with zeros to one number of KV heads and one head size; cut the padding off
    inside.

        before                                             after

        past_key_values.0.key [batch, 1, past, 256]        past_key_values.0.key [batch, 1, past, 512]
                 |                                                  |
                 |                                                Slice [batch, 1, past, 256]
                 |                                                  |
           [attention 0] -> present.0.key                     [attention 0] -> Pad -> present.0.key [..., 512]
                 |            |                                     |                     |
           [KV-shared layer 15]   Identity -> present.15.key   [KV-shared layer 15]     Identity -> present.15.key

    onnxruntime-genai 0.12 and 0.13 allocate all caches with the one size of genai_config.json, and the first run of
    anything else fails with "Got invalid dimensions for input: past_key_values.0.key". Every attention, fused or
    unfused, goes on computing at its own size, on the same numbers: nothing but zeros is added, and nobody reads them.
    A KV-shared layer's alias copies the padded cache. A past that nothing reads changes its declaration alone.

    The price: the smaller caches take the memory of the largest, and each step copies them twice more. A buffer shared
    between past and present is no longer possible, because Slice and Pad touch the caches.

    Requires: caches named as rename-io names them, with concrete KV heads and head size, each past as its present;
    opset 11. Ensures: one size in the whole interface; the sizes that the layers use are as they were.
    """

    name: ClassVar[str] = "uniform-heads"
    summary: ClassVar[str] = "every cache padded to the largest KV heads and head size, for GenAI 0.12 and 0.13"

    def requires(self, model: Model) -> None:
        sizes = _sizes(model.graph)
        for (layer, kind), names in _pairs(sizes).items():
            if len(names) == 2 and sizes[names[0]] != sizes[names[1]]:
                raise PassError(
                    f"layer {layer}'s {kind} is {sizes[names[0]]} as past, but {sizes[names[1]]} as present"
                )
        if len(set(sizes.values())) > 1 and model.opset() < MIN_OPSET:
            raise PassError(f"opset {model.opset()} has no Slice with inputs; {MIN_OPSET} or newer is expected")
        made = producers(model.graph)
        for value in model.graph.output:
            if value.name in sizes and value.name not in made:
                raise PassError(f"{value.name} comes from no node")

    def run(self, model: Model) -> list[Finding]:
        sizes = _sizes(model.graph)
        uniform = _largest(sizes.values())
        small = {name: size for name, size in sizes.items() if size != uniform}
        if not small:
            return [Finding("skipped", f"{len(sizes)} caches", f"each has {_words(uniform)} already")]
        _Padding(model.graph, small, uniform).write()
        padded: dict[tuple[int, Size], list[str]] = {}
        for (layer, kind), names in _pairs(small).items():
            padded.setdefault((layer, small[names[0]]), []).append(kind)
        findings = [
            Finding("changed", f"layer {layer}'s {' and '.join(kinds)}", f"{_words(size)}, padded to {_words(uniform)}")
            for (layer, size), kinds in padded.items()
        ]
        if kept := len(sizes) - len(small):
            findings.append(Finding("skipped", f"{kept} caches", f"each has {_words(uniform)} already"))
        return findings

    def ensures(self, model: Model) -> None:
        sizes = _sizes(model.graph)
        if len(found := set(sizes.values())) > 1:
            raise PassError(f"the caches still have {len(found)} sizes: {', '.join(map(_words, sorted(found)))}")
        if model.architecture is None:
            return
        for name, own in own_sizes(model.graph).items():
            if (match := _CACHE.fullmatch(name)) and int(match[1]) < len(model.architecture.layers):
                layer = model.architecture.layers[int(match[1])]
                if own != (layer.kv_heads, layer.head_size):
                    raise PassError(f"{name} is used as {own}, but config.json gives {layer.kv_heads, layer.head_size}")


def _sizes(graph: GraphProto) -> dict[str, Size]:
    """Each cache of the interface and its size. Raises PassError for one that has no numbers, and for none at all."""
    sizes: dict[str, Size] = {}
    for name, (heads, size) in declared_sizes(graph).items():
        if not _CACHE.fullmatch(name):
            continue
        if not isinstance(heads, int) or not isinstance(size, int):
            declared = next(tensor_type(v) for v in (*graph.input, *graph.output) if v.name == name)
            raise PassError(
                f"{name} is {declared}; numbers are expected for its KV heads and its head size",
                hint="run annotate-head-sizes first",
            )
        sizes[name] = (heads, size)
    if not sizes:
        raise PassError("no past_key_values.N.key is in the interface", hint="run rename-io first")
    return sizes


def _pairs(names: Iterable[str]) -> dict[tuple[int, str], list[str]]:
    """(layer, kind) -> its past and its present, as far as they are there, in the order of the interface."""
    pairs: dict[tuple[int, str], list[str]] = {}
    for name in names:
        if match := _CACHE.fullmatch(name):
            pairs.setdefault((int(match[1]), match[2]), []).append(name)
    return pairs


def _largest(sizes: Iterable[Size]) -> Size:
    heads, head_sizes = zip(*sizes, strict=True)
    return max(heads), max(head_sizes)


def _words(size: Size) -> str:
    return f"{size[0]} KV {'head' if size[0] == 1 else 'heads'} of {size[1]}"


@dataclass
class _Padding:
    """One edit of a graph: caches of `small` sizes become `uniform` in the interface."""

    graph: GraphProto
    small: dict[str, Size]
    uniform: Size
    _constants: dict[str, TensorProto] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def write(self) -> None:
        """The inner values take new names everywhere, subgraphs included; the interface gets its own back."""
        self._taken = all_names(self.graph)
        aliases = self._aliases()
        unread = self._unread()
        inner = {name: self._inner_name(name) for name in self.small if name not in aliases and name not in unread}
        rename(self.graph, inner)
        self._restore_interface({new: old for old, new in inner.items()})
        for name, source in aliases.items():
            node = next(node for node in self.graph.node if name in node.output)
            node.input[0] = source
        nodes = list(self._with_padding(inner))
        held = [copied(node) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(held)
        self.graph.initializer.extend(self._constants.values())

    def _aliases(self) -> dict[str, str]:
        """A KV-shared layer's present -> the present that it copies."""
        return {
            node.output[0]: node.input[0]
            for node in self.graph.node
            if node.op_type == "Identity" and self.small.get(node.output[0], 0) == self.small.get(node.input[0], 1)
        }

    def _unread(self) -> set[str]:
        read = {name for node in self.graph.node for name in reads(node)}
        return {value.name for value in self.graph.input if value.name in self.small and value.name not in read}

    def _inner_name(self, name: str) -> str:
        return fresh(f"{SCOPE}/{name}/own", self._taken)

    def _restore_interface(self, public: dict[str, str]) -> None:
        for value in (*self.graph.input, *self.graph.output):
            if value.name in public:
                self.graph.value_info.append(value)
                value.name = public[value.name]
            if value.name in self.small:
                for axis, size in zip(AXES, self.uniform, strict=True):
                    value.type.tensor_type.shape.dim[axis].dim_value = size

    def _with_padding(self, inner: dict[str, str]) -> Iterator[NodeProto]:
        """The nodes in their order, a Slice right before the first reader of a past, a Pad right after a present's
        maker."""
        pasts = {inner[value.name]: value.name for value in self.graph.input if value.name in inner}
        presents = {inner[value.name]: value.name for value in self.graph.output if value.name in inner}
        for node in self.graph.node:
            for own in sorted(reads(node) & pasts.keys()):
                yield self._slice(pasts.pop(own), own)
            yield node
            for own in node.output:
                if own in presents:
                    yield self._pad(own, presents[own])

    def _slice(self, past: str, own: str) -> NodeProto:
        from onnx.helper import make_node

        size = self.small[past]
        cut = [axis for axis in (0, 1) if size[axis] != self.uniform[axis]]
        bounds = [
            self._constant("starts", [0] * len(cut)),
            self._constant("ends", [size[axis] for axis in cut]),
            self._constant("axes", [AXES[axis] for axis in cut]),
        ]
        return make_node("Slice", [past, *bounds], [own], name=f"{SCOPE}/{past}/Slice")

    def _pad(self, own: str, present: str) -> NodeProto:
        from onnx.helper import make_node

        size = self.small[present]
        pads = [0, 0, 0, 0, 0, self.uniform[0] - size[0], 0, self.uniform[1] - size[1]]
        return make_node("Pad", [own, self._constant("pads", pads)], [present], name=f"{SCOPE}/{present}/Pad")

    def _constant(self, role: str, values: list[int]) -> str:
        import numpy as np
        from onnx.numpy_helper import from_array

        label = f"{SCOPE}/constants/{role}_{'_'.join(map(str, values))}"
        if label not in self._constants:
            name = fresh(label, self._taken)
            self._constants[label] = from_array(np.array(values, np.int64), name)
        return self._constants[label].name
