"""Gates that a user sets, and which defaults hold where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.errors import RequestError
from surgery.verify.thresholds import NAMES, default_thresholds, keeps_arithmetic, read_thresholds


def test_values_are_read_by_name() -> None:
    assert read_thresholds(["logits=0.5", "cosine=1e-3"]) == {"logits": 0.5, "cosine": 0.001}
    changed = default_thresholds("float32", exact=True).with_values({"kl": 3})
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
def test_exact_thresholds_ask_for_equality_and_others_are_wider(dtype: str) -> None:
    exact, loose = (default_thresholds(dtype, exact=flag) for flag in (True, False))
    assert exact.logits == exact.caches == 0 and exact.exact == exact.first == exact.top1 == 1
    for name in NAMES:
        wider = getattr(loose, name) - getattr(exact, name)
        assert wider <= 0 if name in ("cosine", "top1", "top10", "exact", "first", "headroom") else wider >= 0, name


@pytest.mark.parametrize(
    ("recipe", "exact"),
    [
        ("merge-embeddings{embed=onnx/e.onnx},fold-logits-to-keep{keep=all},rename-io", True),
        ('merge-embeddings{embed="a,to-fp16,{b.onnx"},rename-io', True),
        ('merge-embeddings{embed="a\\",b"},rename-io', True),
        ("merge-embeddings{embed=e.onnx},to-fp16", False),
        ("rename-io, to-fp16{x=1,y=2}", False),
        ("", True),
        (None, True),
    ],
)
def test_the_recipe_tells_whether_the_arithmetic_is_kept(recipe: object, exact: bool, tmp_path: Path) -> None:
    assert keeps_arithmetic(tmp_path), "without a manifest nothing is forgiven"
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "recipe": recipe}))
    assert keeps_arithmetic(tmp_path) is exact
