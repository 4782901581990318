"""prune-vocabulary: what stays is computed bit by bit as before, whatever form the tables and lm_head have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exhaustive import in_full
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info
from small import Array, decoder, embed_tokens, externalised, run

from fixtures.build import build
from passes import MergeEmbeddings, PruneVocabulary, SplitPerLayerTable, TieLmHead
from passes.base import apply
from passes.presets import compatible, pruned
from passes.prune_vocabulary import bytes_by_token
from surgery.architecture import architecture
from surgery.errors import PassError
from surgery.graph import weight_conversion
from surgery.graph.model import Model
from surgery.runtime.decoding import next_feed, prompt_feeds
from surgery.runtime.sessions import MergedModel, OpenGraph, Runner, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, GraphPair, open_export
from surgery.source.kept_tokens import GROUP, KeptTokens

MUST = (0, 1, 2, 3, 4, 50, 98, 105, 106, 109, 111, 113, 114, 116, 125)
KEPT = KeptTokens.of([*MUST, *range(6, 125, 3), *range(40, 80, 2)])
"""64 tokens: whole groups of logits."""
PROMPT = [int(place) for place in np.random.default_rng(3).integers(0, len(KEPT), 13)]


def answers(runner: Runner, prompt: list[int], then: list[int]) -> list[Array]:
    """The logits of the prompt's last token, and of each token after it, one by one."""
    feed = next(iter(prompt_feeds([prompt], 0)))
    logits, cache = runner.step(feed, runner.start(1), 1)
    found = [logits]
    for token in then:
        feed = next_feed(feed.mask, np.array([token]))
        logits, cache = runner.step(feed, cache, 1)
        found.append(logits)
    return found


def equal(one: list[Array], other: list[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def source(pair: GraphPair) -> list[Array]:
    old = [KEPT.ids[place] for place in PROMPT]
    return [logits[..., list(KEPT.ids)] for logits in answers(TwoGraphModel.open(pair, Settings()), old, old[:3])]


def merged(pair: GraphPair, export: Export, folder: Path, *more: Any) -> Path:
    recipe = (*pruned(compatible(pair.embed), KEPT), *more)
    apply(Model.open(pair.decoder, export.architecture), recipe)[0].save(folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("precision", ["fp32", in_full("fp16"), in_full("q4"), "q4f16", "quantized"])
def test_two_graphs_and_one_give_the_bits_of_the_source(export: Export, precision: str, tmp_path: Path) -> None:
    pair = export.pair(precision)
    wanted = source(pair)
    for path, role in ((pair.embed, "e"), (pair.decoder, "d")):
        apply(Model.open(path), [PruneVocabulary(KEPT)])[0].save(tmp_path / f"{role}.onnx")
    two = TwoGraphModel(*(OpenGraph(tmp_path / f"{role}.onnx", Settings()) for role in "ed"))
    assert len(KEPT) % GROUP == 0 and equal(answers(two, PROMPT, PROMPT[:3]), wanted)
    one = MergedModel(merged(pair, export, tmp_path), Settings())
    assert equal(answers(one, PROMPT, PROMPT[:3]), wanted)


@pytest.fixture(scope="module", params=["tiny-e2b-qat", in_full("tiny-e4b-qat")])
def qat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("qat")
    build(request.param, "q2f16", folder)
    return open_export(folder)


def test_two_four_and_eight_bits_without_zero_points(qat: Export, tmp_path: Path) -> None:
    pair = qat.pair("q2f16")
    one = MergedModel(merged(pair, qat, tmp_path), Settings())
    assert equal(answers(one, PROMPT, PROMPT[:3]), source(pair))


def test_a_split_table_is_pruned_and_a_pruned_one_split(export: Export, tmp_path: Path) -> None:
    pair = export.pair("q4")
    wanted = source(pair)
    after = MergedModel(merged(pair, export, tmp_path, SplitPerLayerTable()), Settings())
    assert equal(answers(after, PROMPT, PROMPT[:3]), wanted)
    split = apply(Model.open(pair.decoder, export.architecture), [MergeEmbeddings(pair.embed), SplitPerLayerTable()])[0]
    split.save(tmp_path / "split.onnx")
    again = Model.open(tmp_path / "split.onnx", export.architecture)
    small, _ = apply(again, [PruneVocabulary(KEPT), *compatible(pair.embed)])
    small.save(tmp_path / "small.onnx")
    assert equal(answers(MergedModel(tmp_path / "small.onnx", Settings()), PROMPT, PROMPT[:3]), wanted)
    unsaved = (MergeEmbeddings(pair.embed), SplitPerLayerTable(), PruneVocabulary(KEPT))
    both, _ = apply(Model.open(pair.decoder, export.architecture), unsaved)
    assert sum(both.converted_files().values()) < sum(split.converted_files().values())


@pytest.mark.parametrize("precision", ["q4f16", "fp32"])
def test_what_was_tied_stays_tied(export: Export, precision: str, tmp_path: Path) -> None:
    pair = export.pair(precision)
    model = Model.open(pair.decoder, export.architecture)
    steps = [MergeEmbeddings(pair.embed), TieLmHead(), PruneVocabulary(KEPT)]
    untied, tied = (apply(model, chosen)[0] for chosen in ([steps[0], steps[2]], steps))
    less = sum(untied.converted_files().values()) - sum(tied.converted_files().values())
    assert less == len(KEPT) * (32 if precision == "q4f16" else 256), "lm_head's codes are the table's"
    both = [tensor for tensor in tied.graph.initializer if tensor.dims and tensor.dims[0] == len(KEPT)]
    assert both
    tied.save(tmp_path / "tied.onnx")
    assert equal(answers(MergedModel(tmp_path / "tied.onnx", Settings()), PROMPT, PROMPT[:3]), source(pair))


# Forms that the exporter does not write, in miniature

ROWS, WIDTH = 12, 96
"""Three blocks of 32: an odd number of zero points a row."""
FEW = KeptTokens.of([0, 1, 4, 7, 11])
OUTPUTS, HALF = 32, KeptTokens.of([0, 1, 4, 7, 11, *range(13, 31, 2), 30, 31])
"""Of lm_head, in whole groups."""


def of(name: str, data_type: int, values: Array) -> TensorProto:
    bits = {TensorProto.UINT4: 4, TensorProto.UINT8: 8}.get(data_type)
    if bits != 4:
        return numpy_helper.from_array(values, name)
    flat = values.reshape(-1)
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return make_tensor(
        name, data_type, values.shape, (flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes(), raw=True
    )


def lookup(kind: int) -> ModelProto:
    """GatherBlockQuantized of unpacked 4-bit numbers, its zero points packed across the ends of rows."""
    rng = np.random.default_rng(0)
    codes, zeros = (rng.integers(0, 16, (ROWS, n), np.uint8) for n in (WIDTH, WIDTH // 32))
    scales = rng.random((ROWS, WIDTH // 32)).astype(np.float32)
    node = make_node(
        "GatherBlockQuantized", ["codes", "input_ids", "scales", "zeros"], ["rows"], name="lookup",
        domain="com.microsoft", block_size=32, gather_axis=0, quantize_axis=1, bits=4,
    )  # fmt: skip
    tensors = [of("codes", kind, codes), of("scales", 1, scales), of("zeros", kind, zeros)]
    return model([node], [("input_ids", TensorProto.INT64, ["n"])], [("rows", 1, ["n", WIDTH])], tensors)


def product(bits: int, *, flat: bool) -> ModelProto:
    """MatMulNBits with zero points in whole bytes for each row, the last of them not full."""
    rng = np.random.default_rng(bits)
    blocks = WIDTH // 32
    zeros = rng.integers(0, 256, (OUTPUTS, (blocks * bits + 7) // 8), np.uint8)
    codes = rng.integers(0, 256, (OUTPUTS, blocks, 32 * bits // 8), np.uint8)
    scales = rng.random((OUTPUTS, blocks)).astype(np.float32)
    bias = rng.random(OUTPUTS).astype(np.float32)
    node = make_node(
        "MatMulNBits", ["x", "codes", "scales", "zeros", "", "bias"], ["y"], name="head", domain="com.microsoft",
        K=WIDTH, N=OUTPUTS, bits=bits, block_size=32,
    )  # fmt: skip
    cap = make_node("Tanh", ["y"], ["logits"], name="cap")
    tensors = [
        numpy_helper.from_array(value.reshape(-1) if flat and name in ("scales", "zeros") else value, name)
        for name, value in (("codes", codes), ("scales", scales), ("zeros", zeros), ("bias", bias))
    ]
    return model([node, cap], [("x", 1, ["b", "s", WIDTH])], [("logits", 1, ["b", "s", OUTPUTS])], tensors)


def gemm(*, transposed: bool) -> ModelProto:
    rng = np.random.default_rng(5)
    matrix = rng.random((OUTPUTS, WIDTH) if transposed else (WIDTH, OUTPUTS)).astype(np.float32)
    node = make_node("Gemm", ["x", "w", "c"], ["logits"], name="head", transB=int(transposed))
    tensors = [numpy_helper.from_array(matrix, "w"), numpy_helper.from_array(matrix.reshape(-1)[:OUTPUTS], "c")]
    return model([node], [("x", 1, ["s", WIDTH])], [("logits", 1, ["s", OUTPUTS])], tensors)


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: list[TensorProto]) -> ModelProto:
    given, made = ([make_tensor_value_info(*value) for value in side] for side in (inputs, outputs))
    graph: GraphProto = make_graph(nodes, "g", given, made, tensors)
    return make_model(graph, ir_version=10, opset_imports=[make_opsetid("", 21), make_opsetid("com.microsoft", 1)])


def pruned_file(proto: ModelProto, folder: Path, *, external: bool, keep: KeptTokens = FEW) -> ModelProto:
    """The graph after the pass, saved and read again with its weights inside."""
    import onnx

    folder.mkdir()
    if external:
        for tensor in proto.graph.initializer:
            tensor.raw_data = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        proto = _all_external(proto, folder / "data")
    (folder / "in.onnx").write_bytes(proto.SerializeToString())
    found, _ = apply(Model.open(folder / "in.onnx"), [PruneVocabulary(keep)])
    found.save(folder / "out.onnx")
    return onnx.load(folder / "out.onnx")


def _all_external(proto: ModelProto, file: Path) -> ModelProto:
    with file.open("wb") as writer:
        for tensor in proto.graph.initializer:
            offset, length = writer.tell(), writer.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", file.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    return proto


@pytest.mark.parametrize("external", [False, True])
def test_zero_points_that_share_a_byte_with_the_next_row(tmp_path: Path, external: bool) -> None:
    ids = np.arange(len(FEW), dtype=np.int64)
    wanted = run(lookup(TensorProto.UINT4), {"input_ids": np.array(FEW.ids)})["rows"]
    small = pruned_file(lookup(TensorProto.UINT4), tmp_path / "g", external=external)
    shapes = {tensor.name: list(tensor.dims) for tensor in small.graph.initializer}
    assert shapes == {"codes": [5, WIDTH], "scales": [5, 3], "zeros": [5, 3]}
    assert np.array_equal(run(small, {"input_ids": ids})["rows"], wanted)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    "proto",
    [
        product(2, flat=False),
        product(4, flat=True),
        product(8, flat=True),
        gemm(transposed=True),
        gemm(transposed=False),
    ],
    ids=["2 bits", "4 bits, flat", "8 bits, flat", "Gemm, transposed", "Gemm"],
)
def test_every_form_of_lm_head(tmp_path: Path, proto: ModelProto, external: bool) -> None:
    shape = (1, 3, WIDTH) if len(proto.graph.input[0].type.tensor_type.shape.dim) == 3 else (3, WIDTH)
    x = np.random.default_rng(1).random(shape).astype(np.float32)
    wanted = run(proto, {"x": x})["logits"][..., list(HALF.ids)]
    copy = ModelProto()
    copy.CopyFrom(proto)
    small = pruned_file(copy, tmp_path / "g", external=external, keep=HALF)
    assert small.graph.output[0].type.tensor_type.shape.dim[-1].dim_value == len(HALF) == GROUP
    assert np.array_equal(run(small, {"x": x})["logits"], wanted)


# Ids in the graph


def masked(*nodes: Any, constants: dict[str, int]) -> ModelProto:
    """A table of 12 rows looked up by what `nodes` make of input_ids."""
    table = numpy_helper.from_array(np.arange(ROWS * 4, dtype=np.float32).reshape(ROWS, 4), "table")
    gather = make_node("Gather", ["table", "rows"], ["out"], name="lookup")
    shape = make_node("Reshape", ["out", "zero"], ["flat"], name="flat", allowzero=0)
    tensors = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([0]), "zero"))
    del shape
    return model([*nodes, gather], [("input_ids", TensorProto.INT64, ["n"])], [("out", 1, ["n", 4])], [table, *tensors])


NODES = {
    "Less": ("Less", ["input_ids", "c"], {"c": 11}),
    "Greater": ("Greater", ["input_ids", "c"], {"c": 5}),
    "LessOrEqual": ("LessOrEqual", ["input_ids", "c"], {"c": 6}),
    "GreaterOrEqual": ("GreaterOrEqual", ["c", "input_ids"], {"c": 5}),
    "Equal": ("Equal", ["input_ids", "c"], {"c": 7}),
    "Equal, outside": ("Equal", ["c", "input_ids"], {"c": 12}),
}


@pytest.mark.parametrize("form", NODES)
def test_ids_that_the_graph_holds_are_numbered_anew(tmp_path: Path, form: str) -> None:
    operator, inputs, constants = NODES[form]
    compare = make_node(operator, inputs, ["is"], name="compare")
    where = make_node("Where", ["is", "input_ids", "other"], ["rows"], name="where")
    proto = masked(compare, where, constants={**constants, "other": 4})
    wanted = run(proto, {"input_ids": np.array(FEW.ids)})["out"]
    small = pruned_file(proto, tmp_path / "g", external=False)
    assert np.array_equal(run(small, {"input_ids": np.arange(len(FEW))})["out"], wanted)


def test_a_constant_that_is_also_something_else_stays_there(tmp_path: Path) -> None:
    proto = masked(
        make_node("Equal", ["input_ids", "c"], ["is"], name="compare"),
        make_node("Where", ["is", "c", "input_ids"], ["rows"], name="where"),
        constants={"c": 4},
    )
    proto.graph.node.append(make_node("Add", ["c", "c"], ["twice"], name="twice"))
    proto.graph.output.append(make_tensor_value_info("twice", TensorProto.INT64, []))
    small = pruned_file(proto, tmp_path / "g", external=False)
    assert run(small, {"input_ids": np.arange(2)})["twice"] == 8


@pytest.mark.parametrize(
    ("nodes", "constants", "sentence"),
    [
        ([("Add", ["input_ids", "c"], ["rows"])], {"c": 1}, "Add node 'n0' computes with token ids"),
        (
            [("Equal", ["input_ids", "c"], ["is"]), ("Where", ["is", "c", "input_ids"], ["rows"])],
            {"c": 5},
            "Equal node 'n0' holds token 5, which does not stay",
        ),
        (
            [("Identity", ["input_ids"], ["x"]), ("Equal", ["x", "input_ids"], ["is"]), ("Neg", ["c"], ["m"]),
             ("Where", ["is", "m", "x"], ["rows"])],
            {"c": 4},
            "'m' stands beside token ids, and is no constant",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_numbered_anew_is_refused(
    tmp_path: Path, nodes: list[Any], constants: dict[str, int], sentence: str
) -> None:
    made = [make_node(op, inputs, outputs, name=f"n{n}") for n, (op, inputs, outputs) in enumerate(nodes)]
    with pytest.raises(PassError, match=sentence):
        apply(Model.from_proto(masked(*made, constants=constants)), [PruneVocabulary(FEW)])


def test_a_smaller_table_behind_a_larger_one_keeps_its_own_rows(tmp_path: Path) -> None:
    """The per-layer table of Gemma 3n ends before the token table."""
    proto = masked(make_node("Less", ["input_ids", "c"], ["is"], name="compare"),
                   make_node("Where", ["is", "input_ids", "zero"], ["rows"], name="where"), constants={"c": 6})  # fmt: skip
    proto.graph.node.append(make_node("Gather", ["small", "rows"], ["out2"], name="second"))
    proto.graph.initializer.append(numpy_helper.from_array(np.arange(18, dtype=np.float32).reshape(6, 3), "small"))
    proto.graph.output.append(make_tensor_value_info("out2", 1, ["n", 3]))
    wanted = run(proto, {"input_ids": np.array(FEW.ids)})
    small = pruned_file(proto, tmp_path / "g", external=False)
    assert {t.name: t.dims[0] for t in small.graph.initializer if len(t.dims) == 2} == {"table": 5, "small": 3}
    found = run(small, {"input_ids": np.arange(len(FEW))})
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


# The contract


def test_the_second_run_finds_nothing_to_do() -> None:
    model, _ = apply(Model.from_proto(decoder()), [PruneVocabulary(FEW)])
    again, (outcome,) = apply(model, [PruneVocabulary(FEW)])
    assert [finding.verb for finding in outcome.findings] == ["skipped"]
    assert again.fingerprint() == model.fingerprint()
    nothing, (outcome,) = apply(Model.from_proto(embed_tokens()), [PruneVocabulary(KeptTokens.of(range(32)))])
    assert not outcome.changed and nothing.graph.initializer[0].dims[0] == 32


def test_a_file_and_its_faults_in_one_sentence(tmp_path: Path) -> None:
    model = Model.from_proto(embed_tokens())
    with pytest.raises(PassError, match=r"keeps token 40, and .* ends at token 31"):
        apply(model, [PruneVocabulary(KeptTokens.of([0, 40]))])
    with pytest.raises(PassError, match="list does not exist"):
        apply(model, [PruneVocabulary(tmp_path / "list")])
    (tmp_path / "list").write_text("0\n5\n")
    found, _ = apply(model, [PruneVocabulary(tmp_path / "list")])
    assert [tensor.dims[0] for tensor in found.graph.initializer if len(tensor.dims) == 2] == [2, 2]


def test_groups_in_another_order_are_refused() -> None:
    proto = product(4, flat=False)
    proto.graph.node[0].input[4] = "order"
    proto.graph.initializer.append(numpy_helper.from_array(np.arange(WIDTH, dtype=np.int32), "order"))
    with pytest.raises(
        PassError, match="MatMulNBits node 'head' takes groups in another order, 'order'; none is expected"
    ):
        apply(Model.from_proto(proto), [PruneVocabulary(HALF)])


def test_logits_of_no_product_are_refused() -> None:
    proto = decoder()
    proto.graph.node[-1].op_type = "Einsum"
    proto.graph.node[-1].attribute.add(name="equation", type=AttributeProto.STRING, s=b"bsh,hv->bsv")
    with pytest.raises(PassError, match="the logits come from no MatMul"):
        apply(Model.from_proto(proto), [PruneVocabulary(FEW)])


def table(name: str, *shape: int) -> TensorProto:
    return numpy_helper.from_array(np.arange(math.prod(shape), dtype=np.float32).reshape(shape), name)


def looked_up(*tables: TensorProto, more: Sequence[Any] = (), given: Sequence[TensorProto] = ()) -> ModelProto:
    """Each table looked up by input_ids, its rows an output."""
    nodes = [make_node("Gather", [each.name, "input_ids"], [f"{each.name}_rows"], name=each.name) for each in tables]
    outputs = [(f"{each.name}_rows", 1, None) for each in tables]
    return model([*more, *nodes], [("input_ids", TensorProto.INT64, ["n"])], outputs, [*given, *tables])


def test_what_cannot_be_taken_from_is_refused(tmp_path: Path) -> None:
    double = make_node("Add", ["stored", "stored"], ["table"], name="double")
    computed = looked_up(table("table", ROWS, 4), more=[double], given=[table("stored", ROWS, 4)])
    del computed.graph.initializer[-1]
    with pytest.raises(PassError, match="Gather node 'table' looks tokens up in 'table'; a stored table is expected"):
        apply(Model.from_proto(computed), [PruneVocabulary(FEW)])
    head = make_node("MatMul", ["x", "w"], ["logits"], name="head")
    deep = model([head], [("x", 1, ["b", "s", 4])], [("logits", 1, ["b", "s", 8])], [table("w", 1, 4, 8)])
    with pytest.raises(PassError, match="MatMul node 'head' multiplies by 'w'; a stored matrix is expected"):
        apply(Model.from_proto(deep), [PruneVocabulary(FEW)])
    (tmp_path / "in.onnx").write_bytes(
        externalised(looked_up(table("t", ROWS, 64)), tmp_path / "data").SerializeToString()
    )
    twice = [PruneVocabulary(FEW), PruneVocabulary(KeptTokens.of([0, 1]))]
    with pytest.raises(PassError, match="'t' has other rows by now"):
        apply(Model.open(tmp_path / "in.onnx"), twice)


def test_what_lies_between_two_tables_moves_along(tmp_path: Path) -> None:
    proto = looked_up(table("a", ROWS, 64), table("b", ROWS, 64))
    proto.graph.initializer.insert(1, table("between", 512))
    proto.graph.node.append(make_node("Neg", ["between"], ["other"], name="other"))
    proto.graph.output.append(make_tensor_value_info("other", 1, [512]))
    (tmp_path / "in.onnx").write_bytes(externalised(proto, tmp_path / "data").SerializeToString())
    opened = Model.open(tmp_path / "in.onnx")
    assert list(opened.used_weight_files()) == ["data"]
    found, _ = apply(opened, [PruneVocabulary(FEW)])
    assert not found.used_weight_files() and len(found.converted) == 3


def test_the_shape_that_is_declared_of_a_table_is_that_of_what_stays() -> None:
    proto = looked_up(table("t", ROWS, 4))
    proto.graph.value_info.append(make_tensor_value_info("t", 1, [ROWS, 4]))
    found, _ = apply(Model.from_proto(proto), [PruneVocabulary(FEW)])
    (declared,) = (value for value in found.graph.value_info if value.name == "t")
    assert [dim.dim_value for dim in declared.type.tensor_type.shape.dim] == [len(FEW), 4]


def test_the_bytes_of_a_split_table_are_those_of_its_layers() -> None:
    split = looked_up(
        table("per_layer.layer_0", ROWS, 4), table("per_layer.layer_1", ROWS, 4), table("tokens", ROWS, 8)
    )
    assert bytes_by_token(Model.from_proto(split)) == {"per_layer": 2 * ROWS * 4 * 4, "tokens": ROWS * 8 * 4}


def test_rows_in_between_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4,000 rows of 2 kB, two that lie apart, and two neighbours, are read; nothing else."""
    table = numpy_helper.from_array(np.random.default_rng(0).random((4000, 512)).astype(np.float32), "table")
    gather = make_node("Gather", ["table", "input_ids"], ["out"], name="lookup")
    proto = model([gather], [("input_ids", TensorProto.INT64, ["n"])], [("out", 1, ["n", 512])], [table])
    values = numpy_helper.to_array(table)
    (tmp_path / "in.onnx").write_bytes(externalised(proto, tmp_path / "data").SerializeToString())
    found, _ = apply(Model.open(tmp_path / "in.onnx"), [PruneVocabulary(KeptTokens.of([3, 1000, 1001, 3999]))])
    read: list[int] = []
    whole = weight_conversion._read

    def counted(file: Any, part: Any, row: int, count: int) -> bytes:
        read.append(count)
        return whole(file, part, row, count)

    monkeypatch.setattr(weight_conversion, "_read", counted)
    found.save(tmp_path / "out.onnx")
    assert read == [1, 2, 1]
    assert (tmp_path / "out.onnx_data").read_bytes() == values[[3, 1000, 1001, 3999]].tobytes()


def test_what_lies_behind_lm_head_moves_along(tmp_path: Path) -> None:
    """No file keeps a hole where rows were: what lies behind them is written anew, what lies before stays as it is."""
    proto = externalised(decoder(), tmp_path / "data")
    names = [tensor.name for tensor in proto.graph.initializer if tensor.data_location]
    assert names[-1] == "lm_head.weight"
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    opened = Model.open(tmp_path / "in.onnx", architecture({"model_type": "gemma4_text", **_sizes()}))
    end, _ = apply(opened, [PruneVocabulary(FEW)])
    assert list(end.used_weight_files()) == ["data"] and len(end.converted) == 1
    head = next(tensor for tensor in proto.graph.initializer if tensor.name == "lm_head.weight")
    first = next(tensor for tensor in proto.graph.initializer if tensor.name == names[0])
    for entry, other in zip(head.external_data, first.external_data, strict=True):
        if entry.key == "offset":
            entry.value, other.value = "0", entry.value
    (tmp_path / "data").write_bytes((tmp_path / "data").read_bytes() + bytes(4096))
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    middle, _ = apply(Model.open(tmp_path / "in.onnx"), [PruneVocabulary(FEW)])
    assert not middle.used_weight_files() and len(middle.converted) == len(names)


def _sizes() -> dict[str, Any]:
    from small import CONFIG

    return {key: value for key, value in CONFIG.items() if key != "model_type"}
