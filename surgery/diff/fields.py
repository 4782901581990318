"""The metadata and the configuration sections: values under keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from surgery.diff.comparison import FieldChange, Verb
from surgery.diff.nodes import Compared
from surgery.diff.sides import Side

if TYPE_CHECKING:
    from onnx import ModelProto

LONGEST_FIELD = 4000
"""Characters of a value in a report."""


def metadata_changes(before: Side, after: Side) -> tuple[FieldChange, ...]:
    """IR version, opsets, producer, names, metadata and functions. Of a pair, what the decoder has is the one held
    against the other side; what the embedding graph alone has counts as well.
    """
    return _changes(_merged(before), _merged(after))


def _merged(side: Side) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in side.parts:
        found |= _fields(part.model.proto)
    return found


def _fields(proto: ModelProto) -> dict[str, str]:
    found = {"ir_version": str(proto.ir_version)}
    for entry in proto.opset_import:
        found[f"opset {entry.domain or 'ai.onnx'}"] = str(entry.version)
    plain = {
        "producer_name": proto.producer_name,
        "producer_version": proto.producer_version,
        "domain": proto.domain,
        "model_version": str(proto.model_version) if proto.model_version else "",
        "doc_string": proto.doc_string,
        "graph name": proto.graph.name,
        "graph doc_string": proto.graph.doc_string,
        "training_info": f"{len(proto.training_info)} entries" if proto.training_info else "",
    }
    found |= {key: value for key, value in plain.items() if value}
    for level, entries in (("metadata", proto.metadata_props), ("graph metadata", proto.graph.metadata_props)):
        found |= {f"{level} {entry.key}": entry.value for entry in entries}
    for function in proto.functions:
        name = "::".join(part for part in (function.domain, function.name, function.overload) if part)
        found[f"function {name}"] = f"({', '.join(function.input)}) -> ({', '.join(function.output)})"
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


def config_changes(before: Side, after: Side) -> tuple[FieldChange, ...]:
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
            verb: Verb = "added" if before is None else "removed" if after is None else "changed"
            found.append(FieldChange(verb, key, _cut(before), _cut(after)))
    return tuple(found)


def _cut(value: str | None) -> str | None:
    if value is None or len(value) <= LONGEST_FIELD:
        return value
    return f"{value[:LONGEST_FIELD]} [{len(value)} characters]"
