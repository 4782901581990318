"""The mask's columns of a step's new tokens, in masks of every width that a runtime feeds."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from surgery.attention.sequence_lengths import new_columns
from surgery.graph.node_builder import NodeBuilder

CASES: dict[str, tuple[list[list[int]], int, int, list[list[int]]]] = {
    "prompt": ([[1, 1, 1]], 0, 3, [[1, 1, 1]]),
    "padded prompts": ([[1, 1, 1], [1, 0, 0], [0, 1, 1]], 0, 3, [[1, 1, 1], [1, 0, 0], [0, 1, 1]]),
    "behind others": ([[1, 1, 0, 1, 0]], 2, 3, [[0, 1, 0]]),
    "one token behind a padded batch": ([[1, 1, 1, 1], [1, 0, 0, 1]], 3, 1, [[1], [1]]),
    "a buffer of 8 rows, a mask up to the tokens so far": ([[1, 1, 1, 1, 0]], 8, 2, [[1, 0]]),
    "a buffer that is full": ([[1, 1, 1, 1]], 4, 2, [[1, 1]]),
    "prompt, a mask of the whole buffer": ([[1, 1, 1, 0, 0, 0]], 6, 3, [[1, 1, 1]]),
    "padded prompts, a mask of the whole buffer": ([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], 5, 3, [[1, 1, 1], [1, 0, 0]]),
    "behind others, a mask of the whole buffer": ([[1, 1, 1, 1, 1, 0]], 6, 2, [[1, 1]]),
    "one token, a mask of the whole buffer": ([[1, 1, 1, 0]], 4, 1, [[1]]),
}  # fmt: skip
"""Mask, rows of the caches, new tokens -> their columns."""


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    mask = gs.Variable("attention_mask", np.int64, ["batch", "width"])
    past = gs.Variable("past", np.float32, ["batch", 1, "rows", 2])
    new = gs.Variable("new", np.int64, [1])
    make = NodeBuilder()
    columns = new_columns(make, mask, new, past)
    graph = gs.Graph(make.nodes, inputs=[mask, past, new], outputs=[columns], opset=21)
    model = gs.export_onnx(graph, do_type_check=False, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("case", CASES)
def test_columns_are_those_of_the_new_tokens(case: str, session: ort.InferenceSession) -> None:
    mask, rows, new, expected = CASES[case]
    past = np.zeros((len(mask), 1, rows, 2), np.float32)
    given = {"attention_mask": np.array(mask), "past": past, "new": np.array([new])}
    np.testing.assert_array_equal(session.run(None, given)[0], expected)
