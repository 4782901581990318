"""gemma4-surgery review and comment: what a change does to the models of a repository, and the word of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from surgery.commands.console import data, say_data
from surgery.commands.options import EVERY_ASPECT, FailOn, Ignore
from surgery.errors import FolderError
from surgery.files.safe_reading import read_regular


def review(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A commit: what was there before.")],
    head: Annotated[str, typer.Argument(metavar="HEAD", help="A commit: what is there now.")] = "HEAD",
    form: Annotated[Literal["terminal", "md"], typer.Option("--format", help="md is for pull requests.")] = "terminal",
    fail_on: FailOn = EVERY_ASPECT,
    ignore: Ignore = "none",
) -> None:
    """Compare every model of a git repository that differs between two commits. Exit codes are those of diff."""
    from surgery.compare.commits import review_commits as run
    from surgery.compare.commits import review_markdown
    from surgery.compare.comparison import read_aspects
    from surgery.compare.terminal import show_review

    failing = read_aspects(fail_on)
    found = run(Path(), base, head, read_aspects(ignore))
    if form == "md":
        sys.stdout.write(review_markdown(found))
    else:
        show_review(data(), found)
    if any(one.problem for one in found):
        raise typer.Exit(2)
    raise typer.Exit(1 if any(one.fails(failing) for one in found) else 0)


def comment(
    target: Annotated[str, typer.Argument(metavar="OWNER/REPO#NUMBER", help="The pull request.")],
    file: Annotated[Path, typer.Argument(metavar="REPORT.md")],
    marker: Annotated[str, typer.Option("--marker", help="Tells apart several comments of ours.")] = "report",
    update_only: Annotated[
        bool, typer.Option("--update-only", help="Do nothing where there is no comment of ours yet.")
    ] = False,
) -> None:
    """Put a report on a pull request, as one comment that later calls update. Needs GITHUB_TOKEN."""
    from surgery.compare.pull_request import LONGEST, PullRequest, Site, post

    try:
        body = read_regular(file, 4 * LONGEST).decode("utf-8")
    except OSError as error:
        raise FolderError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FolderError(f"{file} is not UTF-8") from None
    posted = post(Site.from_environment(), PullRequest.parse(target), body, marker, update_only=update_only)
    if posted is None:
        say_data("there is no comment to update")
        return
    say_data(f"{'created' if posted.created else 'updated'} {posted.url}")
