"""Passes: what one is and how it is applied (base), which there are (registry), recipes of them (recipe, presets).

Each pass has a file of its own. To write one, here or in another package, see docs/writing-passes.md.
"""

from __future__ import annotations

from typing import Any

from passes.base import EXACT, LOSSY, REORDERED, Finding, Numerics, Outcome, Pass, apply
from passes.registry import BUILT_IN, names, pass_class, register

__all__ = [
    "EXACT",
    "LOSSY",
    "REORDERED",
    "Finding",
    "Numerics",
    "Outcome",
    "Pass",
    "apply",
    "names",
    "pass_class",
    "register",
]


def __getattr__(name: str) -> Any:
    """A pass of this package by the name of its class, imported when it is asked for: `from passes import RenameIO`."""
    for built_in in BUILT_IN:
        if name.lower() == built_in.replace("-", "") and name == pass_class(built_in).__name__:
            return pass_class(built_in)
    raise AttributeError(f"module 'passes' has no attribute {name!r}")
