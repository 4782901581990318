"""A recipe: an ordered list of passes with their options, and its text form.

    recipe  = pass { "," pass }
    pass    = NAME [ "{" option { "," option } "}" ]
    option  = NAME "=" value
    value   = a word without , { } = " or space | a JSON string

    merge-embeddings{embed=onnx/embed_tokens_q4.onnx},fold-logits-to-keep{keep=last},rename-io

`parse(text(recipe)) == recipe`, and `text(parse(s))` is one canonical spelling: options at their defaults are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import types
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from passes.base import Pass
from passes.registry import names, pass_class
from surgery.errors import RecipeError, nearest

Recipe = tuple[Pass, ...]

_TOKEN = re.compile(r'\s*(?:(?P<mark>[{},=])|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<word>[^\s{},="]+))')
_PLAIN = re.compile(r'[^\s{},="]+')


def recipe_text(recipe: Sequence[Pass]) -> str:
    """The text of a recipe. Raises RecipeError for an option that has none, as a model in memory."""
    return ",".join(_pass_text(step) for step in recipe)


def _pass_text(step: Pass) -> str:
    options = []
    for option in dataclasses.fields(step):
        value = getattr(step, option.name)
        if value != option.default:
            options.append(f"{option.name}={_value_text(value)}")
    return f"{step.name}{{{','.join(options)}}}" if options else step.name


def _value_text(value: Any) -> str:
    if not isinstance(value, (bool, int, float, str, Path)):
        raise RecipeError(f"a {type(value).__name__} in memory has no name that a recipe could write; give a file")
    plain = str(value).lower() if isinstance(value, bool) else str(value)
    return plain if _PLAIN.fullmatch(plain) else json.dumps(plain)


def parse(source: str) -> Recipe:
    """Read a recipe. Raises RecipeError for unknown passes and options, with the nearest known name."""
    return tuple(build(pass_class(name), options) for name, options in _read(source))


def known_passes(source: str) -> list[type[Pass]]:
    """The passes that a text names and that are known here; others are left out, and so is a text that is no recipe.

    For recipes out of a manifest, which another version may have written: options are not looked at.
    """
    found: list[type[Pass]] = []
    with contextlib.suppress(RecipeError):
        for name, _ in _read(source):
            with contextlib.suppress(RecipeError):
                found.append(pass_class(name))
    return found


StepT = TypeVar("StepT", bound=Pass)


def steps_of(source: str, kind: type[StepT]) -> list[StepT]:
    """The passes of one kind that a text names, in order; as in `known_passes`, what cannot be read is left out."""
    found: list[StepT] = []
    with contextlib.suppress(RecipeError):
        for name, options in _read(source):
            if name == kind.name:
                step = build(kind, options)
                assert isinstance(step, kind)  # `build` made it of the class
                found.append(step)
    return found


def _read(source: str) -> list[tuple[str, dict[str, str]]]:
    """The name of each pass and the text of its options, whether they are known or not."""
    tokens = _Tokens(source)
    steps = [_read_pass(tokens)]
    while tokens.take(","):
        steps.append(_read_pass(tokens))
    if tokens.left:
        raise RecipeError(f"recipe: {tokens.left[0]!r} is not expected after {steps[-1][0]}")
    return steps


class _Tokens:
    def __init__(self, source: str) -> None:
        self.left: deque[str] = deque()
        position, end = 0, len(source.rstrip())
        while position < end:
            match = _TOKEN.match(source, position)
            if match is None:
                raise RecipeError(f"recipe: cannot read {source[position : position + 20]!r}")
            self.left.append(match[0].strip())
            position = match.end()

    def take(self, mark: str) -> bool:
        if self.left and self.left[0] == mark:
            self.left.popleft()
            return True
        return False

    def word(self, what: str) -> str:
        if not self.left or self.left[0] in "{},=":
            found = repr(self.left[0]) if self.left else "the end"
            raise RecipeError(f"recipe: {what} is expected, {found} is found")
        token = self.left.popleft()
        try:
            return str(json.loads(token)) if token.startswith('"') else token
        except ValueError:
            raise RecipeError(f"recipe: {token} is not a JSON string") from None


def _read_pass(tokens: _Tokens) -> tuple[str, dict[str, str]]:
    name = tokens.word("the name of a pass")
    given: dict[str, str] = {}
    if tokens.take("{") and not tokens.take("}"):
        while True:
            option = tokens.word(f"an option of {name}")
            if not tokens.take("="):
                raise RecipeError(f"recipe: option {option!r} of {name} has no value; write {option}=VALUE")
            if option in given:
                raise RecipeError(f"recipe: option {option!r} of {name} is given twice")
            given[option] = tokens.word(f"the value of {name}'s {option}")
            if tokens.take("}"):
                break
            if not tokens.take(","):
                raise RecipeError(f"recipe: the options of {name} do not end with '}}'")
    return name, given


def build(kind: type[Pass], given: dict[str, str]) -> Pass:
    """A pass from the text of its options. Raises RecipeError for unknown, missing and unreadable ones."""
    options = {option.name: option for option in dataclasses.fields(kind)}
    hints = _hints(kind)
    for option in given:
        if option not in options:
            known = ", ".join(options) or "none"
            raise RecipeError(f"{kind.name} has no option {option!r}{nearest(option, list(options))}; it has {known}")
    for option, field in options.items():
        if _is_required(field) and option not in given:
            raise RecipeError(f"{kind.name} needs the option {option}=VALUE")
    return kind(**{option: _read_value(kind.name, option, hints[option], value) for option, value in given.items()})


def _is_required(option: dataclasses.Field[Any]) -> bool:
    return option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING


_VALUES = {Path: "a file", int: "a whole number", float: "a number", str: "text"}


def _hints(kind: type[Pass]) -> dict[str, Any]:
    """Option -> the type of its value where one is given: `int` of `int | None`. Raises RecipeError for other types."""
    try:
        hints = get_type_hints(kind)
    except NameError as error:
        raise RecipeError(f"{kind.name}: the type of an option cannot be read: {error}") from None
    found = {}
    for option in dataclasses.fields(kind):
        hint = hints[option.name]
        several = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
        written = [one for one in several if one in _VALUES or _choices(one)]
        if not written:
            raise RecipeError(f"{kind.name}: {option.name} is {hint}, which a recipe cannot write")
        found[option.name] = written[0]
    return found


def _choices(hint: Any) -> dict[str, Any]:
    """What can be written -> the value that it means, of a Literal or a bool; nothing of other types."""
    if hint is bool:
        return {"true": True, "false": False}
    return {str(choice): choice for choice in get_args(hint)} if get_origin(hint) is Literal else {}


def _read_value(name: str, option: str, hint: Any, value: str) -> Any:
    choices = _choices(hint)
    if value in choices:
        return choices[value]
    if hint is int and re.fullmatch(r"-?\d{1,18}", value):
        return int(value)
    if hint is float:
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    if hint in (int, float) or choices:
        raise RecipeError(f"{name}: {option} is {value!r}{nearest(value, list(choices))}; {_values(hint)} is expected")
    return hint(value)


def describe_pass(name: str) -> dict[str, Any]:
    """A pass for people and programs: its name, summary, what it does to numbers and weights, and its options.

    Raises RecipeError for an unknown name. A pass of another package that cannot be loaded says so in its summary.
    """
    try:
        kind = pass_class(name)
        hints = _hints(kind)
    except RecipeError as error:
        if name not in names():
            raise
        return {"name": name, "summary": str(error), "options": []}
    options = [
        {"name": option.name, "values": _values(hints[option.name]), "default": _default(option)}
        for option in dataclasses.fields(kind)
    ]
    said = {"numerics": kind.numerics.kind, "rewrites_weights": kind.rewrites_weights}
    return {"name": name, "summary": kind.summary, **said, "options": options}


def _default(option: dataclasses.Field[Any]) -> str:
    return "required" if _is_required(option) else "none" if option.default is None else str(option.default)


def _values(hint: Any) -> str:
    return " or ".join(_choices(hint)) or _VALUES[hint]
