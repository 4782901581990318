"""A recipe: an ordered list of passes with their options, and its text form.

    recipe  = pass { "," pass }
    pass    = NAME [ "{" option { "," option } "}" ]
    option  = NAME "=" value
    value   = a word without , { } = " or space | a JSON string

    merge-embeddings{embed=onnx/embed_tokens_q4.onnx},fold-logits-to-keep{keep=last},rename-io

`parse(text(recipe)) == recipe`, and `text(parse(s))` is one canonical spelling: options at their defaults are left out.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from passes import (
    PASSES,
    AnnotateHeadSizes,
    DropAttentionBias,
    ExpandSharedKV,
    FitEncoder,
    FlattenPerLayerInputs,
    FoldLogitsToKeep,
    FuseAttention,
    FusePerLayerTable,
    HostEmbeddings,
    MaskMediaIds,
    MergeEmbeddings,
    RenameIO,
    ScatterFeatures,
    SetAccuracyLevel,
    SliceCaches,
    SplitPerLayerTable,
    TieLmHead,
    ToFp16,
    UniformHeads,
)
from passes.base import Pass
from surgery.choices import AccuracyLevel, KVLayout, Modality, OnnxRuntime, PerLayerTable, Target
from surgery.errors import RecipeError, nearest
from surgery.source.export import ENCODERS

Recipe = tuple[Pass, ...]

_TOKEN = re.compile(r'\s*(?:(?P<mark>[{},=])|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<word>[^\s{},="]+))')
_PLAIN = re.compile(r'[^\s{},="]+')


def compatible(
    embed: Path,
    kv_layout: KVLayout = "aliased",
    target: Target = "genai-0.14",
    *,
    half: bool = False,
    accuracy_level: AccuracyLevel | None = None,
) -> Recipe:
    """The main recipe. `aliased` gives every layer a pair of caches, `unique` leaves the owners' pairs alone.

    `target` is the oldest runtime that must load the folder; below 0.14 all caches get one size.
    `half` makes float16 of a float32 precision, which CUDA needs; every number then changes a little.
    `accuracy_level` is MatMulNBits' on the CPU: 4 multiplies in int8, and changes every number too.
    """
    expand: Recipe = (ExpandSharedKV(),) if kv_layout == "aliased" else ()
    uniform: Recipe = (UniformHeads(),) if target == "genai-0.12" else ()
    halved: Recipe = (ToFp16(),) if half else ()
    level: Recipe = (SetAccuracyLevel(accuracy_level),) if accuracy_level is not None else ()
    merged: Recipe = (MergeEmbeddings(embed), FoldLogitsToKeep(), RenameIO())
    return (*merged, *expand, AnnotateHeadSizes(), *uniform, *halved, *level)


def fast(
    embed: Path,
    provider: str = "cpu",
    onnxruntime: OnnxRuntime = "1.31",
    *,
    half: bool = False,
    accuracy_level: AccuracyLevel | None = None,
) -> Recipe:
    """The recipe for speed: all attention in GroupQueryAttention, the owners' caches alone, updated in place.

    The arithmetic is the source's in another order. On the CPU attention reads no more of a cache than is in view.
    `onnxruntime` is the oldest ONNX Runtime that must run it. `half` and `accuracy_level` as in `compatible`.
    """
    halved: Recipe = (ToFp16(),) if half else ()
    level: Recipe = (SetAccuracyLevel(accuracy_level),) if accuracy_level is not None else ()
    attention: Recipe = (FuseAttention(onnxruntime), DropAttentionBias())
    merged: Recipe = (MergeEmbeddings(embed), TieLmHead(), FoldLogitsToKeep(), RenameIO())
    sliced: Recipe = (SliceCaches(onnxruntime),) if provider == "cpu" else ()
    return (*merged, *attention, AnnotateHeadSizes(), *halved, *sliced, *level)


def per_layer_tables(choice: PerLayerTable) -> Recipe:
    """What follows a recipe: the table of per-layer inputs as it is, cut into one a layer, or put together."""
    recipes: dict[PerLayerTable, Recipe] = {
        "keep": (),
        "split": (SplitPerLayerTable(),),
        "fused": (FusePerLayerTable(),),
    }
    return recipes[choice]


def kept_in_host_memory(asked: bool) -> Recipe:
    """What follows a recipe where the token tables are to stay in host memory; behind what changes the tables."""
    return (HostEmbeddings(),) if asked else ()


def multimodal(
    merged: Recipe, tokens: Mapping[Modality, int], hidden: int, patches: int | None = None
) -> dict[str, Recipe]:
    """The recipes of a folder that takes images or sound too: one for each of its graphs, by role.

    The decoder's is `merged`, the recipe for text, without the embeddings in the graph. `tokens` are the placeholders'
    ids, `hidden` is the text model's size, `patches` the most that an image has.
    """
    ids = {str(modality): token for modality, token in tokens.items()}
    decoder = tuple(step for step in merged if not isinstance(step, MergeEmbeddings))
    recipes: dict[str, Recipe] = {
        "decoder_model_merged": (*decoder, FlattenPerLayerInputs()),
        "embed_tokens": (ScatterFeatures(**ids), MaskMediaIds(**ids), FlattenPerLayerInputs()),
    }
    for modality in tokens:
        recipes[ENCODERS[modality]] = (FitEncoder(modality, hidden, patches if modality == "image" else None),)
    return recipes


def text(recipe: Sequence[Pass]) -> str:
    return ",".join(_pass_text(step) for step in recipe)


def _pass_text(step: Pass) -> str:
    options = []
    for option in dataclasses.fields(step):
        value = getattr(step, option.name)
        if value != option.default:
            options.append(f"{option.name}={_value_text(value)}")
    return f"{step.name}{{{','.join(options)}}}" if options else step.name


def _value_text(value: Any) -> str:
    plain = str(value).lower() if isinstance(value, bool) else str(value)
    return plain if _PLAIN.fullmatch(plain) else json.dumps(plain)


def parse(source: str) -> Recipe:
    """Read a recipe. Raises RecipeError for unknown passes and options, with the nearest known name."""
    return tuple(build(_known(name), options) for name, options in _read(source))


def known_passes(source: str) -> list[type[Pass]]:
    """The passes that a text names and that are known here; others are left out, and so is a text that is no recipe.

    For recipes out of a manifest, which another version may have written: options are not looked at.
    """
    try:
        names = [name for name, _ in _read(source)]
    except RecipeError:
        return []
    return [PASSES[name] for name in names if name in PASSES]


def _read(source: str) -> list[tuple[str, dict[str, str]]]:
    """The name of each pass and the text of its options, whether they are known or not."""
    tokens = _tokens(source)
    steps = [_read_pass(tokens)]
    while tokens.take(","):
        steps.append(_read_pass(tokens))
    if tokens.left:
        raise RecipeError(f"recipe: {tokens.left[0]!r} is not expected after {steps[-1][0]}")
    return steps


def _known(name: str) -> type[Pass]:
    if name not in PASSES:
        raise RecipeError(f"no pass is named {name!r}{nearest(name, list(PASSES))}; there are {', '.join(PASSES)}")
    return PASSES[name]


class _Tokens:
    def __init__(self, tokens: list[str]) -> None:
        self.left = deque(tokens)

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
        return _unquoted(token) if token.startswith('"') else token


def _unquoted(token: str) -> str:
    try:
        return str(json.loads(token))
    except ValueError:
        raise RecipeError(f"recipe: {token} is not a JSON string") from None


def _tokens(source: str) -> _Tokens:
    tokens, position, end = [], 0, len(source.rstrip())
    while position < end:
        match = _TOKEN.match(source, position)
        if match is None:
            raise RecipeError(f"recipe: cannot read {source[position : position + 20]!r}")
        tokens.append(match[0].strip())
        position = match.end()
    return _Tokens(tokens)


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
    hints = get_type_hints(kind)
    for option in given:
        if option not in options:
            known = ", ".join(options) or "none"
            raise RecipeError(f"{kind.name} has no option {option!r}{nearest(option, list(options))}; it has {known}")
    for option, field in options.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and option not in given:
            raise RecipeError(f"{kind.name} needs the option {option}=VALUE")
    return kind(**{option: _read_value(kind.name, option, hints[option], value) for option, value in given.items()})


def _read_value(name: str, option: str, hint: Any, value: str) -> Any:
    hint = _given(hint)
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        if value not in choices:
            raise RecipeError(
                f"{name}: {option} is {value!r}{nearest(value, choices)}; {' or '.join(choices)} is expected"
            )
        return value
    if hint is bool:
        if value not in ("true", "false"):
            raise RecipeError(f"{name}: {option} is {value!r}; true or false is expected")
        return value == "true"
    if hint is int:
        if not re.fullmatch(r"-?\d{1,18}", value):
            raise RecipeError(f"{name}: {option} is {value!r}; a whole number is expected")
        return int(value)
    return Path(value) if hint is Path else value


def describe(name: str) -> dict[str, Any]:
    """A pass for people and programs: name, summary, and its options with their values and defaults."""
    kind = PASSES[name]
    hints = get_type_hints(kind)
    options = [
        {
            "name": option.name,
            "values": _values(hints[option.name]),
            "default": "required" if option.default is dataclasses.MISSING else _default_text(option.default),
        }
        for option in dataclasses.fields(kind)
    ]
    return {"name": name, "summary": kind.summary, "options": options}


def _default_text(value: Any) -> str:
    return "none" if value is None else str(value)


def _values(hint: Any) -> str:
    hint = _given(hint)
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    return {Path: "a file", int: "a whole number", bool: "true or false"}.get(hint, "text")


def _given(hint: Any) -> Any:
    """The type of an option's value where one is given: `int` of `int | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(choice for choice in get_args(hint) if choice is not type(None))
    return hint
