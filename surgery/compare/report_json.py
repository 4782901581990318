"""The report as JSON: docs/diff-report.md documents each key, and `version` grows when one changes its meaning.

Keys are in a fixed order, numbers are integers, absent things are null: the same two models give the same bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from surgery.compare.comparison import Comparison
from surgery.compare.impact import impact_of
from surgery.printing import json_text

VERSION = 1


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The report as plain values; docs/diff-report.md has each key."""
    found = _plain(comparison)
    sections = ("before", "after", "interface", "layers", "metadata", "nodes", "weights", "config", "numbers", "passes")
    impact = impact_of(comparison)
    return {
        "version": VERSION,
        "impact": impact.level,
        "why": list(impact.why),
        "verdict": comparison.verdict,
        "same": comparison.same,
        "differing": list(comparison.differing),
        "ignored": list(comparison.ignored),
        **{section: found[section] for section in sections},
        "proven": comparison.proven,
    }


def to_json(comparison: Comparison) -> str:
    """The report as JSON text, ending in a newline."""
    return json_text(to_dict(comparison))


def _plain(value: Any) -> Any:
    """Dataclasses as objects with their fields in order, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
