"""What an operator of a fragment will take before it runs: elements that it makes, multiplications, fixed costs.

Only operators are known whose work follows from the shapes, and a few sizes, that they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import ModelError
from surgery.graph.nodes import node_in_words

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import NodeProto

    Array = NDArray[Any]

Given = Sequence["Array"]

_START, _ELEMENT, _SLOW_ELEMENT, _WHOLE_NUMBER, _BY_PYTHON = 2**18, 16, 64, 32, 4096
"""In multiplications of float32: calling an operator; an element that is read or made, by a slow one too; a
multiplication of whole numbers; an element in a loop of the reference implementation's."""
_WIDEST = 8
"""Bytes of an element."""
_MOST_ELEMENTS = 2**28
"""Of one array."""


def operator_work(node: NodeProto, given: Sequence[Array | None]) -> tuple[int, int]:
    """In multiplications, and the most bytes that it makes.

    Raises ModelError for an operator that is not known, for text, and for an array that is too large.
    """
    made = _MADE.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if made is None:
        raise ModelError(f"it depends on {node_in_words(node)}, and such a node is not tried")
    arrays = [array for array in given if array is not None]
    if any(array.dtype.kind not in "biuf" for array in arrays):
        raise ModelError(f"it depends on {node_in_words(node)}, which is given no numbers")
    elements = made(arrays)
    if elements > _MOST_ELEMENTS:
        raise ModelError(f"it depends on {node_in_words(node)}, which makes {elements:,} elements")
    each = _SLOW_ELEMENT if node.op_type in _SLOW else _ELEMENT
    work = _START + each * elements + reading_work(arrays)
    if node.op_type == "MatMul":
        work += elements * arrays[0].shape[-1] * (1 if arrays[0].dtype.kind == "f" else _WHOLE_NUMBER)
    if node.op_type in _LOOPS:
        work += _BY_PYTHON * sum(array.size for array in arrays)
    return work, _WIDEST * elements


def reading_work(arrays: Iterable[Array]) -> int:
    """The work of reading each element once, in the unit of this module."""
    return _ELEMENT * sum(array.size for array in arrays)


def _product(sizes: Sequence[int]) -> int:
    """As Python's integers, which do not overflow."""
    return math.prod(int(size) for size in sizes)


def _no_more(given: Given) -> int:
    """No more than it is given."""
    return sum(array.size for array in given)


def _broadcast(given: Given) -> int:
    import numpy as np

    return _product(np.broadcast_shapes(*(array.shape for array in given)))


def _expanded(given: Given) -> int:
    import numpy as np

    return _product(np.broadcast_shapes(given[0].shape, tuple(given[1].tolist())))


def _filled(given: Given) -> int:
    sizes: list[int] = given[0].reshape(-1).tolist()
    return _product(sizes)


def _counted(given: Given) -> int:
    start, limit, step = (array.reshape(-1).tolist()[0] for array in given)
    count: int = math.ceil((limit - start) / step)
    return max(0, count)


def _repeated(given: Given) -> int:
    times: list[int] = given[1].reshape(-1).tolist()
    return given[0].size * _product(times)


def _gathered(given: Given) -> int:
    """At most: whatever the axis is, each index takes one slice across it."""
    data, indices = given
    return data.size // max(1, min(data.shape, default=1)) * indices.size


def _multiplied(given: Given) -> int:
    import numpy as np

    left, right = (array.shape for array in given)
    batches: tuple[int, ...] = np.broadcast_shapes(left[:-2], right[:-2])
    return _product([*batches, *left[-2:-1], *(right[-1:] if len(right) > 1 else ())])


_LOOPS = {"ScatterND"}
_SLOW = {"CumSum", "Erf", "Exp", "Log", "Mod", "Pow", "Sigmoid", "Softmax", "Tanh"}
_SHRINKING = {
    "Abs", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant", "CumSum", "Erf", "Exp", "Flatten", "Floor", "Identity",
    "IsInf", "IsNaN", "Log", "Neg", "Not", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "Relu", "Reshape", "Round", "ScatterND", "Shape", "Sigmoid", "Sign", "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze",
    "Tanh", "Transpose", "Trilu", "Unsqueeze",
}  # fmt: skip
_ELEMENTWISE = {
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or",
    "Pow", "Sub", "Sum", "Where", "Xor",
}  # fmt: skip
_MADE: Mapping[str, Callable[[Given], int]] = {
    **dict.fromkeys(_SHRINKING, _no_more),
    **dict.fromkeys(_ELEMENTWISE, _broadcast),
    "ConstantOfShape": _filled,
    "Expand": _expanded,
    "Gather": _gathered,
    "MatMul": _multiplied,
    "Range": _counted,
    "Tile": _repeated,
}
"""Operator -> the elements that it makes of what it is given."""
