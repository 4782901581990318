"""The architecture: layers, head sizes, KV heads, and which layer reads which KV cache.

Read from config.json in each form that is published: with or without `text_config`, with `global_head_dim`
(the hub's form) or with `per_layer_config` (as transformers 5.23 writes it). Gemma 3 is read as well: its
exports come from the same exporter and have the same two graphs; and so is Gemma 3n, whose exports come from another.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgery.errors import ArchitectureError
from surgery.files.json_values import JsonValues, finite_number, refuse_constant, whole_number
from surgery.files.safe_reading import read_regular

AttentionKind = Literal["sliding", "full"]
Family = Literal["gemma3", "gemma3n", "gemma4"]

_GEMMA4 = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}
_GEMMA3 = {"gemma3", "gemma3_text"}
_GEMMA3N = {"gemma3n", "gemma3n_text"}

_VOCABULARIES: dict[Family, int] = {"gemma3": 262208, "gemma3n": 262400, "gemma4": 262144}
"""vocab_size where config.json has none (transformers 5.23)."""

_WINDOWS: dict[Family, int] = {"gemma3": 4096, "gemma3n": 512, "gemma4": 512}
"""sliding_window where config.json has none (transformers 5.23)."""

MAX_LAYERS = 4096
"""More than any known model has; a larger number in config.json is a mistake, not a reason to fill the memory."""

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Twice the tokenizer.json of Gemma 4, the largest of the files that are read as JSON."""

MAX_JSON_DEPTH = 100
_PARSING: Any = {"parse_int": whole_number, "parse_float": finite_number, "parse_constant": refuse_constant}


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer, as far as its KV cache is concerned. `head_size` and `window` are in elements and tokens."""

    index: int
    attention: AttentionKind
    head_size: int
    kv_heads: int
    kv_source: int
    window: int | None

    @property
    def is_kv_source(self) -> bool:
        """Whether it has a KV cache of its own."""
        return self.kv_source == self.index


@dataclass(frozen=True, slots=True)
class Architecture:
    """What config.json says. Sizes are in elements, `context_length` in tokens."""

    family: Family
    hidden_size: int
    vocab_size: int
    attention_heads: int
    context_length: int
    per_layer_input_size: int
    layers: tuple[Layer, ...]

    @property
    def kv_sources(self) -> tuple[Layer, ...]:
        """The layers with a KV cache of their own, in order."""
        return tuple(layer for layer in self.layers if layer.is_kv_source)

    @property
    def kv_shared_layers(self) -> tuple[Layer, ...]:
        """The layers that read another layer's KV cache, in order."""
        return tuple(layer for layer in self.layers if not layer.is_kv_source)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ArchitectureError naming the file and the position of the first fault."""
    try:
        text = read_regular(path, MAX_JSON_BYTES).decode("utf-8")
        config = json.loads(text, **_PARSING, object_pairs_hook=_once)
        _check_depth(config)
        if "\\ud" in text.lower():  # json puts the halves of a pair together
            json.dumps(config, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise ArchitectureError(f"{path} is missing") from None
    except OSError as error:
        raise ArchitectureError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise ArchitectureError(
            f"{path} is not JSON: it holds {half!r}, half of a pair that makes a character"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ArchitectureError(f"{path} holds a JSON {type(config).__name__}; an object is expected")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with each key once: of two, one reader takes the first, another the last, and GenAI both."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it holds the key {twice!r} twice")
    return found


def _check_depth(config: object) -> None:
    """Raise ValueError for nesting that would exhaust the stack of whoever prints or writes it."""
    level, depth = [config] if isinstance(config, dict | list) else [], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
        children = (value for one in level for value in (one.values() if isinstance(one, dict) else one))
        level = [value for value in children if isinstance(value, dict | list)]


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's own configuration: the `text_config` of a multimodal one, or the configuration itself."""
    inner = config.get("text_config")
    return dict(inner) if isinstance(inner, Mapping) else dict(config)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read the architecture. Raises ArchitectureError naming the key that is missing or contradicts another."""
    text = text_config(config)
    family = _family(config, text)
    read = JsonValues(text, "config.json", ArchitectureError)
    count = read.whole("num_hidden_layers", most=MAX_LAYERS)
    kinds = _layer_types(read, text, count, family)
    shared = read.whole("num_kv_shared_layers", default=15 if family == "gemma3n" else 0, least=0)
    if shared >= count:
        raise ArchitectureError(f"num_kv_shared_layers is {shared}, but the model has only {count} layers")
    overrides = _per_layer(text, count) if family == "gemma4" else None
    sizes = [_head_size_and_kv_heads(read, text, kind, family, overrides, index) for index, kind in enumerate(kinds)]
    kv_sources = _kv_sources(kinds, count - shared)
    window = read.whole("sliding_window", default=_WINDOWS[family], least=0) or None
    layers = tuple(
        Layer(index, kinds[index], *sizes[index], kv_sources[index], window if kinds[index] == "sliding" else None)
        for index in range(count)
    )
    per_layer_default = 0 if family == "gemma3" else 256  # absent means 256 in Gemma4TextConfig (transformers 5.23)
    return Architecture(
        family=family,
        hidden_size=read.whole("hidden_size"),
        vocab_size=read.whole("vocab_size", default=_VOCABULARIES[family]),
        attention_heads=read.whole("num_attention_heads", default=8),
        context_length=read.whole("max_position_embeddings", default=32768 if family == "gemma3n" else 131072),
        per_layer_input_size=read.whole("hidden_size_per_layer_input", default=per_layer_default, least=0),
        layers=layers,
    )


def _family(config: Mapping[str, Any], text: Mapping[str, Any]) -> Family:
    named = list(dict.fromkeys(str(c.get("model_type")) for c in (config, text) if c.get("model_type")))
    for name in named:
        if name in _GEMMA4:
            return "gemma4"
        if name in _GEMMA3:
            return "gemma3"
        if name in _GEMMA3N:
            return "gemma3n"
    raise ArchitectureError(
        f"config.json: model_type is {', '.join(named) or 'absent'}; "
        "gemma4, gemma4_text, gemma3, gemma3_text, gemma3n or gemma3n_text is expected"
    )


def _layer_types(read: JsonValues, text: Mapping[str, Any], count: int, family: str) -> list[AttentionKind]:
    declared = _declared_layer_types(text, count)
    kinds = _periodic_layer_types(read, count, 5 if family == "gemma3n" else 6) if declared is None else declared
    if family == "gemma4":
        kinds[-1] = "full"  # transformers 5.23 forces the last layer to full attention, whatever is declared
    return kinds


def _periodic_layer_types(read: JsonValues, count: int, default: int) -> list[AttentionKind]:
    period = read.whole("sliding_window_pattern", default=default)
    return ["sliding" if (index + 1) % period else "full" for index in range(count)]


def _declared_layer_types(text: Mapping[str, Any], count: int) -> list[AttentionKind] | None:
    declared = text.get("layer_types")
    if declared is None:
        return None
    if not isinstance(declared, list) or len(declared) != count:
        found = f"{len(declared)} entries" if isinstance(declared, list) else repr(declared)
        raise ArchitectureError(f"config.json: layer_types has {found}, but num_hidden_layers is {count}")
    known: dict[object, AttentionKind] = {"sliding_attention": "sliding", "full_attention": "full"}
    for index, kind in enumerate(declared):
        if not isinstance(kind, str) or kind not in known:
            raise ArchitectureError(
                f"config.json: layer_types[{index}] is {kind!r}; sliding_attention or full_attention is expected"
            )
    return [known[kind] for kind in declared]


def _head_size_and_kv_heads(
    read: JsonValues,
    text: Mapping[str, Any],
    kind: AttentionKind,
    family: str,
    overrides: Mapping[int, Mapping[str, Any]] | None,
    index: int,
) -> tuple[int, int]:
    head_size = read.whole("head_dim", default=256)
    kv_heads = read.whole("num_key_value_heads", default=2 if family == "gemma3n" else 4)
    if overrides is not None:  # as transformers 5.23 writes it: whatever is not overridden is as everywhere
        layer = JsonValues(overrides.get(index, {}), "config.json", ArchitectureError)
        return layer.whole("head_dim", default=head_size), layer.whole("num_key_value_heads", default=kv_heads)
    if family == "gemma4" and kind == "full":
        head_size = read.whole("global_head_dim", default=512)
        if text.get("attention_k_eq_v"):  # num_global_key_value_heads only counts then (transformers 5.23)
            kv_heads = read.whole("num_global_key_value_heads", default=kv_heads)
    return head_size, kv_heads


def _per_layer(text: Mapping[str, Any], count: int) -> dict[int, Mapping[str, Any]] | None:
    """`per_layer_config` by layer; its keys are numbers padded with zeros. None where config.json has none."""
    declared = text.get("per_layer_config")
    if declared is None:
        return None
    if not isinstance(declared, Mapping):
        raise ArchitectureError(f"config.json: per_layer_config is a {type(declared).__name__}; an object is expected")
    numbers = {str(index): index for index in range(count)}
    overrides: dict[int, Mapping[str, Any]] = {}
    for key, value in declared.items():
        index = numbers.get(str(key).lstrip("0") or "0")
        if index is None or not isinstance(value, Mapping):
            raise ArchitectureError(
                f"config.json: per_layer_config has {key!r}: {str(value)[:40]}; the number of one of {count} layers "
                "and an object are expected"
            )
        overrides[index] = value
    return overrides


def _kv_sources(kinds: list[AttentionKind], first_shared: int) -> list[int]:
    """KV-shared layers read the cache of the last KV source layer of their own kind. Raises ArchitectureError where
    there is none."""
    last: dict[AttentionKind, int] = {}
    kv_sources = []
    for index, kind in enumerate(kinds):
        if index < first_shared:
            last[kind] = index
        elif kind not in last:
            raise ArchitectureError(f"layer {index} shares a {kind} KV cache, but no {kind} layer before it has one")
        kv_sources.append(last[kind])
    return kv_sources
