"""Weights of 8 bits, one scale for each output channel, made from MatMulNBits' codes in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

MOST = 127
"""The largest of the whole numbers: they are symmetric around 0."""

_AT_A_TIME = 2**22
"""Values that are float32 at one time."""


@dataclass(frozen=True, slots=True)
class ChannelWeights:
    """How a product's codes are stored, and which of the two results is meant, of one of `of` equal parts of its channels.

    `depth` is K, of which `block` values share a scale; codes have `bits` and scales are float16 where `half` is set.
    `values` are int8 [K, N], w = value * scale; `scales` are float32 [N], N those of the part. A channel that has one
    scale for all of its blocks, and no zero points, keeps codes and scale. `inline` are the bytes of codes, scales and
    zero points that the graph itself holds: None for those in a data file, nothing for zero points that there are not.
    """

    depth: int
    block: int
    bits: int
    half: bool
    result: Literal["values", "scales"]
    index: int = 0
    of: int = 1
    inline: tuple[bytes | None, bytes | None, bytes | None] = field(default=(None, None, None), repr=False)

    @property
    def row_bytes(self) -> int:
        """Bytes that one output channel has in the result."""
        return self.depth if self.result == "values" else 4

    def made(self, read: Sequence[Array]) -> Array:
        """The result for these channels. `read` are those that are in data files, uint8 [N, bytes of a row] each."""
        import numpy as np

        left = list(read)
        given = [left.pop(0) if one is None else np.frombuffer(one, np.uint8) for one in self.inline]
        codes = given[0].reshape(-1, -(-self.depth // self.block) * self.block * self.bits // 8)
        count = len(codes) // self.of
        part = slice(self.index * count, (self.index + 1) * count)
        scales, points = (one.reshape(len(codes), -1)[part] for one in given[1:])
        codes = codes[part]
        step = max(1, _AT_A_TIME // self.depth)
        values = np.empty((self.depth, len(codes)), np.int8) if self.result == "values" else None
        channel = np.empty(len(codes), np.float32)
        for row in range(0, len(codes), step):
            part = slice(row, row + step)
            real = self.real(codes[part], scales[part], points[part])
            sizes = self._sizes(scales[part])
            same = sizes.shape[1] == 1 and not points.size
            one = sizes[:, 0] if same else np.abs(real).max(axis=1) / np.float32(MOST)
            channel[part] = np.where(one != 0, one, np.float32(1))
            if values is not None:
                values[:, part] = np.rint(real / channel[part, None]).T
        return channel if values is None else values

    def real(self, codes: Array, scales: Array, points: Array) -> Array:
        """What the codes of some channels mean, float32 [n, K]; without zero points, 0 is in the middle."""
        import numpy as np

        blocks = -(-self.depth // self.block)
        size = self._sizes(scales)[:, :, None]
        whole = self._codes(codes).reshape(len(codes), blocks, self.block).astype(np.float32)
        middle = np.full((len(codes), blocks), 2 ** (self.bits - 1), np.uint8)
        zero = self._codes(points)[:, :blocks] if points.size else middle
        found: Array = ((whole - zero[:, :, None].astype(np.float32)) * size).reshape(len(codes), -1)[:, : self.depth]
        return found

    def _sizes(self, scales: Array) -> Array:
        """The scales of some channels, float32 [n, blocks] or, where there is one for all blocks, [n, 1]."""
        import numpy as np

        found: Array = np.ascontiguousarray(scales).view("<f2" if self.half else "<f4").astype(np.float32)
        return found.reshape(len(scales), -1)

    def _codes(self, packed: Array) -> Array:
        """Codes of less than a byte, one a byte."""
        import numpy as np

        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        codes: Array = (packed[:, :, None] >> shifts) & np.uint8(2**self.bits - 1)
        return codes.reshape(len(packed), -1)
