"""A folder answers: one prompt, or a conversation, piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from surgery.choices import ProviderChoice
from surgery.jobs.listener import SILENT, Listener

if TYPE_CHECKING:
    from surgery.runtime.conversation import Turn


@dataclass(frozen=True, slots=True)
class Answered:
    """What one answer took: `prompt` tokens, of which `kept` were in the caches already, `tokens` of the answer, and
    seconds to its `first` token and to the last."""

    prompt: int
    kept: int
    tokens: int
    first: float
    seconds: float

    @property
    def rate(self) -> float | None:
        """Tokens a second behind the first one; None of a single token."""
        return (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else None


class Chat:
    """A conversation with a folder, whose model stays in memory: by onnxruntime-genai for a GenAI folder, by two
    sessions for one with two graphs, which may be a Hub repository too.

    Decoding is greedy; `sample` uses the folder's sampling values, `temperature`, `top_k` and `top_p` take their place,
    and `seed` makes sampled answers repeatable. `system` comes before the first turn; `thinking` asks for thoughts,
    where the chat template can; it tells of `tools`, whose calls `surgery.tool_calls` reads from an answer; without
    `template` the turns go to the model as they are. `precision` chooses among two-graph pairs, `new_tokens` is the
    most of an answer. A later turn reuses what the caches hold, where the folder's layout allows it, and has the tokens
    of a run that begins anew.

    The folder is opened and run in a process of its own, which ends with the `with` block. Raises FolderError for what
    is neither kind of folder or refuses a turn, RequestError, ProcessEnded where it crashes or hangs the runtime, and
    RuntimeMissing.

        with surgery.Chat("out", system="Be brief.") as chat:
            for piece in chat.say("Why is the sky blue?"):
                print(piece, end="", flush=True)
            print("".join(chat.say("And at night?")), chat.answered.rate)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        new_tokens: int = 128,
        sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        template: bool = True,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        system: str | None = None,
        precision: str | None = None,
        provider: ProviderChoice = "auto",
        lasting: bool = True,
        listener: Listener = SILENT,
    ) -> None:
        from surgery.runtime.conversation import ChatSettings, chat_contained
        from surgery.runtime.sessions import provider_of
        from surgery.source.opening import local_folder

        settings = ChatSettings(
            new_tokens,
            sample,
            temperature,
            top_k,
            top_p,
            seed,
            template,
            thinking,
            None if tools is None else json.dumps(tools),
            system,
            lasting,
        )
        runs_on = provider_of(provider)
        place, precision = local_folder(str(folder), precision, runs_on, listener)
        self._words: Generator[Any, Any, None] = chat_contained(place, settings, runs_on, precision)
        self.answered: Answered | None = None
        """What the last answer took; None before the first one."""
        listener.said(f"runs       {next(self._words)}")

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._words.close()

    def clear(self) -> None:
        """Forget the turns; the model stays in memory."""
        from surgery.runtime.conversation import CLEAR

        self._words.send(CLEAR)

    def say(
        self,
        text: str,
        *,
        images: Sequence[str | Path] = (),
        sounds: Sequence[str | Path] = (),
        thought: Callable[[str], object] | None = None,
    ) -> Generator[str, None, None]:
        """The answer in pieces of text, of which some are empty. To close it early ends the answer; what was said
        stays.

        Files stand where the text says `<|image|>` and `<|audio|>`; `thought` is told pieces of what the model thinks.
        """
        from surgery.runtime.conversation import Turn

        files = [tuple(str(file) for file in given) for given in (images, sounds)]
        return self._answer(Turn(text, files[0], files[1]), thought)

    def say_results(
        self, results: Sequence[Any], *, thought: Callable[[str], object] | None = None
    ) -> Generator[str, None, None]:
        """The answer to what tools returned, texts or plain values, in the order of the calls of the last answer.

            while calls := surgery.tool_calls(answer):
                answer = "".join(chat.say_results([run(call.name, call.arguments) for call in calls]))

        Raises RequestError where the last answer has another number of calls.
        """
        from surgery.runtime.conversation import Turn

        return self._answer(Turn("", results=json.dumps(list(results))), thought)

    def _answer(self, turn: Turn, thought: Callable[[str], object] | None) -> Generator[str, None, None]:
        from surgery.runtime.conversation import Counts

        started, first = time.monotonic(), None
        word = self._words.send(asdict(turn))
        try:
            while isinstance(word, list):
                first = first or time.monotonic() - started
                piece, is_thought = word
                if not is_thought:
                    yield piece
                elif thought is not None:
                    thought(piece)
                word = self._words.send(True)
        except GeneratorExit:
            while isinstance(word, list):
                word = self._words.send(False)
        finally:
            if isinstance(word, dict):
                took, counts = time.monotonic() - started, Counts(**word)
                self.answered = Answered(counts.prompt, counts.kept, counts.answer, first or took, took)


def generate(
    folder: str | Path,
    prompt: str,
    *,
    new_tokens: int = 128,
    sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    template: bool = True,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
    images: Sequence[str | Path] = (),
    sounds: Sequence[str | Path] = (),
    precision: str | None = None,
    provider: ProviderChoice = "auto",
    listener: Listener = SILENT,
) -> Generator[str, None, None]:
    """The answer to one prompt, in pieces of text; the options and what is raised are those of Chat.

    print("".join(surgery.generate("out", "Why is the sky blue?")))
    """
    chat = Chat(
        folder, new_tokens=new_tokens, sample=sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        template=template, thinking=thinking, tools=tools, system=system, precision=precision, provider=provider, lasting=False,
        listener=listener,
    )  # fmt: skip
    return _one(chat, prompt, images, sounds)


def _one(
    chat: Chat, prompt: str, images: Sequence[str | Path], sounds: Sequence[str | Path]
) -> Generator[str, None, None]:
    with chat:
        yield from chat.say(prompt, images=images, sounds=sounds)
