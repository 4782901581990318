"""Where the time of a folder goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from places import TINY

import surgery
from surgery.architecture import architecture, read_config
from surgery.graph.model import Model
from surgery.jobs.benchmarking import profile
from surgery.runtime.profiling import model_runs, profile_folder, time_shares, weight_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profiled") / "out"
    surgery.repack(TINY, out, surgery.RepackOptions(precision="q4", preset="fast", validate=False))
    return out


def _run(start: int, micros: int) -> Mapping[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": micros}


def _node(start: int, micros: int, name: str, operator: str, activations: int = 0) -> Mapping[str, Any]:
    sizes = {"op_name": operator, "activation_size": str(activations), "output_size": "10"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": micros, "args": sizes}


def test_a_node_belongs_to_the_run_in_which_it_began() -> None:
    events = [_node(12, 3, "a", "Add"), _run(30, 9), _node(31, 5, "a", "Add"), _run(10, 8), _node(14, 2, "b", "Mul")]
    first, second = model_runs(events)
    assert (first.milliseconds, [each["dur"] for each in first.nodes]) == (0.008, [3, 2])
    assert (second.milliseconds, [each["dur"] for each in second.nodes]) == (0.009, [5])


def test_shares_are_by_operator_and_kind_of_layer() -> None:
    arch = architecture(read_config(TINY / "config.json"))
    named = "/model/layers.{}/mlp/MatMul"
    events = [_run(0, 1000), _run(2000, 3000)]
    for start in (0, 2000):
        events += [_node(start + i, 100, named.format(i), "MatMulNBits", activations=5) for i in (0, 1, 4, 5, 9)]
        events.append(_node(start + 10, 50, "/lm_head/MatMul", "MatMulNBits"))
    shares = time_shares(model_runs(events), {named.format(0): 1000}, arch)
    found = {each.layers: each for each in shares}
    assert shares[0].layers == "sliding"
    assert set(found) == {"sliding", "full", "KV-shared sliding", "KV-shared full", "lm_head"}
    assert (found["sliding"].nodes, found["sliding"].milliseconds, found["sliding"].bytes) == (2, 0.2, 1030)
    assert found["sliding"].share == pytest.approx(400 / 4000)
    assert found["sliding"].rate == pytest.approx(1030 / 0.0002)


def test_a_node_that_makes_no_rows_reads_no_weights() -> None:
    """One of the two sides of a product in int8 has none."""
    empty: Any = _node(5, 100, "/model/layers.0/mlp/MatMul", "MatMulNBits", activations=5)
    empty["args"]["output_size"] = "0"
    arch = architecture(read_config(TINY / "config.json"))
    (share,) = time_shares(model_runs([_run(0, 1000), empty]), {"/model/layers.0/mlp/MatMul": 1000}, arch)
    assert (share.bytes, share.milliseconds) == (0, 0.1)


def test_weights_count_where_they_are_read_whole(folder: Path) -> None:
    model = Model.open(folder / "model.onnx")
    found = weight_bytes(model)
    (head,) = (node for node in model.graph.node if node.name.startswith("/lm_head/MatMul"))
    assert found[head.name] == 128 * 64 // 2 + 128 * 2 * 4 + 128 * 1  # codes, scales, zero points
    assert not any(name.startswith("/model/embed_tokens/Gather") for name in found)


def test_a_folder_is_profiled(folder: Path) -> None:
    prefill, decode = profile(folder, provider="cpu", contexts=[20], new_tokens=4)
    assert (prefill.phase, decode.phase, decode.context) == ("prefill", "decode", 20)
    for one in (prefill, decode):
        assert 0 < sum(each.milliseconds for each in one.shares) <= one.milliseconds
        attention = [each for each in one.shares if each.operator == "GroupQueryAttention"]
        assert {each.layers: each.nodes for each in attention} == {
            "sliding": 4, "full": 1, "KV-shared sliding": 4, "KV-shared full": 1,
        }  # fmt: skip
        assert one.bandwidth > 1e8


def test_a_prompt_in_pieces_is_one_prefill(folder: Path) -> None:
    said: list[str] = []
    prefill, decode = profile_folder(folder, [20, 4096], 4, "cpu", chunk=8, progress=said.append)
    counts = {(each.operator, each.layers): each.nodes for each in decode.shares}
    assert {(each.operator, each.layers): each.nodes / 3 for each in prefill.shares} == counts
    assert said == ["skipped    prompts of 4,096 tokens: with 4 more they do not fit the model's 256"]


def test_the_command_prints_a_table_for_each_phase(folder: Path) -> None:
    done = run("bench", str(folder), "--profile", "--contexts", "20", "--new-tokens", "3")
    assert done.returncode == 0, done.stderr
    for told in ("prefill of 20 tokens: ", " ms a token; the memory gives ", "decode behind 20 tokens: ", "all others"):
        assert told in done.stdout


def test_a_profile_is_of_the_folder_alone(folder: Path) -> None:
    done = run("bench", str(folder), "--profile", "--against", str(TINY))
    assert (done.returncode, done.stdout) == (2, "")
    assert "leave out --against" in done.stderr
