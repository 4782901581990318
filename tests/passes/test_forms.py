"""Forms of other exporters, by validation.forms: those that came to a wrong number or a traceback once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from validation.forms import __main__ as forms

NUMBER = r"^[\de.+-]+$"
ONE_LENGTH = "takes all rows to be of one length; GroupQueryAttention is expected"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forms")


@pytest.mark.parametrize(
    ("name", "compatible", "fast"),
    [
        (
            "inside of GroupQueryAttention",
            "rotates by itself, and counts positions from the front .*--preset fast",
            NUMBER,
        ),
        ("Attention of opset 23", NUMBER, rf"layer 0's attention is Attention node .* {ONE_LENGTH}"),
        ("MultiHeadAttention on shared caches", NUMBER, rf"layer 5's attention is MultiHeadAttention .* {ONE_LENGTH}"),
        ("bodies of If that capture", NUMBER, NUMBER),
        ("no position_ids", NUMBER, NUMBER),
        ("attention_mask INT32", NUMBER, NUMBER),
        ("8-bit codes of the layers' matrices behind DequantizeLinear", NUMBER, NUMBER),
        ("BFLOAT16 everywhere", "made, and cannot be run", "is BFLOAT16; FLOAT, FLOAT16, INT64, INT32 are known"),
        ("initializers among the inputs", "has 9 initializers among its inputs", "take them out of the inputs"),
        ("logits wider than the vocabulary", "set vocab_size to 160 in config.json", "set vocab_size to 160"),
    ],
)
def test_a_form_is_right_or_refused(
    name: str, compatible: str, fast: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "NAMES", {"one-token", "ragged-batch"})
    (form,) = [form for form in forms.FORMS if form.name == name]
    found = forms.row(form, work)
    assert found.sound, found
    for text, wanted in zip(found.presets, (compatible, fast), strict=True):
        assert re.search(wanted, text), text
