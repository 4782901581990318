"""The proof of a folder, on its own: its structure, its numbers against the source, and the real runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery.choices import ProviderChoice
from surgery.jobs.listener import SILENT, Listener

if TYPE_CHECKING:
    from surgery.source.export import GraphPair
    from surgery.verify.report import Report
    from surgery.verify.validation import Request


def validate(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    precision: str | None = None,
    provider: ProviderChoice = "auto",
    request: Request | None = None,
    listener: Listener = SILENT,
) -> Report:
    """Check a GenAI folder, against the export `against` that it was made from where one is given.

    `precision` is the export's; None finds it by the folder. `request` says what is covered: prompts, tokens,
    thresholds, a recording. Every fault is a failed gate of the report (`report.passed`), also where the folder crashes
    or hangs what runs it: that is a process of its own. Raises FolderError for what
    is no GenAI folder, ExportError for what is no export, RequestError, and RuntimeMissing without a runtime.

        report = surgery.validate("out", "onnx-community/gemma-4-E2B-it-ONNX")
    """
    from surgery.folder.genai_config import require_folder
    from surgery.runtime.sessions import provider_of
    from surgery.verify.contained import contained
    from surgery.verify.validation import Request, prove_folder

    folder = Path(folder)
    require_folder(folder)
    pair = source_pair(folder, against, precision)
    return contained(prove_folder, folder, pair, provider_of(provider), listener.stage, request=request or Request())


def source_pair(folder: Path, source: str | Path | None, precision: str | None) -> GraphPair | None:
    """The pair of `source` that a GenAI folder was made from: of the precision that is named, or that its manifest
    records. None without a source. Raises ExportError where there is none.
    """
    from surgery.errors import ExportError
    from surgery.folder.manifest import NAME as MANIFEST_FILE
    from surgery.folder.manifest import recorded_precision
    from surgery.source.export import open_export

    if source is None:
        return None
    export = open_export(Path(source))
    wanted = precision or recorded_precision(folder)
    if wanted is not None and (precision or wanted in export.pairs):
        return export.pair(wanted)
    if len(export.pairs) == 1:
        return next(iter(export.pairs.values()))
    raise ExportError(
        f"{export.root} holds {', '.join(export.pairs)}, and {folder / MANIFEST_FILE} does not say which it was made from",
        hint="name it with --precision",
    )
