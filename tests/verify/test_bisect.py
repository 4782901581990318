"""A bisection names the node where the graphs part, in a sound folder none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import repack
from onnx import GraphProto, NodeProto, numpy_helper
from signing import sign

from passes.presets import compatible
from surgery.errors import RequestError
from surgery.graph.model import Model
from surgery.runtime.sessions import Settings
from surgery.source.export import Export
from surgery.verify import Request, prove_folder
from surgery.verify.bisect import Divergence, find_divergence
from surgery.verify.prompts import Case

CASE = Case("chunks", "a prompt in pieces", ((2, 10, 77, 31, 9, 12),), chunk=4)
RAGGED = Case("ragged", "a padded batch", ((2, 10, 77), (2, 9, 33, 61, 17, 40)))


@pytest.fixture(scope="module")
def sound(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(export, tmp_path_factory.mktemp("sound") / "out", "fp32").folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


def node(graph: GraphProto, name: str) -> NodeProto:
    return next(each for each in graph.node if each.name == name)


def edit(folder: Path, change: Callable[[GraphProto], None]) -> None:
    model = Model.open(folder / "model.onnx")
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.proto.SerializeToString())


def part(folder: Path, export: Export, case: Case = CASE, tolerance: float = 0.0) -> Divergence | None:
    pair = export.pair("fp32")
    return find_divergence(pair, folder / "model.onnx", case, Settings(), steps=2, tolerance=tolerance)


@pytest.mark.parametrize("case", [CASE, RAGGED])
def test_sound_graphs_do_not_part(case: Case, sound: Path, export: Export) -> None:
    assert part(sound, export, case) is None


def test_padded_caches_do_not_part(export: Export, tmp_path: Path) -> None:
    from passes.uniform_heads import UniformHeads

    made = repack(export, tmp_path / "out", "fp32", lambda embed: (*compatible(embed), UniformHeads())).folder
    assert part(made, export) is None


def test_a_weight_byte(folder: Path, export: Export) -> None:
    model = Model.open(folder / "model.onnx")
    name = node(model.graph, "/model/layers.4/mlp/down_proj/MatMul").input[1]
    weight = next(each for each in model.weight_references() if each.name == name)
    with weight.file.open("r+b") as file:
        file.seek(weight.offset + 3)  # sign and exponent of the first float32
        byte = file.read(1)[0]
        file.seek(weight.offset + 3)
        file.write(bytes([byte ^ 0x80]))
    found = part(folder, export)
    assert found is not None
    assert (found.node, found.layer, found.step) == ("/model/layers.4/mlp/down_proj/MatMul", 4, 0)
    assert found.cause == f"its weight {name} does not hold the source's values"
    assert found.unmatched == () and 0 < found.max_abs < np.inf


def other_epsilon(graph: GraphProto) -> str:
    norm = node(graph, "/model/layers.5/pre_feedforward_layernorm/LayerNorm")
    next(each for each in norm.attribute if each.name == "epsilon").f = 0.5
    return norm.name


def other_operator(graph: GraphProto) -> str:
    node(graph, "/model/layers.5/mlp/Mul").op_type = "Add"
    return "/model/layers.5/mlp/Mul"


def other_wire(graph: GraphProto) -> str:
    add = node(graph, "/model/layers.5/Add_2")
    add.input[0] = "/model/layers.4/Add_3/output_0"
    return add.name


def other_owner(graph: GraphProto) -> str:
    reader = node(graph, "/model/layers.6/attn/shared/k_transpose")
    reader.input[0] = reader.input[0].replace("present.3", "present.2")
    return reader.name


def other_scale(graph: GraphProto) -> str:
    graph.initializer.append(numpy_helper.from_array(np.float32(16), "doubled"))
    node(graph, "/model/embed_tokens/Mul").input[1] = "doubled"
    return "/model/embed_tokens/Mul"


def no_softcap(graph: GraphProto) -> str:
    node(graph, "/lm_head/softcap/Tanh").op_type = "Identity"
    return "/lm_head/softcap/Tanh"


@pytest.mark.parametrize(
    ("damage", "layer", "cause"),
    [
        (other_epsilon, 5, "its attribute epsilon is 0.5, in the source"),
        (other_operator, 5, "it is Add, in the source Mul"),
        (other_wire, 5, "its input 0 is /model/layers.4/Add_3/output_0, in the source /model/layers.5/Add_1/output_0"),
        (other_owner, 6, "its input 0 is present.2.key, in the source present.3.key"),
        (other_scale, None, "its weight doubled does not hold the source's values"),
        (no_softcap, None, "it is Identity, in the source Tanh"),
    ],
)
def test_a_damaged_node(
    damage: Callable[[GraphProto], str], layer: int | None, cause: str, folder: Path, export: Export
) -> None:
    damaged: list[str] = []
    edit(folder, lambda graph: damaged.append(damage(graph)))
    found = part(folder, export)
    assert found is not None and [found.node] == damaged
    assert found.layer == layer and found.cause.startswith(cause)
    assert found.node in str(found) and "\n" not in str(found)


def test_a_fault_of_the_cache_shows_in_the_second_piece(folder: Path, export: Export) -> None:
    """A past that is doubled: nothing differs in the first piece, which has none."""
    edit(folder, double_the_past)
    found = part(folder, export)
    assert found is not None and (found.step, found.layer) == (1, 1)
    assert found.node == "/model/layers.1/attn/GroupQueryAttention"
    assert found.unmatched == ("doubled_past",)


def double_the_past(graph: GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    attention = node(graph, "/model/layers.1/attn/GroupQueryAttention")
    doubled = NodeProto(
        op_type="Mul", name="/model/layers.1/doubled_past", input=[attention.input[3], "two"], output=["doubled_past"]
    )
    place = list(graph.node).index(attention)
    attention.input[3] = "doubled_past"
    graph.node.insert(place, doubled)


def test_a_tolerance_steps_over_small_differences(folder: Path, export: Export) -> None:
    def slightly(graph: GraphProto) -> None:
        norm = node(graph, "/model/layers.5/pre_feedforward_layernorm/LayerNorm")
        next(each for each in norm.attribute if each.name == "epsilon").f = 2e-6

    edit(folder, slightly)
    assert part(folder, export) is not None
    assert part(folder, export, tolerance=0.1) is None


def test_validate_bisects_when_logits_differ(folder: Path, sound: Path, export: Export) -> None:
    request = Request(cases=[replace(CASE, chunk=None)], tokens=2, bisect=True)
    names = {gate.name for gate in prove_folder(sound, export.pair("fp32"), request=request).gates}
    assert "values inside the graphs" not in names
    edit(folder, lambda graph: other_wire(graph) and None)
    (gate,) = [
        gate
        for gate in prove_folder(sign(folder), export.pair("fp32"), request=request).failed
        if gate.name == "values inside the graphs"
    ]
    assert "in layer 5, at Add node '/model/layers.5/Add_2'" in gate.detail
    with pytest.raises(RequestError, match="no source is given"):
        prove_folder(sound, None, request=request)
