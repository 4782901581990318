"""The runtime's tokenizer and template by the gates: what comes back, and what is rendered, against stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from surgery.runtime.tokenizer import render_template
from surgery.verify.genai_proof import check_tokenizer

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
LETTERS = 0x110000


@dataclass
class Tokenizer:
    """A letter is a token. What it gives back and renders is changed on the way."""

    returned: Callable[[str], str] = str
    rendered: Callable[[str], str] = str

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Any) -> str:
        return self.returned("".join(map(chr, ids)))

    def apply_chat_template(self, messages: str, **_: str) -> str:
        return self.rendered(render_template(TEMPLATE, {}, json.loads(messages)))


def gates(
    tokenizer: Tokenizer, folder: Path, vocabulary: int = LETTERS, *, bytes_known: bool = False
) -> dict[str, str]:
    """What fails, and what it says; of what passes nothing."""
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text("{}")
    model = {"byte_fallback": bytes_known, "vocab": {"<0xFF>": 255}}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    found = check_tokenizer(tokenizer, folder, vocabulary)
    assert [gate.name for gate in found] == ["tokenizer gives text back", "chat template renders as in jinja2"]
    return {gate.name: gate.detail for gate in found if not gate.passed}


@pytest.mark.parametrize(("tokenizer", "sentence"), [
    (Tokenizer(), ""),
    (Tokenizer(returned=str.lower), "latin: "),
    (Tokenizer(rendered=str.lower), "the message is lost"),
    (Tokenizer(rendered=lambda text: text.replace("<user>", "<human>")), "in place of '<user>"),
    (Tokenizer(rendered=lambda text: f"{text} "), "in place of '<user>"),
    (Tokenizer(rendered=lambda text: text.replace("Bonjour", "")), "in place of '<user>Good day."),
])  # fmt: skip
def test_each_gate_can_fail(tokenizer: Tokenizer, sentence: str, tmp_path: Path) -> None:
    said = gates(tokenizer, tmp_path)
    assert [sentence in detail for detail in said.values()] == ([True] if sentence else [])


def test_letters_that_are_unknown_are_a_fault_of_a_tokenizer_that_knows_all(tmp_path: Path) -> None:
    assert gates(Tokenizer(), tmp_path, 128) == {}
    assert "an id is outside of the vocabulary" in gates(Tokenizer(), tmp_path, 128, bytes_known=True).popitem()[1]
    assert "outside of the vocabulary" in gates(Tokenizer(), tmp_path, 1).popitem()[1], "no text is known"
