"""tie-lm-head: lm_head reads the bytes of the embedding's table, where they are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Finding, Pass
from surgery.graph.external_data import WeightReference, is_external, reference, set_extent
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute, node_in_words
from surgery.graph.output_products import output_products
from surgery.graph.weight_comparison import first_difference, is_transpose

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

_PARTS = (("codes", 0, 1), ("scales", 2, 2), ("zero points", 3, 3))
"""Part, and its input of GatherBlockQuantized and of MatMulNBits."""


@dataclass(frozen=True)
class TieLmHead(Pass):
    """Store a tied embedding once.

        before                                           after

        table  [V,K/2]     -> GatherBlockQuantized       table  [V,K/2]     -> GatherBlockQuantized
                                                           : the same bytes of the same file
        matrix [V,K/32,16] -> MatMulNBits                matrix [V,K/32,16] -> MatMulNBits

        table  [V,H] -> Gather                           table  [V,H] -> Gather
                                                             |
        matrix [H,V] -> MatMul                               '---------> FusedMatMul(transB=1)

    Gemma ties lm_head to its embedding, and exports store both: 258 MB of E2B in q4. That they are equal is read
    from the files, a portion at a time; what differs in a byte stays as it is.

    Quantised: codes, scales and zero points each keep their tensor, with its own dtype and shape, and refer to one
    extent. No Reshape comes between: ONNX Runtime prepacks the matrix of MatMulNBits only where it is an initializer,
    and a Reshape of one is folded into a copy when the model loads (measured: 192 MB more for the table's side, 0.5 s
    longer to load for the matrix's). On the CPU the memory stays as it was, because a table is mapped and the matrix
    repacked; what is saved is storage, and reading it.

    Unquantised: the table itself is the matrix, transposed. FusedMatMul gives the bits that MatMul gave on the CPU
    provider, which packs either for its kernels (measured, float32 and float16, 1 to 33 tokens); it has kernels for
    float32 and float16 on CUDA too. One copy is in the file and in the device's memory.

    Placing: `consolidate` writes shared bytes once; `copy` leaves off what nothing refers to at a file's end, where the
    exporter has lm_head; `link` shares whole files with the source, and saves nothing.

    Leaves alone: weights inside of the graph file, and those that another pass has rounded.
    Requires: nothing; run it behind merge-embeddings, which brings the table into the graph.
    Ensures: every weight lies inside of its file.
    """

    name: ClassVar[str] = "tie-lm-head"
    summary: ClassVar[str] = "lm_head reads the embedding table's bytes where they are equal, and its own copy goes"

    def requires(self, model: Model) -> None:
        model.check_weights()

    def run(self, model: Model) -> list[Finding]:
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        heads = [node for node, _ in output_products(model.graph) if node.op_type != "Gemm"]
        findings = [*_share_codes(model, heads, weights), *_share_tables(model, heads, weights)]
        reason = "no table that tokens are looked up in has its size; merge-embeddings brings the embedding's"
        return findings or [Finding("skipped", "lm_head", reason)]

    def ensures(self, model: Model) -> None:
        model.check_weights()


def _share_codes(model: Model, heads: list[NodeProto], weights: dict[str, TensorProto]) -> Iterator[Finding]:
    """Block-quantised: one extent for each part that is equal."""
    tables = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    for matrix in (node for node in heads if node.op_type == "MatMulNBits"):
        for table in tables:
            if _have_one_size(model, weights, table, matrix):
                for part, of_table, of_matrix in _PARTS:
                    one, other = _input(weights, table, of_table), _input(weights, matrix, of_matrix)
                    if one is not None and other is not None:
                        yield _share(model, part, one, other)


def _have_one_size(model: Model, weights: dict[str, TensorProto], table: NodeProto, matrix: NodeProto) -> bool:
    """Whether the codes of both have as many rows and bytes, and rows are what is looked up."""
    one, other = _input(weights, table, 0), _input(weights, matrix, 1)
    return (
        one is not None
        and other is not None
        and int_attribute(table, "gather_axis", 0) == 0
        and one.dims[:1] == other.dims[:1]
        and _bytes(model, one) == _bytes(model, other)
    )


def _bytes(model: Model, tensor: TensorProto) -> int:
    return reference(tensor, model.weight_files).length if _is_stored(model, tensor) else len(tensor.raw_data)


def _share(model: Model, part: str, table: TensorProto, matrix: TensorProto) -> Finding:
    if not (_is_stored(model, table) and _is_stored(model, matrix)):
        return Finding("skipped", matrix.name, f"its {part} are in the graph's own file, or are still to be written")
    one, other = reference(table, model.weight_files), reference(matrix, model.weight_files)
    if _place(one) == _place(other):
        return Finding("skipped", matrix.name, f"it refers to the bytes of {table.name!r} already")
    difference = first_difference(one, other)
    if difference is not None:
        return Finding("skipped", matrix.name, f"its {part} differ from those of {table.name!r} at byte {difference:,}")
    set_extent(matrix, one.location, one.offset, one.length)
    return Finding("changed", matrix.name, f"its {part} are those of {table.name!r}: {one.length:,} bytes less")


def _place(ref: WeightReference) -> tuple[object, ...]:
    return ref.file, ref.offset, ref.length


def _share_tables(model: Model, heads: list[NodeProto], weights: dict[str, TensorProto]) -> list[Finding]:
    """Plain floats: a table of Gather that is the transpose of a MatMul's matrix takes its place."""
    tables = {
        table.name: table
        for node in model.graph.node
        if node.op_type == "Gather" and int_attribute(node, "axis", 0) == 0
        if (table := _input(weights, node, 0)) is not None and len(table.dims) == 2
    }
    findings, tied = [], dict[str, str]()
    for node in heads:
        matrix = _input(weights, node, 1)
        if matrix is None:
            continue
        if node.op_type == "FusedMatMul" and matrix.name in tables:
            findings.append(Finding("skipped", node_in_words(node), f"it multiplies by {matrix.name!r} already"))
        for table in tables.values():
            if node.op_type == "MatMul" and list(matrix.dims) == list(table.dims)[::-1]:
                findings.append(finding := _compare(model, node, table, matrix))
                if finding.verb == "changed":
                    tied[node.output[0]] = table.name
    if tied:
        _multiply_by_tables(model, tied)
    return findings


def _compare(model: Model, node: NodeProto, table: TensorProto, matrix: TensorProto) -> Finding:
    if not (_is_stored(model, table) and _is_stored(model, matrix)):
        return Finding("skipped", matrix.name, "it is in the graph's own file, or is still to be written")
    one, other = reference(table, model.weight_files), reference(matrix, model.weight_files)
    if not is_transpose(one, other):
        return Finding("skipped", matrix.name, f"it is not the transpose of {table.name!r}")
    return Finding("changed", node_in_words(node), f"it multiplies by {table.name!r}: {other.length:,} bytes less")


def _multiply_by_tables(model: Model, tied: dict[str, str]) -> None:
    """`tied` is output of a MatMul -> the table that it is to multiply by, transposed."""
    with model.edited() as view:
        tensors = view.tensors()
        for node in view.nodes:
            if node.outputs and node.outputs[0].name in tied:
                node.op, node.domain, node.attrs["transB"] = "FusedMatMul", "com.microsoft", 1
                node.inputs[1] = tensors[tied[node.outputs[0].name]]
    if not model.opset("com.microsoft"):
        model.proto.opset_import.add(domain="com.microsoft", version=1)


def _input(weights: dict[str, TensorProto], node: NodeProto, index: int) -> TensorProto | None:
    return weights.get(node.input[index]) if index < len(node.input) else None


def _is_stored(model: Model, tensor: TensorProto) -> bool:
    """Whether its bytes are in a data file, as they are."""
    return is_external(tensor) and model.conversion(tensor) is None
