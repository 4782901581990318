"""Chat templates in GenAI's dialect against jinja2's rendering of the published ones, byte by byte.

    python -m validation.chat_templates TEMPLATE.jinja ...

The conversations are made up from a seed: system messages, thinking, calls of tools and what they answer, schemas with
objects in objects, enumerations and lists, texts in many scripts. Needs onnxruntime-genai and jinja2.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.folder.chat_template import genai_template

BOS = "<bos>"
_TEXTS = (
    "hello", "What is the height of the tide today?", " padded \n", "\u3000全角の空白\u3000", "فانوس دریایی چیست؟", "naïve café",
    "👩‍🚀 \\o/", "a \"quoted\" 'text'", "{curly} [square] <angle|>", "{{ not_jinja }} {% nor_this %}", "\ttab\x0b\u00a0\u2003", "",
    "line\r\nbreak", "100 % & more", "Ünïcödé ßẞ", "back\\slash", "<|channel>thought\nhm<channel|> well", "a<channel|>b",
)  # fmt: skip
_NAMES = (
    "city",
    "Unit",
    "unit_2",
    "limit",
    "Zeta",
    "alpha",
    "Alpha2",
    "名前",
    "type",
    "items",
    "description",
    "required",
    "naïve",
    "_x",
)
_TOOLS = ("get_weather", "search", "add_numbers", "Lookup")
_NUMBERS = (0, 1, -7, 2**53, 0.5, -0.0, 1.0, 1e-7, 1e22, 12.25)


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking: bool


def conversations(number: int, seed: int = 0) -> Iterator[Conversation]:
    """Made up from the seed; a third without tools, a third with thinking."""
    for index in range(number):
        chance = random.Random(f"{seed}/{index}")
        tools = [_tool(chance, name) for name in chance.sample(_TOOLS, chance.randint(1, 3))] if index % 3 else None
        yield Conversation(list(_messages(chance, bool(tools))), tools, index % 3 == 2)


def _messages(chance: random.Random, called: bool) -> Iterator[dict[str, Any]]:
    if chance.random() < 0.5:
        yield {"role": "system", "content": chance.choice(_TEXTS)}
    for turn in range(chance.randint(1, 4)):
        if turn:
            yield {"role": "assistant", "content": chance.choice(_TEXTS)}
        parts = [{"type": "text", "text": chance.choice(_TEXTS)}, {"type": "image"}]
        yield {"role": "user", "content": parts if chance.random() < 0.1 else chance.choice(_TEXTS)}
        if called and chance.random() < 0.6:
            yield from _call(chance)


def _call(chance: random.Random) -> Iterator[dict[str, Any]]:
    names = chance.sample(_TOOLS, chance.randint(1, 2))
    calls = [
        {"id": f"call-{name}", "type": "function", "function": {"name": name, "arguments": _object(chance, 2)}}
        for name in names
    ]
    message: dict[str, Any] = {"role": "assistant", "content": chance.choice(("", *_TEXTS[:4])), "tool_calls": calls}
    if chance.random() < 0.5:
        message["reasoning"] = chance.choice(_TEXTS[:6])
    if chance.random() < 0.2:  # as Gemma has it itself: what the tools answer is part of the model's turn
        message["tool_responses"] = [{"name": name, "response": _value(chance, 2)} for name in names]
        yield message
        return
    yield message
    if chance.random() < 0.8:
        for name in names:
            yield {"role": "tool", "tool_call_id": f"call-{name}", "name": name, "content": chance.choice(_TEXTS)}
        if chance.random() < 0.7:
            yield {"role": "assistant", "content": chance.choice(_TEXTS)}


def _value(chance: random.Random, depth: int) -> Any:
    kind = chance.randrange(7 if depth else 5)
    if kind < 2:
        return chance.choice(_TEXTS)
    if kind == 2:
        return chance.choice(_NUMBERS)
    if kind < 5:
        return chance.choice((True, False, None))
    return _object(chance, depth - 1) if kind == 5 else [_value(chance, depth - 1) for _ in range(chance.randrange(4))]


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    return {name: _value(chance, depth) for name in chance.sample(_NAMES, chance.randrange(5))}


def _tool(chance: random.Random, name: str) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name, "description": chance.choice(_TEXTS), "parameters": _schema(chance, 2)}
    for key in ("description", "parameters"):
        if chance.random() < 0.1:
            del function[key]
    if chance.random() < 0.2:
        function["response"] = {"type": "object", "description": chance.choice(_TEXTS)}
    return {"type": "function", "function": function}


def _schema(chance: random.Random, depth: int) -> dict[str, Any]:
    """An object whose properties are of every kind; the names of a schema's own keys are among theirs."""
    names = chance.sample(_NAMES, chance.randint(0, 5))
    found: dict[str, Any] = {"type": "object", "properties": {name: _property(chance, depth) for name in names}}
    if names and chance.random() < 0.6:
        found["required"] = names[:2]
    return found


def _property(chance: random.Random, depth: int) -> dict[str, Any]:
    kind = chance.choice(("string", "integer", "number", "boolean", *(("array", "object") if depth else ())))
    found: dict[str, Any] = _schema(chance, depth - 1) if kind == "object" else {"type": kind}
    if kind == "string" and chance.random() < 0.5:
        found["enum"] = chance.sample(_TEXTS[:6], 2)
    if kind == "array":
        found["items"] = _property(chance, depth - 1)
    if chance.random() < 0.7:
        found["description"] = chance.choice(_TEXTS)
    if chance.random() < 0.2:
        found["nullable"] = True
    return found


def published_text(template: str, said: Conversation) -> str:
    """What jinja2 renders of the published template."""
    from surgery.runtime.tokenizer import render_template

    thinking = {"enable_thinking": True} if said.thinking else {}
    return render_template(template, {"bos_token": BOS}, said.messages, tools=said.tools, **thinking)


def renderer(folder: Path, template: str) -> Callable[[Conversation], str]:
    """What GenAI renders of a template in its dialect, put into a folder for it: to read one takes half a second."""
    from surgery.runtime.genai import open_tokenizer

    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizers = {}
    for thinking, told in ((False, ""), (True, "{%- set enable_thinking = true -%}")):
        text = json.dumps({**settings, "chat_template": told + template})
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        tokenizers[thinking] = open_tokenizer(folder, "cpu")

    def render(said: Conversation) -> str:
        tools: Mapping[str, str] = {} if said.tools is None else {"tools": json.dumps(said.tools)}
        return str(tokenizers[said.thinking].apply_chat_template(json.dumps(said.messages), **tools))

    return render


def main() -> None:
    from surgery import RepackOptions, repack

    parser = argparse.ArgumentParser(description="Render templates in GenAI's dialect, and compare.")
    parser.add_argument("templates", nargs="+", type=Path)
    parser.add_argument("--conversations", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        repack("fixtures/tiny-e2b", Path(place) / "out", RepackOptions(validate=False))
        for path in options.templates:
            published = path.read_text(encoding="utf-8")
            render = renderer(Path(place) / "out", genai_template(published) or published)
            same = refused = 0
            for number, said in enumerate(conversations(options.conversations, options.seed), 1):
                try:
                    wanted = published_text(published, said)
                except Exception:  # jinja2 refuses it: there is nothing to compare
                    refused += 1
                    continue
                found = render(said)
                same += found == wanted
                if found != wanted and same + 1 == number - refused:
                    at = next((n for n, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), 0)
                    print(f"{path.name}: {wanted[at - 60 : at + 60]!r}, and not {found[at - 60 : at + 60]!r}")
            print(f"{path.name}: {same} of {options.conversations - refused} the same, {refused} refused by jinja2")


if __name__ == "__main__":
    main()
