"""Try a folder: one prompt through the real runtime, or through two sessions; the answer piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import FolderError, RequestError
from surgery.export import holds_pair
from surgery.genai import CONFIG_FILE
from surgery.verify.generation import load_genai, render


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt. `template` wraps it in the folder's chat template; `sample` uses the folder's sampling values,
    otherwise decoding is greedy; `seed` makes a sampled answer the same in every run of one runtime.
    """

    prompt: str
    new_tokens: int = 128
    sample: bool = False
    template: bool = True
    seed: int | None = None


def answer(folder: Path, question: Question, precision: str | None = None) -> tuple[str, Iterator[str]]:
    """What runs the folder, in words, and the pieces of the answer, as they are decoded.

    A folder with genai_config.json runs in onnxruntime-genai, one with two graphs, of `precision` or the best one, in
    two sessions of onnxruntime. Raises FolderError for any other, or with the runtime's own words where it refuses
    the folder or the prompt, and RuntimeMissing where it is not installed.
    """
    if (folder / CONFIG_FILE).is_file():
        if precision is not None:
            raise RequestError(f"{folder} is a GenAI folder: it has one precision", hint="leave out --precision")
        return f"{folder} in onnxruntime-genai", _by_genai(folder, question)
    if folder.is_dir() and not holds_pair(folder):
        raise FolderError(f"{folder} has neither {CONFIG_FILE} nor two graphs, as a GenAI folder or an export have")
    return _by_pair(folder, question, precision)


def _by_genai(folder: Path, question: Question) -> Iterator[str]:
    og = load_genai("cpu")
    try:
        model = og.Model(str(folder))
        tokenizer = og.Tokenizer(model)
        ids = tokenizer.encode(render(tokenizer, question.prompt) if question.template else question.prompt)
        params = og.GeneratorParams(model)
        options: dict[str, Any] = {} if question.sample else {"do_sample": False}
        if question.seed is not None:
            options["random_seed"] = question.seed
        params.set_search_options(max_length=len(ids) + question.new_tokens, **options)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        stream = tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])
    except Exception as error:  # the runtime's exceptions share no base class of their own
        raise FolderError(f"{folder}: the runtime says: {error}") from error


def _by_pair(folder: Path, question: Question, precision: str | None) -> tuple[str, Iterator[str]]:
    from surgery.pair import open_folder

    opened = open_folder(folder, precision)
    sampling = replace(opened.sampling, do_sample=question.sample, seed=question.seed)
    names = f"{opened.pair.embed.name} and {opened.pair.decoder.name}"
    return f"{folder} in two sessions of onnxruntime: {names}", opened.answer(
        question.prompt, new_tokens=question.new_tokens, sampling=sampling, template=question.template
    )
