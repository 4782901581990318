"""Where the committed files are that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "fixtures"
DATA = FIXTURES / "data"
"""Weights and reference numbers, from transformers."""
TINY = FIXTURES / "tiny-e2b"
"""The committed export."""
