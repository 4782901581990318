"""Open an export from wherever it is, and choose its precision.

SourceRequest -> open_source -> OpenedSource     everything that the precision needs is there
SourceRequest -> look_up     -> OpenedSource     of a repository the graphs are there, and a plan of what is to be fetched
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from surgery.choices import Modality
from surgery.errors import ExportError
from surgery.source.export import Export, GraphPair, best_precision, open_export
from surgery.source.hub import (
    Download,
    HubSource,
    Listing,
    fetch,
    hub_source,
    list_files,
    plan_download,
    plan_folder,
    require_space_for,
)

Say = Callable[[str], None]
"""Is told, in a sentence, what a person should know while it goes on."""


class Hears(Protocol):
    """Is told sentences, and how many bytes are to come and came: a Listener."""

    def said(self, text: str) -> None:
        """One sentence."""

    def started(self, total: int, doing: str = ...) -> None:
        """`total` bytes are to come, for what `doing` says."""

    def advanced(self, count: int) -> None:
        """So many bytes more have come."""


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """Which export, and which precision of it.

    source      a repository of the Hub (owner/name, owner/name@revision, its address), or the folder of an export
    provider    chooses the precision where none is named and `pick` is not given
    revision    branch, tag or commit of a repository
    given       the two graphs, where they do not lie in the community's layout
    modalities  those whose encoders are needed too; None: those that are there
    pick        chooses the precision out of those that are held
    """

    source: str
    provider: str
    precision: str | None = None
    revision: str | None = None
    given: GraphPair | None = None
    modalities: Sequence[Modality] | None = ()
    pick: Callable[[Sequence[str]], str] | None = None

    @property
    def hub(self) -> HubSource | None:
        """The repository, or None for a folder. Raises ExportError where a revision is given for one."""
        return hub_source(self.source, self.revision) if self.given is None else None


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """An export and the pair that was chosen. `reason` says why this one; `download` is None for a local source."""

    export: Export
    pair: GraphPair
    reason: str
    download: Download | None = None


def open_source(
    choice: SourceRequest,
    hears: Hears,
    *,
    target: Path | None = None,
    linked: bool = False,
    tried: Callable[[OpenedSource], object] | None = None,
) -> OpenedSource:
    """Fetch what is missing, and open it. `hears` is told where the Hub cannot be reached and its cache is used.

    Where the weights are to be copied to a `target`, or `linked`, there is room for that too before anything is
    fetched. `tried` is called before, with graphs whose weights are still to be fetched; what it raises stops there.
    Raises ExportError for what is not an export, or lacks what was asked for; see also surgery.source.hub.
    """
    found = look_up(choice, hears.said)
    if found.download is not None:
        if tried is not None and found.download.missing_bytes:
            tried(found)
        require_space_for(found.download, target, linked=linked)
    return fetched(found, hears)


def fetched(found: OpenedSource, hears: Hears) -> OpenedSource:
    """What look_up found, with its weights: of a repository they are fetched."""
    if found.download is not None:
        _fetched(found.download, hears)
    return found


def _fetched(download: Download, hears: Hears) -> Path:
    return fetch(download, lambda total: hears.started(total, "fetching"), hears.advanced)


def look_up(choice: SourceRequest, say: Say) -> OpenedSource:
    """Like open_source, but of a repository config.json and the graphs alone, which name its data files."""
    hub = choice.hub
    if hub is None:
        return _open_folder(choice)
    planned, reason = _planned(hub, choice, say)
    return _opened(planned, planned.listing.root, reason)


def local_folder(source: str, precision: str | None, provider: str, hears: Hears) -> tuple[Path, str | None]:
    """The folder that `source` names and the precision to take from it; of a repository, what that needs is fetched."""
    choice = SourceRequest(source, provider, precision)
    folder = genai_folder(source, hears)
    if folder is not None:
        return folder, precision
    found = open_source(choice, hears)
    return found.export.root, found.pair.precision


def genai_folder(source: str, hears: Hears) -> Path | None:
    """The folder itself, or of a repository that holds one for ONNX Runtime GenAI what was fetched of it; None of an
    export."""
    hub = hub_source(source)
    if hub is None:
        return Path(source)
    listing = _listing(hub, hears.said)
    if not listing.holds_folder:
        return None
    planned = plan_folder(listing)
    require_space_for(planned)
    return _fetched(planned, hears)


def open_folder(source: str, hears: Hears) -> Path:
    """A folder for ONNX Runtime GenAI: itself, or a repository's, which is fetched. Raises ExportError for a repository
    of another kind."""
    folder = genai_folder(source, hears)
    if folder is None:
        raise ExportError(
            f"{source} is an export, and a folder for ONNX Runtime GenAI is expected",
            hint=f"gemma4-surgery repack {source} OUT makes one",
        )
    return folder


def given_pair(embed: Path | None, decoder: Path | None) -> GraphPair | None:
    """Two graphs that are named one by one, or None. Raises ExportError for one without the other."""
    if (embed is None) != (decoder is None):
        raise ExportError("--embed and --decoder belong together: one pair of graphs is repacked")
    return GraphPair("given", embed, decoder) if embed is not None and decoder is not None else None


def _open_folder(choice: SourceRequest) -> OpenedSource:
    export = open_export(Path(choice.source), choice.given)
    precision, reason = _precision(list(export.pairs), choice, str(export.root))
    return OpenedSource(export, export.pair(precision), reason)


def _opened(planned: Download, root: Path, reason: str) -> OpenedSource:
    """The planned pair, by its precision: the cache's folder may hold others as well."""
    listing = planned.listing
    export = replace(open_export(root), repo=listing.source.repo_id, revision=listing.commit)
    return OpenedSource(export, export.pair(planned.precision), reason, planned)


def _planned(hub: HubSource, choice: SourceRequest, say: Say) -> tuple[Download, str]:
    """The download of the asked or the best precision, and the reason for it in words."""
    listing = _listing(hub, say)
    precision, reason = _precision(list(listing.graphs), choice, str(listing.source))
    modalities = listing.modalities(precision) if choice.modalities is None else choice.modalities
    return plan_download(listing, precision, modalities), reason


def _listing(hub: HubSource, say: Say) -> Listing:
    listing = list_files(hub)
    if listing.unreachable is not None:
        say(f"{listing.unreachable}: using the cache")
    return listing


def _precision(held: Sequence[str], choice: SourceRequest, where: str) -> tuple[str, str]:
    """The one that is asked for or the best of those that are held, and the reason for it in words."""
    if choice.precision is not None:
        return choice.precision, f"{choice.precision}: as asked for"
    if choice.pick is not None:
        return (found := choice.pick(held)), f"{found}: the one that the folder was made from"
    return best_precision(held, choice.provider, where)
