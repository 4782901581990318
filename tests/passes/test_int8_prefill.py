"""int8-prefill: what is computed, exactly; a run of a few tokens bit by bit; folders made, proven and run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from onnx.helper import make_graph, make_model, make_node, make_operatorsetid, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array
from places import TINY
from signing import sign
from typer.testing import CliRunner

from passes import Int8Prefill, SetAccuracyLevel, ToFp16
from passes.base import apply
from passes.presets import compatible
from passes.recipe import parse, recipe_text
from surgery.commands.app import app
from surgery.errors import PassError, RequestError
from surgery.graph.model import Model
from surgery.jobs.repacking import RepackOptions
from surgery.runtime.sessions import Settings
from surgery.source.export import open_export
from surgery.verify import Request, prove_folder
from surgery.verify.prompts import Case
from surgery.verify.report import Gate
from surgery.verify.thresholds import default_thresholds
from surgery.verify.whole_numbers import whole_number_gate

Array = NDArray[Any]

WORDS = Case("words", "", (tuple(range(5, 45)),))
BLOCK, DEPTH, COUNT = 32, 80, 48
"""The last block of a row is half full."""
NAME = "/model/layers.0/mlp/up_proj/MatMul_Quant"


def product(bits: int = 4, *, half: bool = False, points: bool = True, op: str = NAME) -> Model:
    """y [B,S,48] of inputs_embeds [B,S,80] and random codes of so many bits."""
    rng, blocks = np.random.default_rng(bits), -(-DEPTH // BLOCK)
    dtype = np.float16 if half else np.float32
    stored = {
        "codes": rng.integers(0, 256, (COUNT, blocks, BLOCK * bits // 8), dtype=np.uint8),
        "scales": (rng.random((COUNT, blocks)) * 0.02 + 0.001).astype(dtype),
    }
    if points:
        stored["points"] = rng.integers(0, 256, (COUNT, -(-blocks * bits // 8)), dtype=np.uint8)
    sizes: Any = {"K": DEPTH, "N": COUNT, "bits": bits, "block_size": BLOCK}
    node = make_node("MatMulNBits", ["inputs_embeds", *stored], ["y"], op, domain="com.microsoft", **sizes)
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    graph = make_graph(
        [node],
        "product",
        [make_tensor_value_info("inputs_embeds", kind, ["batch", "tokens", DEPTH])],
        [make_tensor_value_info("y", kind, ["batch", "tokens", COUNT])],
        [from_array(values, name) for name, values in stored.items()],
    )
    opsets = [make_operatorsetid("", 21), make_operatorsetid("com.microsoft", 1)]
    return Model.from_proto(make_model(graph, opset_imports=opsets, ir_version=10))


def spread(model: Model, *, column: bool = False) -> Model:
    """The same with one scale for each channel, which the graph spreads over the blocks as a QAT export does."""
    scales = next(tensor for tensor in model.graph.initializer if tensor.name == "scales")
    values = to_array(scales)[:, :1].copy()
    values[3], values[4] = 0, -values[4]
    scales.CopyFrom(from_array(values if column else values[:, 0], "scales"))
    for name, sizes in (("axes", [1]), ("shape", [COUNT, -(-DEPTH // BLOCK)])):
        model.graph.initializer.append(from_array(np.array(sizes), name))
    nodes = [make_node("Unsqueeze", ["scales", "axes"], ["column"])] if not column else []
    nodes.append(make_node("Expand", ["scales" if column else "column", "shape"], ["spread"]))
    model.graph.node[0].input[2] = "spread"
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def external(model: Model, folder: Path, but: str = "") -> Model:
    """The same with its weights in a data file, `but` one."""
    data = b""
    for tensor in model.graph.initializer:
        if tensor.name != but:
            values = to_array(tensor).tobytes()
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "w.onnx_data"), ("offset", len(data)), ("length", len(values))):
                tensor.external_data.add(key=key, value=str(value))
            data += values
    (folder / "w.onnx_data").write_bytes(data)
    (folder / "w.onnx").write_bytes(model.to_bytes())
    return Model.open(folder / "w.onnx")


def run(model: Model, x: Array, folder: Path, weights: Any = "copy") -> Array:
    import onnxruntime as ort

    path = folder / "run.onnx"
    model.save(path, weights=weights, force=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    found: Array = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(
        None, {"inputs_embeds": x}
    )[0]
    return found


def real_weights(model: Model) -> Array:
    """float64 [N, K], by the words of MatMulNBits' specification."""
    stored = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    bits = next(a.i for a in model.graph.node[0].attribute if a.name == "bits")

    def unpacked(row: Array) -> list[int]:
        whole = int.from_bytes(row.tobytes(), "little")
        return [(whole >> (bits * n)) % 2**bits for n in range(row.size * 8 // bits)]

    found = np.zeros((COUNT, DEPTH))
    for channel in range(COUNT):
        codes = unpacked(stored["codes"][channel])
        points = unpacked(stored["points"][channel]) if "points" in stored else [2 ** (bits - 1)] * 8
        for k in range(DEPTH):
            block = k // BLOCK
            found[channel, k] = (codes[k] - points[block]) * float(stored["scales"][channel, block])
    return found


def expected(x: Array, weights: Array) -> Array:
    """The two roundings in float32, as they are at their ties, and the product of whole numbers, exactly."""
    single = weights.astype(np.float32)
    channel = np.abs(single).max(axis=1) / np.float32(127)
    whole = np.rint(single / channel[:, None]).astype(np.int64)
    x = x.astype(np.float32)
    row, step = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)), np.float32(1 / 127)
    codes = np.rint(x / row / step).astype(np.int64)
    found: Array = codes @ whole.T * (channel.astype(np.float64) * step) * row
    return found


def activations(*shape: int, half: bool = False) -> Array:
    rng = np.random.default_rng(len(shape))
    sizes = 10.0 ** rng.integers(-3, 3, (*shape, 1))
    return (rng.standard_normal((*shape, DEPTH)) * sizes).astype(np.float16 if half else np.float32)


@pytest.mark.parametrize(
    ("bits", "half", "points"),
    [(2, False, True), (4, False, True), (8, False, True), (4, True, True), (8, False, False)],
)
def test_result_is_that_of_whole_numbers(bits: int, half: bool, points: bool, tmp_path: Path) -> None:
    source = product(bits, half=half, points=points)
    x = activations(2, 16, half=half)
    x[1, 3] = 0  # a token that is padding
    exact = expected(x, real_weights(source))
    found = run(apply(source, [Int8Prefill()])[0], x, tmp_path)
    assert found.dtype == x.dtype and not found[1, 3].any()
    largest = np.abs(exact).max(axis=-1, keepdims=True) + 1e-30
    assert (np.abs(found - exact) / largest).max() < (1e-3 if half else 1e-6)
    distance = np.abs(exact - x.astype(np.float64) @ real_weights(source).T) / largest
    assert 1e-3 < distance.max() < 0.1, "the rounding itself is seen, and is small"


@pytest.mark.parametrize("half", [False, True])
def test_few_tokens_are_bit_by_bit_the_sources(half: bool, tmp_path: Path) -> None:
    source = product(half=half)
    made, _ = apply(source, [Int8Prefill(tokens=5)])
    for tokens in (1, 4, 5):
        x = activations(3, tokens, half=half)
        assert np.array_equal(run(made, x, tmp_path), run(source, x, tmp_path)) == (tokens < 5)


def test_rows_do_not_depend_on_each_other(tmp_path: Path) -> None:
    made, _ = apply(product(), [Int8Prefill()])
    x = activations(2, 20)
    alone = run(made, x[1:, 2:], tmp_path)
    assert np.array_equal(run(made, x, tmp_path)[1:, 2:], alone)


@pytest.mark.parametrize(("bits", "half", "column"), [(2, True, False), (4, False, True), (8, False, False)])
def test_codes_of_one_scale_a_channel_are_kept(bits: int, half: bool, column: bool, tmp_path: Path) -> None:
    source = external(spread(product(bits, half=half, points=False), column=column), tmp_path, "axes")
    made, _ = apply(source, [Int8Prefill()])
    made.save(tmp_path / "made.onnx", force=True)
    stored = {
        tensor.name: to_array(tensor, str(tmp_path)) for tensor in onnx.load(tmp_path / "made.onnx").graph.initializer
    }
    whole, scales = (next(value for name, value in stored.items() if name.endswith(end)) for end in ("int8", "_scales"))
    assert np.array_equal(scales, np.where(stored["scales"] == 0, 1, stored["scales"]).ravel().astype(np.float32))
    packed = stored["codes"].reshape(COUNT, -1)
    codes = np.stack([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)], axis=-1).reshape(COUNT, -1)
    codes = (codes.astype(int) - 2 ** (bits - 1))[:, :DEPTH]
    codes[3] = 0
    assert np.array_equal(whole, codes.T)


def test_scales_that_the_graph_spreads_otherwise_are_refused() -> None:
    source = spread(product(points=False))
    next(tensor for tensor in source.graph.initializer if tensor.name == "axes").CopyFrom(
        from_array(np.array([0]), "axes")
    )
    with pytest.raises(PassError, match="'spread' is computed by the graph") as refused:
        apply(source, [Int8Prefill()])
    assert refused.value.hint == "leave out --prefill int8"


@pytest.mark.parametrize("but", ["", "points", "scales"])
@pytest.mark.parametrize("weights", ["copy", "link", "consolidate"])
def test_weights_in_data_files_give_the_same(but: str, weights: str, tmp_path: Path) -> None:
    """Whether all weights are in the graph, some, or none."""
    x = activations(1, 20)
    inline = run(apply(product(), [Int8Prefill()])[0], x, tmp_path)
    source = external(product(), tmp_path, but)
    made, (outcome,) = apply(source, [Int8Prefill()])
    assert len(made.converted) == 2 and sum(made.converted_files().values()) == COUNT * (DEPTH + 4)
    assert np.array_equal(run(made, x, tmp_path, weights), inline)
    finding = "changed 1 MatMulNBits: int8 in runs of 16 tokens and more: up_proj; 3,840 bytes of weights in int8"
    assert [str(one) for one in outcome.findings] == [finding]


def test_what_is_no_plain_product_of_stored_codes_has_no_side(tmp_path: Path) -> None:
    """An order of groups; codes of 5 bits; scales that a pass before rounds when the model is saved."""
    ordered = product()
    ordered.graph.node[0].input.append("order")
    ordered.graph.initializer.append(from_array(np.zeros(DEPTH, np.int32), "order"))
    with pytest.raises(PassError, match="no MatMulNBits in a layer, which could multiply in int8"):
        apply(ordered, [Int8Prefill()])
    with pytest.raises(PassError, match="bits"):
        apply(product(5), [Int8Prefill()])
    source = external(product(), tmp_path, "points")
    with pytest.raises(PassError, match="is changed by a pass before; int8 weights are made from stored ones"):
        apply(source, [ToFp16(), Int8Prefill()])


def test_second_run_finds_nothing_to_do() -> None:
    _, (_, again) = apply(product(), [Int8Prefill(), Int8Prefill()])
    assert not again.changed and "each that is meant has a side in int8" in str(again.findings[0])


WIDE = 64
"""Channels of an MLP."""


def mlp(split: bool = True) -> Model:
    """y [B,S,80] = down(gelu(gate(x)) * up(x)), inputs_embeds [B,S,80]; with other halves where `split` is not set."""
    rng, nodes, stored = np.random.default_rng(5), [], {}
    for name, depth, count, x in (("gate_up", DEPTH, 2 * WIDE, "inputs_embeds"), ("down", WIDE, DEPTH, "h")):
        blocks = -(-depth // BLOCK)
        stored[f"{name}.codes"] = rng.integers(0, 256, (count, blocks, BLOCK // 2), dtype=np.uint8)
        stored[f"{name}.scales"] = (rng.random((count, blocks)) * 0.02 + 0.001).astype(np.float32)
        sizes: Any = {"K": depth, "N": count, "bits": 4, "block_size": BLOCK}
        inputs = [x, f"{name}.codes", f"{name}.scales"]
        node = f"/model/layers.0/mlp/{name}_proj/MatMul"
        nodes.append(make_node("MatMulNBits", inputs, [f"{name}.y"], node, domain="com.microsoft", **sizes))
    inner = [
        make_node("Split", ["gate_up.y"], ["gate", "up"], "split", axis=-1, num_outputs=2),
        make_node("Gelu", ["gate" if split else "up"], ["active"], "gelu", approximate="tanh"),
        make_node("Mul", ["active", "up" if split else "gate"], ["h"], "product"),
    ]
    kind = TensorProto.FLOAT
    graph = make_graph(
        [nodes[0], *inner, nodes[1], make_node("Identity", ["down.y"], ["y"], "end")],
        "mlp",
        [make_tensor_value_info("inputs_embeds", kind, ["batch", "tokens", DEPTH])],
        [make_tensor_value_info("y", kind, ["batch", "tokens", DEPTH])],
        [from_array(values, name) for name, values in stored.items()],
    )
    opsets = [make_operatorsetid("", 21), make_operatorsetid("com.microsoft", 1)]
    return Model.from_proto(make_model(graph, opset_imports=opsets, ir_version=10))


def in_codes(x: Array, name: str, model: Model, rows: slice = slice(None)) -> tuple[Array, Array]:
    """What one product makes of the rows' codes, and the largest number of each."""
    stored = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    codes, scales = stored[f"{name}.codes"][rows], stored[f"{name}.scales"][rows]
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), scales.shape[1], BLOCK)
    real = ((nibbles.astype(np.float32) - 8) * scales[:, :, None]).reshape(len(codes), -1)[:, : x.shape[-1]]
    channel = np.abs(real).max(axis=1) / np.float32(127)
    largest, step = np.abs(x).max(axis=-1, keepdims=True), np.float32(1 / 127)
    found = np.rint(x / largest / step).astype(np.int64) @ np.rint(real / channel[:, None]).astype(np.int64).T
    return (found * (channel * step)).astype(np.float32), largest


def test_mlp_is_that_of_whole_numbers(tmp_path: Path) -> None:
    """The scale of up's rows is not in what is rounded for down_proj: it cannot change the codes."""
    source, x = mlp(), activations(2, 16)
    made = apply(source, [Int8Prefill()])[0]
    (gate, row), (up, _) = (in_codes(x, "gate_up", source, half) for half in (slice(0, WIDE), slice(WIDE, None)))
    real = gate * row
    active = real * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (real + 0.044715 * real**3)))
    down, inner = in_codes((active * up).astype(np.float32), "down", source)
    exact = down * inner * row
    found = run(made, x, tmp_path)
    assert (np.abs(found - exact) / np.abs(exact).max(axis=-1, keepdims=True)).max() < 1e-5
    assert np.array_equal(run(made, x[:, :15], tmp_path), run(source, x[:, :15], tmp_path))
    assert np.array_equal(run(made, x[1:], tmp_path), found[1:])


def test_mlp_in_data_files_gives_the_same(tmp_path: Path) -> None:
    x = activations(1, 20)
    inline = run(apply(mlp(), [Int8Prefill()])[0], x, tmp_path)
    made = apply(external(mlp(), tmp_path, "gate_up.scales"), [Int8Prefill()])[0]
    assert np.array_equal(run(made, x, tmp_path), inline)


def test_other_halves_are_two_products(tmp_path: Path) -> None:
    """What multiplies up by gate's activation is no MLP that is known: each product has a Concat of its own."""
    source, x = mlp(split=False), activations(1, 20)
    made = apply(source, [Int8Prefill()])[0]
    assert [node.op_type for node in made.graph.node].count("Concat") == 2
    off = np.abs(run(made, x, tmp_path) - run(source, x, tmp_path)).max()
    assert off < 0.05 * np.abs(run(source, x, tmp_path)).max()


def test_which_products_are_meant() -> None:
    decoder = Model.open(open_export(TINY).pair("q4").decoder)

    def kinds(step: Int8Prefill) -> set[str]:
        return {node.name.split("/")[-2] for node in step.concerns(decoder)}

    assert kinds(Int8Prefill("mlp")) == {"gate_up_proj", "down_proj"}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert kinds(Int8Prefill("attention")) == attention
    small = {"per_layer_input_gate", "per_layer_projection"}
    assert kinds(Int8Prefill()) == {"gate_up_proj", "down_proj"} | attention | small
    made, _ = apply(decoder, [Int8Prefill()])
    made_for_x = [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
    assert len(made_for_x) == 60, (
        "once for all products of a layer that read the same: q, k, v; o; gate and up; down; small"
    )
    assert len([node for node in made.graph.node if node.op_type == "Concat" and "/mlp/" in node.name]) == 10


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"has no MatMulNBits in a layer") as raised:
        apply(Model.open(open_export(TINY).pair("fp32").decoder), [Int8Prefill()])
    assert raised.value.hint == "take a quantised precision: q4, q4f16 or quantized"
    with pytest.raises(PassError, match="has no MatMulNBits in a layer"):
        apply(product(op="/lm_head/MatMul_Quant"), [Int8Prefill()])
    with pytest.raises(PassError, match="tokens is 0; the fewest"):
        apply(product(), [Int8Prefill(tokens=0)])
    routed = product()
    routed.graph.node.append(make_node("TopK", ["y", "best"], ["v", "i"], "/model/layers.0/moe/router/TopK"))
    routed.graph.initializer.append(from_array(np.array([2]), "best"))
    with pytest.raises(PassError, match="is a mixture of experts") as raised:
        apply(routed, [Int8Prefill()])
    assert raised.value.hint == "leave out --prefill int8"
    renamed = product()
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "x"
    with pytest.raises(PassError, match="has no input input_ids or inputs_embeds"):
        apply(renamed, [Int8Prefill()])
    computed = product()
    del computed.graph.initializer[0]
    computed.graph.input.append(make_tensor_value_info("codes", TensorProto.UINT8, [COUNT, 3, 16]))
    with pytest.raises(PassError, match="'codes' is computed by the graph"):
        apply(computed, [Int8Prefill()])
    short = product()
    short.graph.initializer[2].CopyFrom(from_array(np.zeros((COUNT, 1), np.uint8), "points"))
    with pytest.raises(PassError, match=r"'points' is UINT8 \[48, 1\]; 96 bytes are expected"):
        apply(short, [Int8Prefill()])
    strange = product()
    next(each for each in strange.graph.node[0].attribute if each.name == "block_size").i = 0
    with pytest.raises(PassError, match="block_size, K and N are"):
        apply(strange, [Int8Prefill()])
    old = product()
    old.proto.opset_import[0].version = 17
    with pytest.raises(PassError, match="is of opset 17; 18 or newer is expected"):
        apply(old, [Int8Prefill()])
    together: Any = ({"provider": "cuda"}, {"to_fp16": True}, {"recipe": "rename-io"})
    for options in together:
        with pytest.raises(RequestError, match=r"--prefill int8 and --.* do not go together"):
            RepackOptions(prefill="int8", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command's option."""
    out = tmp_path_factory.mktemp("made") / "out"
    arguments = ["--precision", "q4", "--prefill", "int8", "--ep", "cpu", "--no-validate"]
    result = CliRunner().invoke(app, ["repack", str(TINY), str(out), *arguments])
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["recipe"].endswith(",int8-prefill")
    return out


Fault = Callable[[Model], None]


def whole_numbers(folder: Path, fault: Fault | None = None) -> Gate:
    model = Model.open(folder / "model.onnx")
    if fault is not None:
        fault(model)
    source = Model.open(open_export(TINY).pair("q4").decoder)
    return whole_number_gate(model, source, 16, Settings(), lambda _: None)


def side(model: Model, kind: str) -> NodeProto:
    found: NodeProto = next(n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat" and kind in n.name)
    return found


def scaled(model: Model, kind: str, channels: slice, factor: float) -> None:
    """Other scales of some channels of one product."""
    tensor = next(t for t in model.graph.initializer if t.name == side(model, kind).input[3])
    values = to_array(tensor, str(model.path.parent)).copy()
    values[channels] *= np.float32(factor)
    tensor.CopyFrom(from_array(values, tensor.name))


def zero_point(model: Model, kind: str) -> None:
    model.graph.initializer.append(from_array(np.array(127, np.uint8), "other"))
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat" and kind in node.name:
            node.input[4] = "other"


def tokens(model: Model, count: int) -> None:
    """The number of tokens from which on the graph takes the side in int8."""
    tensor = next(t for t in model.graph.initializer if t.name == "int8_prefill/tokens")
    tensor.CopyFrom(from_array(np.array([count]), tensor.name))


def test_sides_are_what_whole_numbers_come_to(folder: Path) -> None:
    gate = whole_numbers(folder)
    assert gate.passed and isinstance(gate.found, float) and gate.found < 1e-6
    assert gate.detail.startswith("26 of 70 products, 16 tokens; worst ")


@pytest.mark.parametrize(
    ("fault", "least"),
    [
        (lambda model: zero_point(model, ""), 0.02),
        (lambda model: zero_point(model, "layers.0/mlp/down_proj"), 0.02),
        (lambda model: scaled(model, "layers.0/attn/k_proj", slice(5, 6), 1.02), 0.0199),
        (lambda model: tokens(model, 17), 0.02),
    ],
    ids=["zero point of all", "zero point of one", "scale of one channel", "a few tokens more"],
)
def test_what_quality_forgives_whole_numbers_do_not(folder: Path, fault: Fault, least: float) -> None:
    gate = whole_numbers(folder, fault)
    assert not gate.passed and isinstance(gate.found, float) and gate.found > least


def test_a_folder_without_a_side_is_told() -> None:
    plain = Model.open(open_export(TINY).pair("q4").decoder)
    gate = whole_number_gate(plain, None, 16, Settings(), lambda _: None)
    assert not gate.passed and "no product has a side in int8" in gate.detail


def test_folder_is_proven_and_runs_in_int8_in_each_way(folder: Path) -> None:
    """GenAI too: alone, in chunks, in a batch, padded; and a run of a few tokens is the source's, bit by bit."""
    report = prove_folder(folder, open_export(TINY).pair("q4"), request=Request(scope="closing", by_kind=True))
    assert not report.failed and report.parity is not None and report.parity.max_abs > 0.05
    far = {case.name: max(case.max_abs, case.regrouped_max_abs) for case in report.cases}
    many = {name for name in far if name.startswith("many-tokens")}
    assert len(many) == 4 and all(far[name] > 0.05 for name in (*many, "latin", "conversation"))
    gates = {gate.name: gate for gate in report.gates}
    few = gates["logits, in runs of fewer than 16 tokens"]
    assert (few.found, few.threshold) == (0, 0)
    assert [gates["relative error"].threshold, gates["divergence"].threshold] == [0.18, 0.35]
    kinds = [(one.by, one.kind, one.products) for one in report.kinds]
    assert kinds == [
        ("int8-prefill", "all", 70), ("int8-prefill", "MLP", 20), ("int8-prefill", "attention", 30),
        ("int8-prefill", "per-layer inputs", 20),
    ]  # fmt: skip
    errors = [one.parity.error for one in report.kinds]
    assert errors[0] == gates["relative error"].found and all(0.005 < error < errors[0] for error in errors[1:])
    generated = {name: gate.detail for name, gate in gates.items() if name.startswith("tokens are the source's")}
    assert [detail.rsplit(" ", 1)[1] for detail in generated.values()] == ["5", "2", "2", "2"]


def test_faults_of_either_side_fail_the_proof(folder: Path, tmp_path: Path) -> None:
    """Scales of a quarter of one product's columns ten times too large; int8 in runs of 9 tokens."""
    other = Path(shutil.copytree(folder, tmp_path / "out"))
    model = Model.open(other / "model.onnx")
    scaled(model, "layers.3/mlp/down_proj", slice(16), 10)
    tokens(model, 9)
    (other / "model.onnx").write_bytes(model.to_bytes())
    request = Request(cases=[WORDS, replace(WORDS, name="few", rows=(WORDS.rows[0][:12],))])
    report = prove_folder(sign(other), open_export(TINY).pair("q4"), request=request)
    assert {"divergence", "direction", "logits, in runs of fewer than 16 tokens"} <= {
        gate.name for gate in report.failed
    }


def test_recipe_parses_back_and_goes_with_a_level() -> None:
    recipe = (*compatible(Path("e.onnx")), SetAccuracyLevel(), Int8Prefill("mlp", 32))
    assert parse(recipe_text(recipe)) == recipe and recipe_text(recipe).endswith(
        ",int8-prefill{products=mlp,tokens=32}"
    )
    assert default_thresholds("float32", [Int8Prefill.numerics]).to_dict() == {
        **Int8Prefill.numerics.bound,
        "headroom": 1.0,
    }
