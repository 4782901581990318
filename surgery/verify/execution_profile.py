"""Where each node of a model really ran, read from the profile that ONNX Runtime writes of a session.

A profile is a list of events in JSON. An event of category "Node" whose name ends in "_kernel_time" is one run of one
node; its arguments name the operator, the provider, and the types and shapes that went in and out. Copies between
the memories are nodes as well: MemcpyFromHost and MemcpyToHost. (Format of onnxruntime 1.31.1.)
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.choices import Provider
from surgery.cuda.layering import OPTION, SETTING
from surgery.cuda.prediction import SMALL, Prediction
from surgery.errors import ModelError, RuntimeMissing, SurgeryError
from surgery.runtime.profiling import KERNEL_TIME, read_events
from surgery.runtime.sessions import Array, load_onnxruntime, one_line
from surgery.verify.report import Gate

TOKENS = 4
"""Tokens of the prompt that `trace` runs."""

_PROVIDERS: Mapping[str, Provider] = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
_EXACT = ("int64", "int32", "bool", "int8", "uint8", "int16", "uint16", "uint32", "uint64")
"""Types that shape arithmetic is done in; hidden states and caches are of other types."""
_INPUTS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Ran:
    """A node that ran: its provider as `cpu`, `cuda` or the runtime's own name, and (type, shape) of its operands."""

    node: str
    operator: str
    provider: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    times: int = 1

    @property
    def is_copy(self) -> bool:
        """Whether it copies between the memories."""
        return self.operator in ("MemcpyFromHost", "MemcpyToHost")

    @property
    def is_small(self) -> bool:
        """Whether it is shape arithmetic: integers and truth values, each operand of few elements."""
        return all(kind in _EXACT and math.prod(shape) <= SMALL for kind, shape in self.operands)


@dataclass(frozen=True)
class ExecutionProfile:
    """Every node that ran, in the order of the first runs, copies included."""

    nodes: tuple[Ran, ...]

    @property
    def copies(self) -> tuple[Ran, ...]:
        """The copies between the memories."""
        return tuple(ran for ran in self.nodes if ran.is_copy)

    def on(self, provider: str) -> tuple[Ran, ...]:
        """The nodes that ran on a provider, copies left out."""
        return tuple(ran for ran in self.nodes if ran.provider == provider and not ran.is_copy)

    def fallen(self, expected: Prediction | None = None) -> tuple[Ran, ...]:
        """Nodes that ran on the CPU and should not have: neither shape arithmetic, nor meant for the CPU."""
        meant = {each.node for each in expected.on("cpu") if not each.is_fault} if expected else set()
        return tuple(ran for ran in self.on("cpu") if ran.node not in meant and not ran.is_small)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {"nodes": [asdict(ran) for ran in self.nodes], "copies": len(self.copies)}


def read_profile(path: Path) -> ExecutionProfile:
    """Raises ModelError where the file is not a profile, or holds no run of a node."""
    found: dict[tuple[str, str], Ran] = {}
    times: dict[tuple[str, str], int] = {}
    for ran in _runs(read_events(path)):
        key = (ran.node, ran.provider)
        found.setdefault(key, ran)
        times[key] = times.get(key, 0) + 1
    if not found:
        raise ModelError(f"{path} holds no run of a node", hint="a session writes its profile when it is ended")
    return ExecutionProfile(
        tuple(Ran(r.node, r.operator, r.provider, r.operands, times[key]) for key, r in found.items())
    )


def _runs(events: Sequence[Mapping[str, Any]]) -> Iterator[Ran]:
    for event in events:
        if event.get("cat") != "Node":
            continue
        name, arguments = event.get("name"), event.get("args")
        if isinstance(name, str) and name.endswith(KERNEL_TIME) and isinstance(arguments, dict):
            provider = str(arguments.get("provider"))
            yield Ran(
                node=name.removesuffix(KERNEL_TIME),
                operator=str(arguments.get("op_name")),
                provider=_PROVIDERS.get(provider, provider),
                operands=tuple(_operands(arguments)),
            )


def _operands(arguments: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for side in ("input_type_shape", "output_type_shape"):
        listed = arguments.get(side)
        for operand in listed if isinstance(listed, list) else []:
            if isinstance(operand, dict):
                for kind, shape in operand.items():
                    if isinstance(shape, list) and all(isinstance(size, int) for size in shape):
                        yield str(kind), tuple(shape)


def profile_run(path: Path, provider: Provider, tokens: int = TOKENS) -> ExecutionProfile:
    """Run a graph once, on `tokens` tokens and empty caches, and read where its nodes ran.

    Raises ModelError, with the runtime's words, where the graph cannot be run on inputs of the declared types, and
    RuntimeMissing where the provider does not start.
    """
    runtime = load_onnxruntime(provider)
    wanted = ["CUDAExecutionProvider"] if provider == "cuda" else []
    with tempfile.TemporaryDirectory(prefix="gemma4-surgery-") as folder:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        if wanted:
            options.add_session_config_entry(OPTION, SETTING)
        try:
            session = runtime.InferenceSession(str(path), options, providers=[*wanted, "CPUExecutionProvider"])
            if missing := set(wanted) - set(session.get_providers()):  # it goes on with the CPU, and only logs that
                raise RuntimeMissing(f"onnxruntime could not start {missing.pop()}; see its log for the reason")
            session.run(None, {value.name: _feed(path, value, tokens) for value in session.get_inputs()})
            written = session.end_profiling()
        except SurgeryError:
            raise
        except Exception as error:  # the runtime's exceptions share no base class of their own
            raise ModelError(f"ONNX Runtime cannot run {path}: {one_line(error)}") from None
        return read_profile(Path(written))


def _feed(path: Path, value: Any, tokens: int) -> Array:
    """An input for a first step: one row of `tokens` tokens, empty caches, ones for every other value."""
    kind = _INPUTS.get(value.type)
    if kind is None:
        raise ModelError(f"{path}: input {value.name} is {value.type}; {', '.join(_INPUTS)} are known")
    open_sizes = (1, tokens, 0)  # [batch, tokens, ...], and a cache is [batch, KV heads, tokens so far, head size]
    shape = [
        size if isinstance(size, int) else (open_sizes[axis] if axis < len(open_sizes) else 1)
        for axis, size in enumerate(value.shape)
    ]
    ones: Array = np.ones(shape, kind)
    return np.broadcast_to(np.arange(tokens, dtype=kind), shape).copy() if value.name == "position_ids" else ones


def profile_gates(found: ExecutionProfile, expected: Prediction | None = None) -> list[Gate]:
    """Whether a model ran on CUDA as it should: no decoder node fell to the CPU, and no more was copied than expected.

    What may run on the CPU: shape arithmetic, and nodes that `expected` puts there without calling it a fault.
    """
    fallen, copies = found.fallen(expected), found.copies
    where = f"{len(found.on('cuda'))} nodes on CUDA, {len(found.on('cpu'))} on the CPU"
    named = "; ".join(f"{ran.operator} {ran.node!r} ran on the CPU" for ran in fallen[:3])
    most = len(expected.copies) if expected else None
    return [
        Gate("runtime", "nodes run on CUDA", not fallen and bool(found.on("cuda")), 0, len(fallen), named or where),
        Gate(
            "runtime",
            "copies between the memories",
            most is None or len(copies) <= most,
            most,
            len(copies),
            f"{len(copies)} a run" + "".join(f"; {ran.operator} of {_shown(ran)}" for ran in copies[:3]),
        ),
    ]


def _shown(ran: Ran) -> str:
    return " ".join(f"{kind} {list(shape)}" for kind, shape in ran.operands[:1]) or "an unknown type"
