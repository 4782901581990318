"""Tables of tokens where AFTER has fewer tokens than BEFORE: each row that stays, by a digest of all of them.

What stays is told by the list in AFTER's folder. That a list is right is not taken on trust: rows that are not those of the
tokens that it names have another digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.compare.subjects import Subject
from surgery.errors import SurgeryError
from surgery.folder.manifest import recorded_tokens
from surgery.graph.embedding_tables import Matrix
from surgery.graph.external_data import BITS, is_external, reference
from surgery.graph.model import Model
from surgery.graph.tensor_types import initializer_type
from surgery.graph.weight_conversion import (
    Columns,
    Conversion,
    Selection,
    SourcePart,
    made_portions,
    moved,
    picked_elements,
)
from surgery.source.kept_tokens import KeptTokens

if TYPE_CHECKING:
    from onnx import TensorProto


_MOST_ELEMENTS = 2**24
"""Of a tensor of elements of less than a byte: rows that do not begin at a byte are compared element by element."""


class RowsOfTokens:
    """The tokens that stay of BEFORE's, and whether a tensor has their rows."""

    def __init__(self, kept: KeptTokens, size: int) -> None:
        self.kept = kept
        self.size = size
        self._selections: dict[tuple[int, int], Selection] = {}

    @classmethod
    def of(cls, before: Subject, after: Subject) -> RowsOfTokens | None:
        """None where AFTER is no folder of fewer tokens, or BEFORE is one too."""
        found = (after.manifest or {}).get("vocabulary")
        size = found.get("source") if isinstance(found, Mapping) else None
        if not isinstance(size, int) or size < 1 or (before.manifest or {}).get("vocabulary"):
            return None
        kept = _list(after.root)
        return cls(kept, size) if kept is not None and kept.ids[-1] < size else None

    def are_equal(self, before: tuple[Model, TensorProto], after: tuple[Model, TensorProto]) -> bool:
        """Whether a tensor of AFTER is BEFORE's with the rows, or the columns, of the tokens that stay; it is read. False too
        where that cannot be told."""
        (model, one), (other_model, other) = before, after
        if len(one.dims) != len(other.dims) or one.data_type != other.data_type:
            return False
        axes = [axis for axis, sizes in enumerate(zip(one.dims, other.dims, strict=True)) if sizes[0] != sizes[1]]
        bits = BITS.get(initializer_type(one).dtype, 0)
        if len(axes) != 1 or axes[0] not in (0, len(one.dims) - 1) or not bits or not math.prod(one.dims):
            return False
        if bits < 8 and math.prod(one.dims) > _MOST_ELEMENTS:
            return False
        with contextlib.suppress(SurgeryError, OSError, ValueError):
            return self._staying(model, one, axes[0]) == _digest(other_model, other)
        return False

    def _staying(self, model: Model, tensor: TensorProto, axis: int) -> str:
        """The digest of what stays of a tensor: rows, or elements of each row; a flat tensor holds several for each token."""
        bits, last, elements = BITS[initializer_type(tensor).dtype], tensor.dims[-1], math.prod(tensor.dims)
        rows = tensor.dims[0] if tensor.dims[0] % self.size else self.size
        each = elements // rows if axis == 0 else 1
        columns = Columns(elements, 0, elements, bits) if axis == 0 else Columns(last, 0, last, bits)
        if not is_external(tensor):
            picked = self._selection(rows if axis == 0 else last, each)
            data = Matrix(tensor, columns, 1).inline_bytes().reshape(-1, columns.row_bytes)
            return hashlib.sha256(picked_elements(data, picked.numbers, bits).tobytes()).hexdigest()
        source = reference(tensor, model.weight_files)
        if axis == 0 and each * bits % 8 == 0:
            size = each * bits // 8
            parts = (SourcePart(source, Columns(size, 0, size, 8)),)
            return _digest_of(Conversion(parts, taken=self._selection(rows, 1)), model)
        picked = self._selection(rows if axis == 0 else last, each)
        return _digest_of(Conversion((SourcePart(source, columns),), picked=picked), model)

    def _selection(self, rows: int, each: int) -> Selection:
        """Of `rows` rows of `each` elements, the elements of those that stay."""
        key = rows, each
        if key not in self._selections:
            ids = self.kept.ids[: self.kept.below(rows)]
            self._selections[key] = Selection.of(n * each + e for n in ids for e in range(each))
        return self._selections[key]


def _digest(model: Model, tensor: TensorProto) -> str:
    if not is_external(tensor):
        return hashlib.sha256(Matrix(tensor, Columns(1, 0, 1, 8), 1).inline_bytes().tobytes()).hexdigest()
    return _digest_of(model.conversion(tensor) or moved(reference(tensor, model.weight_files)), model)


def _digest_of(made: Conversion, model: Model) -> str:
    """SHA-256 of a weight as it is written."""
    digest = hashlib.sha256()
    for _, _, data in made_portions([made], model.open_data):
        digest.update(data)
    return digest.hexdigest()


def _list(root: Path) -> KeptTokens | None:
    with contextlib.suppress(SurgeryError):
        return recorded_tokens(root)
    return None
