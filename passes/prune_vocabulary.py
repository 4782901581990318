"""prune-vocabulary: the rows of tokens that do not stay leave the tables and lm_head."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.errors import PassError, RequestError
from surgery.graph.embedding_tables import Matrix, TableLookup, made_from, move_along, table_lookups
from surgery.graph.external_data import BITS, byte_size, external_field, is_external, reference, tensors
from surgery.graph.index import Constants, producers
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute, node_in_words
from surgery.graph.output_products import output_products
from surgery.graph.tensor_types import initializer_type
from surgery.graph.weight_conversion import Columns, Conversion, NewFiles, Selection, picked_elements
from surgery.source.ids_in_graph import LOOKUPS, NewConstant, renumbered_constants, replace_constants, values_of_ids
from surgery.source.kept_tokens import KeptTokens

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

DATA_FILE = "vocabulary.onnx_data"
LOGITS = "logits"
_PART = re.compile(r"(_quant|\.layer_\d+.*)$")
"""Of the name of a table's tensor: which of its tensors it is, and which layer's."""
_SPREADING = {"Cast", "Expand", "Identity", "Reshape", "Unsqueeze"}
"""Operators between a stored scale for each row and the scales of all blocks."""


@dataclass(frozen=True)
class PruneVocabulary(Pass):
    """Keep the rows of some tokens, and number them anew without a gap.

        before                                        after, keep=vocabulary.txt with n tokens

        token table [V,H]         -> Gather           [n,H]
        per-layer table [V,L*D]   -> Gather           [n,L*D]
        Equal(input_ids, 258880)                      Equal(input_ids, new id of 258880)
        lm_head [V,H] or [H,V]    -> logits [B,S,V]   [n,H] or [H,n] -> logits [B,S,n]

    Tables are quantised row by row and lm_head output by output: what stays keeps its codes, scales and zero points,
    and every logit that stays is computed from the numbers that it was computed from. New ids go by the order of the
    old ones (`surgery.source.kept_tokens`), so that a comparison with the size of a table stays right. Ids that the
    graph itself holds, of placeholders say, are renumbered; a graph that does arithmetic with ids is refused.

    The rows are read and written when the model is saved, a portion at a time. The data file that the tables have left
    stays behind, and what else lies in it moves along; a file that ends in lm_head is copied without its end.

    Kernels take logits in groups, and sum up those that are left over in another order (measured: 1 to 3 of quantised
    products, by one unit in the last place). Where the number of tokens is a multiple of 16, there are none.

    Requires: token ids come in as `input_ids`, logits go out as `logits` behind one product; every id that the graph
    holds stays. Run it behind merge-embeddings or tie-lm-head, and in front of passes that bring ids along
    (scatter-features, mask-media-ids).
    Ensures: tables by token, lm_head and logits have as many rows as tokens stay.
    """

    name: ClassVar[str] = "prune-vocabulary"
    summary: ClassVar[str] = "rows of tokens that do not stay leave the tables and lm_head; ids are numbered anew"
    rewrites_weights: ClassVar[bool] = True

    keep: Path | KeptTokens

    def requires(self, model: Model) -> None:
        found = _Vocabulary.of(model.graph)
        if found.size and not found.is_pruned(kept := self.tokens):
            try:
                kept.check_size(found.size, f"{model.path}")
            except RequestError as error:
                raise PassError(str(error)) from None
            renumbered_constants(model.graph, kept, found.size)

    def run(self, model: Model) -> list[Finding]:
        kept, found = self.tokens, _Vocabulary.of(model.graph)
        if not found.size:
            return [Finding("skipped", "tables", "no table is looked up by token, and no product gives logits")]
        if found.is_pruned(kept):
            return [Finding("skipped", "tables", f"they are of {len(kept):,} tokens already")]
        changes = renumbered_constants(model.graph, kept, found.size)
        findings = [Finding("changed", change.values, f"{node_in_words(change.node)} has it") for change in changes]
        replace_constants(model, changes)
        return findings + _Taking(model, kept).all(_Vocabulary.of(model.graph))

    def ensures(self, model: Model) -> None:
        found = _Vocabulary.of(model.graph)
        if found.size and not found.is_pruned(self.tokens):
            raise PassError(f"there are still {found.size:,} tokens")

    @property
    def tokens(self) -> KeptTokens:
        """The list, in memory or in a file."""
        if isinstance(self.keep, KeptTokens):
            return self.keep
        try:
            return KeptTokens.read(self.keep)
        except RequestError as error:
            raise PassError(str(error), hint=error.hint) from None


def bytes_by_token(model: Model) -> dict[str, int]:
    """The tables that have a row for each token, and lm_head, by the name of their weights: bytes, scales and zero points
    included."""
    found: dict[str, int] = {}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    vocabulary = _Vocabulary.of(model.graph)
    groups = [[matrix.tensor for matrix in lookup.matrices.values()] for lookup in vocabulary.lookups]
    groups += [[weights[name] for name in head.node.input[1:] if name in weights] for head in vocabulary.heads]
    for group in groups:
        name = _PART.sub("", group[0].name)
        types = map(initializer_type, group)
        found[name] = found.get(name, 0) + sum(
            byte_size(each.dtype, tensor.dims) for each, tensor in zip(types, group, strict=True)
        )
    return found


@dataclass(frozen=True)
class _Head:
    """A product that gives logits, how many, and the nodes between it and them."""

    node: NodeProto
    rows: int
    behind: list[NodeProto]


@dataclass(frozen=True)
class _Vocabulary:
    """What a graph has of each token: the look-ups by token, and the products that give logits, with the nodes
    between."""

    lookups: list[TableLookup]
    heads: list[_Head]
    size: int

    @classmethod
    def of(cls, graph: GraphProto) -> _Vocabulary:
        """Raises PassError for logits that come from no product, and for a table that is not stored."""
        ids = values_of_ids(graph)
        lookups = [lookup for lookup in table_lookups(graph) if lookup.ids in ids]
        stored = {id(lookup.node) for lookup in lookups}
        for node in graph.node:
            if node.op_type in LOOKUPS and node.input[1] in ids and id(node) not in stored:
                raise PassError(
                    f"{node_in_words(node)} looks tokens up in {node.input[0]!r}; a stored table is expected"
                )
        weights = {tensor.name: tensor for tensor in graph.initializer}
        heads = [
            _Head(node, _outputs(node, weights), behind)
            for node, behind in output_products(graph)
            if any(LOGITS in each.output for each in (node, *behind))
        ]
        if any(value.name == LOGITS for value in graph.output) and not heads:
            raise PassError("the logits come from no MatMul, MatMulNBits, FusedMatMul or Gemm")
        rows = [matrix.tensor.dims[0] for lookup in lookups for matrix in lookup.matrices.values()]
        return cls(lookups, heads, max([*rows, *(head.rows for head in heads)], default=0))

    def is_pruned(self, kept: KeptTokens) -> bool:
        return self.size == len(kept)


def _outputs(head: NodeProto, weights: dict[str, TensorProto]) -> int:
    """How many logits a product gives. Raises PassError where its matrix is not stored."""
    if head.op_type == "MatMulNBits":
        return int_attribute(head, "N", 0)
    matrix = weights.get(head.input[1])
    if matrix is None or len(matrix.dims) != 2:
        raise PassError(f"{node_in_words(head)} multiplies by {head.input[1]!r}; a stored matrix is expected")
    return int(matrix.dims[0] if int_attribute(head, "transB", 0) else matrix.dims[1])


# Rows


@dataclass
class _Taking:
    """The rows that stay, taken from one tensor after another. A tensor that two nodes read is taken from once."""

    model: Model
    kept: KeptTokens
    done: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    """Data file -> the lowest offset in it that is not used any more."""

    def __post_init__(self) -> None:
        self._files = NewFiles(DATA_FILE, {*self.model.weight_files, *self.model.converted_files()})
        self._weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._selections: dict[int, Selection] = {}

    def all(self, found: _Vocabulary) -> list[Finding]:
        for lookup in found.lookups:
            self._rows([matrix.tensor for matrix in lookup.matrices.values()], lookup.node)
        makers = producers(self.model.graph)
        for head in found.heads:
            self._head(head.node, head.rows, makers)
            self._declare({name for node in (head.node, *head.behind) for name in node.output}, head.rows)
        return self.findings + move_along(self.model, set(self._with_gaps()), self._files)

    def _head(self, head: NodeProto, rows: int, makers: Mapping[str, NodeProto]) -> None:
        if head.op_type == "MatMulNBits":
            if len(head.input) > 4 and head.input[4]:
                raise PassError(
                    f"{node_in_words(head)} takes groups in another order, {head.input[4]!r}; none is expected"
                )
            names = [name for index, name in enumerate(head.input) if index in (1, 2, 3, 5) and name]
            self._rows([self._stored(name, head, rows, makers) for name in names], head, rows)
            next(attribute for attribute in head.attribute if attribute.name == "N").i = self.kept.below(rows)
            return
        matrix = self._weights[head.input[1]]
        if int_attribute(head, "transB", 0):
            self._rows([matrix], head)
        else:
            self._columns(matrix, head)
        if len(head.input) > 2 and head.input[2]:  # Gemm's C
            bias = self._weights.get(head.input[2])
            if bias is None:
                raise PassError(f"{node_in_words(head)} adds {head.input[2]!r}; a stored bias is expected")
            if bias.dims and bias.dims[-1] == rows:
                self._columns(bias, head)

    def _stored(self, name: str, head: NodeProto, rows: int, makers: Mapping[str, NodeProto]) -> TensorProto:
        """The weight that a product's input is made of: itself, or one that is spread to all blocks of a row."""
        changes = []
        constants = Constants(self.model.graph)
        while name not in self._weights:
            node = makers.get(name)
            if node is None or node.op_type not in _SPREADING:
                raise PassError(f"{node_in_words(head)} takes {name!r}; a stored weight is expected")
            shape = constants.integers(node.input[1]) if node.op_type in ("Expand", "Reshape") else []
            if shape is None:
                raise PassError(f"{node_in_words(node)} makes {name!r} of a shape that is no constant")
            if shape and shape[0] == rows:
                changes.append(NewConstant(node, 1, shape, [self.kept.below(rows), *shape[1:]]))
            self._declare({name}, rows, axis=0)
            name = node.input[0]
        replace_constants(self.model, changes)
        found: TensorProto = self._weights[name]
        return found

    def _rows(self, found: Sequence[TensorProto], node: NodeProto, count: int | None = None) -> None:
        """Of `count` rows, which is the tensors' first dimension unless it is given: a flat tensor may hold them."""
        external = []
        for tensor in found:
            rows = count or tensor.dims[0]
            if tensor.name in self.done:
                continue
            elements = math.prod(tensor.dims)
            if not tensor.dims or tensor.dims[0] % rows or elements % rows:
                raise PassError(
                    f"{node_in_words(node)}: {tensor.name!r}, {initializer_type(tensor)}, does not come apart into {rows} rows"
                )
            made = self._taken(tensor, rows, elements // rows)
            tensor.dims[0] = tensor.dims[0] // rows * self.kept.below(rows)
            external += [(tensor, made)] if made is not None else []
            self._settle(tensor, f"{self.kept.below(rows):,} of {rows:,} rows stay")
        if external:
            self._files.add(self.model.converted, external)

    def _columns(self, tensor: TensorProto, node: NodeProto) -> None:
        """A matrix [K, V], or a vector [V]: elements of each row."""
        if tensor.name in self.done:
            return
        width, bits = tensor.dims[-1], _bits(tensor)
        picked = self._selection(width)
        if bits < 8:
            raise PassError(
                f"{node_in_words(node)}: {tensor.name!r} is {initializer_type(tensor)}; floats are expected"
            )
        matrix = Matrix(tensor, Columns(width, 0, width, bits), 1)
        if is_external(tensor):
            self._leave(tensor)
            made = self._extended(matrix, math.prod(tensor.dims[:-1]), picked=picked)
            tensor.dims[-1] = len(picked)
            self._files.add(self.model.converted, [(tensor, made)])
        else:
            rows = matrix.inline_bytes().reshape(-1, width * bits // 8)
            _set_inline(tensor, picked_elements(rows, picked.numbers, bits).tobytes())
            tensor.dims[-1] = len(picked)
        self._settle(tensor, f"{len(picked):,} of {width:,} columns stay")

    def _taken(self, tensor: TensorProto, rows: int, elements: int) -> Conversion | None:
        """What a tensor of `rows` times `elements` is made from; an inline one gets its bytes at once, and None is
        given.

        Rows that do not begin at a byte, of odd numbers of packed zero points say, are picked element by element.
        """
        bits, selection = _bits(tensor), self._selection(rows)
        on_bytes = elements * bits % 8 == 0
        size = elements * bits // 8
        single = (
            None if on_bytes else Selection.of(n * elements + e for n in selection.numbers for e in range(elements))
        )
        if not is_external(tensor):
            flat = Matrix(tensor, Columns(1, 0, 1, bits), 1).inline_bytes().reshape(1, -1)
            if single is not None:
                _set_inline(tensor, picked_elements(flat, single.numbers, bits).tobytes())
            else:
                _set_inline(tensor, flat.reshape(rows, size)[list(selection.numbers)].tobytes())
            return None
        self._leave(tensor)
        if single is not None:
            total = rows * elements
            return self._extended(Matrix(tensor, Columns(total, 0, total, bits), 1), 1, picked=single)
        return self._extended(Matrix(tensor, Columns(size, 0, size, 8), 1), rows, taken=selection)

    def _extended(
        self, matrix: Matrix, rows: int, taken: Selection | None = None, picked: Selection | None = None
    ) -> Conversion:
        """What an external matrix is made from, less what does not stay."""
        made = made_from(self.model, matrix)
        if made.rows != rows or made.taken is not None or made.picked is not None:
            raise PassError(
                f"{matrix.tensor.name!r} has other rows by now",
                hint="run prune-vocabulary before passes that change tables",
            )
        return Conversion(made.parts, made.half, made.clip, taken, picked)

    def _selection(self, rows: int) -> Selection:
        if rows not in self._selections:
            self._selections[rows] = Selection.of(self.kept.ids[: self.kept.below(rows)])
        return self._selections[rows]

    def _leave(self, tensor: TensorProto) -> None:
        """Note that a data file is not referred to by this tensor any more."""
        location = external_field(tensor, "location") or ""
        if location in self.model.weight_files:
            start = reference(tensor, self.model.weight_files).offset
            self.left[location] = min(start, self.left.get(location, start))

    def _with_gaps(self) -> Iterator[str]:
        """Data files in which something else lies behind what left: their other weights move."""
        for location, start in self.left.items():
            others = [
                reference(tensor, self.model.weight_files)
                for tensor in tensors(self.model.proto)
                if is_external(tensor) and external_field(tensor, "location") == location
            ]
            if any(other.end > start for other in others):
                yield location

    def _settle(self, tensor: TensorProto, reason: str) -> None:
        self.done.add(tensor.name)
        for value in self.model.graph.value_info:
            if value.name == tensor.name and len(dims := value.type.tensor_type.shape.dim) == len(tensor.dims):
                for dim, size in zip(dims, tensor.dims, strict=True):
                    dim.dim_value = size
        self.findings.append(Finding("changed", tensor.name, reason))

    def _declare(self, names: set[str], size: int, axis: int = -1) -> None:
        """An axis of values: the last one between lm_head and the logits."""
        for value in (*self.model.graph.value_info, *self.model.graph.output):
            dims = value.type.tensor_type.shape.dim
            if value.name in names and dims and dims[axis].dim_value == size:
                dims[axis].dim_value = self.kept.below(size)


def _bits(tensor: TensorProto) -> int:
    found = BITS.get(initializer_type(tensor).dtype)
    if found is None:
        raise PassError(f"{tensor.name!r} is {initializer_type(tensor)}, which has no size on disk")
    return found


def _set_inline(tensor: TensorProto, data: bytes) -> None:
    """Give an inline tensor other bytes, whatever field held them before."""
    for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(name)
    tensor.raw_data = data
