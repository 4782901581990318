"""The text-only job: an export in, the two graphs of one precision out, for two-session loops and transformers.js."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.choices import ProviderChoice
from surgery.jobs.fewer_tokens import held_out, of_fewer_tokens, refuse_corpus
from surgery.jobs.listener import SILENT, Listener
from surgery.jobs.uploading import announce, destination_of, refuse_private, upload

if TYPE_CHECKING:
    from surgery.folder.publishing import Destination
    from surgery.folder.text_only import Stripped
    from surgery.source.hub import Download
    from surgery.source.opening import SourceRequest
    from surgery.verify.report import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class StripOptions:
    """What a strip can be asked for; every field is the command's option of that name. Raises RequestError."""

    precision: str | None = None
    weights: Literal["copy", "link"] = "copy"
    vocabulary: Path | None = None
    corpus: Sequence[Path] = ()
    provider: ProviderChoice = "auto"
    validate: bool = True
    force: bool = False
    revision: str | None = None
    push_to: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        refuse_private(self.push_to, self.private)
        refuse_corpus(self.vocabulary, self.corpus)


@dataclass(frozen=True)
class StripPlan:
    """The files that a strip would write, with their bytes (None for new ones), and what the Hub would be asked for."""

    files: Mapping[str, int | None]
    download: Download | None
    destination: Destination | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        writes = [{"file": name, "size": count} for name, count in self.files.items()]
        fetched = self.download.to_dict() if self.download else {}
        return {**fetched, "writes": writes, **(self.destination.to_dict() if self.destination else {})}


def strip(
    source: str | Path, target: str | Path, options: StripOptions | None = None, *, listener: Listener = SILENT
) -> Stripped[Report]:
    """Write `target`: the two graphs for text, and nothing of images and sound. It appears proven, or not at all.

    Raises SurgeryError for everything that a user can mend, GateFailed where the proof fails.
    """
    from surgery.files.atomic import refuse_existing, require_writable
    from surgery.folder.manifest import refuse_foreign
    from surgery.folder.text_only import build_text_only as build
    from surgery.runtime.sessions import provider_of
    from surgery.source.opening import open_source
    from surgery.verify.closing_proof import closing_proof_of_two_graphs, require_runtimes

    options = options or StripOptions()
    target = Path(target)
    destination = destination_of(options.push_to, options.private)
    provider = provider_of(options.provider)
    refuse_existing(target, refuse_foreign if options.force else None)  # before gigabytes are fetched, not after
    require_writable(target)
    if options.validate:
        require_runtimes(provider, genai=False)
    announce(destination, listener)
    whole = options.vocabulary is None
    opened = open_source(
        _choice(source, options), listener, target=target if whole else None, linked=options.weights == "link"
    )
    listener.said(f"source     {opened.export.root}")
    listener.said(f"precision  {opened.reason}")
    with of_fewer_tokens(opened, options.vocabulary, listener) as found:
        proof = closing_proof_of_two_graphs(
            found.pair, found.export.root, provider, listener.stage, held_out(options.corpus)
        )
        result = build(
            found.export, found.pair, target, weights=options.weights, force=options.force,
            check=proof if options.validate else None, started=listener.started, progress=listener.advanced,
        )  # fmt: skip
    return upload(result, destination, f"{result.precision}, text only, as two graphs", listener)


def plan_strip(source: str | Path, options: StripOptions | None = None, *, listener: Listener = SILENT) -> StripPlan:
    """What `strip` would write; nothing is written, and of a Hub repository the graphs alone are fetched."""
    from surgery.folder.text_only import planned_text_only
    from surgery.source.opening import look_up

    options = options or StripOptions()
    opened = look_up(_choice(source, options), listener.said)
    with of_fewer_tokens(opened, options.vocabulary, listener) as found:
        files = planned_text_only(found.export, found.pair)
    sized = opened.download.sized(files) if opened.download else files
    return StripPlan(sized, opened.download, destination_of(options.push_to, options.private))


def _choice(source: str | Path, options: StripOptions) -> SourceRequest:
    from surgery.runtime.sessions import provider_of
    from surgery.source.opening import SourceRequest

    return SourceRequest(str(source), provider_of(options.provider), options.precision, options.revision)
