"""Small exports with a sliding window of any size: the published ones are 512 and 1024."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fixtures
from fixtures.zoo import FIXTURES
from surgery.source.export import Export, open_export


def export_with(window: int, name: str, precision: str, folder: Path) -> Export:
    """A fixture with another window, and with positions enough to cross it."""
    fixture = FIXTURES[name]
    architecture = replace(fixture.architecture, sliding_window=window, max_position_embeddings=max(256, 4 * window))
    other = f"{name}-{window}"
    FIXTURES[other] = replace(fixture, name=other, architecture=architecture)
    try:
        fixtures.build(other, precision, folder)
    finally:
        del FIXTURES[other]
    return open_export(folder)
