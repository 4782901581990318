"""The text form of a recipe parses back to itself; mistakes are one sentence with the nearest name."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Literal

import pytest

from passes import AnnotateHeadSizes, ExpandSharedKV, FoldLogitsToKeep, MergeEmbeddings, RenameIO
from passes.base import Finding, Pass
from passes.presets import compatible
from passes.recipe import build, parse, recipe_text
from passes.registry import BUILT_IN, pass_class
from surgery.errors import RecipeError
from surgery.graph.model import Model

HOSTILE = [
    "a.onnx", "onnx/embed tokens.onnx", 'quo"te.onnx', "back\\slash.onnx", "a,b={c}.onnx", "層/ß\u202e.onnx",
    "tab\t.onnx", "new\nline.onnx", "\x1b[31m.onnx", "=", "{}", ",", '"', "'", "\udc80.onnx", " lead and trail ",
    "/abs/../p.onnx",
    "\x00",
]  # fmt: skip


def test_the_main_recipe_has_one_canonical_text() -> None:
    recipe = compatible(Path("onnx/embed_tokens_q4.onnx"))
    assert recipe_text(recipe) == (
        "merge-embeddings{embed=onnx/embed_tokens_q4.onnx},fold-logits-to-keep,rename-io,move-padding,"
        "expand-shared-kv,annotate-head-sizes"
    )
    assert parse(recipe_text(recipe)) == recipe
    assert ExpandSharedKV() not in compatible(Path("a"), "unique")


def test_options_at_their_defaults_are_left_out() -> None:
    assert recipe_text(parse('fold-logits-to-keep{keep="last"}')) == "fold-logits-to-keep"
    assert (
        recipe_text(parse(" rename-io { } , fold-logits-to-keep { keep = all } "))
        == "rename-io,fold-logits-to-keep{keep=all}"
    )


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_paths_come_back(path: str) -> None:
    recipe = (MergeEmbeddings(Path(path)), RenameIO())
    assert parse(recipe_text(recipe)) == recipe


def test_random_recipes_come_back_and_have_one_text() -> None:
    rng = random.Random(4)
    alphabet = 'ab/.{}=," \\\n\t層\x7f-_'

    def some_pass() -> Pass:
        path = Path("".join(rng.choices(alphabet, k=rng.randrange(1, 12))))
        keep = FoldLogitsToKeep(rng.choice(("last", "all")))  # type: ignore[arg-type]
        return rng.choice((MergeEmbeddings(path), keep, RenameIO(), ExpandSharedKV(), AnnotateHeadSizes()))

    for _ in range(500):
        recipe = tuple(some_pass() for _ in range(rng.randrange(1, 6)))
        written = recipe_text(recipe)
        assert parse(written) == recipe
        assert recipe_text(parse(written)) == written


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("", "the name of a pass is expected, the end is found"),
        ("  ", "the name of a pass is expected, the end is found"),
        (",", "the name of a pass is expected, ',' is found"),
        ("rename-io,", "the name of a pass is expected, the end is found"),
        ("rename-oi", r"no pass is named 'rename-oi' \(did you mean 'rename-io'\?\); there are merge-embeddings, "),
        ("zzz", "no pass is named 'zzz'; there are merge-embeddings, "),
        ("rename-io rename-io", "'rename-io' is not expected after rename-io"),
        ("rename-io}", "'}' is not expected after rename-io"),
        ("rename-io{", "an option of rename-io is expected, the end is found"),
        ("rename-io{a=b}", "rename-io has no option 'a'; it has none"),
        ("fold-logits-to-keep{kep=all}", r"no option 'kep' \(did you mean 'keep'\?\); it has keep"),
        ("fold-logits-to-keep{keep=lst}", r"keep is 'lst' \(did you mean 'last'\?\); last or all is expected"),
        ("fold-logits-to-keep{keep}", "option 'keep' of fold-logits-to-keep has no value; write keep=VALUE"),
        ("fold-logits-to-keep{keep=}", "the value of fold-logits-to-keep's keep is expected, '}' is found"),
        ("fold-logits-to-keep{keep=all", "the options of fold-logits-to-keep do not end with '}'"),
        ("fold-logits-to-keep{keep=all,}", "an option of fold-logits-to-keep is expected, '}' is found"),
        ("fold-logits-to-keep{keep=all,keep=all}", "option 'keep' of fold-logits-to-keep is given twice"),
        ("merge-embeddings", "merge-embeddings needs the option embed=VALUE"),
        ('merge-embeddings{embed="a}', "cannot read"),
        ('merge-embeddings{embed="\\x"}', "is not a JSON string"),
    ],
)
def test_mistakes_are_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as raised:
        parse(source)
    assert "\n" not in str(raised.value)


def test_options_have_the_types_that_their_pass_declares() -> None:
    @dataclasses.dataclass(frozen=True)
    class Many(Pass):
        name = "many"
        count: int = 1
        exact: bool = False
        limit: int | None = None
        label: str = "x"
        share: float = 0.5
        level: Literal[0, 4] = 0

        def run(self, model: Model) -> list[Finding]:
            return []

    built = build(Many, {"count": "-3", "exact": "true", "limit": "7", "label": "a b", "share": "1e-3", "level": "4"})
    assert built == Many(-3, True, 7, "a b", 0.001, 4)
    assert recipe_text((built,)) == 'many{count=-3,exact=true,limit=7,label="a b",share=0.001,level=4}'
    for option, value, expected in (
        ("count", "1.5", "a whole number"),
        ("exact", "yes", "true or false"),
        ("share", "nan", "a number"),
        ("share", "half", "a number"),
        ("level", "2", "0 or 4"),
    ):
        with pytest.raises(RecipeError, match=f"many: {option} is '{value}'; {expected} is expected"):
            build(Many, {option: value})


def test_options_that_a_recipe_cannot_write_are_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Listed(Pass):
        name = "listed"
        sizes: tuple[int, ...] = ()

        def run(self, model: Model) -> list[Finding]:
            return []

    with pytest.raises(RecipeError, match=r"listed: sizes is tuple\[int, \.\.\.\], which a recipe cannot write"):
        build(Listed, {})


def test_a_recipe_of_many_passes_is_read_in_linear_time() -> None:
    assert len(parse(",".join(["fold-logits-to-keep{keep=all}"] * 5000))) == 5000


def test_every_pass_has_a_name_a_summary_and_a_docstring() -> None:
    for name in BUILT_IN:
        kind = pass_class(name)
        assert kind.name == name and kind.summary and kind.__doc__
        for word in ("Requires:", "Ensures:"):
            assert word in kind.__doc__, f"{name} does not say {word}"
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
