"""ONNX Runtime's CUDA provider on a machine without a GPU: the released wheel, and stub CUDA libraries.

The provider's library does not load without the CUDA libraries that it is linked to. Their symbols are read from the
wheel, and libraries that define them are compiled from stubs.c. The real provider then lists its kernels, and
creates sessions: it says which nodes it takes and where copies go. No kernel can run.

Needs Linux, pip, gcc and nm. The wheel of onnxruntime-gpu has 256 MB; it and what is made of it stay in one folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
ROOT = Path(__file__).parents[2]
HEADERS = ("nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*")
"""Wheels with the CUDA 13 headers that stubs.c includes."""

_UNVERSIONED = {
    "libcuda.so.1": re.compile(r"cu[A-Z]\w+"),
    "libnvinfer.so.10": re.compile(r"createInfer\w+|getInferLibVersion|getPluginRegistry"),
    "libnvonnxparser.so.10": re.compile(r"createNvOnnxParser\w+"),
}
"""Libraries whose symbols carry no version, and the symbols that are theirs. TensorRT's two are needed because
listing kernels loads every provider of the wheel."""
_ALWAYS = ("libcurand.so.10",)
"""Libraries that are loaded although nothing is imported from them."""


@dataclass(frozen=True)
class StubbedRuntime:
    """An unpacked onnxruntime-gpu and the libraries that let it load. `wheel` is a file name."""

    site: Path
    libraries: Path
    wheel: str
    sha256: str

    def run(self, module: str, *arguments: str) -> str:
        """What `python -m module` prints with this runtime instead of the installed one."""
        path = os.pathsep.join((str(self.site), str(ROOT)))
        environment = {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(self.libraries)}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(version: str, folder: Path) -> StubbedRuntime:
    """Download, unpack and compile into `folder`; what is there from an earlier call is used again."""
    folder = folder.absolute()
    wheel = _download(f"onnxruntime-gpu=={version}", folder)
    site = _unpacked(wheel, folder / "site")
    headers = folder / "headers"
    for requirement in HEADERS:
        _unpacked(_download(requirement, folder), headers)
    include = next(headers.rglob("cuda_runtime_api.h")).parent
    libraries = folder / "stubs"
    libraries.mkdir(exist_ok=True)
    for library, symbols in imported(site).items():
        _compile(library, symbols, include, libraries)
    return StubbedRuntime(site, libraries, wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())


def imported(site: Path) -> dict[str, set[str]]:
    """CUDA and TensorRT library -> the symbols that the wheel's providers import from it."""
    found: dict[str, set[str]] = {library: set() for library in (*_UNVERSIONED, *_ALWAYS)}
    for provider in sorted((site / "onnxruntime" / "capi").glob("libonnxruntime_providers_*.so")):
        for symbol, library in _undefined(provider):
            if library.startswith("libcu"):
                found.setdefault(library, set()).add(symbol)
            for known, pattern in _UNVERSIONED.items():
                if not library and pattern.fullmatch(symbol):
                    found[known].add(symbol)
    return found


def _undefined(library: Path) -> Iterator[tuple[str, str]]:
    """(symbol, version) of everything that a library imports; the version of CUDA's symbols is their library."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, stdout=subprocess.PIPE, text=True)
    for line in listed.stdout.splitlines():
        symbol, _, version = line.split()[-1].partition("@")
        yield symbol, version


def _compile(library: str, symbols: set[str], include: Path, folder: Path) -> None:
    """One stub library: what stubs.c has for it, and functions that return 0 for the other symbols."""
    name = re.split(r"[.]so", library.removeprefix("lib"))[0]
    gcc = ["gcc", "-w", "-O1", "-fPIC", f"-I{include}", f"-DLIBRARY_{name}"]
    written = folder / f"{name}.o"
    subprocess.run([*gcc, "-c", SOURCE, "-o", written], check=True)
    listed = subprocess.run(["nm", "--defined-only", written], check=True, stdout=subprocess.PIPE, text=True)
    missing = symbols - {line.split()[-1] for line in listed.stdout.splitlines()}
    rest = folder / f"{name}.c"
    rest.write_text("".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in sorted(missing)))
    link = ["-shared", f"-Wl,-soname,{library}", "-o", str(folder / library)]
    if library not in _UNVERSIONED:
        versions = folder / f"{name}.map"
        versions.write_text(f"{library} {{ global: *; }};\n")
        link.append(f"-Wl,--version-script={versions}")
    subprocess.run([*gcc, rest, written, *link], check=True)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement in `folder`, for this Python."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl" if "*" not in version else f"{name.replace('-', '_')}-*.whl"
    if not any(folder.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, requirement], check=True)
    return next(folder.glob(pattern))


def _unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        if any(not (folder / name).exists() for name in archive.namelist()):
            archive.extractall(folder)
    return folder
