"""What is advised to type, in the environment that the command runs in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from surgery.errors import RuntimeMissing
from surgery.runtime import installing
from surgery.verify.golden import load_golden


@pytest.mark.parametrize(
    ("place", "files", "there", "provider", "typed"),
    [
        ("venv", {}, (), None, "pip install 'gemma4-surgery[cpu]'"),
        ("venv", {"pyvenv.cfg": "home = /usr\n"}, ("onnxruntime-gpu",), None, "pip install 'gemma4-surgery[cuda]'"),
        (
            "venv", {"pyvenv.cfg": "home = /usr\n"}, ("onnxruntime", "onnxruntime-genai"), "cuda",
            "pip uninstall -y onnxruntime onnxruntime-genai && pip install 'gemma4-surgery[cuda]'",
        ),
        ("venv", {"pyvenv.cfg": "uv = 0.13.9\n"}, (), "cpu", "uv pip install 'gemma4-surgery[cpu]'"),
        (
            "venv", {"pyvenv.cfg": "uv = 0.13.9\n"}, ("onnxruntime",), "cuda",
            "uv pip uninstall onnxruntime && uv pip install 'gemma4-surgery[cuda]'",
        ),
        ("archive-v0/a", {"pyvenv.cfg": "uv = 0.13.9\n"}, (), "cpu", "uvx --from 'gemma4-surgery[cpu]' gemma4-surgery"),
        (
            "tools/gemma4-surgery", {"pyvenv.cfg": "uv = 0.13.9\n", "uv-receipt.toml": "[tool]\n"}, ("onnxruntime",), "cuda",
            "uv tool install 'gemma4-surgery[cuda]'",
        ),
    ],
)  # fmt: skip
def test_the_advice_is_for_this_environment(
    place: str, files: dict[str, str], there: tuple[str, ...], provider: str | None, typed: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prefix = tmp_path / place
    prefix.mkdir(parents=True)
    for name, text in files.items():
        (prefix / name).write_text(text)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(installing, "installed", lambda name: "1" if name in there else None)
    assert installing.how_to_install(provider) == typed  # type: ignore[arg-type]


def test_a_package_of_an_extra_that_is_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(RuntimeMissing, match=r"safetensors is not installed: .*install 'gemma4-surgery"):
        load_golden(tmp_path / "kept")
