"""One virtual environment per version of onnxruntime-genai and ONNX Runtime, made by pip and kept for the next run."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal

Kind = Literal["minimum", "newest"]
"""Which ONNX Runtime: the oldest that the wheel's own metadata admits, or the newest that pip finds."""

VERSIONS = ("0.12.2", "0.13.2", "0.14.1", "0.15.2", "0.16.0", "0.17.1", "0.18.0")

_GENAI = "onnxruntime-genai"
_REQUIRED = re.compile(r"onnxruntime\s*\(?>=\s*([0-9.]+)")


class PipError(RuntimeError):
    """pip could not make an environment; its last words."""


@dataclass(frozen=True, slots=True)
class Column:
    """What an environment holds. A column of one table is another run's by `genai` and `kind`."""

    genai: str
    kind: Kind
    onnxruntime: str
    numpy: str

    @property
    def key(self) -> tuple[str, str]:
        return self.genai, self.kind


@dataclass(frozen=True, slots=True)
class Environment:
    """A column and the interpreter that has it."""

    column: Column
    python: Path


def make_environment(root: Path, genai: str, kind: Kind) -> Environment:
    """Create it, or take what an earlier run left complete. Raises PipError with pip's words.

    Packages are installed without their dependencies: the runtime loads ONNX Runtime's library and numpy, nothing else.
    """
    place = root / f"genai-{genai}-{kind}"
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        venv.EnvBuilder(clear=True, symlinks=True).create(place)
        _pip(python, f"{_GENAI}=={genai}")
        _pip(python, _onnxruntime(_installed(place), kind), "numpy")
        (place / "complete").touch()
    found = _installed(place)
    return Environment(Column(genai, kind, found["onnxruntime"].version, found["numpy"].version), python)


def _pip(python: Path, *requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile", "--no-deps"]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        raise PipError(f"pip install {' '.join(requirements)}: {done.stderr.strip()[-500:]}")


def _onnxruntime(found: dict[str, Distribution], kind: Kind) -> str:
    """What to ask pip for. The minimum is read from the installed wheel, so that a new version needs no table here."""
    if kind == "newest":
        return "onnxruntime"
    return f"onnxruntime=={minimum(found[_GENAI].requires or [])}"


def minimum(requires: list[str]) -> str:
    """The lower bound that `Requires-Dist` lines give onnxruntime."""
    for line in requires:
        if match := _REQUIRED.match(line):
            return match[1]
    raise PipError(f"onnxruntime-genai names no least onnxruntime: {', '.join(requires)}")


def _installed(place: Path) -> dict[str, Distribution]:
    site = [str(path) for path in place.glob("lib/python*/site-packages")]
    return {found.metadata["Name"].lower().replace("_", "-"): found for found in distributions(path=site)}
