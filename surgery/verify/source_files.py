"""What the source's own files say of a folder: token ids, placeholders and layers, read from them and not from it.

The folder's configuration and its layer table are what the passes wrote. A fault in either would be in every gate that
reads it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.architecture import architecture, read_config, text_config
from surgery.errors import ArchitectureError, SurgeryError
from surgery.folder.opened import OpenedFolder
from surgery.source.export import GraphPair
from surgery.verify.report import Gate

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def source_file_gates(folder: OpenedFolder, source: GraphPair) -> list[Gate]:
    """One gate for ids, one for layers; none where the source's graphs lie beside no config.json."""
    root = next((root for root in source.embed.parents[:2] if (root / "config.json").is_file()), None)
    if root is None:
        return []
    rules = {"token ids are the source's": _ids, "layers are the source's": _layers}
    gates = []
    for name, rule in rules.items():
        try:
            faults = list(rule(folder, root))
            gates.append(Gate("structure", name, not faults, 0, len(faults), "; ".join(faults[:3])))
        except SurgeryError as error:
            gates.append(Gate("structure", name, False, detail=str(error)))
    return gates


def _ids(folder: OpenedFolder, root: Path) -> Iterator[str]:
    """generation_config.json goes before config.json, whose text model's goes last."""
    config = read_config(root / "config.json")
    said: dict[str, Any] = {**text_config(config), **{key: value for key, value in config.items() if value is not None}}
    said |= {key: value for key, value in _optional(root / "generation_config.json").items() if value is not None}
    for key in _IDS:
        value = said.get(key, [])
        wanted, found = set(value if isinstance(value, list) else [value]), set(folder.token_ids(key))
        if wanted and found != wanted:
            yield f"{key} is {_listed(found)}, and {_listed(wanted)} in {root}"
    for modality, token in folder.media.items():
        if token != (wanted_token := said.get(f"{modality}_token_id")):
            yield f"{modality}_token_id is {token}, and {wanted_token} in {root / 'config.json'}"


def _optional(path: Path) -> Mapping[str, Any]:
    return read_config(path) if path.is_file() else {}


def _listed(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids))) or "missing"


def _layers(folder: OpenedFolder, root: Path) -> Iterator[str]:
    wanted, found = architecture(read_config(root / "config.json")).layers, folder.layers or ()
    if len(wanted) != len(found):
        raise ArchitectureError(f"the layer table has {len(found)} layers, and {root / 'config.json'} {len(wanted)}")
    for ours, theirs in zip(found, wanted, strict=True):
        if ours != theirs:
            yield f"the layer table has {ours}, and {root / 'config.json'} {theirs}"
