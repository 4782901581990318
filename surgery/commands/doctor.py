"""gemma4-surgery doctor: what is installed here, and what stands in the way."""

from __future__ import annotations

import typer

from surgery.commands.console import data, print_json
from surgery.commands.options import Json


def doctor(as_json: Json = False) -> None:
    """Show runtimes, versions, providers and conflicts: what to paste into a bug report. Exit code 1 if one is
    wrong."""
    from surgery.printing import plain
    from surgery.runtime.environment import environment

    found = environment()
    if as_json:
        print_json(found.to_dict())
    else:
        lines = [("python", found.python), ("platform", f"{found.platform}, {found.cores} cores")]
        lines += [(name, version or "not installed") for name, version in found.packages.items()]
        lines += [("providers", ", ".join(found.providers) or "none"), ("GPU", "yes" if found.gpu else "none")]
        lines += list(found.variables.items())
        for name, value in lines:
            data().print(plain(f"{name:<24}{value}"), soft_wrap=True)
        for problem in found.problems:
            data().print(plain(f"{'problem':<24}{problem}", "red"), soft_wrap=True)
    raise typer.Exit(1 if found.problems else 0)
