"""merge-embeddings: embed_tokens joins the decoder, so that one graph takes input_ids."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.errors import PassError
from surgery.graph.external_data import external_field, is_external, set_location, tensors
from surgery.graph.index import producers
from surgery.graph.metadata_props import Described, properties, set_property
from surgery.graph.model import Model
from surgery.graph.nodes import copied, node_in_words
from surgery.graph.operands import check_graph
from surgery.graph.opsets import changed_operators, raise_opset
from surgery.graph.renaming import fresh, rename, rename_dims, rename_in_every_scope
from surgery.graph.scopes import all_names, reads
from surgery.graph.tensor_types import TensorType, tensor_type

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

NAMESPACE = "embed_tokens"
"""Prefix of an embedding graph's name that the decoder already uses for something else."""

MAX_IR_VERSION = 13
"""The newest IR version that ONNX Runtime 1.31.1 loads (measured)."""


@dataclass(frozen=True)
class MergeEmbeddings(Pass):
    """Join the embedding graph to the decoder.

        before                                            after

        input_ids -> [embed_tokens] -> inputs_embeds      input_ids -> [embed_tokens]
                                    -> per_layer_inputs                  |        |
                                                                   inputs_embeds  per_layer_inputs
        inputs_embeds ----+                                              |        |
        per_layer_inputs -+-> [decoder] -> logits                    [decoder] -> logits
        attention_mask ---+                               attention_mask -^

    Requires: each output of the embedding graph is an input of the decoder of the same dtype and rank (inputs_embeds
    float [batch, sequence, hidden]; per_layer_inputs float [batch, sequence, layers, size] where the model has one),
    and the embedding graph has one input, integer [batch, sequence]. A Reshape joins per_layer_inputs of rank 3,
    [batch, sequence, layers x size], to those of rank 4. Further inputs [n, size] are features of images or sound: the
    merged graph is for text, and has none of them (n = 0).
    Ensures: the joined inputs have left the interface and the embedding graph's input stands in their place.

    `embed` is the file of the embedding graph, or the graph in memory, which stays as it is.

    The embedding nodes stand right before their first consumer; the decoder's nodes keep their order. A name that both
    graphs use is prefixed in the embedding graph, inside subgraphs too; so is the location of a data file when both
    graphs call different files by one name. Of two operator sets of ONNX the newer one stays, if each operator of the
    other graph takes the same in it. Weights are not read. The embedding's own arithmetic and casts are left as they
    are, which keeps every number bit-exact.
    """

    name: ClassVar[str] = "merge-embeddings"
    summary: ClassVar[str] = "join embed_tokens to the decoder: input_ids replaces inputs_embeds and per_layer_inputs"

    embed: Path | Model

    def requires(self, model: Model) -> None:
        if self._already_merged(model):
            return
        embed = self._opened()
        check_graph(embed)
        for one in (embed, model):
            _refuse_defaults(one)
        _check_join(embed, model)
        _check_versions(embed, model)

    def run(self, model: Model) -> list[Finding]:
        if self._already_merged(model):
            return [Finding("skipped", "input_ids", "the graph takes token ids already and no embeddings")]
        embed = self._opened()
        joined = [value.name for value in embed.graph.output]
        findings = _without_features(embed.graph)
        findings += _separate_names(embed.graph, model.graph, [*joined, *_shared_tokens(embed.graph, model.graph)])
        findings += _reshape_outputs(embed.graph, model.graph)
        findings += _separate_locations(embed, model)
        _unify_dims(embed.graph, model.graph, joined)
        findings += _join_interface(embed.graph, model.graph, joined)
        position = _first_consumer(model.graph, set(joined))
        findings.append(_insert(embed.graph, model.graph, position))
        findings += _raise_older(embed, model)
        findings += _join_model_fields(embed.proto, model.proto)
        return findings

    def ensures(self, model: Model) -> None:
        if not self._already_merged(model):
            raise PassError("the decoder still takes embeddings as an input")

    def _opened(self) -> Model:
        """The embedding graph, to be changed."""
        return self.embed.copy() if isinstance(self.embed, Model) else Model.open(self.embed)

    def _already_merged(self, model: Model) -> bool:
        """Token ids come in, and nothing floating-point of rank 3, [batch, sequence, hidden], does."""
        declared = [tensor_type(value) for value in model.graph.input]
        floats = [type for type in declared if type is not None and "FLOAT" in type.dtype and type.shape is not None]
        return bool(_token_inputs(model.graph)) and not any(len(type.shape or ()) == 3 for type in floats)


def _token_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """Integer rank-2 inputs that are not a mask or positions by name."""
    others = ("mask", "pos")
    return [
        value
        for value in graph.input
        if (declared := tensor_type(value)) is not None
        and declared.dtype in ("INT64", "INT32")
        and declared.shape is not None
        and len(declared.shape) == 2
        and not any(word in value.name for word in others)
    ]


def _check_join(embed: Model, decoder: Model) -> None:
    others = [value for value in embed.graph.input if not _is_feature(value)]
    if len(others) != 1 or len(_token_inputs(embed.graph)) != 1:
        found = ", ".join(f"{value.name} {tensor_type(value)}" for value in embed.graph.input) or "nothing"
        raise PassError(f"{embed.path} takes {found}; one input of token ids, INT64 [batch, sequence], is expected")
    takes = {value.name: tensor_type(value) for value in decoder.graph.input}
    made = producers(embed.graph)
    for value in embed.graph.output:
        gives = tensor_type(value)
        if value.name not in takes:
            raise PassError(
                f"{embed.path} gives {value.name!r}, which the decoder does not take; it takes {', '.join(takes)}"
            )
        if value.name not in made:
            raise PassError(f"{embed.path}: output {value.name!r} comes from no node")
        if not _compatible(gives, takes[value.name]) and _reshaped(gives, takes[value.name]) is None:
            raise PassError(f"{value.name!r} is {gives} in {embed.path} but {takes[value.name]} in the decoder")
    given = {value.name for value in embed.graph.output}
    if missing := [name for name in ("inputs_embeds", "per_layer_inputs") if name in takes and name not in given]:
        raise PassError(f"the decoder takes {missing[0]!r}, but {embed.path} gives only {', '.join(sorted(given))}")


def _compatible(gives: TensorType | None, takes: TensorType | None) -> bool:
    """Same dtype, same rank, and no two concrete sizes that differ."""
    if gives is None or takes is None or gives.dtype != takes.dtype:
        return False
    if gives.shape is None or takes.shape is None:
        return True
    if len(gives.shape) != len(takes.shape):
        return False
    pairs = zip(gives.shape, takes.shape, strict=True)
    return all(not (isinstance(a, int) and isinstance(b, int)) or a == b for a, b in pairs)


def _reshaped(gives: TensorType | None, takes: TensorType | None) -> list[int] | None:
    """The shape that makes [batch, sequence, layers x size] of [batch, sequence, layers, size], or the way back."""
    if gives is None or takes is None or gives.dtype != takes.dtype or not gives.shape or not takes.shape:
        return None
    sizes = [dim for dim in takes.shape[2:] if isinstance(dim, int)]
    own = [dim for dim in gives.shape[2:] if isinstance(dim, int)]
    whole = len(sizes) == len(takes.shape) - 2 and len(own) == len(gives.shape) - 2
    ranks = {len(gives.shape), len(takes.shape)}
    return [0, 0, *sizes] if ranks == {3, 4} and whole and math.prod(own) == math.prod(sizes) else None


def _reshape_outputs(embed: GraphProto, decoder: GraphProto) -> list[Finding]:
    """Give outputs the rank that the decoder takes."""
    import numpy as np
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    takes = {value.name: value for value in decoder.input}
    findings = []
    taken = all_names(embed) | all_names(decoder)
    for value in list(embed.output):
        wanted = takes[value.name]
        shape = _reshaped(tensor_type(value), tensor_type(wanted))
        if shape is None:
            continue
        inner, constant = fresh(f"{value.name}/as_embedded", taken), fresh(f"{value.name}/shape", taken)
        reason = f"{tensor_type(value)} is reshaped to {tensor_type(wanted)}, which the decoder takes"
        findings.append(Finding("changed", value.name, reason))
        rename(embed, {value.name: inner})
        embed.initializer.append(from_array(np.array(shape, np.int64), constant))
        name = fresh(f"{wanted.name}/Reshape", taken)
        embed.node.append(make_node("Reshape", [inner, constant], [wanted.name], name=name))
        value.CopyFrom(wanted)
    return findings


def _refuse_defaults(model: Model) -> None:
    """Inputs with a default are no constants to ONNX Runtime, which computes with those in another order."""
    held = {tensor.name for tensor in model.graph.initializer}
    if found := [value.name for value in model.graph.input if value.name in held]:
        raise PassError(
            f"{model.path} has {len(found)} initializers among its inputs, {found[0]!r} the first; an initializer alone is "
            "expected",
            hint="take them out of the inputs: onnxruntime's tools have remove_initializer_from_input.py",
        )


def _is_feature(value: ValueInfoProto) -> bool:
    """Features of images or sound, float [n, size]."""
    declared = tensor_type(value)
    shape = declared.shape if declared is not None and "FLOAT" in declared.dtype else None
    return shape is not None and len(shape) == 2 and isinstance(shape[1], int) and not isinstance(shape[0], int)


def _without_features(embed: GraphProto) -> list[Finding]:
    """Make inputs of features empty constants."""
    from onnx import TensorProto

    findings = []
    for index in range(len(embed.input) - 1, -1, -1):
        value = embed.input[index]
        if _is_feature(value):
            size = value.type.tensor_type.shape.dim[1].dim_value
            kind = value.type.tensor_type.elem_type
            embed.initializer.append(TensorProto(name=value.name, data_type=kind, dims=[0, size], raw_data=b""))
            findings.append(Finding("removed", value.name, f"input of features, {tensor_type(value)}; there are none"))
            del embed.input[index]
    return findings


def _shared_tokens(embed: GraphProto, decoder: GraphProto) -> list[str]:
    """The token input, where the decoder takes it too."""
    own = {value.name for value in _token_inputs(decoder)}
    return [value.name for value in _token_inputs(embed) if value.name in own]


def _check_versions(embed: Model, decoder: Model) -> None:
    for entry in embed.proto.opset_import:
        has = decoder.opset(entry.domain)
        if has and has != entry.version:
            domain = entry.domain or "ai.onnx"
            older, newer = sorted((embed, decoder), key=lambda model: model.opset(entry.domain))
            changed = (
                changed_operators(older, newer.opset()) if domain == "ai.onnx" else ["the operators of this domain"]
            )
            if changed:
                raise PassError(
                    f"{embed.path} uses opset {domain} {entry.version}, the decoder {has}; one graph can have only one, and "
                    f"{', '.join(changed[:3])} may mean something else in the other",
                    hint="convert one of them with onnx.version_converter first",
                )
    newest = max(embed.proto.ir_version, decoder.proto.ir_version)
    if newest > MAX_IR_VERSION:
        raise PassError(f"IR version {newest} is newer than ONNX Runtime loads ({MAX_IR_VERSION})")
    names = {(function.domain, function.name, function.overload): function for function in decoder.proto.functions}
    for function in embed.proto.functions:
        other = names.get((function.domain, function.name, function.overload))
        if other is not None and other != function:
            raise PassError(f"both graphs define a function {function.domain}::{function.name}, and they differ")


def _raise_older(embed: Model, decoder: Model) -> list[Finding]:
    """Declare one operator set of ONNX in both graphs: the newer one, in which the older graph means the same."""
    if embed.opset() == decoder.opset() or not embed.opset():
        return []
    older, newer = sorted((embed, decoder), key=Model.opset)
    which, reason = older.path.name, "each of its operators takes the same there, and means the same"
    finding = Finding("changed", f"opset ai.onnx {older.opset()}", f"{newer.opset()} in {which}: {reason}")
    raise_opset(older, newer.opset())
    return [finding]


def _separate_names(embed: GraphProto, decoder: GraphProto, joined: list[str]) -> list[Finding]:
    """Rename what clashes in the embedding graph: values in every scope, and node names."""
    taken = all_names(decoder)
    clashing = sorted((all_names(embed) & taken) - set(joined))
    taken |= all_names(embed)
    names = {name: fresh(f"{NAMESPACE}/{name.lstrip('/')}", taken) for name in clashing}
    rename_in_every_scope(embed, names)
    reason = "because the decoder uses the name"
    return [Finding("changed", old, f"renamed to {new}, {reason}") for old, new in names.items()]


def _separate_locations(embed: Model, decoder: Model) -> list[Finding]:
    """Tell apart two data files with one name, and register the embedding's files with the decoder's."""
    findings = []
    decoder.folders |= embed.folders
    places = {PurePosixPath(location): file for location, file in decoder.weight_files.items()}
    taken = {str(place) for place in (*places, *map(PurePosixPath, embed.weight_files))}
    moved: dict[str, str] = {}
    for location, file in embed.weight_files.items():
        other = places.get(PurePosixPath(location))  # ./w.data and w.data are one place
        if other is not None and os.path.realpath(other) != os.path.realpath(file):
            place = PurePosixPath(location)
            moved[location] = fresh(str(place.with_name(f"{NAMESPACE}.{place.name}")), taken)
            reason = (
                f"the embedding's is placed as {moved[location]}, because the decoder has another file of this name"
            )
            findings.append(Finding("changed", location, reason))
        decoder.weight_files[moved.get(location, location)] = file
    for tensor in tensors(embed.proto):
        location = external_field(tensor, "location") or ""
        if is_external(tensor) and location in moved:
            set_location(tensor, moved[location])
    return findings


def _unify_dims(embed: GraphProto, decoder: GraphProto, joined: list[str]) -> None:
    """Call a symbolic size of the embedding graph what the decoder calls it."""
    takes = {value.name: tensor_type(value) for value in decoder.input}
    names: dict[str, str] = {}
    for value in embed.output:
        gives, wants = tensor_type(value), takes[value.name]
        if gives and wants and gives.shape and wants.shape:
            for own, other in zip(gives.shape, wants.shape, strict=True):
                if isinstance(own, str) and isinstance(other, str) and own != other:
                    names.setdefault(own, other)
    rename_dims(embed, names)


def _join_interface(embed: GraphProto, decoder: GraphProto, joined: list[str]) -> list[Finding]:
    """Put the token input where the first joined input stood; what was joined becomes inner, declared values."""
    inputs = list(decoder.input)
    position = min(index for index, value in enumerate(inputs) if value.name in joined)
    inner = [value for value in inputs if value.name in joined]
    decoder.value_info.extend(inner)
    token = embed.input[0]
    rest = [value for value in inputs if value.name not in joined]
    there = any(value.name == token.name for value in rest)
    if not there:
        rest.insert(position - sum(1 for value in inputs[:position] if value.name in joined), token)
    held = [copied(value) for value in rest]
    del decoder.input[:]
    decoder.input.extend(held)
    findings = [] if there else [Finding("added", token.name, f"graph input, {tensor_type(token)}")]
    return findings + [Finding("removed", name, "graph input; embed_tokens computes it now") for name in joined]


def _first_consumer(graph: GraphProto, joined: set[str]) -> int:
    for index, node in enumerate(graph.node):
        if reads(node) & joined:
            return index
    return len(graph.node)


def _insert(embed: GraphProto, decoder: GraphProto, position: int) -> Finding:
    before = node_in_words(decoder.node[position]) if position < len(decoder.node) else "the end of the graph"
    held = [copied(node) for node in decoder.node[position:]]
    del decoder.node[position:]
    decoder.node.extend(embed.node)
    decoder.node.extend(held)
    decoder.initializer.extend(embed.initializer)
    decoder.sparse_initializer.extend(embed.sparse_initializer)
    decoder.quantization_annotation.extend(embed.quantization_annotation)
    known = {value.name for value in decoder.value_info}
    decoder.value_info.extend(value for value in embed.value_info if value.name not in known)
    weights = len(embed.initializer)
    return Finding("added", f"{len(embed.node)} nodes", f"and {weights} initializers of embed_tokens, before {before}")


def _join_model_fields(embed: ModelProto, decoder: ModelProto) -> list[Finding]:
    """Opset imports, functions and metadata. Where both graphs have a value for one key, the decoder's stays."""
    decoder.ir_version = max(decoder.ir_version, embed.ir_version)
    domains = {_domain(entry.domain) for entry in decoder.opset_import}
    decoder.opset_import.extend(entry for entry in embed.opset_import if _domain(entry.domain) not in domains)
    functions = {(function.domain, function.name, function.overload) for function in decoder.functions}
    decoder.functions.extend(f for f in embed.functions if (f.domain, f.name, f.overload) not in functions)
    return _join_metadata(embed, decoder, "model") + _join_metadata(embed.graph, decoder.graph, "graph")


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _join_metadata(embed: Described, decoder: Described, level: str) -> list[Finding]:
    values = properties(decoder)
    findings = []
    for key, value in properties(embed).items():
        if key not in values:
            set_property(decoder, key, value)
        elif values[key] != value:
            reason = "both graphs have it; the decoder's stays"
            findings.append(Finding("skipped", f"{level} metadata {key!r}", reason))
    return findings
