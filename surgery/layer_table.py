"""The layer table that a model carries in its metadata: a documented, versioned form.

The key is `gemma4_surgery.layers`, the value JSON:

    {"version": 1, "layers": [{"layer": 4, "attention": "full", "head_size": 512, "kv_heads": 1,
                               "owner": 4, "window": null}, ...]}

`attention` is "sliding" or "full"; `head_size` and `kv_heads` are counts; `owner` is the layer whose KV cache this
layer reads, its own number for a KV owner; `window` is in tokens, or null. A reader refuses other versions.
"""

from __future__ import annotations

import json

from surgery.errors import ModelError
from surgery.gemma4 import Layer
from surgery.model import Model

KEY = "gemma4_surgery.layers"
VERSION = 1


def layer_table(layers: tuple[Layer, ...]) -> str:
    """The table as JSON text; one text for one set of layers."""
    entries = [
        {
            "layer": layer.index,
            "attention": layer.attention,
            "head_size": layer.head_size,
            "kv_heads": layer.kv_heads,
            "owner": layer.owner,
            "window": layer.window,
        }
        for layer in layers
    ]
    return json.dumps({"version": VERSION, "layers": entries}, separators=(",", ":"))


def read_layer_table(model: Model) -> tuple[Layer, ...] | None:
    """The table in a model's metadata, or None where it has none. Raises ModelError for a form that is not known."""
    text = stored_table(model)
    if text is None:
        return None
    try:
        table = json.loads(text)
        version, entries = table["version"], table["layers"]
        if version == VERSION:
            return tuple(_layer(entry) for entry in entries)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"{model.path}: metadata {KEY} is not a layer table") from None
    raise ModelError(f"{model.path}: metadata {KEY} has version {version!r}; {VERSION} is known")


def _layer(entry: dict[str, object]) -> Layer:
    layer = Layer(
        index=entry["layer"],  # type: ignore[arg-type]
        attention=entry["attention"],  # type: ignore[arg-type]
        head_size=entry["head_size"],  # type: ignore[arg-type]
        kv_heads=entry["kv_heads"],  # type: ignore[arg-type]
        owner=entry["owner"],  # type: ignore[arg-type]
        window=entry["window"],  # type: ignore[arg-type]
    )
    numbers = (layer.index, layer.head_size, layer.kv_heads, layer.owner, layer.window or 0)
    if layer.attention not in ("sliding", "full") or not all(isinstance(number, int) for number in numbers):
        raise ValueError("not a layer")
    return layer


def stored_table(model: Model) -> str | None:
    return next((entry.value for entry in model.proto.metadata_props if entry.key == KEY), None)


def store_table(model: Model, text: str) -> None:
    """Put the table into the metadata, in place of one that is there."""
    for entry in model.proto.metadata_props:
        if entry.key == KEY:
            entry.value = text
            return
    model.proto.metadata_props.add(key=KEY, value=text)
