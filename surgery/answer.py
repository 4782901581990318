"""Try a folder: one prompt through the real runtime, the answer piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgery.errors import FolderError
from surgery.genai import CONFIG_FILE
from surgery.verify.generation import load_genai, render


def answer(
    folder: Path, prompt: str, *, new_tokens: int = 128, sample: bool = False, template: bool = True
) -> Iterator[str]:
    """Yield the pieces of the answer as the runtime decodes them.

    `template` wraps the prompt in the folder's chat template; `sample` uses the folder's sampling values, otherwise
    decoding is greedy. Raises FolderError with the runtime's own words where it refuses the folder or the prompt,
    RuntimeMissing where it is not installed.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FolderError(f"{folder} has no {CONFIG_FILE}; a GenAI folder is expected")
    og = load_genai("cpu")
    try:
        model = og.Model(str(folder))
        tokenizer = og.Tokenizer(model)
        ids = tokenizer.encode(render(tokenizer, prompt) if template else prompt)
        params = og.GeneratorParams(model)
        greedy = {} if sample else {"do_sample": False}
        params.set_search_options(max_length=len(ids) + new_tokens, **greedy)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        stream = tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])
    except Exception as error:  # the runtime's exceptions share no base class of their own
        raise FolderError(f"{folder}: the runtime says: {error}") from error
