"""Our passes run inside of onnx-ir's pipelines, and give there what they give alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass
from places import FIXTURES

from passes import ExpandSharedKV, FoldLogitsToKeep, MergeEmbeddings, RenameIO, ToFp16
from passes.base import Pass, apply
from passes.onnx_ir_adapter import OnnxIrPass
from surgery.architecture import architecture, read_config
from surgery.errors import FolderError, PassError
from surgery.graph.model import Model

SOURCE = FIXTURES / "tiny-e2b"
EMBED, DECODER = (SOURCE / "onnx" / f"{role}_q4.onnx" for role in ("embed_tokens", "decoder_model_merged"))
ARCHITECTURE = architecture(read_config(SOURCE / "config.json"))


def interface(proto: object) -> list[str]:
    return [str(value.name) for value in (*proto.graph.input, *proto.graph.output)]  # type: ignore[attr-defined]


def weights(model: ir.Model) -> dict[str, bytes]:
    return {name: value.const_value.tobytes() for name, value in model.graph.initializers.items() if value.const_value}


def test_passes_of_both_run_in_one_pipeline(tmp_path: Path) -> None:
    """Weights come out of the files of both graphs, and are the bytes that a folder made by `save` holds."""
    steps: list[Pass] = [MergeEmbeddings(EMBED), FoldLogitsToKeep(), RenameIO(), ExpandSharedKV()]
    given = ir.load(DECODER)
    before = ir.to_proto(given).SerializeToString(deterministic=True)
    result = ir.passes.Sequential(OnnxIrPass(*steps, architecture=ARCHITECTURE), RemoveUnusedNodesPass())(given)
    assert result.modified and ir.to_proto(given).SerializeToString(deterministic=True) == before
    alone, _ = apply(Model.open(DECODER, ARCHITECTURE), steps)
    alone.save(tmp_path / "model.onnx")
    assert interface(ir.to_proto(result.model)) == interface(alone.proto)
    assert [node.op_type for node in result.model.graph] == [node.op_type for node in alone.graph.node]
    assert weights(result.model) == weights(ir.load(tmp_path / "model.onnx"))
    assert {type(value.const_value).__name__ for value in result.model.graph.initializers.values()} >= {
        "ExternalTensor"
    }
    again = OnnxIrPass(*steps[1:], architecture=ARCHITECTURE)(result.model)
    assert not again.modified


def test_a_pass_that_rewrites_weights_writes_them_into_its_folder(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="to-fp16 writes weights anew") as raised:
        OnnxIrPass(ToFp16())
    assert "folder" in (raised.value.hint or "")
    alone, _ = apply(Model.open(DECODER), [ToFp16()])
    alone.save(tmp_path / "model.onnx")
    (tmp_path / "new").mkdir()
    step = OnnxIrPass(ToFp16(), folder=tmp_path / "new")
    result = step(ir.load(DECODER))
    assert weights(result.model) == weights(ir.load(tmp_path / "model.onnx"))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["float16.onnx_data"]
    with pytest.raises(FolderError, match=r"float16\.onnx_data exists"):
        step.call(ir.load(DECODER))


def test_an_error_names_the_pass_and_what_was_expected() -> None:
    with pytest.raises(ir.passes.PassError, match="the 'rename-io,expand-shared-kv' pass") as raised:
        ir.passes.Sequential(OnnxIrPass(RenameIO(), ExpandSharedKV()))(ir.load(DECODER))
    assert "expand-shared-kv after rename-io" in str(raised.value.__cause__)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    model = ir.load(DECODER)
    for folder, name in (("a", "one"), ("b", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w").write_bytes(bytes(4))
        tensor = ir.ExternalTensor(
            "w", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name=name, base_dir=tmp_path / folder
        )
        model.graph.register_initializer(
            ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        )
    with pytest.raises(PassError, match=r"'w' is .*b/w and .*a/w; rename one of them"):
        OnnxIrPass(RenameIO()).call(model)


def test_weights_in_memory_go_through() -> None:
    model = ir.load(DECODER)
    array = np.arange(4, dtype=np.float32)
    model.graph.register_initializer(ir.Value(name="w", const_value=ir.tensor(array, name="w")))
    result = OnnxIrPass(RenameIO())(model)
    np.testing.assert_array_equal(result.model.graph.initializers["w"].const_value.numpy(), array)  # type: ignore[union-attr]
