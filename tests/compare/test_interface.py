"""The interface of two graphs: what is added, gone, retyped, and which names of dimensions are one."""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_operatorsetid, make_tensor_value_info

from surgery.compare import compare, open_subject
from surgery.graph.model import Model

Declared = dict[str, list[str | int]]
INPUTS: Declared = {"x": ["b", "s"], "w": ["c", "t"]}
OUTPUTS: Declared = {"y": ["b", "s"], "z": ["c", "t"]}


def changes(inputs: Declared, outputs: Declared) -> list[tuple[str, str, str, str]]:
    """Verb, kind, before and after of what differs from y = relu(x), z = relu(w)."""
    found = compare(open_subject(graph(INPUTS, OUTPUTS)), open_subject(graph(inputs, outputs)))
    assert found.before.nodes == 2
    return [
        (change.verb, change.kind, *(f"{side.name} {side.type}".strip() if side else "" for side in (change.before, change.after)))
        for change in found.interface
    ]  # fmt: skip


def graph(inputs: Declared, outputs: Declared) -> Model:
    sides = [
        [make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in side.items()] for side in (inputs, outputs)
    ]
    nodes = [make_node("Relu", ["x"], ["y"], name="one"), make_node("Relu", ["w"], ["z"], name="two")]
    made = make_graph(nodes, "g", *sides)
    return Model(make_model(made, opset_imports=[make_operatorsetid("", 21)], ir_version=10), Path("g.onnx"))


def test_values_that_come_and_go() -> None:
    assert changes(INPUTS, OUTPUTS) == []
    assert changes(INPUTS, {"y": ["b", "s"]}) == [("removed", "output", "z FLOAT [c, t]", "")]
    assert changes({**INPUTS, "more": [1]}, OUTPUTS) == [("added", "input", "", "more FLOAT [1]")]
    assert changes(INPUTS, {**OUTPUTS, "x": ["b", "s"]}) == [("added", "output", "", "x FLOAT [b, s]")]


def test_another_type_is_a_change() -> None:
    assert changes(INPUTS, {**OUTPUTS, "z": ["c", 8]}) == [("changed", "output", "z FLOAT [c, t]", "z FLOAT [c, 8]")]
    assert changes({**INPUTS, "x": ["b"]}, OUTPUTS) == [("changed", "input", "x FLOAT [b, s]", "x FLOAT [b]")]


def test_a_dimension_is_renamed_where_it_alone_has_the_new_name() -> None:
    assert changes({**INPUTS, "x": ["n", "s"]}, {**OUTPUTS, "y": ["n", "s"]}) == [("renamed", "dimension", "b", "n")]
    joined = changes({"x": ["n", "s"], "w": ["n", "t"]}, {"y": ["n", "s"], "z": ["n", "t"]})
    assert [(verb, kind) for verb, kind, *_ in joined] == [("changed", "input")] * 2 + [("changed", "output")] * 2
    parted = changes({**INPUTS, "x": ["n", "s"]}, OUTPUTS)
    assert parted == [("changed", "input", "x FLOAT [b, s]", "x FLOAT [n, s]")], "it keeps its name in another place"
