"""The KV cache section: which layer has a cache of its own and which shares one, from each side's own wiring."""

from __future__ import annotations

from surgery.architecture import Layer as ArchitectureLayer
from surgery.attention.kv_wiring import Attention, attentions, slot_of_name
from surgery.compare.comparison import LayerCache, LayerChange
from surgery.compare.subjects import Subject
from surgery.errors import ModelError
from surgery.graph.model import Model
from surgery.graph.tensor_types import TensorType, declared_types
from surgery.source.layer_table import read_layer_table


def layers(before: Subject, after: Subject) -> tuple[LayerChange, ...]:
    """Every layer of either side; none where neither graph has attention."""
    sides = _caches(before), _caches(after)
    return tuple(
        LayerChange(index, sides[0].get(index), sides[1].get(index)) for index in sorted({*sides[0], *sides[1]})
    )


def _caches(side: Subject) -> dict[int, LayerCache]:
    model = side.main.model
    known = _known_layers(model, side)
    types = declared_types(model.graph)
    aliases = {slot: value.name for value in model.graph.output if (slot := slot_of_name(value.name)) is not None}
    found = {}
    for index, core in enumerate(attentions(model.graph)):
        alias = aliases.get((index, "key"))
        layer = known[index] if index < len(known) else None
        found[index] = _cache(core, layer, types, alias)
    return found


def _known_layers(model: Model, side: Subject) -> tuple[ArchitectureLayer, ...]:
    try:
        table = read_layer_table(model)
    except ModelError:
        table = None
    return table or (side.architecture.layers if side.architecture else ())


def _cache(
    core: Attention, layer: ArchitectureLayer | None, types: dict[str, TensorType], alias: str | None
) -> LayerCache:
    """The architecture says what a layer is; where none is known, the cache's declared type and its name do."""
    past = core.key.past if core.key else None
    present = core.key.present if core.key else None
    if layer is not None:
        owner: int | None = layer.kv_source
        sizes: tuple[int | None, int | None] = (layer.kv_heads, layer.head_size)
    else:
        slot = slot_of_name(present or past or "")
        owner = slot[0] if slot else None
        sizes = _declared(types.get(past or present or ""))
    return LayerCache(
        operator=core.operator,
        attention=layer.attention if layer else None,
        head_size=sizes[1],
        kv_heads=sizes[0],
        owner=owner,
        window=layer.window if layer else None,
        past=past,
        present=present,
        alias=alias if alias != present else None,
    )


def _declared(found: TensorType | None) -> tuple[int | None, int | None]:
    """KV heads and head size of a cache [batch, KV heads, tokens, head size], where they are numbers."""
    if found is None or found.shape is None or len(found.shape) != 4:
        return None, None
    heads, size = found.shape[1], found.shape[3]
    return heads if isinstance(heads, int) else None, size if isinstance(size, int) else None
