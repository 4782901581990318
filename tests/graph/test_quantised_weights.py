"""Quantised weights that are not what their node says are refused, in one sentence, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from command_line import run
from onnx import NodeProto, TensorProto

import fixtures
from surgery.errors import ModelError
from surgery.graph.model import Model
from surgery.graph.quantised_weights import check_quantised

DECODER, EMBED = "decoder_model_merged_q2f16.onnx", "embed_tokens_q2f16.onnx"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qat")
    fixtures.build("tiny-e2b-qat", "q2f16", folder)
    return folder


@pytest.mark.parametrize("name", ["tiny-e2b", "tiny-e2b-qat", "tiny-31b"])
def test_what_exporters_write_is_sound(name: str, tmp_path: Path) -> None:
    fixtures.build(name, "all", tmp_path)
    for path in (tmp_path / "onnx").glob("*.onnx"):
        check_quantised(Model.open(path))


def attribute(node: NodeProto, name: str, value: int) -> None:
    next(each for each in node.attribute if each.name == name).i = value


def bits(proto: onnx.ModelProto) -> None:
    attribute(first(proto, "MatMulNBits"), "bits", 8)


def block_size(proto: onnx.ModelProto) -> None:
    attribute(first(proto, "MatMulNBits"), "block_size", 64)


def no_block_size(proto: onnx.ModelProto) -> None:
    attribute(first(proto, "MatMulNBits"), "block_size", 0)


def packing(proto: onnx.ModelProto) -> None:
    codes = weight(proto, "MatMulNBits", 1)
    codes.dims[2] //= 2
    codes.dims[0] *= 2


def table_bits(proto: onnx.ModelProto) -> None:
    attribute(first(proto, "GatherBlockQuantized"), "bits", 8)


def table_scales(proto: onnx.ModelProto) -> None:
    weight(proto, "GatherBlockQuantized", 2).data_type = TensorProto.BFLOAT16


def product_scales(proto: onnx.ModelProto) -> None:
    name = first(proto, "MatMulNBits").input[2]
    next(value for value in proto.graph.value_info if value.name == name).type.tensor_type.elem_type = TensorProto.FLOAT


def first(proto: onnx.ModelProto, operator: str) -> NodeProto:
    return next(node for node in proto.graph.node if node.op_type == operator)


def weight(proto: onnx.ModelProto, operator: str, index: int) -> TensorProto:
    name = first(proto, operator).input[index]
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


@pytest.mark.parametrize(
    ("graph", "damage", "sentence"),
    [
        (
            DECODER,
            bits,
            r"codes '.*q_proj.*' are \[64, 2, 16\]; \[64, 2, 32\] is expected of 8 bits in blocks of 32, K 64",
        ),
        (DECODER, block_size, r"are \[64, 2, 16\]; \[64, 1, 32\] is expected of 4 bits in blocks of 64"),
        (DECODER, no_block_size, r"block_size, K and N are 4, 0, 64 and 64; numbers above 0 are expected"),
        (DECODER, packing, r"are \[128, 2, 8\]; \[64, 2, 16\] is expected"),
        (DECODER, product_scales, r"scales '.*' are FLOAT, the activations FLOAT16; one dtype is expected"),
        (EMBED, table_bits, r"64\]; 16 values a row are expected of codes UINT8 \[128, 16\], 8 bits in blocks of 64"),
        (EMBED, table_scales, r"scales '.*' are BFLOAT16, the rows that it gives FLOAT16; one dtype is expected"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_one_sentence_and_nothing_is_written(
    graph: str, damage: Callable[[onnx.ModelProto], None], sentence: str, export: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(export, source)
    proto = onnx.load(source / "onnx" / graph, load_external_data=False)
    damage(proto)
    onnx.save(proto, source / "onnx" / graph)
    with pytest.raises(ModelError, match=sentence):
        check_quantised(Model.open(source / "onnx" / graph))
    for command in ("repack", "strip"):
        done = run(command, str(source), str(tmp_path / "out"), "--no-validate")
        assert done.returncode == 2 and done.stdout == ""
        assert not (tmp_path / "out").exists()


def test_cuda_is_refused_for_codes_without_zero_points(export: Path, tmp_path: Path) -> None:
    words = ("--precision", "q2f16", "--ep", "cuda", "--no-validate")
    done = run("repack", str(export), str(tmp_path / "out"), *words)
    assert done.returncode == 2 and "GatherBlockQuantized" in done.stderr
    assert "--embed-device cpu, or run it with --ep cpu" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
    kept = run("repack", str(export), str(tmp_path / "out"), *words, "--preset", "fast", "--embed-device", "cpu")
    assert kept.returncode == 0, "what the hint says"
