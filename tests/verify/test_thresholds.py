"""Gates that a user sets, and which defaults hold where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from surgery.errors import RequestError
from surgery.verify.thresholds import (
    LEAST,
    NAMES,
    arithmetic_of,
    default_thresholds,
    read_thresholds,
    rows_stand_alone,
)


def test_values_are_read_by_name() -> None:
    assert read_thresholds(["logits=0.5", "cosine=1e-3"]) == {"logits": 0.5, "cosine": 0.001}
    changed = default_thresholds("float32", "same").with_values({"kl": 3})
    assert changed.kl == 3 and changed.logits == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logit=1", "no gate is named 'logit' \\(did you mean 'logits'\\?\\); there are logits, regrouped"),
        ("logits", "gate logits has no value; write logits=NUMBER"),
        ("logits=", "gate logits is ''; a number >= 0 is expected"),
        ("kl=nan", "gate kl is 'nan'"),
        ("kl=inf", "gate kl is 'inf'"),
        ("top1=-1", "gate top1 is '-1'"),
    ],
)
def test_what_is_no_threshold_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_thresholds([text])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_arithmetic_is_held_to_equality_and_others_to_wider_thresholds(dtype: str) -> None:
    same, reordered, other = (default_thresholds(dtype, kind) for kind in ("same", "reordered", "other"))
    assert same.logits == same.caches == 0 and same.exact == same.first == same.top1 == 1
    for narrow, wide in ((replace(same, regrouped=0, mean=0, kl=0), reordered), (reordered, other)):
        for name in NAMES:
            wider = getattr(wide, name) - getattr(narrow, name)
            assert wider <= 0 if name in LEAST else wider >= 0, name


@pytest.mark.parametrize(
    ("recipe", "arithmetic"),
    [
        ("merge-embeddings{embed=onnx/e.onnx},fold-logits-to-keep{keep=all},rename-io", "same"),
        ('merge-embeddings{embed="a,to-fp16,{b.onnx"},rename-io', "same"),
        ('merge-embeddings{embed="a\\",b"},rename-io', "same"),
        ("merge-embeddings{embed=e.onnx},fuse-attention", "reordered"),
        ("fuse-attention{onnxruntime=1.27},to-fp16", "other"),
        ("merge-embeddings{embed=e.onnx},to-fp16", "other"),
        ("rename-io, to-fp16{x=1,y=2}", "other"),
        ("", "same"),
        (None, "same"),
    ],
)
def test_the_recipe_tells_what_becomes_of_the_arithmetic(recipe: object, arithmetic: str, tmp_path: Path) -> None:
    assert arithmetic_of(tmp_path) == "same", "without a manifest nothing is forgiven"
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "recipe": recipe}))
    assert arithmetic_of(tmp_path) == arithmetic


def test_rows_stand_alone_where_their_lengths_are_counted(tmp_path: Path) -> None:
    assert not rows_stand_alone(tmp_path)
    for recipe, counted in (("fuse-attention", False), ("fuse-attention,drop-attention-bias", True)):
        (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "recipe": recipe}))
        assert rows_stand_alone(tmp_path) is counted
