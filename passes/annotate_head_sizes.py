"""annotate-head-sizes: each cache says its KV heads and head size, and the model carries its layer table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass, Verb
from passes.kv_sources import check_size, check_windows
from surgery.architecture import Layer
from surgery.attention.cache_padding import AXES, own_sizes
from surgery.errors import PassError
from surgery.graph.metadata_props import properties, set_property
from surgery.graph.model import Model
from surgery.graph.tensor_types import tensor_type
from surgery.source.layer_table import KEY, layer_table, read_layer_table

if TYPE_CHECKING:
    from onnx import ValueInfoProto


@dataclass(frozen=True)
class AnnotateHeadSizes(Pass):
    """Write concrete sizes where the runtime reads them, and the layer table where people and tools do.

        before                                            after

        past_key_values.4.key [batch, ?, past, hd]        past_key_values.4.key [batch, 1, past, 512]
        present.4.key         [batch, ?, total, hd]       present.4.key         [batch, 1, total, 512]
                                                          metadata gemma4_surgery.layers = {"version": 1, ...}

    ONNX Runtime GenAI (0.14 and later) takes each layer's head size from axis 3 and (0.15 and later) its KV heads
    from axis 1 of the declared past; a symbolic axis falls back to one number for all layers, and the first run fails
    with "Got invalid dimensions for output: present.1.key ... index: 3".

    A cache that uniform-heads has padded keeps its declaration; the table says what the layer uses of it.
    The table's form is documented in surgery.source.layer_table; `inspect` shows it.

    Requires: the architecture, and no cache whose concrete size, and no window, contradicts it. Ensures: every cache in
    the interface has concrete KV heads and head size, and the table reads back as it was written.
    """

    name: ClassVar[str] = "annotate-head-sizes"
    summary: ClassVar[str] = "concrete KV heads and head size in every past and present; the layer table as metadata"

    def requires(self, model: Model) -> None:
        _annotate(model, write=False)
        check_windows(model.graph, model.require_architecture())

    def run(self, model: Model) -> list[Finding]:
        findings = _annotate(model, write=True)
        layers = model.require_architecture().layers
        text = layer_table(layers)
        there = properties(model.proto).get(KEY)
        if there == text:
            findings.append(Finding("skipped", f"metadata {KEY}", "it holds this table already"))
        else:
            verb: Verb = "added" if there is None else "changed"
            set_property(model.proto, KEY, text)
            findings.append(Finding(verb, f"metadata {KEY}", f"the table of {len(layers)} layers"))
        return findings

    def ensures(self, model: Model) -> None:
        for name, value, _ in _caches(model):
            declared = tensor_type(value)
            if (
                declared is None
                or declared.shape is None
                or not all(isinstance(declared.shape[axis], int) for axis in (1, 3))
            ):
                raise PassError(f"{name} is {declared}; KV heads and head size are still symbolic")
        if read_layer_table(model) != model.require_architecture().layers:
            raise PassError(f"metadata {KEY} does not read back as it was written")


def _caches(model: Model) -> list[tuple[str, ValueInfoProto, Layer]]:
    """(name, declaration, layer) of every past and present in the interface, in order."""
    layers = model.require_architecture().layers
    found = []
    for value, prefix in (
        *((value, "past_key_values.") for value in model.graph.input),
        *((value, "present.") for value in model.graph.output),
    ):
        head, _, kind = value.name.removeprefix(prefix).partition(".")
        if value.name.startswith(prefix) and head.isdecimal() and kind in ("key", "value"):
            if int(head) >= len(layers):
                raise PassError(f"{value.name} names layer {head}, but config.json has {len(layers)} layers")
            found.append((value.name, value, layers[int(head)]))
    if not found:
        raise PassError("no past_key_values.N.key is in the interface", hint="run rename-io first")
    return found


def _annotate(model: Model, *, write: bool) -> list[Finding]:
    findings = []
    kept = 0
    own = own_sizes(model.graph)
    for name, value, layer in _caches(model):
        declared = tensor_type(value)
        if declared is None or declared.shape is None or len(declared.shape) != 4:
            raise PassError(f"{name} is {declared}; rank 4, [batch, kv heads, tokens, head size], is expected")
        wanted = {1: layer.kv_heads, 3: layer.head_size}
        for what, found, size in zip(("KV heads", "head size"), own[name], wanted.values(), strict=True):
            check_size(name, what, found, size)
        if all(isinstance(declared.shape[axis], int) for axis in AXES):
            kept += 1
            continue
        if write:
            for axis, size in wanted.items():
                value.type.tensor_type.shape.dim[axis].dim_value = size
        findings.append(Finding("changed", name, f"{declared} is now {tensor_type(value)}"))
    if kept:
        findings.append(Finding("skipped", f"{kept} caches", "their KV heads and head size are concrete already"))
    return findings
