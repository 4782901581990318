"""A proof in a process of its own (surgery.runtime.own_process): what it renders, tokenizes and runs is not trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.choices import Provider
from surgery.errors import ProcessEnded
from surgery.runtime.own_process import STRICT, Limits, Tell, run
from surgery.source.export import GraphPair
from surgery.verify.report import Gate, Report
from surgery.verify.stages import TOKENIZER, Progress
from surgery.version import VERSION


def contained(
    proof: Callable[..., Report],
    folder: Path,
    source: GraphPair | None,
    provider: Provider,
    progress: Progress | None,
    **options: Any,
) -> Report:
    """What `proof(folder, source, provider=..., progress=..., **options)` returns, and what it raises.

    A process that dies, or is silent for too long, is a failed gate that says in which stage.
    """
    stages = ["the beginning"]

    def told(stage: str) -> None:
        stages.append(stage)
        if progress is not None:
            progress(stage)

    places = [folder] if source is None else [folder, source.embed.parent, source.decoder.parent]
    limits = Limits.of(provider, *dict.fromkeys(places))
    try:
        return run(_prove, proof, folder, source, provider, options, answer=Report, limits=limits, told=told)
    except ProcessEnded as error:
        gate = Gate("runtime", "the proof comes to its end", False, detail=f"at {stages[-1]!r} {error}")
        return Report(
            gates=(gate,),
            cases=(),
            skipped=(),
            seconds={},
            versions={"gemma4-surgery": VERSION},
            settings={"provider": provider},
        )


def _prove(
    tell: Tell,
    proof: Callable[..., Report],
    folder: Path,
    source: GraphPair | None,
    provider: Provider,
    options: dict[str, Any],
) -> Report:
    def told(stage: str) -> None:
        tell(stage, STRICT if stage == TOKENIZER else None)

    return proof(folder, source, provider=provider, progress=told, **options)
