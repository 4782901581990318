"""Comparing weights on disk, a portion at a time: what a pass may share, it proves here first.

Memory use does not depend on the size of the weights, and a difference ends the reading.
"""

from __future__ import annotations

import os
from pathlib import Path

from surgery.errors import WeightError
from surgery.graph.external_data import WeightReference, byte_size

PORTION = 1024 * 1024
"""Bytes of each weight in memory at a time."""

BAND = 32 * 1024 * 1024
"""The same where one of them is transposed: wide enough that each of its rows gives some kilobytes."""


def first_difference(one: WeightReference, other: WeightReference) -> int | None:
    """The first byte in which two weights differ, None where they are equal; dtype and shape do not matter.

    A shorter weight differs from a longer one behind its end. Raises WeightError where a file ends early.
    """
    common = min(one.length, other.length)
    with one.file.open("rb") as left, other.file.open("rb") as right:
        for start in range(0, common, PORTION):
            count = min(PORTION, common - start)
            here = _read(left.fileno(), one.file, one.offset + start, count)
            there = _read(right.fileno(), other.file, other.offset + start, count)
            if here != there:
                return start + next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
    return None if one.length == other.length else common


def is_transpose(table: WeightReference, matrix: WeightReference) -> bool:
    """Whether `matrix` [columns, rows] holds the numbers of `table` [rows, columns], bit by bit.

    Elements have whole bytes: FLOAT, FLOAT16 and the like. Raises WeightError where a file ends early.
    """
    import numpy as np

    if table.dtype != matrix.dtype or len(table.shape) != 2 or table.shape != matrix.shape[::-1]:
        return False
    rows, columns = table.shape
    element = byte_size(table.dtype, [1])
    bits = np.dtype(f"u{element}")
    band = max(1, BAND // max(1, columns * element))
    with table.file.open("rb") as left, matrix.file.open("rb") as right:
        for start in range(0, rows, band):
            count = min(band, rows - start)
            size = count * element
            straight = _read(left.fileno(), table.file, table.offset + start * columns * element, columns * size)
            across = bytearray()
            for column in range(columns):
                offset = matrix.offset + (column * rows + start) * element
                across += _read(right.fileno(), matrix.file, offset, size)
            here = np.frombuffer(straight, bits).reshape(count, columns)
            if not np.array_equal(here, np.frombuffer(across, bits).reshape(columns, count).T):
                return False
    return True


def _read(file: int, path: Path, offset: int, count: int) -> bytes:
    data = os.pread(file, count, offset)
    if len(data) != count:
        raise WeightError(f"{path} ends before byte {offset + count}; it changed while it was being read")
    return data
