"""Repacked folders in Foundry Local, offline: it loads them, and answers what onnxruntime-genai answers.

    python -m validation.foundry_local WORK [--version 2.2.1]

Makes an environment with foundry-local-sdk in WORK; its wheel brings the native runtime. The folders are of the small
export, in each layout of caches. What is run has no way out: its proxy is a port that nobody listens on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from surgery import RepackOptions, generate, repack

PROMPTS = ("hello world", "the world, and er", "привет")
LAYOUTS = {
    "compatible": RepackOptions(validate=False),
    "fast": RepackOptions(validate=False, preset="fast"),
    "fast, speculative": RepackOptions(validate=False, preset="fast", speculative=True),
    "genai-0.12": RepackOptions(validate=False, target="genai-0.12"),
}
_OFFLINE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
_TOKENS = 12


def environment(work: Path, wanted: str) -> Path:
    """The interpreter of an environment with foundry-local-sdk, made where it is not there."""
    python = work / "environment" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(work / "environment")], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"foundry-local-sdk=={wanted}"], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description="Run repacked folders in Foundry Local.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--version", default="2.2.1")
    options = parser.parse_args()
    python, probe = environment(options.work.absolute(), options.version), Path(__file__).with_name("foundry_probe.py")
    faults, versions = 0, {}
    for name, layout in LAYOUTS.items():
        folder = options.work.absolute() / name.replace(", ", "-")
        if not folder.exists():
            repack("fixtures/tiny-e2b", folder, layout)
        for prompt in PROMPTS:
            done = subprocess.run(
                [str(python), "-P", str(probe), str(folder), prompt, str(_TOKENS)],
                env={**os.environ, **_OFFLINE}, capture_output=True, text=True, check=False, timeout=300,
            )  # fmt: skip
            wanted = "".join(generate(folder, prompt, new_tokens=_TOKENS, provider="cpu"))
            if done.returncode:
                found, same = done.stderr.strip().splitlines()[-1:], False
            else:
                told = json.loads(done.stdout.splitlines()[-1])
                versions, found, same = told["versions"], told["answer"], told["answer"].strip() == wanted.strip()
            faults += not same
            print(f"{name}: {prompt!r}: " + ("the same answer" if same else f"{found!r}, and {wanted!r} is expected"))
    print(", ".join(f"{package} {number}" for package, number in versions.items()))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
