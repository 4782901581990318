"""How fast a folder is, beside the export that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.choices import ProviderChoice
from surgery.jobs.listener import SILENT, Listener
from surgery.jobs.source_of_folder import source_pair

if TYPE_CHECKING:
    from surgery.runtime.benchmark import Benchmark
    from surgery.runtime.profiling import Profile


def bench(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    precision: str | None = None,
    provider: ProviderChoice = "auto",
    contexts: Sequence[int] = (128, 1024, 4096),
    new_tokens: int = 16,
    chunk: int = 512,
    listener: Listener = SILENT,
) -> list[Benchmark]:
    """Time to first token, prefill and decode rates (tokens per second) and peak memory (bytes) at prompts of
    `contexts` tokens; of the folder in GenAI, its prompts in chunks of `chunk` tokens, 0 for all at once, and of its source
    in a two-session loop where `against` is given. The listener is told which contexts do not fit.

    Raises FolderError for what is no GenAI folder, ExportError, and RuntimeMissing.
    """
    from surgery.folder.genai_config import require_folder
    from surgery.runtime.benchmark import measure as run
    from surgery.runtime.genai import load_genai
    from surgery.runtime.sessions import load_onnxruntime, provider_of
    from surgery.source.opening import open_folder

    load_onnxruntime(runs_on := provider_of(provider))  # before gigabytes are fetched, not after
    load_genai(runs_on)
    folder = open_folder(str(folder), listener)
    require_folder(folder)
    pair = source_pair(folder, against, precision, listener)
    return run(
        folder, pair, provider=runs_on, contexts=contexts, new_tokens=new_tokens, chunk=chunk, progress=listener.said
    )


def profile(
    folder: str | Path,
    *,
    provider: ProviderChoice = "auto",
    contexts: Sequence[int] = (128,),
    new_tokens: int = 16,
    chunk: int = 512,
    listener: Listener = SILENT,
) -> tuple[Profile, ...]:
    """Where the time of a folder goes, by operator and kind of layer: prefill and decode at prompts of `contexts` tokens,
    in chunks of `chunk` tokens, 0 for all at once. The listener is told which contexts do not fit.

    Raises FolderError for what is no GenAI folder, and RuntimeMissing.
    """
    from surgery.folder.genai_config import require_folder
    from surgery.runtime.genai import load_genai
    from surgery.runtime.profiling import profile_folder
    from surgery.runtime.sessions import load_onnxruntime, provider_of
    from surgery.source.opening import open_folder

    load_onnxruntime(runs_on := provider_of(provider))
    load_genai(runs_on)
    require_folder(folder := open_folder(str(folder), listener))
    listener.said("profiling the folder")
    return profile_folder(folder, contexts, new_tokens, runs_on, chunk, listener.said)
