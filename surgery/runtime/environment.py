"""What is installed here to run a folder with, and what stands in its way: facts for a bug report."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.runtime.installing import how_to_install, installed
from surgery.version import VERSION

PACKAGES = (
    "onnx", "onnx-graphsurgeon", "numpy", "huggingface_hub", "tokenizers", "safetensors", "jinja2",
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda",
)  # fmt: skip
OWN = ("GEMMA4_SURGERY_TRACEBACK", "GEMMA4_SURGERY_SECONDS", "GEMMA4_SURGERY_MEMORY")
VARIABLES = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "GITHUB_TOKEN", *OWN)
"""Environment variables that change what the commands do. Of tokens only whether they are set is told."""


@dataclass(frozen=True, slots=True)
class Environment:
    """`packages` maps a name to its version, None where it is absent; `problems` are sentences with what to do."""

    python: str
    platform: str
    cores: int
    packages: dict[str, str | None]
    providers: tuple[str, ...]
    gpu: bool
    variables: dict[str, str]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {
            "python": self.python,
            "platform": self.platform,
            "cores": self.cores,
            "packages": self.packages,
            "providers": list(self.providers),
            "gpu": self.gpu,
            "variables": self.variables,
            "problems": list(self.problems),
        }


def environment() -> Environment:
    """Look at this machine. Nothing is run but the import of onnxruntime."""
    packages = {"gemma4-surgery": VERSION, **{name: installed(name) for name in PACKAGES}}
    gpu = Path("/dev/nvidiactl").exists()
    providers = _providers()
    return Environment(
        sys.version.split()[0], platform.platform(), os.cpu_count() or 1, packages, providers, gpu, _variables(),
        tuple(_problems(packages, providers, gpu)),
    )  # fmt: skip


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())


def _variables() -> dict[str, str]:
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: "set" if "TOKEN" in name else value for name, value in found.items()}


def _problems(packages: dict[str, str | None], providers: tuple[str, ...], gpu: bool) -> list[str]:
    found = []
    runtimes = [name for name in ("onnxruntime", "onnxruntime-gpu") if packages[name]]
    for both in (("onnxruntime", "onnxruntime-gpu"), ("onnxruntime-genai", "onnxruntime-genai-cuda")):
        if all(packages[name] for name in both):
            found.append(f"{' and '.join(both)} share their files: uninstall both, then {how_to_install()}")
    if not runtimes:
        found.append(f"no onnxruntime is installed, so nothing can be proven: {how_to_install()}")
    elif not providers:
        found.append(f"{runtimes[0]} is installed, but cannot be imported: reinstall it")
    if not any(packages[name] for name in ("onnxruntime-genai", "onnxruntime-genai-cuda")):
        found.append(f"no onnxruntime-genai is installed: {how_to_install()}")
    if gpu and "CUDAExecutionProvider" not in providers:
        found.append(f"there is a GPU, but onnxruntime has no CUDA provider: {how_to_install('cuda')}")
    return found
