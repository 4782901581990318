"""The mark of a model whose caches are updated in place: past and present are one buffer, as long as all tokens.

The metadata entry is `gemma4_surgery.caches` = "in place". Who runs such a model gives it a past that has room for the
new tokens: GenAI with past_present_share_buffer does, surgery.runtime.sessions does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.graph.metadata_props import properties, set_property

if TYPE_CHECKING:
    from surgery.graph.model import Model

KEY = "gemma4_surgery.caches"
VALUE = "in place"


def mark_shared_buffer(model: Model) -> None:
    """Say so in the model's metadata."""
    set_property(model.proto, KEY, VALUE)


def has_shared_buffer(model: Model) -> bool:
    """Whether the model's metadata says so."""
    return properties(model.proto).get(KEY) == VALUE
