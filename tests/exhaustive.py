"""What is exhaustive by its nature is left out of a plain run: pytest -m exhaustive runs it, and -m "" everything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def in_full(*values: Any) -> Any:
    """One set of a test's parameters that a full run alone has: by its code path it is like one that every run has."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def some(values: Iterable[Any], each: int) -> list[Any]:
    """The first of `each` for every run, the others for a full one."""
    return [
        value if number % each == 0 else in_full(*value) if isinstance(value, tuple) else in_full(value)
        for number, value in enumerate(values)
    ]
