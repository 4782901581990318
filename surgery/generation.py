"""Try a folder: one prompt through the real runtime, the answer piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import FolderError, RuntimeMissing, SurgeryError
from surgery.genai import CONFIG_FILE


def generate(
    folder: Path, prompt: str, *, new_tokens: int = 128, sample: bool = False, template: bool = True
) -> Iterator[str]:
    """Yield the pieces of the answer as the runtime decodes them.

    `template` wraps the prompt in the folder's chat template; `sample` uses the folder's sampling values, otherwise
    decoding is greedy. Raises FolderError with the runtime's own message where it refuses the folder or the prompt.
    """
    try:
        import onnxruntime_genai as og
    except ImportError:
        raise RuntimeMissing(
            "onnxruntime-genai is not installed", hint="pip install 'gemma4-surgery[cpu]' (or [cuda])"
        ) from None
    if not (folder / CONFIG_FILE).is_file():
        raise FolderError(f"{folder} has no {CONFIG_FILE}; a GenAI folder is expected")
    try:
        model = og.Model(str(folder))
        tokenizer = og.Tokenizer(model)
        text = _templated(tokenizer, prompt) if template else prompt
        ids = tokenizer.encode(text)
        params = og.GeneratorParams(model)
        options = {"max_length": len(ids) + new_tokens}
        params.set_search_options(**options, **({} if sample else {"do_sample": False}))
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        stream = tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])
    except SurgeryError:
        raise
    except Exception as error:  # the runtime raises RuntimeError and types of its own; its message is the news
        raise FolderError(f"{folder}: the runtime says: {error}") from error


def _templated(tokenizer: object, prompt: str) -> str:
    messages = json.dumps([{"role": "user", "content": prompt}])
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True))  # type: ignore[attr-defined]
