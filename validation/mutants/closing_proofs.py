"""The proofs that jobs end with, as tests: each kind of folder is made of the smallest export, with its proof.

validation.mutants runs those that a module's faults name; they are no part of the suite.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surgery

ROOT = Path(__file__).parents[2]
REPACKED: dict[str, dict[str, Any]] = {
    "compatible": {"precision": "fp32"},
    "unique": {"precision": "q4", "kv_layout": "unique"},
    "fast": {"precision": "q4", "preset": "fast"},
    "fast in float32": {"precision": "fp32", "preset": "fast"},
    "guessing": {"precision": "q4", "preset": "fast", "speculative": True, "prefill": "int8"},
    "media": {"precision": "q4", "modalities": ("image", "audio")},
    "one size of caches": {"precision": "q4", "target": "genai-0.12"},
    "half": {"precision": "fp32", "to_fp16": True},
    "split table": {"precision": "q4", "per_layer_table": "split"},
    "fused table": {"precision": "q4", "per_layer_table": "fused"},
}


@pytest.mark.parametrize("kind", REPACKED)
def test_repack(kind: str, tmp_path: Path) -> None:
    surgery.repack(
        ROOT / "fixtures/tiny-e2b", tmp_path / "out", surgery.RepackOptions(provider="cpu", **REPACKED[kind])
    )


def test_strip(tmp_path: Path) -> None:
    surgery.strip(ROOT / "fixtures/tiny-e2b", tmp_path / "out", surgery.StripOptions(precision="q4", provider="cpu"))


def test_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    from vocabularies import kept_of, small_export, small_tokenizer, written

    export = small_export(tmp_path / "export")
    kept = kept_of(small_tokenizer(tmp_path), 801)
    options = surgery.RepackOptions(provider="cpu", vocabulary=written(kept, tmp_path / "list"))
    surgery.repack(export, tmp_path / "out", options)
