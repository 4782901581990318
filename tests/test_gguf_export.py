"""The values that the comparison with llama.cpp is run on are the export's own."""

from pathlib import Path

import numpy as np
import pytest
from places import TINY

from benchmarks.gguf_export import _tensors
from fixtures.__main__ import parse_reading
from fixtures.build import build
from surgery.architecture import read_config
from surgery.source.export import open_export


def test_q4_0_has_the_numbers_of_the_matrix(tmp_path: Path) -> None:
    build("tiny-e2b", "q4", tmp_path / "tiny-e2b", reading=parse_reading(["symmetric"]))
    found = _found(tmp_path / "tiny-e2b", "q4")
    plain = _found(TINY, "fp32")
    assert found.keys() == plain.keys()
    for name, values in plain.items():
        if found[name].dtype == np.uint8:
            off = np.abs(_dequantised(found[name]) - values)
            assert off.max() <= np.abs(values).max() / 7.5 * 0.51, name  # half a step of the largest block
        else:
            np.testing.assert_array_equal(found[name], values)


def test_zero_points_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has zero points.*--reading symmetric"):
        _found(TINY, "q4")


def _found(export: Path, precision: str) -> dict[str, np.ndarray]:
    text = read_config(export / "config.json")["text_config"]
    return {each.name: each.values for each in _tensors(open_export(export).pair(precision), text)}


def _dequantised(blocks: np.ndarray) -> np.ndarray:
    """As ggml defines block_q4_0: a float16 d, 16 bytes; x[i] = (low nibble i - 8) d, x[i + 16] = (high nibble i - 8) d."""
    split = blocks.reshape(len(blocks), -1, 18)
    d = split[..., :2].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate([split[..., 2:] & 15, split[..., 2:] >> 4], axis=-1).astype(np.float32) - 8
    found: np.ndarray = (codes * d).reshape(len(blocks), -1)
    return found
