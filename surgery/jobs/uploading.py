"""A finished folder on its way to the Hub: asked for with a job, logged in before it, uploaded behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from surgery.errors import RequestError
from surgery.jobs.listener import Listener

if TYPE_CHECKING:
    from surgery.folder.building import Repacked
    from surgery.folder.publishing import Destination
    from surgery.folder.text_only import Stripped
    from surgery.verify.report import Report

    Made = TypeVar("Made", Repacked[Report], Stripped[Report])


def refuse_private(push_to: str | None, private: bool) -> None:
    """Raise RequestError for a private repository without a name."""
    if private and push_to is None:
        raise RequestError("--private is of the repository of --push-to, and there is none")


def destination_of(push_to: str | None, private: bool) -> Destination | None:
    """Where the folder goes; None where nothing is to be uploaded."""
    from surgery.folder.publishing import Destination

    return Destination(push_to, private) if push_to is not None else None


def announce(destination: Destination | None, listener: Listener) -> None:
    """Say who uploads. Raises PublishError for what cannot be uploaded, before it is made."""
    from surgery.folder.publishing import require_login

    if destination is not None:
        listener.said(f"upload     to {destination.repo_id}, as {require_login(destination)}")


def upload(result: Made, destination: Destination | None, what: str, listener: Listener) -> Made:
    """The result with what was uploaded, where something is to be."""
    from surgery.folder.publishing import publish
    from surgery.printing import size

    if destination is None:
        return result
    published = publish(result.folder, destination, f"Upload {what}")
    listener.said(f"uploaded   {published.files} files, {size(published.size)}: {published.url}")
    return replace(result, published=published)
