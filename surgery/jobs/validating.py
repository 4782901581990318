"""The proof of a folder, on its own: its structure, its numbers against the source, and the real runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.choices import ProviderChoice
from surgery.jobs.listener import SILENT, Listener
from surgery.jobs.source_of_folder import pair_by_manifest, source_pair

if TYPE_CHECKING:
    from surgery.verify.report import Report
    from surgery.verify.request import Request


def validate(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    precision: str | None = None,
    provider: ProviderChoice = "auto",
    request: Request | None = None,
    listener: Listener = SILENT,
) -> Report:
    """Check a GenAI folder, against the export `against` that it was made from: a folder or a repository of the Hub.

    Without `against` the repository that its manifest names is taken, where the cache holds it; a folder of a local
    export is then checked alone. `precision` is the export's; None finds it by the folder. `request` says what is
    covered: prompts, tokens, thresholds, a recording. Every fault is a failed gate of the report (`report.passed`),
    also where the folder crashes or hangs what runs it: that is a process of its own. Raises FolderError for what is no
    GenAI folder, ExportError for what is no export, RequestError, and RuntimeMissing without a runtime.

        report = surgery.validate("out", "onnx-community/gemma-4-E2B-it-ONNX")
    """
    from surgery.folder.genai_config import require_folder
    from surgery.runtime.genai import load_genai
    from surgery.runtime.sessions import load_onnxruntime, provider_of
    from surgery.source.opening import open_folder
    from surgery.verify.contained import contained
    from surgery.verify.request import Request
    from surgery.verify.validation import prove_folder

    request, runs_on = request or Request(), provider_of(provider)
    load_onnxruntime(runs_on)  # before gigabytes are fetched, not after
    load_genai(runs_on)
    folder = open_folder(str(folder), listener)
    require_folder(folder)
    pair = source_pair(folder, against, precision, listener)
    if against is None and request.golden is None:
        pair = pair_by_manifest(folder, listener)
    return contained(prove_folder, folder, pair, runs_on, listener.stage, request=request)
