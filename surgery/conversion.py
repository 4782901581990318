"""Weights that change on their way: float32 in the source, float16 in the folder, a portion at a time.

A pass declares a changed weight: the tensor takes its new dtype and a place in a data file that does not exist yet, and
`Model.converted` says what it is made from. The bytes are read, rounded and written when the model is saved, once;
a pass itself reads none of them, and memory use does not depend on the size of the weights.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from surgery.errors import WeightError
from surgery.weights import WeightReference

if TYPE_CHECKING:
    from numpy.typing import NDArray

HALF_MAX = 65504.0
"""The largest number that float16 holds."""

CHUNK = 16 * 1024 * 1024
"""Bytes of float32 in memory at a time."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A float32 weight that is written as float16. `clip` keeps what float16 does not hold at its end of the range."""

    source: WeightReference
    clip: bool = False

    @property
    def length(self) -> int:
        """Bytes written."""
        return self.source.length // 2


def halved(values: NDArray[Any], name: str, *, clip: bool) -> NDArray[Any]:
    """float32 rounded to float16. Raises WeightError for a finite value beyond its range, unless it is to be clipped."""
    import numpy as np

    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    beyond = np.isinf(half) & np.isfinite(values)
    if not beyond.any():
        return half
    if not clip:
        raise WeightError(
            f"tensor {name!r} holds {float(values[beyond].flat[0]):g}, and float16 ends at {HALF_MAX:g}",
            hint="to-fp16{overflow=clip} keeps such values at the end of the range",
        )
    return np.where(beyond, np.copysign(np.float16(HALF_MAX), half), half)


def converted(conversion: Conversion, writer: BinaryIO) -> Iterator[int]:
    """Write a converted weight at the position of a file, and yield the size of each portion."""
    import numpy as np

    source = conversion.source
    done = 0
    with source.file.open("rb") as reader:
        while done < source.length:
            data = os.pread(reader.fileno(), min(CHUNK, source.length - done), source.offset + done)
            data = data[: len(data) // 4 * 4]
            if not data:
                raise OSError(errno.EIO, f"{source.file} ends early; it changed while it was being read")
            half = halved(np.frombuffer(data, "<f4"), source.name, clip=conversion.clip)
            left = memoryview(half.astype("<f2", copy=False).tobytes())
            while left:
                left = left[os.write(writer.fileno(), left) :]
            done += len(data)
            yield len(data) // 2
