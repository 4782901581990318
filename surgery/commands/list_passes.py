"""gemma4-surgery passes: every pass, and its options."""

from __future__ import annotations

from surgery.commands.console import data, print_json
from surgery.commands.options import Json


def passes(as_json: Json = False) -> None:
    """List every pass: what it does, and its options."""
    from passes.recipe import describe_pass
    from passes.registry import names
    from surgery.commands.rendering import show_passes

    described = [describe_pass(name) for name in names()]
    if as_json:
        print_json(described)
    else:
        show_passes(data(), described)
