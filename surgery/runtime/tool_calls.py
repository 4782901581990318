"""Calls of tools, as Gemma 4 writes them: out of an answer, and as a grammar that an answer has to follow.

    <|tool_call>call:NAME{key:VALUE,other:VALUE}<tool_call|>

A VALUE is a text between two `<|"|>`, a number, true, false or None, [VALUE,...] or {key:VALUE,...}. The marks are single
tokens, which a decoder leaves out unless it is told to keep special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import RequestError
from surgery.files.json_values import finite_number, whole_number

_BEGINS, _ENDS, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_HEAD = re.compile(r"call:([^{}]+)(?=\{)")
_KEY = re.compile(r"[^:{}\[\],]+(?=:)")
_WORD = re.compile(r"true|false|None|null|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "None": None, "null": None}
_DEEPEST = 64
_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool's name, and its arguments as plain values."""

    name: str
    arguments: Mapping[str, Any]


def tool_calls(answer: str) -> list[ToolCall]:
    """The calls in an answer, in their order. Raises RequestError for one that is cut off or is not in this form."""
    return list(_calls(answer))


def _calls(answer: str) -> Iterator[ToolCall]:
    at = answer.find(_BEGINS)
    while at >= 0:
        reader = _Reader(answer, at + len(_BEGINS))
        name = reader.match(_HEAD, "call:NAME{")[1]
        arguments = reader.value(0)
        reader.expect(_ENDS)
        yield ToolCall(name, arguments)
        at = answer.find(_BEGINS, reader.at)


class _Reader:
    def __init__(self, text: str, at: int) -> None:
        self._text, self.at = text, at

    def match(self, pattern: re.Pattern[str], wanted: str) -> re.Match[str]:
        found = pattern.match(self._text, self.at)
        if found is None:
            raise self._wrong(wanted)
        self.at = found.end()
        return found

    def expect(self, word: str) -> None:
        if not self._takes(word):
            raise self._wrong(word)

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise RequestError(f"a tool call has values {depth} deep; {_DEEPEST} at most are read")
        if self._takes(_QUOTE):
            end = self._text.find(_QUOTE, self.at)
            if end < 0:
                raise self._wrong(_QUOTE)
            text, self.at = self._text[self.at : end], end + len(_QUOTE)
            return text
        if self._takes("{"):
            return dict(self._listed("}", depth))
        if self._takes("["):
            return list(self._listed("]", depth))
        word = self.match(_WORD, "a value")[0]
        if word in _WORDS:
            return _WORDS[word]
        try:
            return json.loads(word, parse_int=whole_number, parse_float=finite_number)
        except ValueError:
            raise RequestError(f"a tool call has the value {word[:40]!r}, which is no number of JSON's") from None

    def _listed(self, end: str, depth: int) -> Iterator[Any]:
        while not self._takes(end):
            if end == "}":
                key = self.match(_KEY, "a key")[0].removeprefix(_QUOTE).removesuffix(_QUOTE)
                self.expect(":")
                yield key, self.value(depth + 1)
            else:
                yield self.value(depth + 1)
            if not self._takes(","):
                self.expect(end)
                return

    def _takes(self, word: str) -> bool:
        if self._text.startswith(word, self.at):
            self.at += len(word)
            return True
        return False

    def _wrong(self, wanted: str) -> RequestError:
        here = self._text[self.at : self.at + 20]
        return RequestError(
            f"a tool call is not in the model's form: {wanted} is expected, and there is {here!r}" if here else
            f"a tool call is cut off: {wanted} is expected at its end"
        )  # fmt: skip


def tool_grammar(tools: Sequence[Mapping[str, Any]], *, must_call: bool = False) -> str:
    """A Lark grammar for GenAI's guidance (`params.set_guidance("lark_grammar", ...)`): text, or calls of these tools
    with arguments of their types; `must_call` leaves out the text.

    `tools` are as the chat template takes them. What a tool requires is not asked for: the model may leave it out.
    Raises RequestError for a tool without a name.
    """
    rules = [
        f"start: {'' if must_call else 'TEXT | '}call+",
        f"call: {_BEGINS} ({' | '.join(f'tool_{n}' for n in range(len(tools)))}) {_ENDS}",
    ]
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(f"tool {number} has the name {name!r}; letters, digits, _, . and - are expected")
        arguments = _rule(function.get("parameters") or {"type": "object"}, f"of_{number}", rules)
        rules.append(f"tool_{number}: {json.dumps(f'call:{name}')} {arguments}")
    return "\n".join([*rules, *_VALUES])


_VALUES = (
    'text: <|"|> TEXT <|"|>',
    'value: text | NUMBER | "true" | "false" | "None" | "[" (value ("," value)*)? "]" | object',
    'object: "{" (KEY ":" value ("," KEY ":" value)*)? "}"',
    "TEXT: /(.|\\n)*/",
    r"KEY: /[^:{}\[\],<>]+/",
    r"NUMBER: /-?[0-9]+(\.[0-9]+)?/",
    r"INTEGER: /-?[0-9]+/",
)


def _rule(schema: Mapping[str, Any], name: str, rules: list[str]) -> str:
    """What stands for a value of a schema in a rule; objects and lists become rules of their own."""
    kind = str(schema.get("type", "")).lower()
    properties = schema.get("properties")
    if kind == "string" and isinstance(listed := schema.get("enum"), list) and all(isinstance(e, str) for e in listed):
        return f'<|"|> ({" | ".join(json.dumps(entry) for entry in listed)}) <|"|>'
    if kind == "object" and isinstance(properties, Mapping) and properties:
        pairs = [
            f"{json.dumps(f'{key}:')} {_rule(inner, f'{name}_{number}', rules)}"
            for number, (key, inner) in enumerate(properties.items())
        ]
        rules += [f"{name}_pair: {' | '.join(pairs)}", f'{name}: "{{" ({name}_pair ("," {name}_pair)*)? "}}"']
        return name
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        entry = _rule(schema["items"], f"{name}_entry", rules)
        rules.append(f'{name}: "[" ({entry} ("," {entry})*)? "]"')
        return name
    plain = {
        "string": "text",
        "integer": "INTEGER",
        "number": "NUMBER",
        "boolean": '("true" | "false")',
        "object": "object",
    }
    return plain.get(kind, "value")
