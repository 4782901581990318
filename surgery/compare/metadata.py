"""The metadata and the configuration sections: values under keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.compare.comparison import ChangeVerb, FieldChange
from surgery.compare.node_changes import Compared
from surgery.compare.subjects import Subject
from surgery.graph.changes import model_fields

LONGEST_FIELD = 4000
"""Characters of a value in a report."""


def metadata_changes(before: Subject, after: Subject) -> tuple[FieldChange, ...]:
    """IR version, opsets, producer, names, metadata and functions. Of a pair, what the decoder has is the one held
    against the other side; what the embedding graph alone has counts as well.
    """
    return _changes(_merged(before), _merged(after))


def _merged(side: Subject) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in side.parts:
        found |= model_fields(part.model.proto)
    return found


def declaration_changes(compared: Compared) -> tuple[FieldChange, ...]:
    """How many inner values that both sides have are declared with a type on one side only."""
    lost = gained = 0
    for scopes in compared.all():
        for one, other in scopes.alignment.values.items():
            old, new = scopes.before.types.get(one), scopes.after.types.get(other)
            lost += old is not None and new is None
            gained += old is None and new is not None
    found = []
    if lost:
        found.append(FieldChange("removed", "declared types of inner values", f"{lost} values", None))
    if gained:
        found.append(FieldChange("added", "declared types of inner values", None, f"{gained} values"))
    return tuple(found)


def config_changes(before: Subject, after: Subject) -> tuple[FieldChange, ...]:
    """genai_config.json, flattened: `model.decoder.head_size`."""
    return _changes(dict(_flat(before.config or {})), dict(_flat(after.config or {})))


def _flat(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, each in value.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(each, Mapping) and each:
            yield from _flat(each, name)
        else:
            yield name, json.dumps(each, ensure_ascii=False, sort_keys=True)


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[FieldChange, ...]:
    """By key; AFTER's order first, then what is gone in BEFORE's."""
    found = []
    for key in (*new, *(key for key in old if key not in new)):
        before, after = old.get(key), new.get(key)
        if before != after:
            verb: ChangeVerb = "added" if before is None else "removed" if after is None else "changed"
            found.append(FieldChange(verb, key, _cut(before), _cut(after)))
    return tuple(found)


def _cut(value: str | None) -> str | None:
    if value is None or len(value) <= LONGEST_FIELD:
        return value
    return f"{value[:LONGEST_FIELD]} [{len(value)} characters]"
