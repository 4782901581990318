"""What CUDA kernels do not do although their registration does not tell: a node beyond a limit fails when it runs.

Found by the strings in the CUDA providers of the wheels 1.24.4 to 1.31.1, and for Gather in the runtime's own fix
(microsoft/onnxruntime#28108): before it, wrong rows came back without an error. So they do of codes without zero
points: the CPU provider takes 2^(bits - 1) for 0, this one 0 (microsoft/onnxruntime#31692); 2 bits have kernels on the
CPU alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.graph.tensor_types import TensorType

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True, slots=True)
class Limit:
    """What a CUDA kernel that is there does not do before the version `since`; never, where that is None."""

    operator: str
    what: str
    since: str | None
    applies: Callable[[NodeProto, Mapping[str, TensorType]], bool]

    def holds(self, runtime: str) -> bool:
        """Whether a runtime, by its version, has the limit."""
        return self.since is None or release(runtime) < release(self.since)

    def told(self, runtime: str) -> str:
        """The limit as a sentence."""
        when = f"from onnxruntime-gpu {self.since} on" if self.since else "in no version known"
        return f"{self.operator} takes {self.what} {when}; {runtime} is used"


def _has_input(*positions: int) -> Callable[[NodeProto, Mapping[str, TensorType]], bool]:
    return lambda node, _: any(position < len(node.input) and node.input[position] for position in positions)


def _dim(name: str, types: Mapping[str, TensorType], axis: int) -> int:
    """A size that is declared; -1 where it is not a number."""
    known = types.get(name)
    if known is None or known.shape is None or axis >= len(known.shape):
        return -1
    size = known.shape[axis]
    return size if isinstance(size, int) else -1


def _large_heads(node: NodeProto, types: Mapping[str, TensorType]) -> bool:
    return len(node.input) > 3 and _dim(node.input[3], types, 3) > 256


def _empty_key(node: NodeProto, types: Mapping[str, TensorType]) -> bool:
    return len(node.input) > 1 and _dim(node.input[1], types, 1) == 0


def _no_present(node: NodeProto, _: Mapping[str, TensorType]) -> bool:
    return not any(node.output[1:3])


def _large_table(node: NodeProto, types: Mapping[str, TensorType]) -> bool:
    known = types.get(node.input[0]) if node.input else None
    sizes = [size for size in known.shape or () if isinstance(size, int)] if known else []
    return math.prod(sizes) >= 2**31


def _no_zero_points(node: NodeProto, _: Mapping[str, TensorType]) -> bool:
    return not any(node.input[3:4])


def _two_bits(node: NodeProto, _: Mapping[str, TensorType]) -> bool:
    return any(attribute.name == "bits" and attribute.i == 2 for attribute in node.attribute)


def _odd_bits(node: NodeProto, _: Mapping[str, TensorType]) -> bool:
    return any(attribute.name == "bits" and attribute.i not in (2, 4, 8) for attribute in node.attribute)


LIMITS = (
    Limit("GroupQueryAttention", "a head size above 256", "1.26.0", _large_heads),
    Limit("GroupQueryAttention", "an empty key, as a KV-shared layer has it", "1.27.0", _empty_key),
    Limit("GroupQueryAttention", "the weights of a query and key norm", "1.28.0", _has_input(14, 15)),
    Limit("GroupQueryAttention", "an attention_bias", "1.29.0", _has_input(10)),
    Limit("GroupQueryAttention", "outputs without the present cache", "1.31.0", _no_present),
    Limit("Gather", "rows beyond element 2^31 of a table", "1.27.0", _large_table),
    Limit("GatherBlockQuantized", "2 bits", None, _two_bits),
    Limit("GatherBlockQuantized", "codes without zero points, which it reads as around 0,", None, _no_zero_points),
    Limit("MatMulNBits", "other widths than 2, 4 and 8 bits", None, _odd_bits),
)
"""Each holds before the version that lifts it."""


def broken_limit(node: NodeProto, types: Mapping[str, TensorType], runtime: str) -> Limit | None:
    """The limit that a node exceeds, one that no version lifts before others; None where there is none."""
    broken = [
        limit
        for limit in LIMITS
        if limit.operator == node.op_type and limit.holds(runtime) and limit.applies(node, types)
    ]
    return next((limit for limit in broken if limit.since is None), broken[0] if broken else None)


def release(version: str) -> tuple[int, ...]:
    """1.31.1 -> (1, 31, 1). A suffix such as rc1 or +cu13 is left off."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
