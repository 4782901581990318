"""The proof that a job ends with: the check of a staged folder, which appears only if every gate passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from surgery.choices import Provider
from surgery.errors import GateFailed, RuntimeMissing
from surgery.runtime.genai import load_genai
from surgery.runtime.sessions import load_onnxruntime
from surgery.source.export import GraphPair
from surgery.verify.contained import contained
from surgery.verify.report import Report
from surgery.verify.request import Request
from surgery.verify.stages import Progress
from surgery.verify.two_graph_proof import validate_two_graphs
from surgery.verify.validation import prove_folder

Check = Callable[[Path], Report]
"""Takes a staged folder. Raises GateFailed where a gate fails, RuntimeMissing where a runtime is not installed."""


def closing_proof(
    pair: GraphPair, root: Path, provider: Provider, progress: Progress | None = None, corpus: Sequence[str] = ()
) -> Check:
    """The check of a GenAI folder that is made of `pair`, and of the files in `root`. `progress` is told the stages;
    `corpus` are texts for a vocabulary of fewer tokens."""
    request = Request(scope="closing", costly=True, files=root, corpus=corpus)
    return _passing(lambda folder: contained(prove_folder, folder, pair, provider, progress, request=request))


def closing_proof_of_two_graphs(
    pair: GraphPair, root: Path, provider: Provider, progress: Progress | None = None, corpus: Sequence[str] = ()
) -> Check:
    """The same of a two-graph folder."""
    return _passing(
        lambda folder: contained(validate_two_graphs, folder, pair, provider, progress, files=root, corpus=corpus)
    )


def require_runtimes(provider: Provider, *, genai: bool = True) -> None:
    """Raise RuntimeMissing where a proof cannot run here: before gigabytes are fetched for it, not after."""
    try:
        load_onnxruntime(provider)
        if genai:
            load_genai(provider)
    except RuntimeMissing as error:
        raise RuntimeMissing(str(error), hint=_UNPROVEN) from None


_UNPROVEN = "--no-validate writes the folder unproven, for another machine"


def _passing(prove: Check) -> Check:
    """The same proof, but raising with the report where a gate fails."""

    def check(folder: Path) -> Report:
        try:
            report = prove(folder)
        except RuntimeMissing as error:
            raise RuntimeMissing(str(error), hint=_UNPROVEN) from None
        if not report.passed:
            raise GateFailed((gate.name for gate in report.failed), report)
        return report

    return check
