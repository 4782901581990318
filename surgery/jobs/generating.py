"""One prompt through a folder, answered piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from surgery.jobs.listener import SILENT, Listener


def generate(
    folder: str | Path,
    prompt: str,
    *,
    new_tokens: int = 128,
    sample: bool = False,
    seed: int | None = None,
    template: bool = True,
    images: Sequence[str | Path] = (),
    sounds: Sequence[str | Path] = (),
    precision: str | None = None,
    listener: Listener = SILENT,
) -> Generator[str, None, None]:
    """The answer in pieces of text: by onnxruntime-genai for a GenAI folder, by two sessions for one with two graphs.

    Decoding is greedy; `sample` uses the folder's sampling values, `seed` makes a sampled answer repeatable. `template`
    wraps the prompt in the folder's chat template. Files stand where the prompt says `<|image|>` and `<|audio|>`.
    `precision` chooses among two-graph pairs; `folder` may be a Hub repository that has them. The folder is opened and run in a process of its own. Raises FolderError
    for what is neither or refuses the prompt, ProcessEnded where it crashes or hangs the runtime, and RuntimeMissing.

        print("".join(surgery.generate("out", "Why is the sky blue?")))
    """
    from surgery.runtime.prompting import PromptRequest, generate_contained
    from surgery.source.opening import local_folder

    files = [tuple(Path(file) for file in given) for given in (images, sounds)]
    question = PromptRequest(prompt, new_tokens, sample or seed is not None, template, seed, *files)
    place, precision = local_folder(str(folder), precision, "cpu", listener.said)
    pieces = generate_contained(place, question, precision)
    listener.said(f"runs       {next(pieces)}")
    return pieces
