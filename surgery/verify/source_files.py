"""What the source's own files say of a folder: ids, layers and configuration, read from them and not from it.

The folder's configuration and its layer table are what the passes wrote. A fault in either would be in every gate that
reads it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from surgery.architecture import architecture
from surgery.choices import Provider
from surgery.errors import ArchitectureError, SurgeryError
from surgery.folder.opened import OpenedFolder
from surgery.source.export import GraphPair
from surgery.verify.configuration import (
    SourceFiles,
    file_faults,
    logits_faults,
    processor_faults,
    setting_faults,
    two_graph_faults,
)
from surgery.verify.report import Gate

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def source_file_gates(
    folder: OpenedFolder, source: GraphPair, root: Path | None = None, provider: Provider | None = None
) -> list[Gate]:
    """One gate for each of ids, layers and the files of the configuration.

    `root` has the source's files; None where they lie beside its graphs, and no gate where no config.json does.
    `provider` is what the folder is made for, where that is known.
    """
    root = root or files_beside(source)
    if root is None:
        return []
    try:
        files = SourceFiles.read(root, source)
    except SurgeryError as error:
        return [Gate("structure", "source's files can be read", False, detail=str(error))]
    rules: dict[str, Callable[[OpenedFolder, SourceFiles], Iterator[str]]] = {
        "token ids are the source's": _ids,
        "layers are the source's": _layers,
        "settings are the source's": lambda found, said: setting_faults(found, said, provider),
        "files are the source's": file_faults,
        "logits are as many as promised": logits_faults,
    }
    if folder.media:
        rules["processors are the source's"] = processor_faults
    return [_gate(name, lambda rule=rule: rule(folder, files)) for name, rule in rules.items()]  # type: ignore[misc]


def two_graph_file_gate(folder: Path, source: GraphPair, root: Path) -> Gate:
    """The gate of the files that a folder of two graphs has from its source, whose files lie in `root`."""
    return _gate("files are the source's", lambda: two_graph_faults(folder, SourceFiles.read(root, source)))


def _gate(name: str, rule: Callable[[], Iterator[str]]) -> Gate:
    try:
        faults = list(rule())
    except SurgeryError as error:
        return Gate("structure", name, False, detail=str(error))
    return Gate("structure", name, not faults, 0, len(faults), "; ".join(faults[:3]))


def files_beside(source: GraphPair) -> Path | None:
    """The folder with the source's files, in or above that of its graphs; None where no config.json lies there."""
    return next((root for root in source.embed.parents[:2] if (root / "config.json").is_file()), None)


def _ids(folder: OpenedFolder, source: SourceFiles) -> Iterator[str]:
    """generation_config.json goes before config.json, whose text model's goes last."""
    said = {
        key: value
        for part in (source.text, source.config, source.generation)
        for key, value in part.items()
        if value is not None
    }
    for key in _IDS:
        value = said.get(key, [])
        wanted, found = set(value if isinstance(value, list) else [value]), set(folder.token_ids(key))
        if found != wanted:
            yield f"{key} is {_listed(found)}, and {_listed(wanted)} in {source.root}"
    for modality, token in folder.media.items():
        if token != (wanted_token := said.get(f"{modality}_token_id")):
            yield f"{modality}_token_id is {token}, and {wanted_token} in {source.root / 'config.json'}"


def _listed(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids))) or "missing"


def _layers(folder: OpenedFolder, source: SourceFiles) -> Iterator[str]:
    path = source.root / "config.json"
    wanted, found = architecture(source.config).layers, folder.layers or ()
    if len(wanted) != len(found):
        raise ArchitectureError(f"the layer table has {len(found)} layers, and {path} {len(wanted)}")
    for ours, theirs in zip(found, wanted, strict=True):
        if ours != theirs:
            yield f"the layer table has {ours}, and {path} {theirs}"
