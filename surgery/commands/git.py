"""gemma4-surgery git-setup, and the two commands that git itself runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from surgery.commands.console import beside_git, git_goes_on, program, say_data


def git_setup(
    everywhere: Annotated[
        bool, typer.Option("--global/--local", help="For all repositories of yours, or for the one you are in.")
    ] = False,
    unset: Annotated[bool, typer.Option("--unset", help="Take away what git-setup wrote.")] = False,
) -> None:
    """Make git diff, git show and git log -p show what changed in .onnx files."""
    from surgery.compare.git_setup import set_up, take_away

    scope: Literal["global", "local"] = "global" if everywhere else "local"
    if unset:
        removed = take_away(scope, Path()).settings
        for setting in removed:
            say_data(f"removed {setting.text} from {setting.file}")
        if not removed:
            say_data("nothing was there to remove")
        return
    done = set_up(scope, program(), Path())
    for setting in done.settings:
        say_data(f"{'wrote to' if setting.changed else 'there already, in'} {setting.file}: {setting.text}")
    if done.overruled_by:
        say_data(
            f"but .gitattributes of this repository has the last word on *.onnx (diff: {done.overruled_by}); "
            "git-setup without --global wins over it"
        )
    say_data("git diff shows the report; git show and git log -p show lines of the graph, with --ext-diff the report")


def git_textconv(file: Path) -> None:
    """The text of one graph, for git."""
    from surgery.compare.git_drivers import graph_text_of

    with git_goes_on():
        sys.stdout.write(graph_text_of(file))


def git_diff(words: list[str]) -> None:
    """The report of two versions of one graph, for git."""
    from surgery.compare.git_drivers import WEIGHTS, Versions, compared
    from surgery.compare.terminal import show_comparison
    from surgery.printing import plain

    out = beside_git()
    with git_goes_on():
        versions = Versions.parse(words)
        out.print(plain(versions.heading, "bold"), soft_wrap=True)
        found = compared(versions)
        if isinstance(found, str):
            out.print(plain(found), soft_wrap=True)
        else:
            show_comparison(out, found)
            if found.weights.uncompared:
                out.print(plain(WEIGHTS, "dim"), soft_wrap=True)
    out.print()
