"""The text of a graph: one line for every thing, whatever is in it, and never one text for two files."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from limits import cpu_limit
from mutation import mutated_model
from onnx import ModelProto, TensorProto, helper
from onnx.numpy_helper import from_array
from places import TINY

from surgery.compare.git_drivers import graph_text_of
from surgery.compare.graph_text import graph_text
from surgery.graph.model import Model
from surgery.graph.nodes import copied

DECODER = TINY / "onnx" / "decoder_model_merged_q4.onnx"


def lines(proto: ModelProto, folder: Path) -> list[str]:
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return graph_text(Model.open(folder / "model.onnx")).splitlines()


def test_every_kind_of_thing_has_its_line(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["y"], name="inner")],
        "then",
        [],
        [helper.make_tensor_value_info("y", 1, [2])],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["y"], name="/gate", then_branch=body, else_branch=body),
        helper.make_node(
            "Custom", ["x", "", "a b"], ["z"], domain="my.ops", ints=[1, -2], f=0.1, fs=[0.5, 1e30], s="two\nlines",
            ss=["a", "b"], t=from_array(np.array([1.5, 2.5], np.float32)), i=2**40,
        ),
    ]  # fmt: skip
    stored = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[4, 2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.data"), ("offset", "64"), ("length", "16")):
        stored.external_data.add(key=key, value=value)
    weights = [
        from_array(np.arange(100), "long"),
        from_array(np.array(True), "flag"),
        stored,
        from_array(np.ones(2, np.float32), "one"),
    ]
    inputs = [helper.make_tensor_value_info("x", 1, ["batch", None, 3]), helper.make_tensor_value_info("a b", 1, None)]
    graph = helper.make_graph(
        nodes, "main", inputs, [helper.make_tensor_value_info("z", 7, [])], weights, doc_string="a\tdoc"
    )
    function = helper.make_function(
        "my.ops",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 21)],
        ["scale"],
    )
    proto = helper.make_model(
        graph, functions=[function], opset_imports=[helper.make_opsetid("my.ops", 1), helper.make_opsetid("", 21)]
    )
    helper.set_model_props(proto, {"b": "2", "a": "1"})
    found = lines(proto, tmp_path)
    assert [line for line in found if line.startswith(("opset", "metadata"))] == [
        "opset ai.onnx 21", "opset my.ops 1", "metadata a = 1", "metadata b = 2",
    ]  # fmt: skip
    for line in (
        "graph main: doc a\\tdoc",
        "  x  FLOAT [batch, ?, 3]",
        '  "a b"  FLOAT',
        "  flag  BOOL [] = True",
        "  w  FLOAT16 [4, 2] in w.data at 64, 16 bytes",
        "  one  FLOAT [2] = [1.0, 1.0]",
        "  If /gate (flag) -> y",
        "    then_branch:",
        "      graph then: outputs",
        "        Add inner (x, one) -> y FLOAT [2]",
        "function my.ops::Twice (a) -> b",
        "  attribute scale",
    ):
        assert line in found, line
    (custom,) = (line for line in found if "my.ops::Custom" in line)
    assert custom.startswith(
        '  my.ops::Custom "" (x, "", "a b") -> z INT64 []  f=0.1  fs=[0.5, 1e+30]  i=1099511627776'
    )
    assert custom.endswith('ints=[1, -2]  s="two\\nlines"  ss=["a", "b"]  t=FLOAT [2] = [1.5, 2.5]')
    (long,) = (line for line in found if line.startswith("  long"))
    assert long.startswith("  long  INT64 [100] = sha256 ") and len(long) < 60


def test_one_text_for_one_graph_and_two_for_two(tmp_path: Path) -> None:
    proto = ModelProto.FromString(DECODER.read_bytes())
    first = lines(proto, tmp_path)
    assert first[:-1] == graph_text(Model.open(DECODER)).splitlines()[:-1]
    turned = [copied(tensor) for tensor in reversed(proto.graph.initializer)]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(turned)
    proto.graph.node[5].doc_string = "what no line shows"
    second = lines(proto, tmp_path)
    assert [line for line in second if line not in first] == second[-1:], "the digest of the file alone"


def test_one_change_is_one_line(tmp_path: Path) -> None:
    proto = ModelProto.FromString(DECODER.read_bytes())
    first = set(lines(proto, tmp_path))
    node = next(node for node in proto.graph.node if node.op_type == "Softmax")
    node.attribute[0].i = 3
    second = set(lines(proto, tmp_path))
    assert len(first - second) == len(second - first) == 2, "the node, and the digest of the file"


def test_whatever_the_file_is_there_is_a_text(tmp_path: Path) -> None:
    """Damaged and hostile graphs: no exception, no control character, nothing that ends a line but its end."""
    source, rng = DECODER.read_bytes(), random.Random(5)
    file = tmp_path / "model.onnx"
    for _ in range(60):
        done, data = mutated_model(source, rng)
        file.write_bytes(data)
        text = graph_text_of(file)
        assert text.endswith("\n") and all(line.isprintable() for line in text.split("\n")), done


def test_twenty_thousand_nodes_in_seconds(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", [f"v{k}", "v0"], [f"v{k + 1}"], name=f"/layer/{k}", axis=k) for k in range(20_000)]
    graph = helper.make_graph(nodes, "long", [helper.make_tensor_value_info("v0", 1, [1])], [])
    with cpu_limit(10):
        assert len(lines(helper.make_model(graph), tmp_path)) > 20_000
