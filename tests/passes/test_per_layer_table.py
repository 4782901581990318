"""split-per-layer-table and fuse-per-layer-table: the same numbers, the same bytes, one pass over the source."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import GraphProto, ModelProto, TensorProto, load
from onnx.helper import make_graph, make_model, make_node, make_operatorsetid, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array
from places import ROOT, TINY
from small import FLOAT, INT64, arch, embed_tokens, opened

from passes import FusePerLayerTable, SplitPerLayerTable, ToFp16
from passes.base import apply
from passes.presets import compatible, per_layer_tables
from passes.recipe import parse
from surgery.choices import WeightMode
from surgery.errors import PassError
from surgery.folder.building import build_folder
from surgery.graph.external_data import external_field
from surgery.graph.model import Model
from surgery.graph.tensor_types import declared_types
from surgery.graph.weight_conversion import Columns, NewFiles, side_by_side
from surgery.runtime.sessions import Feed, MergedModel, Settings, host
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import open_export

PRECISIONS = ("fp32", "fp16", "q4", "q4f16", "quantized")
IDS = np.array([[1, 127, 113, 114, 5, 0], [9, 10, 11, 12, 126, 2]])


def embed(precision: str, source: Path = TINY) -> Model:
    export = open_export(source)
    return Model.open(export.pair(precision).embed, export.architecture)


def outputs(path: Path) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input_ids": IDS}), strict=True))


def stored(path: Path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    return {t.name: (t.data_type, tuple(t.dims), to_array(t).tobytes()) for t in load(path).graph.initializer}


@pytest.mark.parametrize("weights", ["copy", "consolidate"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_split_and_the_way_back_through_files(precision: str, weights: str, tmp_path: Path) -> None:
    """E2B's tables in miniature: 10 layers of 32 values; one block a layer, so that zero points share bytes."""
    before = embed(precision, shutil.copytree(TINY, tmp_path / "source"))
    truth = outputs(before.path)
    split, (outcome,) = apply(before, [SplitPerLayerTable()])
    split.save(tmp_path / "split.onnx", weights=weights)  # type: ignore[arg-type]
    lookups = 10 + 1
    ops = [node.op_type for node in split.graph.node]
    assert ops.count("Gather") + ops.count("GatherBlockQuantized") == lookups and ops.count("Concat") == 1
    types, (parts,) = declared_types(split.graph), [n.input for n in split.graph.node if n.op_type == "Concat"]
    assert {types[name].shape[-1] for name in parts} == {32}
    for name, values in outputs(tmp_path / "split.onnx").items():
        np.testing.assert_array_equal(values, truth[name], strict=True)
    reopened = Model.open(tmp_path / "split.onnx", before.architecture)
    assert reopened.check_weights() > 0
    fused, _ = apply(reopened, [FusePerLayerTable()])
    fused.save(tmp_path / "fused.onnx", weights=weights)  # type: ignore[arg-type]
    assert stored(tmp_path / "fused.onnx") == stored(before.path)
    assert [node.op_type for node in fused.graph.node] == [node.op_type for node in before.graph.node]
    assert not [node for node in fused.graph.node if "/layer." in node.name]
    assert outcome.findings[-1].reason.startswith("to be written when the model is saved")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_one_recipe_they_cancel_and_nothing_is_written(precision: str) -> None:
    before = embed(precision)
    after, _ = apply(before, [SplitPerLayerTable(), FusePerLayerTable()])
    assert not after.converted
    assert after.used_weight_files() == before.used_weight_files()
    tensors = ({t.name: t for t in model.graph.initializer} for model in (before, after))
    assert next(tensors) == next(tensors)
    assert list(after.graph.node) == list(before.graph.node)


def test_a_second_run_finds_nothing_to_do() -> None:
    split, _ = apply(embed("q4"), [SplitPerLayerTable()])
    _, (again,) = apply(split, [SplitPerLayerTable()])
    assert not again.changed and "no look-up reads the rows of all layers" in again.findings[0].reason
    fused, _ = apply(split, [FusePerLayerTable()])
    _, (again,) = apply(fused, [FusePerLayerTable()])
    assert not again.changed and "no Concat joins look-ups" in again.findings[0].reason


def test_a_model_without_per_layer_inputs_is_left_alone(tmp_path: Path) -> None:
    model = opened(tmp_path, embed_tokens(per_layer=False))
    model.architecture = arch(hidden_size_per_layer_input=0)
    _, (outcome,) = apply(model, [SplitPerLayerTable()])
    assert str(outcome.findings[0]) == "skipped per-layer inputs: the model has none"


def test_no_data_file_keeps_a_table_that_nobody_reads(tmp_path: Path) -> None:
    split, _ = apply(embed("q4"), [SplitPerLayerTable()])
    split.save(tmp_path / "split.onnx")
    size = (TINY / "onnx" / "embed_tokens_q4.onnx_data").stat().st_size
    inline = sum(len(t.raw_data) for t in split.graph.initializer) - sum(
        len(t.raw_data) for t in embed("q4").graph.initializer
    )
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".onnx"] == ["split.onnx_data"]
    # a byte of two layers' zero points becomes two; they are inline, and so is what was
    assert (tmp_path / "split.onnx_data").stat().st_size == size and 0 < inline < 1000


def test_tables_are_spread_over_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.split_per_layer_table.NewFiles", partial(NewFiles, limit=20_000))
    before = embed("fp32")
    truth = outputs(before.path)
    split, _ = apply(before, [SplitPerLayerTable()])
    split.save(tmp_path / "split.onnx")
    files = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".onnx")
    assert len(files) == 11 and files[:2] == ["split.onnx_data", "split.onnx_data_1"]
    for name, values in outputs(tmp_path / "split.onnx").items():
        np.testing.assert_array_equal(values, truth[name])


@pytest.mark.parametrize("recipe", [(ToFp16(), SplitPerLayerTable()), (SplitPerLayerTable(), ToFp16())])
def test_with_to_fp16_in_either_order(recipe: tuple[ToFp16, SplitPerLayerTable], tmp_path: Path) -> None:
    half, _ = apply(embed("fp32"), [ToFp16()])
    both, _ = apply(embed("fp32"), recipe)
    for name, model in (("half", half), ("both", both)):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name / "model.onnx")
    truth = outputs(tmp_path / "half" / "model.onnx")
    for name, values in outputs(tmp_path / "both" / "model.onnx").items():
        np.testing.assert_array_equal(values, truth[name])
    referred = sum(int(external_field(t, "length") or 0) for t in both.graph.initializer)
    assert sum(both.converted_files().values()) == referred, "no gap is left where a weight moved on"


def test_columns_of_less_than_a_byte() -> None:
    codes = np.arange(5 * 7).reshape(5, 7) % 16
    packed = np.pad(codes, ((0, 0), (0, 1)))
    rows = (packed[:, 0::2] | packed[:, 1::2] << 4).astype(np.uint8)
    one, two = (side_by_side([(rows, Columns(7, first, count, 4))]) for first, count in ((0, 3), (3, 4)))
    assert (one[:, 0] & 15 == codes[:, 0]).all() and (two[:, 0] & 15 == codes[:, 3]).all()
    back = side_by_side([(one, Columns(3, 0, 3, 4)), (two, Columns(4, 0, 4, 4))])
    np.testing.assert_array_equal(back, rows)


@pytest.mark.parametrize("weights", ["copy", "link", "consolidate"])
def test_repack_with_a_split_table(weights: WeightMode, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    export = open_export(tmp_path / "source")
    pair = export.pair("q4f16")
    recipe = (*compatible(pair.embed), *per_layer_tables("split"))
    result = build_folder(export, pair, recipe, tmp_path / "out", weights=weights)
    model = Model.open(tmp_path / "out" / "model.onnx")
    assert model.check_weights() <= sum(placed.size for placed in result.placed)
    assert not [entry.source for entry in result.placed if entry.source and "embed_tokens" in entry.source.name]
    runners = TwoGraphModel.open(pair, Settings()), MergedModel(model.path, Settings())
    feed = Feed(IDS, np.ones_like(IDS), np.tile(np.arange(6), (2, 1)))
    (truth, caches), (found, ours) = (runner.step(feed, runner.start(2), 1) for runner in runners)
    np.testing.assert_array_equal(found, truth)
    assert all((host(ours[slot]) == host(cache)).all() for slot, cache in caches.items())


# Refusals


def two_tables(width: int, *, named: bool) -> ModelProto:
    """Two look-ups of rows of `width` values; one may lead to per_layer_inputs."""
    tables = [from_array(np.ones((8, width), np.float32), name) for name in "ab"]
    nodes = [make_node("Gather", [name, "input_ids"], [f"{name}_rows"], name=name) for name in "ab"]
    result = "per_layer_inputs" if named else "other"
    nodes += [make_node("Mul", ["b_rows", "b_rows"], [result]), make_node("Neg", ["a_rows"], ["inputs_embeds"])]
    ids = make_tensor_value_info("input_ids", INT64, ["b", "s"])
    results = [make_tensor_value_info(name, FLOAT, ["b", "s", width]) for name in ("inputs_embeds", result)]
    graph = make_graph(nodes, "g", [ids], results, tables)
    return make_model(graph, ir_version=10, opset_imports=[make_operatorsetid("", 21)])


def test_of_two_tables_of_one_width_the_one_that_leads_to_per_layer_inputs_is_taken(tmp_path: Path) -> None:
    model = opened(tmp_path, two_tables(16, named=True))
    model.architecture = arch()
    split, _ = apply(model, [SplitPerLayerTable()])
    assert {t.name for t in split.graph.initializer} == {"a", *(f"b.layer_{n}" for n in range(4))}
    model = opened(tmp_path, two_tables(16, named=False))
    model.architecture = arch()
    with pytest.raises(PassError, match="rows of 16 values are read by Gather node 'a' and Gather node 'b'; one is"):
        apply(model, [SplitPerLayerTable()])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda g: g.node.append(make_node("Neg", [g.node[1].input[0]], ["x"])), "is read elsewhere, too"),
        (lambda g: g.input.append(make_tensor_value_info(g.node[1].input[0], FLOAT, None)), "is read elsewhere"),
    ],
    ids=["second reader", "input"],
)
def test_a_table_that_is_not_the_lookups_alone(change: object, sentence: str, tmp_path: Path) -> None:
    proto = two_tables(16, named=True)
    change(proto.graph)  # type: ignore[operator]
    model = opened(tmp_path, proto)
    model.architecture = arch()
    with pytest.raises(PassError, match=sentence):
        apply(model, [SplitPerLayerTable()])


@pytest.mark.parametrize(("size", "block"), [(12, 16), (15, 16), (8, 16)], ids=["no whole blocks", "rest", "two"])
def test_blocks_that_two_layers_share_are_refused(size: int, block: int, tmp_path: Path) -> None:
    """Codes of 8 bits in four layers of `size` columns; of the second the blocks' number would come apart."""
    width = 4 * size
    codes = from_array(np.zeros((8, width), np.uint8), "codes")
    scales = from_array(np.ones((8, -(-width // block)), np.float32), "scales")
    node = make_node(
        "GatherBlockQuantized", ["codes", "input_ids", "scales"], ["per_layer_inputs"], "b",
        domain="com.microsoft", bits=8, block_size=block,
    )  # fmt: skip
    ids = make_tensor_value_info("input_ids", INT64, ["b", "s"])
    result = make_tensor_value_info("per_layer_inputs", FLOAT, ["b", "s", width])
    graph = make_graph([node], "g", [ids], [result], [codes, scales])
    opsets = [make_operatorsetid("", 21), make_operatorsetid("com.microsoft", 1)]
    model = opened(tmp_path, make_model(graph, ir_version=10, opset_imports=opsets))
    model.architecture = arch(hidden_size_per_layer_input=size)
    sentence = f"'scales' has {scales.dims[1]} elements a row; they do not come apart into 4 layers"
    with pytest.raises(PassError, match=sentence):
        apply(model, [SplitPerLayerTable()])


def test_lookups_that_are_not_alike_are_not_fused(tmp_path: Path) -> None:
    proto = two_tables(16, named=True)
    proto.graph.node[2].CopyFrom(make_node("Concat", ["a_rows", "b_rows"], ["per_layer_inputs"], axis=-1))
    proto.graph.node[3].CopyFrom(make_node("Neg", ["input_ids"], ["inputs_embeds"]))
    proto.graph.output[0].type.tensor_type.elem_type = INT64
    fused, _ = apply(opened(tmp_path, proto), [FusePerLayerTable()])
    assert [list(t.dims) for t in fused.graph.initializer] == [[8, 32]]
    proto.graph.initializer[1].CopyFrom(from_array(np.ones((9, 16), np.float32), "b"))
    with pytest.raises(PassError, match=r"'b' is FLOAT \[9, 16\] and 'a' FLOAT \[8, 16\]; tables of one dtype"):
        apply(opened(tmp_path, proto), [FusePerLayerTable()])


def joined(change: Callable[[GraphProto], object] = lambda graph: None) -> ModelProto:
    """Two look-ups of the same ids, each times a factor, joined along the last axis; and what is changed in that."""
    names = ("a", "b")
    tensors = [from_array(np.full((8, 16), n + 1, np.float32), name) for n, name in enumerate(names)]
    tensors += [from_array(np.array(n, np.float32), f"factor_{n}") for n in (2, 3)]
    nodes = [make_node("Gather", [name, "input_ids"], [f"{name}_rows"], name=name) for name in names]
    nodes += [make_node("Mul", [f"{name}_rows", "factor_2"], [f"{name}_scaled"]) for name in names]
    nodes.append(make_node("Concat", [f"{name}_scaled" for name in names], ["y"], axis=-1))
    inputs = [make_tensor_value_info(name, INT64, ["b", "s"]) for name in ("input_ids", "other_ids")]
    graph = make_graph(nodes, "g", inputs, [make_tensor_value_info("y", FLOAT, None)], tensors)
    change(graph)
    return make_model(graph, ir_version=10, opset_imports=[make_operatorsetid("", 21)])


def reads(name: str) -> Callable[[GraphProto], None]:
    """Something else reads this value, too."""
    return lambda graph: graph.node.append(make_node("Neg", [name], ["negative"]))


def made_factor(graph: GraphProto) -> None:
    graph.node[2].input[1] = graph.node[3].input[1] = "made"
    graph.node.insert(0, make_node("Neg", ["factor_3"], ["made"]))


LEFT: dict[str, Callable[[GraphProto], object]] = {
    "a table is read elsewhere": reads("b"),
    "rows are read elsewhere": reads("a_rows"),
    "scaled rows are read elsewhere": reads("b_scaled"),
    "along the tokens": lambda graph: setattr(graph.node[4].attribute[0], "i", 1),
    "other ids": lambda graph: graph.node[1].input.__setitem__(1, "other_ids"),
    "factors that differ": lambda graph: graph.node[3].input.__setitem__(1, "factor_3"),
    "a factor that is computed": made_factor,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_one_look_up_cannot_do_stays(name: str, tmp_path: Path) -> None:
    proto = joined(LEFT[name])
    left, (outcome,) = apply(opened(tmp_path, proto), [FusePerLayerTable()])
    assert left.proto == proto and "no Concat joins look-ups" in outcome.findings[0].reason
    fused, _ = apply(opened(tmp_path, joined()), [FusePerLayerTable()])
    assert [node.op_type for node in fused.graph.node] == ["Gather", "Mul"]


@pytest.mark.parametrize("kind", ["GatherBlockQuantized", "axis"])
def test_look_ups_of_two_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    def change(graph: GraphProto) -> None:
        if kind == "axis":
            graph.node[1].attribute.add(name="axis", type=2, i=0)
            return
        node = make_node(
            "GatherBlockQuantized", ["q", "input_ids", "s"], ["b_rows"], "b", domain="com.microsoft", block_size=16
        )
        graph.node[1].CopyFrom(node)
        graph.initializer[1].CopyFrom(from_array(np.full((8, 8), 1, np.uint8), "q"))
        graph.initializer.append(from_array(np.ones((8, 1), np.float32), "s"))

    with pytest.raises(PassError, match="is not like Gather node 'a': one look-up cannot do both"):
        apply(opened(tmp_path, joined(change)), [FusePerLayerTable()])


def split_of(table: np.ndarray, tmp_path: Path) -> Model:
    """Its columns are cut in four, and nothing is written so far; another table of the same shape lies behind it."""
    (tmp_path / "w").write_bytes(table.tobytes() + (-table).tobytes())
    stored = TensorProto(name="b", data_type=FLOAT, dims=table.shape, data_location=1)
    for key, value in (("location", "w"), ("offset", "0"), ("length", str(table.nbytes))):
        stored.external_data.add(key=key, value=value)
    ids = make_tensor_value_info("input_ids", INT64, ["b", "s"])
    result = make_tensor_value_info("per_layer_inputs", FLOAT, ["b", "s", 16])
    node = make_node("Gather", ["b", "input_ids"], ["per_layer_inputs"], "b")
    graph = make_graph([node], "g", [ids], [result], [stored])
    proto = make_model(graph, ir_version=10, opset_imports=[make_operatorsetid("", 21)])
    model = opened(tmp_path, proto)
    model.architecture = arch()
    split, _ = apply(model, [SplitPerLayerTable()])
    return split


TABLE = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)


def test_parts_in_another_order_stay_in_it(tmp_path: Path) -> None:
    split = split_of(TABLE, tmp_path)
    concat = next(node for node in split.graph.node if node.op_type == "Concat")
    concat.input[:] = [concat.input[n] for n in (2, 0, 3, 1)]
    fused, _ = apply(split, [FusePerLayerTable()])
    fused.save(tmp_path / "fused.onnx")
    (whole,) = [
        to_array(t, str(tmp_path)) for t in load(tmp_path / "fused.onnx").graph.initializer if t.dims == [8, 16]
    ]
    np.testing.assert_array_equal(whole, np.hstack([TABLE[:, 4 * n : 4 * n + 4] for n in (2, 0, 3, 1)]))


def test_parts_of_two_tables_do_not_become_one_of_them(tmp_path: Path) -> None:
    split = split_of(TABLE, tmp_path)
    made = split.converted["b.layer_1"]
    other = replace(made.parts[0].source, offset=TABLE.nbytes)
    split.converted["b.layer_1"] = replace(made, parts=(replace(made.parts[0], source=other),))
    fused, _ = apply(split, [FusePerLayerTable()])
    fused.save(tmp_path / "fused.onnx")
    (whole,) = [
        to_array(t, str(tmp_path)) for t in load(tmp_path / "fused.onnx").graph.initializer if t.dims == [8, 16]
    ]
    np.testing.assert_array_equal(whole, np.hstack([TABLE[:, :4], -TABLE[:, 4:8], TABLE[:, 8:]]))


def test_parts_that_are_rounded_and_parts_that_are_not_are_refused(tmp_path: Path) -> None:
    split = split_of(TABLE, tmp_path)
    split.converted["b.layer_1"] = split.converted["b.layer_1"].rounded()
    with pytest.raises(PassError, match="are not all rounded to float16"):
        apply(split, [FusePerLayerTable()])


def test_recipes_know_them() -> None:
    assert parse("split-per-layer-table,fuse-per-layer-table") == (SplitPerLayerTable(), FusePerLayerTable())


def test_memory_does_not_depend_on_the_size_of_the_table(tmp_path: Path) -> None:
    """A sparse table of 256 MiB is cut in a process of its own."""
    rows, layers, width = 2**16, 32, 32
    table = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[rows, layers * width], data_location=1)
    for key, value in (("location", "w"), ("offset", "0"), ("length", str(rows * layers * width * 4))):
        table.external_data.add(key=key, value=value)
    with (tmp_path / "w").open("wb") as file:
        file.truncate(rows * layers * width * 4)
    ids = make_tensor_value_info("input_ids", INT64, ["b", "s"])
    result = make_tensor_value_info("per_layer_inputs", FLOAT, ["b", "s", layers * width])
    graph = make_graph([make_node("Gather", ["t", "input_ids"], ["per_layer_inputs"])], "g", [ids], [result], [table])
    model = make_model(graph, ir_version=10, opset_imports=[make_operatorsetid("", 21)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    code = (
        "import resource, sys; from pathlib import Path; import numpy, onnx\n"
        "sys.path.insert(0, 'tests'); import small\n"
        "from passes import SplitPerLayerTable; from passes.base import apply; from surgery.graph.model import Model\n"
        f"a = small.arch(num_hidden_layers={layers}, layer_types=None, hidden_size_per_layer_input={width})\n"
        "model, _ = apply(Model.open(sys.argv[1] + '/m.onnx', a), [SplitPerLayerTable()])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(sum(p.size for p in model.save(sys.argv[1] + '/out.onnx')))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    written, kibibytes = map(int, done.stdout.split())
    assert written == rows * layers * width * 4 and kibibytes < 128 * 1024
