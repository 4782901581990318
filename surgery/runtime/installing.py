"""What to type so that a runtime is there: in the words of pip or uv, whichever made this environment."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from surgery.choices import Provider
from surgery.errors import RuntimeMissing

_CPU_BUILDS = ("onnxruntime", "onnxruntime-genai")
"""They share their files with the builds for CUDA."""


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def how_to_install(provider: Provider | None = None) -> str:
    """The command that brings all that runs on a provider; None takes the one whose runtime is there."""
    provider = provider or ("cuda" if installed("onnxruntime-gpu") else "cpu")
    package = f"'gemma4-surgery[{provider}]'"
    tool = "uv pip" if _has_line("pyvenv.cfg", "uv =") else "pip"
    if tool == "uv pip" and "archive-v0" in Path(sys.prefix).parts:
        return f"uvx --from {package} gemma4-surgery"
    if _has_line("uv-receipt.toml", "[tool]"):
        return f"uv tool install {package}"
    found = [name for name in _CPU_BUILDS if provider == "cuda" and installed(name)]
    if not found:
        return f"{tool} install {package}"
    return f"{tool} uninstall {'-y ' * (tool == 'pip')}{' '.join(found)} && {tool} install {package}"


def _has_line(file: str, beginning: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        lines = (Path(sys.prefix) / file).read_text(encoding="utf-8").splitlines()
        return any(line.startswith(beginning) for line in lines)
    return False


@contextlib.contextmanager
def needs(package: str, provider: Provider | None = None) -> Iterator[None]:
    """Raise RuntimeMissing, with what to type, where an import within fails."""
    try:
        yield
    except ImportError:
        raise RuntimeMissing(f"{package} is not installed: {how_to_install(provider)}") from None
