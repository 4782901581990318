"""Open an export from wherever it is, and choose its precision.

Choice -> open_source -> Opened     everything that the precision needs is there
Choice -> look_up     -> Opened     of a repository the graphs are there, and a plan of what is to be fetched
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.choices import Modality
from surgery.errors import ExportError
from surgery.source.export import Export, GraphPair, best_precision, open_export
from surgery.source.hub import Download, HubSource, Listing, fetch, hub_source, list_files, plan_download

Say = Callable[[str], None]
"""Is told, in a sentence, what a person should know while it goes on."""


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """Which export, and which precision of it.

    source      a repository of the Hub (owner/name), or the folder of an export
    provider    chooses the precision where none is named
    revision    branch, tag or commit of a repository
    given       the two graphs, where they do not lie in the community's layout
    modalities  those whose encoders are needed too
    """

    source: str
    provider: str
    precision: str | None = None
    revision: str | None = None
    given: GraphPair | None = None
    modalities: Sequence[Modality] = ()

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


def open_source(choice: SourceRequest, say: Say) -> OpenedSource:
    """Fetch what is missing, and open it. `say` is told where the Hub cannot be reached and its cache is used.

    Raises ExportError for what is not an export, or lacks what was asked for; see also surgery.source.hub.
    """
    hub = choice.hub
    if hub is None:
        return _open_folder(choice)
    planned, reason = _planned(hub, choice, say)
    return _opened(planned, fetch(planned), reason)


def look_up(choice: SourceRequest, say: Say) -> OpenedSource:
    """Like open_source, but of a repository config.json and the graphs alone, which name its data files."""
    hub = choice.hub
    if hub is None:
        return _open_folder(choice)
    planned, reason = _planned(hub, choice, say)
    return _opened(planned, planned.listing.root, reason)


def given_pair(embed: Path | None, decoder: Path | None) -> GraphPair | None:
    """Two graphs that are named one by one, or None. Raises ExportError for one without the other."""
    if (embed is None) != (decoder is None):
        raise ExportError("--embed and --decoder belong together: one pair of graphs is repacked")
    return GraphPair("given", embed, decoder) if embed is not None and decoder is not None else None


def _open_folder(choice: SourceRequest) -> OpenedSource:
    export = open_export(Path(choice.source), choice.given)
    if choice.precision is not None:
        return OpenedSource(export, export.pair(choice.precision), _asked(choice.precision))
    return OpenedSource(export, *export.best(choice.provider))


def _opened(planned: Download, root: Path, reason: str) -> OpenedSource:
    """The planned pair, by its precision: the cache's folder may hold others as well."""
    listing = planned.listing
    export = replace(open_export(root), repo=listing.source.repo_id, revision=listing.commit)
    return OpenedSource(export, export.pair(planned.precision), reason, planned)


def _planned(hub: HubSource, choice: SourceRequest, say: Say) -> tuple[Download, str]:
    """The download of the asked or the best precision, and the reason for it in words."""
    listing = list_files(hub)
    if listing.unreachable is not None:
        say(f"{listing.unreachable}: using the cache")
    precision, reason = _precision(listing, choice)
    return plan_download(listing, precision, choice.modalities), reason


def _precision(listing: Listing, choice: SourceRequest) -> tuple[str, str]:
    if choice.precision is not None:
        return choice.precision, _asked(choice.precision)
    return best_precision(list(listing.graphs), choice.provider, str(listing.source))


def _asked(precision: str) -> str:
    return f"{precision}: as asked for"
