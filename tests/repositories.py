"""Real git repositories for tests: what runs git, and what changes a graph in one."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from limits import FOR_EVER

GRAPH = "decoder_model_merged_q4.onnx"


def git(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=FOR_EVER)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)


def change(graph: Path, name: str = "/added") -> None:
    """A node more, and an attribute of another value."""
    from onnx import ModelProto, helper

    proto = ModelProto.FromString(graph.read_bytes())
    proto.graph.node.append(helper.make_node("Identity", ["logits"], [f"{name}/output_0"], name=name))
    softmax = next(node for node in proto.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 3
    graph.write_bytes(proto.SerializeToString())


def pointer(data: bytes) -> str:
    """What Git LFS keeps in place of a file."""
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n"
    )
