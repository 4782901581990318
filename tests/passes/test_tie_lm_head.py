"""tie-lm-head: equal bytes are stored once, and every number is as it was; what is not equal stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from exhaustive import in_full
from folders import repack
from onnx import TensorProto, load
from onnx.helper import make_attribute, make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from places import TINY

from passes import MergeEmbeddings, TieLmHead, ToFp16
from passes.base import Outcome, apply
from passes.presets import compatible
from surgery.choices import WeightMode
from surgery.errors import PassError, WeightError
from surgery.folder.building import build_folder
from surgery.graph.external_data import WeightReference
from surgery.graph.model import Model
from surgery.graph.weight_comparison import first_difference, is_transpose
from surgery.runtime.sessions import MergedModel, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import open_export
from surgery.verify.agreement import agreement_of
from surgery.verify.prompts import Case
from surgery.verify.recording import record

CASES = [Case("one", "", ((2, 5, 9, 30, 31, 7, 8, 9, 10, 11, 12),)), Case("batch", "", ((2, 17, 4), (2, 3, 90, 5)))]
CODES = (
    "changed lm_head_MatMul_weight_quant: its codes are those of 'model_embed_tokens_weight_quant': 4,096 bytes less"
)
HEAD = "MatMul node '/lm_head/MatMul'"
EXPECTED = {
    "fp32": [f"changed {HEAD}: it multiplies by 'model.embed_tokens.weight': 32,768 bytes less"],
    "fp16": [f"changed {HEAD}: it multiplies by 'model.embed_tokens.weight': 16,384 bytes less"],
    "q4": [
        CODES,
        "changed lm_head_MatMul_weight_scales: its scales are those of 'model_embed_tokens_weight_scales': "
        "1,024 bytes less",
    ],
    "q4f16": [CODES],
    "quantized": [CODES.replace("4,096", "8,192")],
}


def tied(folder: Path, precision: str, *before: object) -> tuple[Model, Outcome]:
    pair = open_export(folder).pair(precision)
    steps = [MergeEmbeddings(pair.embed), *before, TieLmHead()]
    model, outcomes = apply(Model.open(pair.decoder), steps)  # type: ignore[arg-type]
    return model, outcomes[-1]


def change_byte(source: Path, precision: str, tensor: str) -> int:
    """Change the last byte of a weight; how many bytes it has."""
    model = Model.open(open_export(source).pair(precision).decoder)
    ref = next(each for each in model.weight_references() if each.name == tensor)
    with ref.file.open("r+b") as file:
        file.seek(ref.end - 1)
        last = file.read(1)[0]
        file.seek(ref.end - 1)
        file.write(bytes([last ^ 1]))
    return ref.length


@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        ("fp32", "copy"),
        ("q4", "copy"),
        ("q4f16", "consolidate"),
        *(in_full(each, "copy") for each in ("fp16", "q4f16", "quantized")),
    ],
)
def test_bytes_are_stored_once_and_every_number_stays(precision: str, weights: WeightMode, tmp_path: Path) -> None:
    export = open_export(TINY)
    pair = export.pair(precision)
    plain = build_folder(export, pair, compatible(pair.embed), tmp_path / "plain", weights=weights)
    recipe = compatible(pair.embed)
    result = build_folder(export, pair, (*recipe, TieLmHead()), tmp_path / "out", weights=weights)
    findings = [str(finding) for finding in result.outcomes[-1].findings]
    assert findings[: len(EXPECTED[precision])] == EXPECTED[precision]
    claimed = sum(int(f.split(": ")[-1].split()[0].replace(",", "")) for f in findings if f.startswith("changed"))
    freed = sum(entry.size for entry in plain.placed) - sum(entry.size for entry in result.placed)
    assert claimed <= freed < claimed + 8192  # consolidating aligns each weight to a page
    settings = Settings(threads=1)
    ours, untied = (MergedModel(tmp_path / name / "model.onnx", settings) for name in ("out", "plain"))
    # the source's own graphs take the padding of a batch for tokens
    for other, cases in ((TwoGraphModel.open(pair, settings), CASES[:1]), (untied, CASES)):
        theirs = record(other, cases, steps=6)
        found = agreement_of(theirs, record(ours, cases, steps=6, follow=theirs), {})
        assert (found.max_abs, found.cache_max_abs) == (0, 0)
    load(tmp_path / "out" / "model.onnx")  # as onnx reads it, too


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_second_run_finds_nothing_to_do(precision: str) -> None:
    model, _ = tied(TINY, precision)
    _, (again,) = apply(model, [TieLmHead()])
    assert not again.changed
    wanted = "it multiplies by 'model.embed_tokens.weight' already" if precision == "fp32" else "already"
    assert wanted in str(again.findings[0])


def test_links_stay_whole_files(source: Path, tmp_path: Path) -> None:
    model, _ = tied(source, "q4")
    placed = model.save(tmp_path / "model.onnx", weights="link")
    assert all(entry.source and entry.source.stat().st_size == entry.size for entry in placed)


def test_what_is_cut_off_is_hashed_again(tmp_path: Path) -> None:
    """repack copies while passes run; the copy that was made ahead is shortened."""
    from surgery.folder.manifest import faults

    result = repack(TINY, tmp_path / "out", "fp32", lambda embed: (*compatible(embed), TieLmHead()))
    assert list(faults(tmp_path / "out")) == []
    assert {entry.size for entry in result.placed} == {196608, 1875968 - 32768}


@pytest.mark.parametrize(
    "precision, tensor, sentence",
    [
        (
            "q4",
            "lm_head_MatMul_weight_quant",
            "its codes differ from those of 'model_embed_tokens_weight_quant' at byte",
        ),
        ("fp32", "lm_head.MatMul.weight", "it is not the transpose of 'model.embed_tokens.weight'"),
    ],
)
def test_one_byte_decides(precision: str, tensor: str, sentence: str, source: Path) -> None:
    length = change_byte(source, precision, tensor)
    model, outcome = tied(source, precision)
    found = next(str(finding) for finding in outcome.findings if finding.subject == tensor)
    assert found == f"skipped {tensor}: {sentence}" + (f" {length - 1:,}" if precision == "q4" else "")
    assert outcome.operators == {}
    assert next(ref for ref in model.weight_references() if ref.name == tensor).location.startswith("decoder_model")


def test_codes_are_shared_although_scales_differ(source: Path) -> None:
    change_byte(source, "q4", "lm_head_MatMul_weight_scales")
    _, outcome = tied(source, "q4")
    assert [finding.verb for finding in outcome.findings] == ["changed", "skipped", "skipped"]


def test_decoder_alone_has_no_table() -> None:
    _, (outcome,) = apply(Model.open(open_export(TINY).pair("q4").decoder), [TieLmHead()])
    reason = "no table that tokens are looked up in has its size; merge-embeddings brings the embedding's"
    assert [str(finding) for finding in outcome.findings] == [f"skipped lm_head: {reason}"]


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_a_table_of_columns_is_left_alone(precision: str) -> None:
    pair = open_export(TINY).pair(precision)
    merged, _ = apply(Model.open(pair.decoder), [MergeEmbeddings(pair.embed)])
    for node in merged.graph.node:
        if node.op_type in ("Gather", "GatherBlockQuantized") and "embed_tokens" in node.input[0]:
            kept = [attribute for attribute in node.attribute if not attribute.name.endswith("axis")]
            del node.attribute[:]
            axes = ["axis"] if node.op_type == "Gather" else ["gather_axis"]
            node.attribute.extend([*kept, *(make_attribute(name, 1) for name in axes)])
    _, (outcome,) = apply(merged, [TieLmHead()])
    assert not outcome.changed


def test_rounded_weights_are_left_alone() -> None:
    _, outcome = tied(TINY, "q4", ToFp16())
    assert {f.subject: f.verb for f in outcome.findings} == {
        "lm_head_MatMul_weight_quant": "changed",
        "lm_head_MatMul_weight_scales": "skipped",
        "lm_head_MatMul_weight_zp": "skipped",
    }


def test_tied_float32_graph_becomes_float16(tmp_path: Path) -> None:
    model, _ = tied(TINY, "fp32")
    half, _ = apply(model, [ToFp16()])
    half.save(tmp_path / "model.onnx", weights="consolidate")
    fused = [node for node in half.graph.node if node.op_type == "FusedMatMul"]
    names = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert [names[node.input[1]] for node in fused] == [TensorProto.FLOAT16]


def test_damaged_file_is_refused(source: Path) -> None:
    pair = open_export(source).pair("q4")
    merged, _ = apply(Model.open(pair.decoder), [MergeEmbeddings(pair.embed)])
    data = pair.embed.with_name("embed_tokens_q4.onnx_data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(PassError, match=r"embed_tokens_q4.onnx_data: tensor .* but the file has 30719 bytes"):
        apply(merged, [TieLmHead()])


def test_domain_is_imported_where_it_was_not(tmp_path: Path) -> None:
    """A Gather and a MatMul alone, of a model without com.microsoft; a second reader keeps the matrix."""
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    (tmp_path / "w").write_bytes(table.tobytes() + table.T.tobytes())
    tensors = []
    for name, dims, offset in (("table", (4, 3), 0), ("matrix", (3, 4), 48)):
        tensor = TensorProto(name=name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w"), ("offset", str(offset)), ("length", "48")):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    nodes = [
        make_node("Gather", ["table", "ids"], ["x"]),
        make_node("MatMul", ["x", "matrix"], ["y"]),
        make_node("Identity", ["matrix"], ["z"]),
    ]
    outputs = [make_tensor_value_info("y", 1, ["n", 4]), make_tensor_value_info("z", 1, [3, 4])]
    graph = make_graph(nodes, "g", [make_tensor_value_info("ids", 7, ["n"])], outputs, tensors)
    proto = make_model(graph, ir_version=10, opset_imports=[make_opsetid("", 21)])
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    model, _ = apply(Model.open(tmp_path / "m.onnx"), [TieLmHead()])
    assert model.opset("com.microsoft") == 1
    assert [tensor.name for tensor in model.graph.initializer] == ["table", "matrix"]
    model.save(tmp_path / "out.onnx")
    session = ort.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(["y"], {"ids": np.array([2, 0])})[0], table[[2, 0]] @ table.T)


# Comparing files


def ref(path: Path, length: int, offset: int = 0, shape: tuple[int, ...] = (), dtype: str = "UINT8") -> WeightReference:
    return WeightReference("w", path.name, path, offset, length, dtype, shape or (length,))


@pytest.mark.parametrize("at", [0, 999_999, 1024 * 1024, 1_500_000, 2_999_999])
def test_first_difference_is_found_across_portions(at: int, tmp_path: Path) -> None:
    data = bytearray(np.random.default_rng(0).bytes(3_000_000))
    (tmp_path / "a").write_bytes(b"head" + data)
    data[at] ^= 1
    (tmp_path / "b").write_bytes(data)
    a, b = ref(tmp_path / "a", 3_000_000, 4), ref(tmp_path / "b", 3_000_000)
    assert first_difference(a, b) == at
    assert first_difference(b, b) is None
    assert first_difference(b, ref(tmp_path / "b", 2_000_000)) == 2_000_000


def test_files_that_end_early_are_not_equal(tmp_path: Path) -> None:
    """They were cut while they were read; to the end that both have, they are."""
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(20))
    shapes = ((4, 6), (6, 4))
    with pytest.raises(WeightError, match="a ends before byte 24; it changed while it was being read"):
        first_difference(*(ref(tmp_path / name, 24) for name in "ab"))
    with pytest.raises(WeightError, match="b ends before byte 24"):
        is_transpose(*(ref(tmp_path / name, 24, 0, dims) for name, dims in zip("ba", shapes, strict=True)))


@pytest.mark.parametrize("dtype, kind", [("FLOAT", np.uint32), ("FLOAT16", np.uint16)])
def test_transpose_is_told_band_by_band(
    dtype: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.graph.weight_comparison.BAND", 1000)
    table = np.random.default_rng(0).integers(0, 2**16, (301, 17)).astype(kind)
    (tmp_path / "a").write_bytes(table.tobytes())
    (tmp_path / "b").write_bytes(b"xyz" + table.T.tobytes())
    a = ref(tmp_path / "a", table.nbytes, 0, (301, 17), dtype)
    b = ref(tmp_path / "b", table.nbytes, 3, (17, 301), dtype)
    assert is_transpose(a, b) and is_transpose(ref(tmp_path / "b", table.nbytes, 3, (17, 301), dtype), a)
    assert not is_transpose(a, a) and not is_transpose(a, replace(b, dtype="INT32"))
    table[300, 16] ^= 1
    (tmp_path / "b").write_bytes(b"xyz" + table.T.tobytes())
    assert not is_transpose(a, b)
