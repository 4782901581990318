"""The folder's structure: what ONNX Runtime GenAI needs of genai_config.json and of the graph, read, not run.

Each rule stands for an error of the runtime, at load or at the first run, or for wrong tokens without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from surgery.architecture import read_config
from surgery.attention.cache_padding import own_sizes
from surgery.attention.gqa import window_faults
from surgery.attention.kv_wiring import attentions
from surgery.attention.shared_buffer import has_shared_buffer
from surgery.errors import FolderError, SurgeryError
from surgery.folder.genai_config import CONFIG_FILE, shares_buffer
from surgery.folder.opened import OpenedFolder, json_object
from surgery.graph.index import producers
from surgery.graph.tensor_types import TensorType, interface_types, types_of
from surgery.verify.report import Gate, Measured

if TYPE_CHECKING:
    pass

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
_FED = ("num_logits_to_keep",)
"""Inputs that the runtime feeds although genai_config.json does not name them."""
_UNCHECKED = "it could not be checked"


def structure_gates(folder: OpenedFolder) -> list[Gate]:
    """One gate per rule; a rule that cannot be checked has failed, and says why."""
    return [_gate(name, rule, folder) for name, rule in _RULES.items()]


def _gate(name: str, rule: Callable[[OpenedFolder], Iterator[str]], folder: OpenedFolder) -> Gate:
    try:
        faults = list(rule(folder))
    except SurgeryError as error:
        return Gate("structure", name, False, 0, _UNCHECKED, str(error))
    found: Measured = len(faults)
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return Gate("structure", name, not faults, 0, found, "; ".join(faults[:3]) + more)


def _files(folder: OpenedFolder) -> Iterator[str]:
    for name in _TOKENIZER:
        path = folder.root / name
        if not path.is_file():
            yield f"{name} is missing"
        else:
            read_config(path)


def _weights(folder: OpenedFolder) -> Iterator[str]:
    folder.check_weights()
    yield from ()


def _interface(folder: OpenedFolder) -> Iterator[str]:
    """Every name in the configuration is in the graph, and every input of the graph will be fed."""
    inputs = {value.name for value in folder.model.graph.input}
    outputs = {value.name for value in folder.model.graph.output}
    declared = {**{name: name for name in _TOKEN_INPUTS}, **json_object(folder.decoder, "inputs")}
    for role in _TOKEN_INPUTS:
        if role in json_object(folder.decoder, "inputs") and declared[role] not in inputs:
            yield f"inputs.{role} is {declared[role]!r}, which the graph does not take"
    if folder.others:
        yield from _media_interface(folder)
    elif declared["input_ids"] not in inputs:
        yield f"the graph takes no {declared['input_ids']!r}"
    logits = json_object(folder.decoder, "outputs").get("logits", "logits")
    if logits not in outputs:
        yield f"outputs.logits is {logits!r}, which the graph does not give"
    between = set(
        map(str, json_object(json_object(json_object(folder.config, "model"), "embedding"), "outputs").values())
    )
    # With images the runtime would feed num_logits_to_keep to the vision encoder, which does not take it.
    extra = set() if folder.others else set(_FED)
    fed = {declared[role] for role in _TOKEN_INPUTS} | between | extra | {past for past, _ in _cache_names(folder)}
    for name in sorted(inputs - fed):
        yield f"nothing feeds the input {name!r}"


def _media_interface(folder: OpenedFolder) -> Iterator[str]:
    """Each further graph has the inputs and outputs of its section, and takes nothing else."""
    for section, model in folder.others.items():
        described = json_object(json_object(folder.config, "model"), section)
        for side, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
            held = {value.name for value in values}
            named = set(map(str, json_object(described, side).values()))
            for name in sorted(named - held):
                yield f"{section}.{side} names {name!r}, which its graph does not have"
            for name in sorted(held - named) if side == "inputs" else ():
                yield f"nothing feeds the input {name!r} of {section}"
    if "embedding" in folder.others:
        gives, takes = types_of(folder.others["embedding"].graph.output), types_of(folder.model.graph.input)
        for role, name in json_object(json_object(json_object(folder.config, "model"), "embedding"), "outputs").items():
            given, taken = gives.get(str(name)), takes.get(str(json_object(folder.decoder, "inputs").get(role)))
            if given is None or taken is None or given.dtype != taken.dtype or not _flat(given) or not _flat(taken):
                yield f"{role} is {given} in the embedding and {taken} in the decoder; one dtype and rank 3 is expected"


def _flat(declared: TensorType) -> bool:
    """Rank 3, the last a number: what the runtime allocates between the two graphs."""
    return declared.shape is not None and len(declared.shape) == 3 and isinstance(declared.shape[2], int)


def _caches(folder: OpenedFolder) -> Iterator[str]:
    """Every past has a present, both with concrete KV heads and head size."""
    graph = folder.model.graph
    types, there = interface_types(graph), {value.name for value in (*graph.input, *graph.output)}
    if not (names := list(_cache_names(folder))):
        yield "the graph has no KV cache under the names of the configuration"
    for past, present in names:
        if present not in there:
            yield f"{past} has no {present}"
        for name in (past, present):
            if name in there and not _concrete(types.get(name)):
                yield f"{name} is {types.get(name)}; numbers are expected for its KV heads and its head size"


def _vocabulary(folder: OpenedFolder) -> Iterator[str]:
    logits = _logits(folder)
    size = logits.shape[-1] if logits and logits.shape else None
    if size != folder.vocab_size:
        yield f"vocab_size is {folder.vocab_size}, but the logits are {logits}"


def _logits_shape(folder: OpenedFolder) -> Iterator[str]:
    """[batch, tokens, vocabulary]; the number 1 for tokens makes the runtime read one row per prompt."""
    logits = _logits(folder)
    if logits is None or logits.shape is None or len(logits.shape) != 3:
        yield f"the logits are {logits}; rank 3 is expected"
    elif isinstance(logits.shape[1], int) and logits.shape[1] != 1:
        yield f"the logits are {logits}; one token or a symbolic number of tokens is expected"


def _token_ids(folder: OpenedFolder) -> Iterator[str]:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for token in folder.token_ids(key):
            if not 0 <= token < folder.vocab_size:
                yield f"{key} {token} is outside of the vocabulary of {folder.vocab_size}"
    if not folder.token_ids("eos_token_id"):
        yield "eos_token_id is missing: generation would stop at the pad id"


def _share_buffer(folder: OpenedFolder) -> Iterator[str]:
    """Also the other way round: caches that are updated in place find no room in a past of the tokens so far."""
    shared = json_object(folder.config, "search").get("past_present_share_buffer")
    if shared and not shares_buffer(folder.model):
        yield "past_present_share_buffer is true, but not only GroupQueryAttention touches the caches"
    if not shared and has_shared_buffer(folder.model):
        yield "past_present_share_buffer is not true, but the graph updates its caches in place"


def _layer_sizes(folder: OpenedFolder) -> Iterator[str]:
    """The layer table says the sizes that the layers use: those of the interface, less padding that the graph cuts
    off."""
    if folder.layers is None:
        yield "the graph carries no layer table"
        return
    types = interface_types(folder.model.graph)
    table = {f"{prefix}.{layer.index}.{kind}": layer for layer in folder.layers for prefix, kind in _PARTS}
    for layer in folder.layers:
        if not 0 <= layer.kv_source < len(folder.layers) or not folder.layers[layer.kv_source].is_kv_source:
            yield f"layer {layer.index} reads the cache of layer {layer.kv_source}, which owns none"
        if layer.is_kv_source and f"past_key_values.{layer.index}.key" not in types:
            yield f"layer {layer.index} owns a cache, but the interface has none of it"
    for name, (heads, size) in own_sizes(folder.model.graph).items():
        row = table.get(name)
        if row and _concrete(types[name]) and (heads, size) != (row.kv_heads, row.head_size):
            yield (
                f"{name} is {types[name]}, used as {heads} KV heads of {size}; "
                f"the layer table says {row.kv_heads} KV heads of {row.head_size}"
            )


def _layer_wiring(folder: OpenedFolder) -> Iterator[str]:
    """Each attention reads the cache, and has the window, that the layer table gives it."""
    yield from window_faults(folder.model.graph, folder.layers or (), "the layer table")
    cores, layers = attentions(folder.model.graph), folder.layers or ()
    if len(cores) != len(layers):
        yield f"the graph has {len(cores)} attention cores, the layer table {len(layers)} layers"
        return
    for layer, core in zip(layers, cores, strict=True):
        for kind, cache in (("key", core.key), ("value", core.value)):
            read = {name for name in (cache.past, cache.present) if name} if cache else set()
            allowed = {f"past_key_values.{layer.kv_source}.{kind}", f"present.{layer.kv_source}.{kind}"}
            if not read or not read <= allowed:
                found = " and ".join(sorted(read)) or "no cache"
                yield f"layer {layer.index} should read layer {layer.kv_source}'s {kind}, but reads {found}"


def _aliases(folder: OpenedFolder) -> Iterator[str]:
    """A KV-shared layer's present is its source layer's, through nothing but Identity."""
    makers = producers(folder.model.graph)
    outputs = {value.name for value in folder.model.graph.output}
    for layer in folder.layers or ():
        if layer.is_kv_source:
            continue
        for kind in ("key", "value"):
            name, kv_source = f"present.{layer.index}.{kind}", f"present.{layer.kv_source}.{kind}"
            if name in outputs and kv_source not in (source := _through_identity(name, makers)):
                yield f"{name} should be {kv_source}, but is {source[-1]}"


def _through_identity(name: str, makers: Mapping[str, Any]) -> list[str]:
    chain = [name]
    while (node := makers.get(chain[-1])) is not None and node.op_type == "Identity" and node.input[0] not in chain:
        chain.append(node.input[0])
    return chain


_PARTS = tuple((prefix, kind) for prefix in ("past_key_values", "present") for kind in ("key", "value"))

_RULES: dict[str, Callable[[OpenedFolder], Iterator[str]]] = {
    "tokenizer files are there": _files,
    "weights are where the graph says": _weights,
    "interface is what the configuration names": _interface,
    "caches have concrete sizes": _caches,
    "vocabulary is the logits' last axis": _vocabulary,
    "logits have one row or all": _logits_shape,
    "token ids are in the vocabulary": _token_ids,
    "shared buffer only where it can be": _share_buffer,
    "layer table agrees with the caches": _layer_sizes,
    "layer table agrees with the wiring": _layer_wiring,
    "KV-shared layers' caches are their source layers'": _aliases,
}


def _cache_names(folder: OpenedFolder) -> Iterator[tuple[str, str]]:
    """(past, present) of every past in the graph, by the patterns of the configuration."""
    inputs, outputs = json_object(folder.decoder, "inputs"), json_object(folder.decoder, "outputs")
    for kind in ("key", "value"):
        past = _pattern(inputs, f"past_{kind}_names", f"past_key_values.%d.{kind}")
        present = _pattern(outputs, f"present_{kind}_names", f"present.%d.{kind}")
        head, tail = past.split("%d")
        for value in folder.model.graph.input:
            layer = value.name[len(head) : len(value.name) - len(tail)]
            if value.name.startswith(head) and value.name.endswith(tail) and layer.isdecimal():
                yield value.name, present.replace("%d", layer)


def _pattern(names: Mapping[str, Any], key: str, default: str) -> str:
    pattern = names.get(key, default)
    if not isinstance(pattern, str) or pattern.count("%d") != 1:
        raise FolderError(f"{CONFIG_FILE}: {key} is {pattern!r}; a name with one %d is expected")
    return pattern


def _logits(folder: OpenedFolder) -> TensorType | None:
    name = json_object(folder.decoder, "outputs").get("logits", "logits")
    return interface_types(folder.model.graph).get(name)


def _concrete(declared: TensorType | None) -> bool:
    shape = declared.shape if declared else None
    return shape is not None and len(shape) == 4 and all(isinstance(shape[axis], int) for axis in (1, 3))
