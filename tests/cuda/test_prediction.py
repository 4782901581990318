"""Where nodes go on CUDA: predictions, what refuses a model, and what a profile says; none of it needs a GPU.

docs/validation/cuda-placement.md holds what the real provider did with the same graphs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from folders import planned
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import (
    make_function,
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)
from onnx.numpy_helper import from_array
from places import ROOT, TINY

from passes import HostEmbeddings
from passes.presets import compatible, fast
from surgery.choices import KVLayout
from surgery.cuda.kernels import DATA, Kernel, cuda_kernels, read_table
from surgery.cuda.limits import LIMITS, broken_limit, release
from surgery.cuda.prediction import ALLOWED_ON_CPU, Copy, predict, require_cuda
from surgery.errors import LONGEST, ModelError, SurgeryError
from surgery.folder.building import plan
from surgery.graph.model import Model
from surgery.graph.tensor_types import TensorType
from surgery.source.export import BEST, open_export
from surgery.verify.execution_profile import ExecutionProfile, Ran, profile_gates, profile_run, read_profile

EVIDENCE = ROOT / "docs" / "validation" / "cuda-placement.md"
LAYOUTS: tuple[KVLayout, ...] = ("aliased", "unique")
HALF, FLOAT, INT64, INT32, BOOL = (
    TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL,
)  # fmt: skip


def graph(
    nodes: Sequence[NodeProto],
    inputs: dict[str, int],
    outputs: dict[str, int],
    *,
    constants: dict[str, Any] | None = None,
    shapes: dict[str, list[Any]] | None = None,
    opset: int = 21,
    **more: Any,
) -> Model:
    """A model in memory; values are of unknown rank where `shapes` does not say."""
    sides = [
        [make_tensor_value_info(name, kind, (shapes or {}).get(name)) for name, kind in side.items()]
        for side in (inputs, outputs)
    ]
    initializers = [from_array(np.array(value), name) for name, value in (constants or {}).items()]
    opsets = [make_opsetid("", opset), make_opsetid("com.microsoft", 1)]
    made = make_graph(list(nodes), "g", *sides, initializers)
    return Model(make_model(made, opset_imports=opsets, ir_version=10, **more), Path("test.onnx"))


def attention(kind: int = HALF, inputs: int = 9, outputs: int = 3, size: int = 64, sequence: Any = "s") -> Model:
    """One GroupQueryAttention over a cache of heads of `size`, with its first `inputs` inputs connected."""
    names = ["q", "k", "v", "pk", "pv", "lengths", "total", "cos", "sin", "positions", "bias", "", "", "", "qn", "kn"]
    kinds = dict.fromkeys(names[:inputs], kind) | {"lengths": INT32, "total": INT32}
    if inputs > 9:
        kinds["positions"] = INT64
    kinds.pop("", None)
    node = make_node(
        "GroupQueryAttention", names[:inputs], ["y", "nk", "nv"][:outputs], name="core", domain="com.microsoft",
        num_heads=2, kv_num_heads=1,
    )  # fmt: skip
    shapes = {"pk": ["b", 1, "p", size], "pv": ["b", 1, "p", size], "k": ["b", sequence, size]}
    return graph([node], kinds, dict.fromkeys(["y", "nk", "nv"][:outputs], kind), shapes=shapes)


def only(model: Model, **options: Any) -> Any:
    (assignment,) = predict(model, **options).assignments
    return assignment


# --- the table ---------------------------------------------------------------------------------------------------


def test_the_table_names_the_wheel_it_is_from_and_has_one_sorted_row_a_line() -> None:
    data = json.loads(DATA.read_text(encoding="utf-8"))
    assert data["wheel"].startswith(f"onnxruntime_gpu-{data['onnxruntime']}-")
    assert re.fullmatch(r"[0-9a-f]{64}", data["sha256"])
    assert [row[:3] for row in data["kernels"]] == sorted(row[:3] for row in data["kernels"])
    rows = sum(len(data[key]) for key in ("kernels", "host", "schemas"))
    assert DATA.read_text(encoding="utf-8").count("\n[") == rows
    assert DATA.stat().st_size < 100_000


def test_attention_has_kernels_for_half_precision_alone() -> None:
    kernels = cuda_kernels().kernels["com.microsoft", "GroupQueryAttention"]
    assert {kind for kernel in kernels for kind in kernel.types["T"]} == {"float16", "bfloat16"}
    assert cuda_kernels().host["com.microsoft", "GroupQueryAttention", 1] == (frozenset({6}), frozenset())


def test_the_precisions_offered_for_cuda_are_those_without_a_fault() -> None:
    export = open_export(TINY)
    sound = {p for p, pair in export.pairs.items() if not predict(Model.open(pair.decoder)).faults}
    assert sound == set(BEST["cuda"])


@pytest.mark.parametrize(
    ("first", "last", "covered"),
    [(13, None, {13}), (6, 12, set(range(6, 13))), (1, 1, {1})],
)
def test_a_kernel_without_an_end_implements_its_own_version_alone(
    first: int, last: int | None, covered: set[int]
) -> None:
    assert {since for since in range(1, 30) if Kernel(first, last, {}).covers(since)} == covered


# --- predictions for the fixtures --------------------------------------------------------------------------------


def merged(precision: str, layout: KVLayout) -> Model:
    return planned(TINY, precision, lambda embed: compatible(embed, layout))[0]


@pytest.mark.parametrize("precision", ["fp32", "q4", "quantized"])
def test_float32_attention_goes_to_the_cpu_and_is_refused(precision: str) -> None:
    model = merged(precision, "aliased")
    found = predict(model)
    reason = "GroupQueryAttention has CUDA kernels for float16 and bfloat16 only, T is float32"
    assert {(fault.operator, fault.why, fault.reason) for fault in found.faults} == {
        ("GroupQueryAttention", "type", reason)
    }
    cores = [node.name for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert [fault.node for fault in found.faults] == cores
    assert found.groups[0].nodes == tuple(cores)
    with pytest.raises(ModelError) as refused:
        require_cuda(model)
    assert f"{len(cores)} nodes would not run on CUDA, the first is GroupQueryAttention {cores[0]!r}: {reason}" in str(
        refused.value
    )
    assert refused.value.hint == "attention would run on the CPU: take fp16 or q4f16"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp16", "q4f16"])
def test_half_precision_leaves_nothing_but_shape_arithmetic_on_the_cpu(precision: str, layout: KVLayout) -> None:
    model = merged(precision, layout)
    require_cuda(model)
    found = predict(model)
    assert not found.faults and not found.on("unknown")
    assert {each.why for each in found.on("cpu")} == {"shape"} <= set(ALLOWED_ON_CPU)
    assert len(found.copies) == 4, "of the mask, and three of where padding lies"
    assert found.advice == "every node that computes has a CUDA kernel"


def test_the_committed_evidence_is_about_these_predictions() -> None:
    row = r"^\| tiny-e2b (\w+) (\w+) \| ([\d |]+?) \| \d+ of \d+ \| \d+ \| (\w+) \|$"
    rows = re.findall(row, EVIDENCE.read_text(encoding="utf-8"), re.M)
    export = open_export(TINY)
    assert len(rows) == len(export.pairs) * 4 + len(BEST["cuda"]) * 2
    for precision, graph_name, numbers, capture in rows:
        if graph_name in ("embed_tokens", "decoder"):
            pair = export.pair(precision)
            model = Model.open(pair.embed if graph_name == "embed_tokens" else pair.decoder)
        elif graph_name in ("fast", "host"):
            pair = export.pair(precision)
            host = (*compatible(pair.embed, "unique"), HostEmbeddings())
            model, _ = plan(pair, export, fast(pair.embed, "cuda") if graph_name == "fast" else host)
        elif precision in ("q4", "q4f16"):
            model = merged(precision, graph_name)
        else:
            continue
        found = predict(model)
        cuda, cpu = len(found.on("cuda")), len(found.on("cpu"))
        nodes, copies = len(found.assignments), len(found.copies)
        assert [int(n) for n in numbers.split("|")] == [nodes, cuda, cpu, len(found.faults), nodes, copies, copies]
        assert found.can_be_captured is (capture == "yes")


def test_the_prediction_is_plain_data() -> None:
    found = predict(merged("q4", "unique")).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["faults"] == 4 and found["runtime"] == cuda_kernels().onnxruntime
    assert found["on_cuda"] + found["on_cpu"] == 471
    assert found["not_on_cuda"][0]["operator"] == "GroupQueryAttention"


# --- why there is no kernel ----------------------------------------------------------------------------------------


def test_an_operator_without_any_kernel() -> None:
    found = only(graph([make_node("BitwiseNot", ["x"], ["y"], name="n")], {"x": INT64}, {"y": INT64}))
    assert (found.provider, found.why, found.is_fault) == ("cpu", "operator", True)
    assert found.reason == "the CUDA provider has no kernel for BitwiseNot"


def test_an_operator_of_a_version_without_a_kernel() -> None:
    table = read_table(
        {
            "onnxruntime": "0.1", "wheel": "", "sha256": "", "host": [],
            "kernels": [["", "Abs", 6, 12, {"T": "float"}]],
            "schemas": [["", "Abs", 6, "T", "T"], ["", "Abs", 13, "T", "T"]],
        }
    )  # fmt: skip
    node = make_node("Abs", ["x"], ["y"], name="n")
    new, old = (graph([node], {"x": FLOAT}, {"y": FLOAT}, opset=opset) for opset in (21, 9))
    assert only(new, table=table).reason == "Abs is of version 13; CUDA has kernels for 6 to 12"
    assert only(old, table=table).provider == "cuda"


def test_a_type_without_a_kernel_and_types_that_do_not_go_together() -> None:
    core = attention(FLOAT)
    assert "T is float32" in only(core).reason
    mixed = attention(HALF)
    for value in mixed.graph.input:
        if value.name in ("pk", "pv"):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for value in mixed.graph.output:
        if value.name in ("nk", "nv"):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    assert only(mixed).reason.startswith("GroupQueryAttention has no CUDA kernel for T float16 with T_CACHE bfloat16")


def test_types_that_nothing_declares_are_said_to_be_unknown() -> None:
    node = make_node("Relu", ["x"], ["y"], name="n")
    model = graph([node], {}, {})
    model.graph.output.add().name = "y"
    found = only(model)
    assert (found.provider, found.is_fault) == ("unknown", False)
    assert found.reason == "the types of this Relu are not declared: T"


def test_what_is_not_known_is_not_captured() -> None:
    model = graph([make_node("Relu", ["x"], ["y"], name="n")], {}, {})
    model.graph.output.add().name = "y"
    assert not predict(model).can_be_captured
    known = graph([make_node("Relu", ["x"], ["y"], name="n")], {"x": HALF}, {"y": HALF})
    assert predict(known).can_be_captured


def test_types_follow_from_schemas_where_they_are_not_declared() -> None:
    nodes = [
        make_node("Cast", ["x"], ["a"], name="cast", to=HALF),
        make_node("FastGelu", ["a"], ["b"], name="gelu", domain="com.microsoft"),
        make_node("Shape", ["b"], ["s"], name="shape"),
        make_node("BitwiseNot", ["s"], ["t"], name="not"),
        make_node("ConstantOfShape", ["t"], ["z"], name="zeros"),
        make_node("Sign", ["z"], ["y"], name="sign"),
    ]
    found = predict(graph(nodes, {"x": FLOAT}, {"y": FLOAT}))
    assert [each.provider for each in found.assignments] == ["cuda", "cuda", "cuda", "cpu", "cuda", "cuda"]
    assert not found.on("unknown")


def test_functions_are_not_placed_as_one() -> None:
    swish = graph([make_node("Swish", ["x"], ["y"], name="n")], {"x": FLOAT}, {"y": FLOAT}, opset=24)
    assert only(swish).reason.startswith("ONNX defines Swish by other operators")
    own = make_function("own", "Twice", ["a"], ["b"], [make_node("Add", ["a", "a"], ["b"])], [make_opsetid("", 21)])
    calls = graph([make_node("Twice", ["x"], ["y"], name="n", domain="own")], {"x": FLOAT}, {"y": FLOAT})
    calls.proto.functions.append(own)
    assert only(calls).reason.startswith("Twice is a function of the model")


# --- limits of a version ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "before", "since"),
    [
        (attention(size=512), "1.25.1", "1.26.0"),
        (attention(sequence=0), "1.26.0", "1.27.0"),
        (attention(inputs=16), "1.27.0", "1.29.0"),
        (attention(inputs=11), "1.28.0", "1.29.0"),
        (attention(outputs=1), "1.30.0", "1.31.0"),
    ],
    ids=["head size", "empty key", "norm weights", "bias", "no present"],
)
def test_a_limit_holds_up_to_the_version_that_lifts_it(model: Model, before: str, since: str) -> None:
    found = only(model, runtime=before)
    assert (found.provider, found.why, found.is_fault) == ("cuda", "limit", True)
    with pytest.raises(ModelError, match=r"from onnxruntime-gpu .* is used") as refused:
        require_cuda(model, before)
    assert refused.value.hint == "install the onnxruntime-gpu that the reason names"
    assert only(model, runtime=since).why == "kernel"
    require_cuda(model)


def test_a_plain_attention_has_no_limit_in_the_oldest_version_named() -> None:
    assert only(attention(), runtime="1.31.0").why == "kernel"
    assert {limit.operator for limit in LIMITS} == {
        "GroupQueryAttention",
        "Gather",
        "GatherBlockQuantized",
        "MatMulNBits",
    }


def test_the_largest_tables_and_odd_widths() -> None:
    gather = graph(
        [make_node("Gather", ["table", "ids"], ["y"], name="n")], {"table": HALF, "ids": INT64}, {"y": HALF},
        shapes={"table": [262144, 8960]},
    )  # fmt: skip
    assert "rows beyond element 2^31" in only(gather, runtime="1.26.0").reason
    assert only(gather).why == "kernel"
    node = make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], name="n", domain="com.microsoft", K=32, N=4, bits=3, block_size=32
    )
    narrow = graph([node], {"x": HALF, "w": TensorProto.UINT8, "s": HALF}, {"y": HALF})
    assert "in no version known" in only(narrow).reason
    with pytest.raises(ModelError):
        require_cuda(narrow)


def of(operator: str, *inputs: str, **attributes: int) -> NodeProto:
    return make_node(operator, inputs, ["y"], domain="com.microsoft", **attributes)


@pytest.mark.parametrize(
    ("node", "sizes", "said"),
    [
        (of("GroupQueryAttention", "q", "k", "v", "p"), {"p": (1, 1, 4, 256)}, "outputs without"),
        (of("GroupQueryAttention", "q", "k", "v", "p"), {"p": (1, 1, 4, 257)}, "a head size above 256"),
        (of("GroupQueryAttention", *"qkvpplt", "", "", "", "b"), {}, "an attention_bias"),
        (of("GroupQueryAttention", *"qkvpplt", "", "", "i"), {}, "outputs without"),
        (make_node("Gather", ["t", "i"], ["y"]), {"t": (2**16, 2**15)}, "rows beyond element 2^31"),
        (make_node("Gather", ["t", "i"], ["y"]), {"t": (2**16, 2**15 - 1)}, ""),
        (of("GatherBlockQuantized", "t", "i", "s", bits=4), {}, "codes without zero points"),
        (of("GatherBlockQuantized", "t", "i", "s", "z", bits=2), {}, "2 bits"),
        (of("GatherBlockQuantized", "t", "i", "s", "z", bits=4), {}, ""),
        (of("MatMulNBits", "x", "w", "s", bits=3), {}, "other widths"),
        (of("MatMulNBits", "x", "w", "s", bits=2), {}, ""),
    ],
)
def test_each_limit_is_told_at_its_edge(node: NodeProto, sizes: dict[str, tuple[int, ...]], said: str) -> None:
    """In the oldest version that is asked for: attention has its present outputs left out here."""
    found = broken_limit(node, {name: TensorType("FLOAT16", shape) for name, shape in sizes.items()}, "1.25.0")
    assert found is None if not said else found is not None and said in found.told("1.25.0")


def test_versions_compare_by_number() -> None:
    assert release("1.9.0") < release("1.10") < release("1.31.1rc1+cu13") == (1, 31, 1)
    assert release("nightly") == ()


# --- what ONNX Runtime leaves on the CPU, and the copies ---------------------------------------------------------------


def test_shape_arithmetic_stays_on_the_cpu_until_it_meets_data() -> None:
    nodes = [
        make_node("Shape", ["x"], ["s"], name="shape"),
        make_node("Gather", ["s", "one"], ["n"], name="pick"),
        make_node("Add", ["n", "one"], ["m"], name="add"),
        make_node("Unsqueeze", ["m", "axes"], ["u"], name="unsqueeze"),
        make_node("Expand", ["x", "u"], ["y"], name="expand"),
    ]
    constants = {"one": np.int64(1), "axes": np.array([0])}
    found = predict(graph(nodes, {"x": HALF}, {"y": HALF}, constants=constants))
    assert [each.provider for each in found.assignments] == ["cuda", "cpu", "cpu", "cpu", "cuda"]
    assert {each.why for each in found.on("cpu")} == {"shape"} and not found.faults
    assert found.copies == ()  # Shape leaves its result in host memory, and Expand takes the sizes from there


@pytest.mark.parametrize("constant", ["large", ""], ids=["large constant", "operand left out"])
def test_shape_arithmetic_with_a_large_constant_or_an_omitted_operand_goes_to_cuda(constant: str) -> None:
    nodes = [
        make_node("Shape", ["x"], ["s"], name="shape"),
        make_node("Add", ["s", "large"], ["y"], name="n") if constant else make_node("Clip", ["s", "", "one"], ["y"]),
    ]
    constants = {"large": np.zeros(101, np.int64), "one": np.int64(1)}
    found = predict(graph(nodes, {"x": HALF}, {"y": INT64}, constants=constants))
    assert found.assignments[1].provider == "cuda"
    assert found.copies == (Copy("s", "cuda"),)


def test_a_node_that_reads_halves_is_not_left_on_the_cpu() -> None:
    nodes = [
        make_node("Shape", ["x"], ["s"], name="shape"),
        make_node("Cast", ["s"], ["f"], name="cast", to=HALF),
        make_node("Mul", ["f", "small"], ["y"], name="mul"),
    ]
    for kind, place in ((np.float32, "cpu"), (np.float16, "cuda")):
        nodes[1].attribute[0].i = HALF if kind is np.float16 else FLOAT
        found = predict(graph(nodes, {"x": HALF}, {}, constants={"small": np.ones(2, kind)}))
        assert [each.provider for each in found.assignments] == ["cuda", "cpu", place]
        assert found.copies == (() if place == "cpu" else (Copy("f", "cuda"),))


def test_constant_nodes_are_constants_and_no_nodes_of_the_runtime() -> None:
    nodes = [
        make_node("Constant", [], ["one"], name="constant", value_int=1),
        make_node("Shape", ["x"], ["s"], name="shape"),
        make_node("Add", ["s", "one"], ["y"], name="add"),
    ]
    found = predict(graph(nodes, {"x": HALF}, {"y": INT64}))
    assert [(each.node, each.provider) for each in found.assignments] == [("shape", "cuda"), ("add", "cpu")]


def test_a_value_that_crosses_is_copied_once_in_each_direction() -> None:
    nodes = [
        make_node("Neg", ["x"], ["a"], name="cuda1"),
        make_node("BitwiseNot", ["a"], ["b"], name="cpu1"),
        make_node("BitwiseNot", ["a"], ["c"], name="cpu2"),
        make_node("BitwiseNot", ["x"], ["d"], name="cpu3"),
        make_node("MatMul", ["b", "w"], ["y"], name="cuda2"),
    ]
    weights = {"w": np.ones((200, 2), np.int64)}
    found = predict(graph(nodes, {"x": INT64}, {"y": INT64, "c": INT64, "d": INT64}, constants=weights))
    assert Counter(each.provider for each in found.assignments[:4]) == {"cuda": 1, "cpu": 3}
    assert Copy("x", "cuda") in found.copies and Copy("a", "cpu") in found.copies
    assert len(found.copies) == len(set(found.copies))


def test_bodies_of_control_flow_are_placed_too() -> None:
    body = make_graph(
        [make_node("BitwiseNot", ["x"], ["z"], name="inner")], "body", [], [make_tensor_value_info("z", INT64, None)]
    )
    node = make_node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=body)
    found = predict(graph([node], {"x": INT64, "c": BOOL}, {"y": INT64}))
    assert Counter(each.node for each in found.faults) == {"inner": 2}


def test_a_body_sees_the_types_around_it() -> None:
    body = make_graph([make_node("Relu", ["h"], ["z"], name="inner")], "body", [], [ValueInfoProto(name="z")])
    nodes = [make_node("Cast", ["x"], ["h"], name="cast", to=HALF),
             make_node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=body)]  # fmt: skip
    found = predict(graph(nodes, {"x": FLOAT, "c": BOOL}, {"y": HALF}))
    assert {each.provider for each in found.assignments if each.node == "inner"} == {"cuda"}


# --- hostile graphs ------------------------------------------------------------------------------------------------------


def test_graphs_that_no_runtime_takes_end_without_a_crash() -> None:
    cycle = [make_node("Neg", ["b"], ["a"], name="one"), make_node("Neg", ["a"], ["b"], name="two")]
    strange = [
        make_node("X\x1b[31m" * 5000, ["", "x"], ["", ""], name="n" * 5000),
        make_node("Cast", [], ["q"], to=999),
    ]
    for nodes in (cycle, strange, [make_node("Shape", [], [])], [make_node("Constant", [], ["k"])]):
        predict(graph(nodes, {"x": 999}, {}, opset=10**9))
        with pytest.raises(SurgeryError) if nodes is strange else nullcontext():
            require_cuda(graph(nodes, {"x": 999}, {}))
    assert predict(Model(ModelProto(), Path("empty"))).assignments == ()
    try:
        require_cuda(graph(strange, {"x": INT64}, {}))
    except SurgeryError as error:
        assert len(str(error)) <= LONGEST * 2 and "\x1b" not in str(error)


def test_nesting_is_no_recursion() -> None:
    inner = make_graph([make_node("Neg", ["x"], ["z"], name="leaf")], "b", [], [])
    for _ in range(25):  # protobuf reads no deeper nesting than about 30
        inner = make_graph([make_node("If", ["c"], ["z"], then_branch=inner)], "b", [], [])
    model = graph(inner.node, {"x": HALF, "c": BOOL}, {})
    assert predict(model).assignments[-1].node == "leaf"


def test_many_nodes_take_time_in_proportion() -> None:
    nodes = [make_node("Shape", ["x"], ["v0"])]
    nodes += [make_node("Add", [f"v{n}", f"v{n}"], [f"v{n + 1}"], name=f"n{n}") for n in range(5000)]
    assert len(predict(graph(nodes, {"x": HALF}, {"v5000": INT64})).on("cpu")) == 5000


# --- profiles ----------------------------------------------------------------------------------------------------------------


def event(node: str, operator: str, provider: str, kind: str = "float16", shape: Sequence[int] = (1, 4, 64)) -> Any:
    """An event as onnxruntime-gpu 1.31.1 writes it, without its counters."""
    operand = [{kind: list(shape)}]
    arguments = {
        "op_name": operator, "provider": f"{provider}ExecutionProvider", "input_type_shape": operand,
        "output_type_shape": operand, "node_index": "0",
    }  # fmt: skip
    name = f"{node}_kernel_time"
    return {"cat": "Node", "pid": 1, "tid": 1, "dur": 5, "ts": 1, "ph": "X", "name": name, "args": arguments}


CUDA_RUN = [
    {"cat": "Session", "name": "model_loading_uri", "args": {}},
    event("/embed/Gather", "Gather", "CUDA"),
    event("/mask/Shape", "Shape", "CUDA", "int64", (1, 4)),
    event("/mask/Sub", "Sub", "CPU", "int64", (1,)),
    event("Memcpy", "MemcpyFromHost", "CUDA", "int64", (1, 1)),
    event("/layers.0/core", "GroupQueryAttention", "CUDA"),
    event("/layers.0/core", "GroupQueryAttention", "CUDA"),
]


def profile(tmp_path: Path, events: Any) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events))
    return path


def test_a_profile_of_cuda_tells_nodes_and_copies(tmp_path: Path) -> None:
    found = read_profile(profile(tmp_path, CUDA_RUN))
    assert [ran.node for ran in found.on("cuda")] == ["/embed/Gather", "/mask/Shape", "/layers.0/core"]
    assert [ran.node for ran in found.on("cpu")] == ["/mask/Sub"] and found.fallen() == ()
    assert [(ran.operator, ran.times) for ran in found.copies] == [("MemcpyFromHost", 1)]
    assert found.nodes[-1].times == 2
    gates = profile_gates(found)
    assert all(gate.passed for gate in gates)
    assert gates[0].detail == "3 nodes on CUDA, 1 on the CPU"
    assert gates[1].detail == "1 a run; MemcpyFromHost of int64 [1, 1]"
    assert json.loads(json.dumps(found.to_dict()))["copies"] == 1


@pytest.mark.parametrize(
    ("fallen", "passes"),
    [
        (event("/layers.0/core", "GroupQueryAttention", "CPU", "float"), False),
        (event("/scale", "Mul", "CPU", "float", (1,)), False),
        (event("/mask/Cast", "Cast", "CPU", "int64", (1, 5000)), False),
        (event("/mask/Add", "Add", "CPU", "int64", (1,)), True),
    ],
    ids=["attention", "small but not an integer", "integers, but many", "shape arithmetic"],
)
def test_a_decoder_node_on_the_cpu_fails_the_gate(tmp_path: Path, fallen: Any, passes: bool) -> None:
    gate, _ = profile_gates(read_profile(profile(tmp_path, [CUDA_RUN[1], fallen])))
    assert gate.passed is passes
    if not passes:
        assert gate.found == 1 and "ran on the CPU" in gate.detail


def test_more_copies_than_predicted_fail_the_gate(tmp_path: Path) -> None:
    expected = predict(merged("q4f16", "aliased"))
    copies = [event(f"Memcpy{n}", "MemcpyToHost", "CUDA") for n in range(5)]
    _, gate = profile_gates(read_profile(profile(tmp_path, [*CUDA_RUN[:4], *copies])), expected)
    assert (gate.passed, gate.threshold, gate.found) == (False, 4, 5)


def test_nodes_that_are_meant_for_the_cpu_are_no_fault() -> None:
    expected = predict(merged("q4f16", "aliased"))
    name = expected.on("cpu")[0].node
    long = Ran(name, "Sub", "cpu", (("int64", (1, 5000)),))
    assert ExecutionProfile((long,)).fallen() == (long,) and ExecutionProfile((long,)).fallen(expected) == ()


@pytest.mark.parametrize(
    "events",
    [[], {}, [1, None, {}], [{"cat": "Node", "name": 3}], [{"cat": "Node", "name": "x_kernel_time", "args": []}]],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, events: Any) -> None:
    with pytest.raises(ModelError, match="holds no run of a node"):
        read_profile(profile(tmp_path, events))
    (tmp_path / "profile.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is not a profile"):
        read_profile(tmp_path / "profile.json")


def test_strange_operands_of_an_event_are_left_out(tmp_path: Path) -> None:
    odd = event("n", "Neg", "CUDA")
    odd["args"] |= {"input_type_shape": [3, {"int64": "x"}], "output_type_shape": None, "provider": "Other"}
    (ran,) = read_profile(profile(tmp_path, [odd])).nodes
    assert (ran.provider, ran.operands) == ("Other", ())


def test_a_real_run_on_the_cpu_is_told_as_such(tmp_path: Path) -> None:
    path = TINY / "onnx" / "decoder_model_merged_q4f16.onnx"
    found = profile_run(path, "cpu")
    assert found.on("cuda") == () and found.copies == () and len(found.on("cpu")) > 300
    expected = predict(Model.open(path))
    meant = {each.node for each in expected.on("cpu")}
    ran = {each.node: each for each in found.nodes}
    assert all(ran[name].is_small for name in meant & ran.keys())
    gate, _ = profile_gates(found, expected)
    assert not gate.passed and "GroupQueryAttention" in {each.operator for each in found.fallen(expected)}


def test_a_graph_that_cannot_be_traced_is_named(tmp_path: Path) -> None:
    text = graph([make_node("Identity", ["x"], ["y"], name="n")], {"x": TensorProto.STRING}, {"y": TensorProto.STRING})
    onnx.save(text.proto, tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="input x is tensor"):
        profile_run(tmp_path / "text.onnx", "cpu")
    (tmp_path / "broken.onnx").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot run"):
        profile_run(tmp_path / "broken.onnx", "cpu")
