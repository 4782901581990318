"""A conversation: later turns go on from the caches, and say what a run that begins anew says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import TINY

from surgery import Chat, RepackOptions, repack
from surgery.errors import FolderError, RequestError
from surgery.runtime.conversation import ChatSettings, Conversation, Counts, Piece, Turn, _Said, open_conversation
from surgery.runtime.genai import template_of

TURNS = ("hello the world", "the other world, er", "привет", "a wor in the hell")
LAYOUTS = {
    "compatible": RepackOptions(validate=False, precision="fp32"),
    "fast": RepackOptions(validate=False, precision="fp32", preset="fast"),
    "speculative": RepackOptions(validate=False, precision="fp32", preset="fast", speculative=True),
    "multimodal": RepackOptions(validate=False, precision="fp32", modalities=("image", "audio")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each layout of caches."""
    place = tmp_path_factory.mktemp("conversation")
    for name, options in LAYOUTS.items():
        repack(TINY, place / name, options)
    return {name: place / name for name in LAYOUTS}


def said(conversation: Conversation, text: str) -> str:
    return "".join(piece.text for piece in conversation.answer(Turn(text)) if not piece.thought)


def anew(folder: Path, settings: ChatSettings, messages: list[dict[str, str]], text: str) -> str:
    """The answer of a conversation that is all new to the runtime."""
    fresh = open_conversation(folder, settings)
    fresh._said.messages = [dict(message) for message in messages]  # type: ignore[attr-defined]
    answer = said(fresh, text)
    assert fresh.counts.kept == 0
    return answer


@pytest.mark.parametrize("template", [True, False], ids=["template", "raw"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_later_turn_says_what_a_fresh_run_says(
    name: str, template: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the later one takes its prompts in pieces, and the fresh one at once."""
    settings = ChatSettings(new_tokens=9, template=template, lasting=True)
    with monkeypatch.context() as smaller:
        smaller.setattr("surgery.runtime.conversation.PROMPT_CHUNK", 5)
        going = open_conversation(folders[name], settings)
    chunks = going._chunks  # type: ignore[attr-defined]
    assert chunks == ({} if name == "speculative" else {"chunk_size": 5}), "a folder's own stays"
    kept = []
    for text in TURNS:
        before = list(going._said.messages)  # type: ignore[attr-defined]
        assert said(going, text) == anew(folders[name], settings, before, text)
        kept.append(going.counts.kept)
    assert kept[0] == 0
    if name in ("fast", "speculative"):
        assert all(kept[1:]), "one buffer is cut where the turns part"


def ending(folder: Path, tmp_path: Path, token: int) -> Path:
    """A copy of a folder in which a token ends an answer."""
    copied = Path(shutil.copytree(folder, tmp_path / "ending"))
    config = json.loads((copied / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = token
    (copied / "genai_config.json").write_text(json.dumps(config))
    return copied


@pytest.mark.parametrize("name", ["compatible", "fast"])
def test_an_answer_that_ended_is_gone_on_from(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Caches that cannot be cut take what follows an end; the turns are raw, so that nothing else comes between."""
    settings = ChatSettings(new_tokens=9, template=False, lasting=True)
    first = open_conversation(folders[name], settings)
    tokens = [first._tokenizer.encode(piece.text) for piece in first.answer(Turn(TURNS[0]))]  # type: ignore[attr-defined]
    folder = ending(folders[name], tmp_path, int(tokens[4][0]))
    going = open_conversation(folder, settings)
    said(going, TURNS[0])
    before, held = list(going._said.messages), going.counts.prompt + going.counts.answer - 1  # type: ignore[attr-defined]
    assert said(going, TURNS[1]) == anew(folder, settings, before, TURNS[1])
    assert going.counts.kept == held


@pytest.mark.parametrize("name", ["compatible", "fast", "speculative"])
def test_an_answer_that_was_left_is_gone_on_from(name: str, folders: dict[str, Path]) -> None:
    settings = ChatSettings(new_tokens=9, lasting=True)
    going = open_conversation(folders[name], settings)
    pieces = going.answer(Turn(TURNS[0]))
    left = next(pieces).text + next(pieces).text
    pieces.close()  # type: ignore[attr-defined]
    before = list(going._said.messages)  # type: ignore[attr-defined]
    assert before[-1] == {"role": "assistant", "content": left}
    assert said(going, TURNS[1]) == anew(folders[name], settings, before, TURNS[1])


def test_the_last_token_of_an_answer_that_was_cut_is_fed_again(folders: dict[str, Path]) -> None:
    """It is among the runtime's tokens, but not in its caches: there its row would be empty."""
    first = [2, *range(20, 60)]
    logits = []
    for reuse in (True, False):
        going: Any = open_conversation(folders["fast"], ChatSettings(new_tokens=8, lasting=True))
        going._go_on(first, 8)
        list(going._tokens(3, set()))
        going._held = [int(token) for token in going._generator.get_sequence(0)]
        ids = [*going._held, 30, 31]
        kept = going._go_on(ids, 8) if reuse else going._begin(ids, 8)
        assert kept == (len(first) + 2 if reuse else 0)
        logits.append(going._generator.get_logits()[0, -1])
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_what_was_said_is_forgotten(folders: dict[str, Path]) -> None:
    going = open_conversation(folders["fast"], ChatSettings(new_tokens=5, system="be er"))
    answer = said(going, TURNS[0])
    said(going, TURNS[1])
    going.clear()
    assert said(going, TURNS[0]) == answer


def test_a_conversation_outgrows_its_first_room_and_ends_at_the_context(folders: dict[str, Path]) -> None:
    """The small model has a context of 256 tokens."""
    going = open_conversation(folders["fast"], ChatSettings(new_tokens=8, lasting=False))
    for _ in range(4):
        said(going, "hello " * 8)
    assert going.counts.prompt + going.counts.answer > 64
    with pytest.raises(RequestError, match="the context 256"):
        said(going, "hello " * 80)


def test_thoughts_are_told_apart_and_not_remembered() -> None:
    said = _Said(ChatSettings())
    marks, words = {7: True, 8: False}, {1: "a", 2: "b", 7: "", 8: ""}
    pieces = list(said.answered(iter([7, 1, 2, 8, 2, 1]), lambda token: words[token], marks))
    assert [piece.text for piece in pieces if piece.thought] == ["", "a", "b"]
    assert said.messages == [{"role": "assistant", "content": "ba"}]
    assert pieces[0] == Piece("", True)


def test_thinking_is_asked_of_the_template(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["fast"], tmp_path / "thinks"))
    template = folder / "chat_template.jinja"
    with pytest.raises(RequestError, match="has no thinking"):
        open_conversation(folder, ChatSettings(thinking=True))
    template.write_text("{%- if enable_thinking -%}the {% endif -%}" + template.read_text())
    counts = []
    for thinking in (True, False):
        going = open_conversation(folder, ChatSettings(new_tokens=1, thinking=thinking))
        said(going, "hello")
        counts.append(going.counts.prompt)
    assert counts[0] > counts[1]
    assert "enable_thinking" in (template_of(folder) or "")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"template": False, "system": "a"}, "a system message needs the chat template"),
        ({"template": False, "thinking": True}, "thinking needs the chat template"),
    ],
)
def test_a_setting_that_cannot_be_is_a_sentence(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        ChatSettings(**options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def chat(folders: dict[str, Path]) -> Iterator[Chat]:
    with Chat(folders["fast"], new_tokens=6) as open_chat:
        yield open_chat


def test_the_library_talks_through_a_process_of_its_own(chat: Chat, folders: dict[str, Path]) -> None:
    here = open_conversation(folders["fast"], ChatSettings(new_tokens=6, lasting=True))
    for text in TURNS[:2]:
        assert "".join(chat.say(text)) == said(here, text)
        assert chat.answered is not None
        assert Counts(chat.answered.prompt, chat.answered.kept, chat.answered.tokens) == here.counts
        assert 0 < chat.answered.first <= chat.answered.seconds and chat.answered.rate
    chat.clear()


def test_leaving_an_answer_leaves_the_conversation(chat: Chat) -> None:
    chat.clear()
    whole = "".join(chat.say(TURNS[0]))
    chat.clear()
    pieces = chat.say(TURNS[0])
    next(pieces)
    pieces.close()
    assert chat.answered is not None and chat.answered.tokens < 6
    chat.clear()
    assert "".join(chat.say(TURNS[0])) == whole


def test_two_graphs_talk_too() -> None:
    going = open_conversation(TINY, ChatSettings(new_tokens=5), precision="fp32")
    before, answer = [], ""
    for text in TURNS[:2]:
        before = list(going._said.messages)  # type: ignore[attr-defined]
        answer = said(going, text)
    fresh = open_conversation(TINY, ChatSettings(new_tokens=5), precision="fp32")
    fresh._said.messages = before  # type: ignore[attr-defined]
    assert said(fresh, TURNS[1]) == answer
    with pytest.raises(FolderError, match="images and sound are for GenAI folders"):
        next(going.answer(Turn("what?", images=("a.png",))))
