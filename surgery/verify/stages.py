"""How far a proof has come: its stages, what is told of each, and the seconds that it took."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Progress = Callable[[str], None]
TOKENIZER = "tokenizer"
"""The stage that takes seconds: texts are tokenized, and the chat template renders."""


def numbered(progress: Progress, stage: str, total: int = 0) -> Progress:
    """Tells `progress` of each of `total` cases, `stage: 3 of 33, case`; of what is not counted, where that is 0."""
    numbers = itertools.count(1)
    return lambda case: progress(f"{stage}: {next(numbers)} of {total}, {case}" if total else f"{stage}: {case}")


@dataclass(frozen=True)
class Stages:
    """The stages that a proof goes through. `progress` is told of each as it begins; `seconds` is what each took."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs in the `with` block is the stage."""
        self.progress(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started

    def told(self, stage: str, total: int = 0) -> Progress:
        """Takes the name of each of `total` cases of a stage as it begins; of 0, they are not counted."""
        return numbered(self.progress, stage, total)
