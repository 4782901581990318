"""Try a folder: one prompt through the real runtime, with images and a sound if it takes them, or through two sessions;
the answer piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from surgery.architecture import read_config
from surgery.choices import Modality
from surgery.errors import FolderError, RequestError
from surgery.folder.genai_config import CONFIG_FILE
from surgery.folder.multimodal import SECTIONS
from surgery.folder.opened import open_genai_folder
from surgery.runtime.genai import load_genai, render
from surgery.runtime.own_process import STRICT, Limits, Tell, ask
from surgery.runtime.sessions import machine_provider
from surgery.source.export import holds_pair

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A prompt, and files that stand where it says `<|image|>` and `<|audio|>`; in front where it says neither.

    `template` wraps it in the folder's chat template; `sample` uses the folder's sampling values,
    otherwise decoding is greedy; `seed` makes a sampled answer the same in every run of one runtime.
    """

    prompt: str
    new_tokens: int = 128
    sample: bool = False
    template: bool = True
    seed: int | None = None
    images: tuple[Path, ...] = ()
    sounds: tuple[Path, ...] = ()


def generate_contained(
    folder: Path, question: PromptRequest, precision: str | None = None
) -> Generator[str, None, None]:
    """As `generate_text`, what runs the folder as the first piece, and all of it in a process of its own.

    Raises ProcessEnded too, where the process crashes, hangs or takes too much memory.
    """
    limits = Limits.of(machine_provider(), folder)
    yield from ask(_tell_text, folder, question, precision, answer=NoneType, limits=limits)


def _tell_text(tell: Tell, folder: Path, question: PromptRequest, precision: str | None) -> None:
    def stage(name: str) -> None:
        tell(None, STRICT if name == "tokenizer" else None)

    runs, pieces = generate_text(folder, question, precision, stage)
    tell(runs)
    for piece in pieces:
        tell(piece)


def generate_text(
    folder: Path, question: PromptRequest, precision: str | None = None, progress: Progress | None = None
) -> tuple[str, Iterator[str]]:
    """What runs the folder, in words, and the pieces of the answer, as they are decoded.

    A folder with genai_config.json runs in onnxruntime-genai, one with two graphs, of `precision` or the best one, in
    two sessions of onnxruntime. `progress` is told the stages: `tokenizer`, `generation`. Raises FolderError for any
    other, or with the runtime's own words where it refuses the folder or the prompt, and RuntimeMissing where it is not
    installed.
    """
    progress = progress or (lambda _: None)
    if (folder / CONFIG_FILE).is_file():
        if precision is not None:
            raise RequestError(f"{folder} is a GenAI folder: it has one precision", hint="leave out --precision")
        return f"{folder} in onnxruntime-genai", _by_genai(folder, question, progress)
    if question.images or question.sounds:
        raise FolderError(
            f"{folder} has no {CONFIG_FILE}; images and sound are for GenAI folders",
            hint="repack SRC OUT --modalities text,image,audio",
        )
    if folder.is_dir() and not holds_pair(folder):
        raise FolderError(f"{folder} has neither {CONFIG_FILE} nor two graphs, as a GenAI folder or an export have")
    return _by_pair(folder, question, precision, progress)


def _by_genai(folder: Path, question: PromptRequest, progress: Progress) -> Iterator[str]:
    _check_files(folder, question)
    og = load_genai("cpu")
    open_genai_folder(folder).check_weights()
    prompt = _with_markers(question.prompt, question.images, question.sounds)
    try:
        model = og.Model(str(folder))
        progress("tokenizer")
        tokenizer = og.Tokenizer(model)
        text = render(tokenizer, prompt) if question.template else prompt
        inputs: Any = None
        if question.images or question.sounds:
            opened = {"images": og.Images.open(*map(str, question.images))} if question.images else {}
            opened |= {"audios": og.Audios.open(*map(str, question.sounds))} if question.sounds else {}
            inputs = model.create_multimodal_processor()(text, **opened)
        ids = tokenizer.encode(text) if inputs is None else inputs["input_ids"].as_numpy()[0]
        progress("generation")
        params = og.GeneratorParams(model)
        options: dict[str, Any] = {} if question.sample else {"do_sample": False}
        if question.seed is not None:
            options["random_seed"] = question.seed
        params.set_search_options(max_length=len(ids) + question.new_tokens, **options)
        generator = og.Generator(model, params)
        if inputs is None:
            generator.append_tokens(ids)
        else:
            generator.set_inputs(inputs)
        stream = tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])
    except Exception as error:  # the runtime's exceptions share no base class of their own
        raise FolderError(f"{folder}: the runtime says: {error}") from error


def _by_pair(
    folder: Path, question: PromptRequest, precision: str | None, progress: Progress
) -> tuple[str, Iterator[str]]:
    from surgery.runtime.two_graphs import open_two_graphs

    opened = open_two_graphs(folder, precision)
    sampling = replace(opened.sampling, do_sample=question.sample, seed=question.seed)
    names = f"{opened.pair.embed.name} and {opened.pair.decoder.name}"
    progress("tokenizer")
    ids = opened.encode(question.prompt, template=question.template)
    progress("generation")
    pieces = opened.continued(ids, new_tokens=question.new_tokens, sampling=sampling)
    return f"{folder} in two sessions of onnxruntime: {names}", pieces


def _check_files(folder: Path, question: PromptRequest) -> None:
    """Raise FolderError where the folder does not take what is given, or a file is not there."""
    if not question.images and not question.sounds:
        return
    body = read_config(folder / CONFIG_FILE).get("model", {})
    given: dict[Modality, Sequence[Path]] = {"image": question.images, "audio": question.sounds}
    for modality, files in given.items():
        section = body.get(SECTIONS[modality][0]) if isinstance(body, dict) else None
        takes = isinstance(section, dict) and bool(section.get("filename"))
        if files and not takes:
            raise FolderError(f"{folder} takes no {modality}", hint="repack SRC OUT --modalities text,image,audio")
        for file in files:
            if not file.is_file():
                raise FolderError(f"{file} is not a file")
    if len(question.sounds) > 1:
        raise FolderError(f"{len(question.sounds)} sounds are given; the runtime takes one")


def _with_markers(prompt: str, images: Sequence[Path], sounds: Sequence[Path]) -> str:
    """The prompt with a placeholder for each file, in front where it has none of its kind. Raises FolderError."""
    for marker, files in (("<|audio|>", sounds), ("<|image|>", images)):
        found = prompt.count(marker)
        if found and found != len(files):
            raise FolderError(f"the prompt has {found} {marker} for {len(files)} files")
        if not found:
            prompt = marker * len(files) + prompt
    return prompt
