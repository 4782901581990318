"""Fragments of graphs that mean harm: what would take all time or memory, or is no number, is refused before it runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from limits import cpu_limit
from onnx import NodeProto, TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info

from surgery.errors import ModelError
from surgery.graph import evaluation
from surgery.graph.evaluation import Subgraph, Subgraphs

LIMIT = 2
"""Seconds of CPU time; each of these once took minutes, or more memory than there is."""
SIZES = {
    "one": [1], "nought": [0], "vast": [2**40, 2**40], "wide": [2**10, 2**10], "times": [2**40, 1], "end": 2**60, "start": 0,
    "step": 1, "axis": 0, "many": [10**5, 2], "row": [0, 0], "count": [10**5],
}  # fmt: skip


def fragment(
    nodes: Sequence[NodeProto], dtype: int = TensorProto.INT64, dims: Sequence[object] = ("b", "t")
) -> Subgraph:
    """From `x` to `y`."""
    constants = [
        make_tensor(name, TensorProto.INT64, np.shape(value), np.ravel(value).tolist()) for name, value in SIZES.items()
    ]
    graph = make_graph(
        nodes, "g", [make_tensor_value_info("x", dtype, list(dims))], [onnx.helper.make_value_info("y", onnx.TypeProto())], constants
    )  # fmt: skip
    return Subgraphs(make_model(graph, opset_imports=[make_opsetid("", 20)])).cut(["y"], {"x"})


def chain(operator: str, first: str, count: int, *others: str) -> list[NodeProto]:
    names = [first, *(f"c{index}" for index in range(1, count)), "y"]
    return [make_node(operator, [one, *others], [other]) for one, other in itertools.pairwise(names)]


DOUBLED = [
    make_node("Concat", ["x" if i == 0 else f"c{i - 1}"] * 2, [f"c{i}" if i < 99 else "y"], axis=0) for i in range(100)
]
WIDENED = make_node("Expand", ["x", "wide"], ["e"])
TOO_MUCH = {
    "range": ([make_node("Range", ["start", "end", "step"], ["y"])], "1,152,921,504,606,846,976 elements"),
    "fill": ([make_node("ConstantOfShape", ["vast"], ["y"])], "makes 1,208,925,819,614,629,174,706,176 elements"),
    "expand": ([make_node("Expand", ["x", "vast"], ["y"])], "broadcast dimensions too large"),
    "tile": ([make_node("Tile", ["x", "times"], ["y"])], "makes [0-9,]+ elements"),
    "doubled": (DOUBLED, "its values take more than 67,108,864 bytes"),
    "chain": ([WIDENED, *chain("Add", "e", 150, "x")], "its values take more than 67,108,864 bytes"),
    "products": ([WIDENED, *chain("MatMul", "e", 2, "e")], "it takes more than 1e\\+09 operations to try"),
    "python": (
        [make_node("Expand", ["row", "many"], ["at"]), make_node("Expand", ["one", "count"], ["what"]),
         make_node("ScatterND", ["x", "at", "what"], ["y"])], "it takes more than 1e\\+09 operations",
    ),
    "regex": ([make_node("RegexFullMatch", ["x"], ["y"], pattern="(a+)+$")], "RegexFullMatch node .*such a node is not tried"),
    "other domain": ([make_node("Add", ["x", "x"], ["y"], domain="own")], "Domain .own.* is not specified"),
}  # fmt: skip


@pytest.mark.parametrize("form", TOO_MUCH)
def test_what_takes_too_much_is_refused_before_it_runs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MOST_WORK", 10**9)
    monkeypatch.setattr(evaluation, "MOST_BYTES", 2**26)
    nodes, sentence = TOO_MUCH[form]
    with cpu_limit(LIMIT), pytest.raises(ModelError, match=sentence):
        fragment(nodes).run({}, {"x": np.ones((1, 1), np.int64)})


def test_many_small_runs_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may mention any number of lengths, each of which is tried."""
    monkeypatch.setattr(evaluation, "MOST_WORK", 10**8)
    part = fragment([make_node("Neg", ["x"], ["y"])])
    with cpu_limit(LIMIT), pytest.raises(ModelError, match="it takes more than 1e\\+08 operations"):
        for _ in range(1000):
            part.run({}, {"x": np.ones((1, 1), np.int64)})


def test_text_is_not_tried() -> None:
    """Text can be doubled as arrays can, and no shape tells."""
    part = fragment(chain("Add", "x", 3, "x"), TensorProto.STRING)
    with pytest.raises(ModelError, match="which is given no numbers"):
        part.run({}, {"x": np.array([["a"]], object)})


@pytest.mark.parametrize("first", ["shape", "numbers"])
def test_a_value_is_read_beside_its_shape(first: str) -> None:
    """Its declared shape stands for what Shape reads; zeros of that shape are not the value."""
    shape = [make_node("Shape", ["m"], ["s"]), make_node("ReduceSum", ["s"], ["n"], keepdims=0)]
    numbers = [make_node("Abs", ["m"], ["a"])]
    ends = ["n", "a"] if first == "shape" else ["a", "n"]
    nodes = [make_node("Neg", ["x"], ["m"]), *shape, *numbers, make_node("Add", ends, ["y"])]
    graph = make_graph(
        nodes, "g", [make_tensor_value_info("x", TensorProto.INT64, ["b", "t"])],
        [onnx.helper.make_value_info("y", onnx.TypeProto())],
        value_info=[make_tensor_value_info("m", TensorProto.INT64, ["b", "t"])],
    )  # fmt: skip
    part = Subgraphs(make_model(graph, opset_imports=[make_opsetid("", 20)])).cut(["y"], {"x"})
    (found,) = part.run({"b": 1, "t": 3}, {"x": np.array([[1, 2, 3]])})
    assert found.tolist() == [[5, 6, 7]]


def test_a_declared_size_that_no_array_has() -> None:
    graph = make_graph(
        [make_node("Shape", ["x"], ["y"])], "g", [make_tensor_value_info("x", TensorProto.FLOAT, [2**62, 2**62])],
        [make_tensor_value_info("y", TensorProto.INT64, [2])],
    )  # fmt: skip
    part = Subgraphs(make_model(graph)).cut(["y"], set())
    with pytest.raises(ModelError, match="it cannot be run"):
        part.run({}, {})


def test_a_constant_in_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file would be one of the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(8))
    tensor = TensorProto(name="w", data_type=TensorProto.INT64, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret")
    with pytest.raises(ModelError, match="it depends on the weight 'w'"):
        fragment([make_node("Constant", [], ["y"], value=tensor)])
