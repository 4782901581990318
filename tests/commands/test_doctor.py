"""doctor: what is installed here, what stands in the way, and the ways to start the command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command_line import run
from places import ROOT

from surgery.runtime import environment as module
from surgery.version import VERSION


def test_doctor_says_what_is_installed() -> None:
    done = run("doctor", "--json", HF_TOKEN="hf_secret")
    found = json.loads(done.stdout)
    assert found["packages"]["gemma4-surgery"] == VERSION and found["packages"]["onnx"]
    assert found["variables"]["HF_TOKEN"] == "set", "a token is not printed"
    assert "CPUExecutionProvider" in found["providers"]
    assert done.returncode == (1 if found["problems"] else 0)


@pytest.mark.parametrize(
    "installed, gpu, problem",
    [
        ((), False, "no onnxruntime is installed"),
        (("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai"), False, "share their files"),
        (("onnxruntime",), False, "no onnxruntime-genai is installed"),
        (("onnxruntime", "onnxruntime-genai"), True, "has no CUDA provider"),
    ],
)
def test_a_conflict_is_named(installed: tuple[str, ...], gpu: bool, problem: str) -> None:
    packages = {name: "1" if name in installed else None for name in module.PACKAGES}
    providers = ("CPUExecutionProvider",) if installed else ()
    assert any(problem in said for said in module._problems(packages, providers, gpu))


def test_nothing_is_wrong_with_one_of_each() -> None:
    installed = ("onnxruntime", "onnxruntime-genai")
    packages = {name: "1" if name in installed else None for name in module.PACKAGES}
    assert module._problems(packages, ("CPUExecutionProvider",), gpu=False) == []


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "surgery", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"gemma4-surgery {VERSION}\n"


def test_help_has_a_short_form_and_names_the_exit_codes() -> None:
    done = run("-h")
    assert done.returncode == 0 and "Exit codes: 0 done; 1 a gate failed" in done.stdout
