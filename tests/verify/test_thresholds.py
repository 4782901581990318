"""Gates that a user sets, and which defaults hold where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from passes.base import EXACT, LOSSY, REORDERED, Numerics
from passes.to_fp16 import ToFp16
from surgery.errors import RequestError
from surgery.verify.thresholds import (
    LEAST,
    NAMES,
    default_thresholds,
    numerics_of,
    read_thresholds,
)


def test_values_are_read_by_name() -> None:
    assert read_thresholds(["logits=0.5", "cosine=1e-3"]) == {"logits": 0.5, "cosine": 0.001}
    changed = default_thresholds("float32").with_values({"kl": 3})
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
def test_exact_passes_are_held_to_equality_and_others_to_wider_thresholds(dtype: str) -> None:
    same, reordered, other = (default_thresholds(dtype, [each]) for each in (EXACT, REORDERED, LOSSY))
    assert same.logits == same.caches == 0 and same.exact == same.first == same.top1 == 1
    for narrow, wide in ((replace(same, regrouped=0, mean=0, kl=0), reordered), (reordered, other)):
        for name in NAMES:
            wider = getattr(wide, name) - getattr(narrow, name)
            assert wider <= 0 if name in LEAST else wider >= 0, name


def test_float32_is_held_to_narrower_limits_than_float16() -> None:
    for each in (EXACT, REORDERED, LOSSY):
        assert default_thresholds("float32", [each]).regrouped < default_thresholds("float16", [each]).regrouped


def test_one_pass_may_be_left_out_of_what_a_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "recipe": "fuse-attention,to-fp16"}))
    assert numerics_of(tmp_path, ToFp16) == [REORDERED]


def test_the_laxest_pass_decides_and_of_two_bounds_the_wider() -> None:
    one, other = Numerics("lossy", {"logits": 7, "top1": 0.5}), Numerics("lossy", {"logits": 9, "top1": 0.6})
    found = default_thresholds("float32", [EXACT, one, other, REORDERED])
    assert (found.logits, found.top1) == (9, 0.5)
    assert found.kl == default_thresholds("float32", [LOSSY]).kl, "what no bound names"
    with pytest.raises(RequestError, match="no gate is named 'logit' \\(did you mean 'logits'"):
        default_thresholds("float32", [Numerics("lossy", {"logit": 1})])


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("merge-embeddings{embed=onnx/e.onnx},fold-logits-to-keep{keep=all},rename-io", "exact"),
        ('merge-embeddings{embed="a,to-fp16,{b.onnx"},rename-io', "exact"),
        ('merge-embeddings{embed="a\\",b"},rename-io', "exact"),
        ("merge-embeddings{embed=e.onnx},fuse-attention", "reordered"),
        ("fuse-attention{onnxruntime=1.27},to-fp16", "lossy"),
        ("merge-embeddings{embed=e.onnx},to-fp16", "lossy"),
        ("rename-io, to-fp16{x=1,y=2}", "lossy"),
        ({"decoder_model_merged": "rename-io,to-fp16", "embed_tokens": "rename-io"}, "lossy"),
        ("somebody-elses{x=1}", "exact"),
        ("somebody-elses,fuse-attention", "reordered"),
        ("to-fp16{", "exact"),
        ("", "exact"),
        (None, "exact"),
        (7, "exact"),
    ],
)
def test_the_recipe_tells_what_becomes_of_the_numbers(recipe: object, kind: str, tmp_path: Path) -> None:
    """What is not known, or cannot be read, forgives nothing."""
    assert numerics_of(tmp_path) == [], "without a manifest nothing is forgiven"
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "recipe": recipe}))
    expected = {"exact": EXACT, "reordered": REORDERED, "lossy": LOSSY}[kind]
    assert default_thresholds("float32", numerics_of(tmp_path)) == default_thresholds("float32", [expected])
