"""The export that a folder was made from: the one that is named, or the one that its manifest names; and no other
one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.jobs.listener import Listener

if TYPE_CHECKING:
    from surgery.source.export import Export, GraphPair
    from surgery.source.opening import OpenedSource


def source_pair(folder: Path, source: str | Path | None, precision: str | None, listener: Listener) -> GraphPair | None:
    """The pair of `source` that a GenAI folder was made from: of the precision that is named, or that its manifest
    records. None without a source.

    Raises ExportError where there is none, and where the source is not the folder's, before its weights are fetched.
    """
    from surgery.folder.multimodal import media_of
    from surgery.source.opening import SourceRequest, fetched, look_up

    if source is None:
        return None
    media = media_of(folder)
    choice = SourceRequest(str(source), "cpu", precision, pick=_pick(folder, str(source)), modalities=media)
    found = look_up(choice, listener.said)
    _refuse_other(folder, str(source), found)
    return _of_tokens(fetched(found, listener).pair, folder, found.export)


def pair_by_manifest(folder: Path, listener: Listener) -> GraphPair | None:
    """The pair that the folder's manifest names, where the cache of the Hub holds all of it; else None, and what would
    compare the numbers is told."""
    from surgery.errors import SurgeryError
    from surgery.folder.manifest import recorded_source
    from surgery.graph.model import Model
    from surgery.source.export import open_export
    from surgery.source.hub import HubSource, cached_folder

    recorded = recorded_source(folder)
    if recorded is None:
        return None
    if recorded.repo is None or recorded.revision is None:
        listener.said("numbers    not compared: the folder was made from a local export, and --against names none")
        return None
    name = f"{recorded.repo}@{recorded.revision}"
    try:
        root = cached_folder(HubSource(recorded.repo, recorded.revision))
        if root is not None and recorded.precision is not None:
            export = open_export(root)
            pair = export.pair(recorded.precision)
            for graph in (pair.embed, pair.decoder):
                Model.open(graph).check_weights()
            listener.said(f"source     {name}, as manifest.json says, from the cache")
            return _of_tokens(pair, folder, export)
    except SurgeryError:
        pass  # not all of it is there
    listener.said(f"numbers    not compared: pass --against {name}")
    return None


def _of_tokens(pair: GraphPair, folder: Path, export: Export) -> GraphPair:
    """The pair with the tokens that the folder has of it. Raises RequestError for a list that names others."""
    from surgery.folder.manifest import recorded_tokens

    kept = recorded_tokens(folder)
    if kept is not None:
        kept.check_size(export.architecture.vocab_size, str(export.root))
    return replace(pair, kept=kept)


def _pick(folder: Path, source: str):  # type: ignore[no-untyped-def]
    from surgery.errors import ExportError
    from surgery.folder.manifest import NAME, recorded_source

    def pick(held: Sequence[str]) -> str:
        recorded = recorded_source(folder)
        if recorded is not None and recorded.precision in held:
            return str(recorded.precision)
        if len(held) == 1:
            return held[0]
        raise ExportError(
            f"{source} holds {', '.join(held)}, and {folder / NAME} does not say which it was made from",
            hint="name it with --precision",
        )

    return pick


def _refuse_other(folder: Path, source: str, found: OpenedSource) -> None:
    """Raise ExportError where a file of the source is not the one that the folder's manifest names."""
    from surgery.errors import ExportError
    from surgery.folder.manifest import NAME, other_file, recorded_source

    recorded = recorded_source(folder)
    if recorded is None:
        return
    listed = {}
    if found.download is not None:
        listed = {name: (file.size, file.sha256) for name, file in found.download.listing.files.items()}
    name = other_file(recorded, found.export.root, listed)
    if name is None:
        return
    its_own = f"--against {recorded.repo}@{recorded.revision}" if recorded.repo else "the export that it was made from"
    raise ExportError(
        f"{source} is not what {folder} was made from: {name} is not the file that {folder / NAME} names",
        hint=f"pass {its_own}; gemma4-surgery diff compares any two models",
    )
