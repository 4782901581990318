"""The layer table that a model carries in its metadata: a documented, versioned form.

The key is `gemma4_surgery.layers`, the value JSON:

    {"version": 1, "layers": [{"layer": 4, "attention": "full", "head_size": 512, "kv_heads": 1,
                               "owner": 4, "window": null}, ...]}

`attention` is "sliding" or "full"; `head_size` and `kv_heads` are counts; `kv_source` is the layer whose KV cache this
layer reads, its own number for a KV source layer; `window` is in tokens, or null. A reader refuses other versions.
"""

from __future__ import annotations

import json
from typing import Any

from surgery.architecture import Layer
from surgery.errors import ModelError
from surgery.graph.metadata_props import properties
from surgery.graph.model import Model

KEY = "gemma4_surgery.layers"
VERSION = 1


def layer_entry(layer: Layer) -> dict[str, object]:
    """A layer as JSON has it."""
    return {
        "layer": layer.index,
        "attention": layer.attention,
        "head_size": layer.head_size,
        "kv_heads": layer.kv_heads,
        "owner": layer.kv_source,
        "window": layer.window,
    }


def layer_table(layers: tuple[Layer, ...]) -> str:
    """The table as JSON text; one text for one set of layers."""
    entries = [layer_entry(layer) for layer in layers]
    return json.dumps({"version": VERSION, "layers": entries}, separators=(",", ":"))


def read_layer_table(model: Model) -> tuple[Layer, ...] | None:
    """The table in a model's metadata, or None where it has none. Raises ModelError for a form that is not known."""
    text = properties(model.proto).get(KEY)
    if text is None:
        return None
    try:
        table = json.loads(text)
        version, entries = table["version"], table["layers"]
        if version == VERSION:
            return _layers(entries)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"{model.path}: metadata {KEY} is not a layer table") from None
    raise ModelError(f"{model.path}: metadata {KEY} has version {version!r}; {VERSION} is known")


def _layers(entries: list[dict[str, Any]]) -> tuple[Layer, ...]:
    """The layers of a table, each in its place. Raises ValueError, KeyError or TypeError for any other form."""
    layers = []
    for index, entry in enumerate(entries):
        numbers = [entry[key] for key in ("layer", "head_size", "kv_heads", "owner")]
        window = entry["window"]
        if any(type(number) is not int for number in (*numbers, 0 if window is None else window)):
            raise ValueError("a size is no whole number")
        number, head_size, kv_heads, kv_source = numbers
        if number != index or not 0 <= kv_source <= index or entry["attention"] not in ("sliding", "full"):
            raise ValueError("the layers are not in order, or a KV source layer comes after its KV-shared layer")
        layers.append(Layer(index, entry["attention"], head_size, kv_heads, kv_source, window))
    return tuple(layers)
