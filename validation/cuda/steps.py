"""What is run, in order of value; each step is a function that answers with plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.choices import Provider

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and on what the steps run. A rehearsal runs the same code on the CPU provider, with small sizes.

    `stubs` is a folder for the CUDA provider over stub libraries (validation.cuda.stubs), for a rehearsal's placement.
    """

    out: Path
    rehearsal: bool = False
    stubs: Path | None = None

    @property
    def provider(self) -> Provider:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def work(self) -> Path:
        """For exports and folders; nothing in it is evidence."""
        return self.out / "work"

    @property
    def large(self) -> str:
        """The fixture whose speed is measured."""
        return "tiny-e2b" if self.rehearsal else "e2b"

    @property
    def contexts(self) -> tuple[int, ...]:
        """Lengths of prompts, in tokens."""
        return (8, 48) if self.rehearsal else (128, 1024, 4096)

    @property
    def new_tokens(self) -> int:
        """Tokens that are timed behind each prompt."""
        return 6 if self.rehearsal else 128


@dataclass(frozen=True, slots=True)
class Step:
    """`name` is its file's, `title` the page's. `needs` are steps that must be done before, for what they leave."""

    name: str
    title: str
    run: Callable[[Setting], Found]
    needs: tuple[str, ...] = ()


def steps() -> tuple[Step, ...]:
    """All of them, in the order in which they are run."""
    from validation.cuda import correctness, speed

    large = ("export",)
    return (
        Step("machine", "Machine", correctness.machine),
        Step("gpu-tests", "`pytest -m gpu`", correctness.gpu_tests),
        Step("numbers-q4f16", "Numbers, q4f16", correctness.numbers("q4f16")),
        Step("numbers-fp16", "Numbers, fp16", correctness.numbers("fp16")),
        Step("placement", "Placement", correctness.placement),
        Step("export", "The large export", speed.export),
        Step("speed-fast", "Speed, `fast`, captured", speed.genai("fast", capture=True), large),
        Step("speed-source", "Speed, the source pair in a loop", speed.source, large),
        Step("speed-fast-launched", "Speed, `fast`, not captured", speed.genai("fast", capture=False), large),
        Step("speed-compatible", "Speed, `compatible`", speed.genai("aliased", capture=False), large),
        Step("tokens", "Tokens at full size", speed.tokens, large),
        Step("speed-runtime", "Speed, `fast`, captured, ONNX Runtime alone", speed.runtime(capture=True), large),
        Step("speed-runtime-launched", "Speed, `fast`, ONNX Runtime alone", speed.runtime(capture=False), large),
        Step("speed-host", "Speed, tables in host memory", speed.genai("host", capture=False), large),
        Step("media", "Images and sound", correctness.media),
        Step("numbers-q2f16", "Numbers, q2f16", correctness.numbers("q2f16")),
    )
