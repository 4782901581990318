"""A conversation with a folder: turn by turn through the real runtime, with images and a sound if it takes them, or
through two sessions; each answer piece by piece.

Every turn is rendered and tokenized whole, as a fresh run would do it. What the caches hold of that already is kept:

    held by the caches    <bos> <|turn> user ... <turn|> <|turn> model  Hello   there
    the next turn's ids   <bos> <|turn> user ... <turn|> <|turn> model  Hello   there  <turn|> <|turn> user ...
                          |------------------ kept -------------------------------|  |------ fed --------|

A generator that has ended takes what follows; one whose caches can be cut goes back to where the two part. The runtime
cuts caches that are one buffer, or all of one size; of others, and where images came in, the whole turn is fed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

from surgery.choices import Modality, Provider
from surgery.errors import FolderError, RequestError
from surgery.files.json_values import typed
from surgery.files.media import check_image, check_sound
from surgery.folder.genai_config import CONFIG_FILE
from surgery.folder.multimodal import SECTIONS
from surgery.folder.opened import OpenedFolder, open_genai_folder
from surgery.runtime.genai import PROMPT_CHUNK, GenAI, encode, render_listed, template_of
from surgery.runtime.own_process import STRICT, Limits, Tell, ask
from surgery.runtime.sampling import Sampling
from surgery.runtime.sessions import Settings, one_line
from surgery.runtime.tool_calls import tool_calls
from surgery.source.export import holds_pair

Progress = Callable[[str], None]
_CHECKS: Mapping[Modality, Callable[[Path], None]] = {"image": check_image, "audio": check_sound}
CLEAR = "clear"
"""Sent in place of a turn: what was said is forgotten."""
_THOUGHT = ("<|channel>", "<channel|>")
"""Between these the model thinks; the chat template leaves it out of later turns."""
_OF_CALLS = ("<|tool_call>", "<tool_call|>", '<|"|>')
"""What a call of a tool is written with: kept in an answer, where a decoder drops them."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How a folder answers.

    `new_tokens` is the most of an answer; `sample` uses the folder's sampling values, otherwise decoding is greedy.
    `temperature`, `top_k` and `top_p` take the place of the folder's, and `seed` makes answers the same in every run
    of one runtime; each of them samples. `template` puts the chat template around the turns, `thinking` has it ask for
    thoughts, `tools`, a list in JSON, has it tell of tools, `system` is what it says first.
    `lasting` is whether later turns are likely.
    """

    new_tokens: int = 128
    sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    template: bool = True
    thinking: bool = False
    tools: str | None = None
    system: str | None = None
    lasting: bool = False

    def __post_init__(self) -> None:
        Sampling(**self.sampling())  # raises RequestError for a value that cannot be
        if self.system is not None and not self.template:
            raise RequestError("a system message needs the chat template, which is left out")
        for name, given in (("thinking", self.thinking), ("tools", self.tools is not None)):
            if given and not self.template:
                raise RequestError(f"{name} needs the chat template, which is left out")
        if self.tools is not None:
            _listed(self.tools)

    def sampling(self) -> dict[str, Any]:
        """What takes the place of the folder's values, by the names of generation_config.json, and `seed`."""
        values = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        given = {name: value for name, value in values.items() if value is not None}
        return {"do_sample": self.sample or bool(given), **given}


@dataclass(frozen=True, slots=True)
class Turn:
    """What is said, with paths of files that stand where it says `<|image|>` and `<|audio|>`; in front where it says
    neither. Or in place of that, a list in JSON of what tools returned, for each call of the last answer."""

    text: str
    images: tuple[str, ...] = ()
    sounds: tuple[str, ...] = ()
    results: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, or of the thoughts before it; empty where a token completes none."""

    text: str
    thought: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of one turn: of the prompt, of those that the caches held already, and of the answer."""

    prompt: int
    kept: int
    answer: int


class Conversation(Protocol):
    """`runs` says what answers, in words. `counts` are those of the turn that was answered last."""

    runs: str
    counts: Counts

    def answer(self, turn: Turn) -> Iterator[Piece]:
        """A piece for each token. An answer that is left before its end is kept as far as it came."""

    def clear(self) -> None:
        """Forget the turns."""


def chat_contained(
    folder: Path, settings: ChatSettings, provider: Provider, precision: str | None = None
) -> Generator[Any, Any, None]:
    """A conversation in a process of its own, as a generator that is sent turns and told how to go on:

        first, what runs the folder; then, for a Turn sent as a mapping, a piece [text, thought] for each token, after
        which True goes on and False ends the answer; and behind the last piece the Counts, as a mapping.

    Raises what `open_conversation` and `answer` raise, and ProcessEnded where the process crashes, hangs or takes too
    much memory.
    """
    limits = Limits.of(provider, folder)
    yield from ask(_converse, folder, settings, provider, precision, answer=NoneType, limits=limits)


def _converse(tell: Tell, folder: Path, settings: ChatSettings, provider: Provider, precision: str | None) -> None:
    def stage(name: str) -> None:
        tell(None, STRICT if name == "tokenizer" else None)

    conversation = open_conversation(folder, settings, provider, precision, stage)
    tell(conversation.runs)
    while (asked := tell.hear()) is not None:
        if asked == CLEAR:
            conversation.clear()
            tell(CLEAR)
            continue
        pieces = conversation.answer(typed(Turn, asked))
        for piece in pieces:
            tell([piece.text, piece.thought])
            if not tell.hear():
                break
        pieces.close()  # type: ignore[attr-defined]  # a generator, which notes what was said
        tell(asdict(conversation.counts))


def open_conversation(
    folder: Path,
    settings: ChatSettings | None = None,
    provider: Provider = "cpu",
    precision: str | None = None,
    progress: Progress | None = None,
) -> Conversation:
    """A folder with genai_config.json runs in onnxruntime-genai, one with two graphs, of `precision` or the best one,
    in two sessions of onnxruntime.

    `progress` is told the stages: `tokenizer`, `generation`. Raises FolderError for any other folder, or with the
    runtime's own words where it refuses the folder or a turn, RequestError for what cannot be asked of it, and
    RuntimeMissing where the runtime is not installed.
    """
    settings, progress = settings or ChatSettings(), progress or (lambda _: None)
    if (folder / CONFIG_FILE).is_file():
        if precision is not None:
            raise RequestError(f"{folder} is a GenAI folder: it has one precision", hint="leave out --precision")
        return _ByGenAI(folder, settings, provider, progress)
    if folder.is_dir() and not holds_pair(folder):
        raise FolderError(f"{folder} has neither {CONFIG_FILE} nor two graphs, as a GenAI folder or an export have")
    return _ByPair(folder, settings, provider, precision, progress)


class _Said:
    """The turns so far, and the files of them."""

    def __init__(self, settings: ChatSettings) -> None:
        self.messages: list[dict[str, Any]] = []
        self.images: tuple[Path, ...] = ()
        self.sounds: tuple[Path, ...] = ()
        if settings.system is not None:
            self.messages.append({"role": "system", "content": settings.system})

    def asked(self, turn: Turn, text: str) -> None:
        """A turn, whose `text` has its files marked. Raises RequestError for results that answer no calls."""
        if turn.results:
            self._returned(json.loads(turn.results))
            return
        self.messages.append({"role": "user", "content": text})
        self.images += tuple(map(Path, turn.images))
        self.sounds += tuple(map(Path, turn.sounds))

    def _returned(self, results: Sequence[Any]) -> None:
        """The last answer becomes calls, as chat templates take them, and behind it stands what each returned."""
        last = self.messages[-1] if self.messages else {"role": "user", "content": ""}
        calls = tool_calls(last["content"]) if last["role"] == "assistant" else []
        if len(calls) != len(results):
            raise RequestError(f"the last answer calls {len(calls)} tools, and there are results of {len(results)}")
        made = [{"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}} for c in calls]
        text = last["content"].partition(_OF_CALLS[0])[0]
        self.messages[-1] = {"role": "assistant", "content": text, "tool_calls": made}
        for call, result in zip(calls, results, strict=True):
            self.messages.append({"role": "tool", "name": call.name, "content": result})

    def raw(self) -> str:
        return "".join(message["content"] for message in self.messages)

    def answered(
        self, tokens: Iterator[int], text_of: Callable[[int], str], marks: Mapping[int, bool]
    ) -> Iterator[Piece]:
        """A piece for each token; `marks` are the ids where thinking begins and ends."""
        message = {"role": "assistant", "content": ""}
        self.messages.append(message)
        thinking = False
        for token in tokens:
            text = text_of(token)
            if token in marks:
                thinking = marks[token]
            elif not thinking:
                message["content"] += text
            yield Piece(text, thinking)


class _ByGenAI:
    def __init__(self, folder: Path, settings: ChatSettings, provider: Provider, progress: Progress) -> None:
        self._folder, self._settings, self._progress = open_genai_folder(folder), settings, progress
        own = "chunk_size" in self._folder.config.get("search", {})
        self._chunks = {"chunk_size": PROMPT_CHUNK} if provider == "cpu" and not own else {}
        self._folder.check_weights()
        self.runs, self.counts = f"{folder} in onnxruntime-genai", Counts(0, 0, 0)
        self._genai = GenAI(folder, provider)
        progress("tokenizer")
        self._tokenizer = self._genai.tokenizer()
        self._template = template_of(folder) if settings.thinking else None
        if self._template is not None and "enable_thinking" not in self._template:
            raise RequestError(f"the chat template of {folder} has no thinking", hint="leave out --thinking")
        self._marks, self._words = _marks(lambda text: encode(self._tokenizer, text))
        self._said = _Said(settings)
        self._generator: Any = None
        self._room = 0
        """Tokens that the generator can hold."""
        self._held: list[int] = []
        """The generator's tokens; the last is not in its caches unless the answer came to its end."""
        self._over = False

    def clear(self) -> None:
        self._said = _Said(self._settings)

    def answer(self, turn: Turn) -> Iterator[Piece]:
        text = self._check_files(turn)
        self._said.asked(turn, text)
        try:
            yield from self._answered()
        except (FolderError, RequestError):
            raise
        except Exception as error:  # the runtime's exceptions share no base class of their own
            raise FolderError(f"{self._folder.root}: the runtime says: {one_line(error)}") from error

    def _answered(self) -> Iterator[Piece]:
        self._progress("tokenizer")
        text = self._rendered()
        inputs = None
        if self._said.images or self._said.sounds:
            inputs = self._genai.prepare(text, self._said.images, self._said.sounds)
        ids = encode(self._tokenizer, text) if inputs is None else [int(i) for i in inputs.arrays["input_ids"][0]]
        most = min(self._settings.new_tokens, self._folder.context_length - len(ids))
        if most < 1:
            raise RequestError(
                f"the conversation has {len(ids)} tokens, and the context {self._folder.context_length}",
                hint="begin anew, or ask with less",
            )
        self._progress("generation")
        kept = self._begin(ids, most, inputs) if inputs is not None else self._go_on(ids, most)
        self.counts = Counts(len(ids), kept, 0)
        stream = self._tokenizer.create_stream()
        ends = set(self._folder.token_ids("eos_token_id"))
        pieces = self._said.answered(self._tokens(most, ends), _worded(stream.decode, self._words), self._marks)
        try:
            yield from pieces
        finally:
            self._held = [int(token) for token in self._generator.get_sequence(0)]

    def _tokens(self, most: int, ends: set[int]) -> Iterator[int]:
        self._over = False
        while self.counts.answer < most and not self._generator.is_done():
            self._generator.generate_next_token()
            token = int(self._generator.get_next_tokens()[0])
            self.counts = replace(self.counts, answer=self.counts.answer + 1)
            self._over = token in ends
            yield token

    def _rendered(self) -> str:
        if not self._settings.template:
            return self._said.raw()
        tools = _listed(self._settings.tools) if self._settings.tools is not None else None
        # The runtime hands a template no variables of a caller's.
        told = None if self._template is None else f"{{%- set enable_thinking = true -%}}{self._template}"
        return render_listed(self._tokenizer, self._said.messages, tools, told)

    def _go_on(self, ids: list[int], most: int) -> int:
        """Feed what the caches lack of `ids`; how many tokens they had."""
        if self._generator is None or len(ids) + most > self._room:
            return self._begin(ids, most)
        pairs = enumerate(zip(ids, self._held, strict=False))
        shared = next((n for n, (one, other) in pairs if one != other), min(len(ids), len(self._held)))
        if self._over and shared == len(self._held) < len(ids):
            self._generator.append_tokens(ids[shared:])
            return shared
        shared = min(shared, len(self._held) - 1, len(ids) - 1)
        try:
            self._generator.rewind_to(shared)
            self._generator.append_tokens(ids[shared:])
        except Exception:  # caches that are not one buffer, and differ in size, cannot be cut
            return self._begin(ids, most)
        return shared

    def _begin(self, ids: list[int], most: int, inputs: Any = None) -> int:
        usual = self._folder.config.get("search", {}).get("max_length", 0) if self._settings.lasting else 0
        self._generator = None  # before the next one takes its memory
        self._room = max(len(ids) + most, min(int(usual), self._folder.context_length))
        sampling = self._settings.sampling()
        sampling = sampling if sampling["do_sample"] else {"do_sample": False}
        if (seed := sampling.pop("seed", None)) is not None:
            sampling["random_seed"] = seed
        self._generator = self._genai.generator(
            max_length=self._room, **(self._chunks if inputs is None else {}), **sampling
        )
        if inputs is None:
            self._generator.append_tokens(ids)
        else:
            self._generator.set_inputs(inputs.inputs)
            self._room = 0  # it takes images once, and not text behind them
        return 0

    def _check_files(self, turn: Turn) -> str:
        """The turn's text, with a placeholder for each file. Raises SurgeryError for what the folder does not take."""
        given: dict[Modality, tuple[str, ...]] = {"image": turn.images, "audio": turn.sounds}
        for modality, files in given.items():
            if files and not takes(self._folder, modality):
                raise FolderError(
                    f"{self._folder.root} takes no {modality}", hint="repack SRC OUT --modalities text,image,audio"
                )
            for file in files:
                _CHECKS[modality](Path(file))
        if (sounds := len(self._said.sounds) + len(turn.sounds)) > 1:
            raise RequestError(f"{sounds} sounds are given; the runtime takes one")
        return _with_markers(turn)


def takes(folder: OpenedFolder, modality: Modality) -> bool:
    """Whether a folder has the graph that reads images, or sound."""
    return SECTIONS[modality][0] in folder.others


class _ByPair:
    def __init__(
        self, folder: Path, settings: ChatSettings, provider: Provider, precision: str | None, progress: Progress
    ) -> None:
        from surgery.runtime.two_graphs import open_two_graphs

        self._opened = open_two_graphs(folder, precision, Settings(provider))
        self._folder, self._settings, self._progress = folder, settings, progress
        names = f"{self._opened.pair.embed.name} and {self._opened.pair.decoder.name}"
        self.runs, self.counts = f"{folder} in two sessions of onnxruntime: {names}", Counts(0, 0, 0)
        self._sampling = replace(self._opened.sampling, **settings.sampling())
        self._said = _Said(settings)
        if settings.thinking and not self._opened.tokenizer.thinks:
            raise RequestError(f"the chat template of {folder} has no thinking", hint="leave out --thinking")
        self._marks, self._words = _marks(self._opened.tokenizer.encode)

    def clear(self) -> None:
        self._said = _Said(self._settings)

    def answer(self, turn: Turn) -> Iterator[Piece]:
        if turn.images or turn.sounds:
            raise FolderError(
                f"{self._folder} has no {CONFIG_FILE}; images and sound are for GenAI folders",
                hint="repack SRC OUT --modalities text,image,audio",
            )
        self._progress("tokenizer")
        self._said.asked(turn, turn.text)
        tokenizer = self._opened.tokenizer
        told: dict[str, Any] = {"enable_thinking": True} if self._settings.thinking else {}
        if self._settings.tools is not None:
            told["tools"] = _listed(self._settings.tools)
        text = tokenizer.render(self._said.messages, **told) if self._settings.template else self._said.raw()
        ids = tokenizer.encode(text)
        self._progress("generation")
        self.counts = Counts(len(ids), 0, 0)
        yield from self._said.answered(self._tokens(ids), _worded(tokenizer.stream(), self._words), self._marks)

    def _tokens(self, ids: Sequence[int]) -> Iterator[int]:
        most = self._settings.new_tokens
        for (token,) in self._opened.generate([ids], new_tokens=most, sampling=self._sampling):
            if token is not None:
                self.counts = replace(self.counts, answer=self.counts.answer + 1)
                yield token


def _marks(encoded: Callable[[str], list[int]]) -> tuple[dict[int, bool], dict[int, str]]:
    """The ids where thinking begins and ends, and those that calls are written with; none that a vocabulary has not as
    one token."""
    found = {mark: ids[0] for mark in (*_THOUGHT, *_OF_CALLS) if len(ids := encoded(mark)) == 1}
    thoughts = {found[mark]: mark == _THOUGHT[0] for mark in _THOUGHT if mark in found}
    return thoughts, {found[mark]: mark for mark in _OF_CALLS if mark in found}


def _worded(text_of: Callable[[int], str], words: Mapping[int, str]) -> Callable[[int], str]:
    return lambda token: words[token] if token in words else text_of(token)


def _listed(tools: str) -> list[dict[str, Any]]:
    """Raises RequestError for what is no list of tools as the chat template takes them."""
    try:
        found = json.loads(tools)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the tools are not JSON: {error}") from None
    for tool in found if isinstance(found, list) and found else [found]:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(
                "the tools are not in the form that chat templates take",
                hint='[{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}]',
            )
    return list(found)


def _with_markers(turn: Turn) -> str:
    """The text with a placeholder for each file, in front where it has none of its kind. Raises RequestError."""
    text = turn.text
    for marker, files in (("<|audio|>", turn.sounds), ("<|image|>", turn.images)):
        found = text.count(marker)
        if found and found != len(files):
            raise RequestError(f"the prompt has {found} {marker} for {len(files)} files")
        if not found:
            text = marker * len(files) + text
    return text
