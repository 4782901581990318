"""Forms of other exporters, by validation.forms: those that came to a wrong number or a traceback once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from exhaustive import in_full

from surgery.choices import Preset
from validation.forms import __main__ as forms

NUMBER = r"^[\de.+-]+$"
ONE_LENGTH = "takes all rows to be of one length; GroupQueryAttention is expected"

ONE_DTYPE = "attention_mask is INT32 and position_ids INT64; onnxruntime-genai feeds both in one dtype"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forms")


@pytest.mark.parametrize(
    ("name", "preset", "sentence"),
    [
        ("inside of GroupQueryAttention", "compatible", "counts positions from the front .*--preset fast"),
        ("Attention of opset 23", "fast", rf"layer 0's attention is Attention node .* {ONE_LENGTH}"),
        in_full(
            "MultiHeadAttention on shared caches", "fast", rf"layer 5's attention is MultiHeadAttention .* {ONE_LENGTH}"
        ),
        ("bodies of If that capture", "fast", NUMBER),
        ("attention_mask INT32", "fast", ONE_DTYPE),
        in_full("8-bit codes of the layers' matrices behind DequantizeLinear", "fast", NUMBER),
        in_full("BFLOAT16 everywhere", "compatible", "source runs: ONNX Runtime cannot load .*embed_tokens_fp16.onnx"),
        ("BFLOAT16 everywhere", "fast", "is BFLOAT16; FLOAT, FLOAT16, INT64, INT32 are known"),
        (
            "initializers among the inputs",
            "compatible",
            "has 9 initializers among its inputs.*take them out of the inputs",
        ),
        ("logits wider than the vocabulary", "compatible", "set vocab_size to 160 in config.json"),
    ],
)
def test_a_form_is_right_or_refused(
    name: str, preset: Preset, sentence: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "NAMES", {"one-token", "ragged-batch"})
    monkeypatch.setattr(forms, "PRESETS", (preset,))
    (form,) = [form for form in forms.FORMS if form.name == name]
    found = forms.row(form, work)
    assert found.sound and re.search(sentence, found.presets[0]), found
