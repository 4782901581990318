"""gemma4-surgery review and comment: what a change does to the models of a repository, and the word of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.console import data, say, say_commands, say_data
from surgery.commands.options import EVERY_ASPECT, FailOn, Ignore, Json, PolicyOption, ReportFiles, ReportForm
from surgery.errors import FolderError
from surgery.files.safe_reading import read_regular


def review(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A commit: what was there before.")],
    head: Annotated[str, typer.Argument(metavar="HEAD", help="A commit: what is there now.")] = "HEAD",
    form: ReportForm = "terminal",
    output: ReportFiles = None,
    policy: PolicyOption = None,
    fail_on: FailOn = EVERY_ASPECT,
    ignore: Ignore = "none",
    as_json: Json = False,
) -> None:
    """Compare every model of a git repository that differs between two commits. Exit codes are those of diff."""
    from surgery.compare.commits import Reviewed
    from surgery.compare.commits import review_commits as run
    from surgery.compare.comparison import read_aspects
    from surgery.compare.formats import known_suffix
    from surgery.compare.review_formats import FORMATS, SUFFIXES, Judged
    from surgery.compare.terminal import show_review
    from surgery.files.atomic import write_file

    form = "json" if as_json else form
    failing = read_aspects(fail_on)
    formats = {path: known_suffix(path, SUFFIXES) for path in output or ()}

    def fails(one: Reviewed) -> bool:
        return one.fails(failing) if policy is None else one.impact.fails(policy)

    judged = Judged(run(Path(), base, head, read_aspects(ignore)), fails)
    for path, written in formats.items():
        write_file(path, FORMATS[written](judged).encode())
        say(f"wrote      {path}")
    if form == "terminal" and not formats:
        show_review(data(), judged.found)
    elif form == "github":
        say_commands(FORMATS[form](judged))
    elif form != "terminal":
        sys.stdout.write(FORMATS[form](judged))
    if any(one.problem for one in judged.found):
        raise typer.Exit(2)
    raise typer.Exit(1 if any(map(fails, judged.found)) else 0)


def comment(
    target: Annotated[str, typer.Argument(metavar="OWNER/REPO#NUMBER", help="The pull request.")],
    file: Annotated[Path, typer.Argument(metavar="REPORT.md", help="What review or diff wrote.")],
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
