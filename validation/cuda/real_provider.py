"""What the real CUDA provider says about itself; runs inside the stubbed runtime of validation.cuda.stubs.

    python -m validation.cuda.real_provider kernels GRAPH...       its kernels, the operators' schemas, and which operands stay in host memory
    python -m validation.cuda.real_provider assign GRAPH...        the provider of every node, and the copies that were inserted; @FILE lists the graphs
    python -m validation.cuda.real_provider ran GRAPH...           the provider of every node, from the profile of a run

Prints JSON. Where a kernel's operands lie is not listed by the runtime, so it is measured: a graph of the one
node, whose inputs and outputs are also read by a node that only the CPU provider has, gets a copy exactly for those
operands that lie in device memory. The nodes are taken from the test models that the onnx package brings, and from
the given graphs for the operators that those do not have.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info

from surgery.cuda.layering import OPTION, SETTING
from surgery.errors import ModelError
from surgery.verify.execution_profile import profile_run

CUDA = "CUDAExecutionProvider"
NO_END = 2**31 - 1
"""The last version of a kernel that has none."""
READER = "ExpandDims"
"""com.microsoft: has a CPU kernel for every fixed-size type, and no CUDA kernel."""


def session(
    model: str | bytes, written: Path | None = None, *, optimized: bool = False, capture: bool = False
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.log_severity_level = 4
    options.add_session_config_entry(OPTION, SETTING)
    if written is not None:
        options.optimized_model_filepath = str(written)
    cuda = (CUDA, {"enable_cuda_graph": "1" if capture else "0"})
    return ort.InferenceSession(model, options, providers=[cuda, "CPUExecutionProvider"])


def kernels() -> list[list[Any]]:
    """[domain, operator, first version, last version or None, {constraint: types}] of each CUDA kernel."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

    rows = []
    for kernel in get_all_opkernel_def():
        if kernel.provider == CUDA:
            first, last = kernel.version_range
            types = {name: sorted(allowed) for name, allowed in kernel.type_constraints.items()}
            rows.append([kernel.domain, kernel.op_name, first, None if last == NO_END else last, types])
    return rows


def schemas() -> list[list[Any]]:
    """[domain, operator, since, types of the inputs, types of the outputs]; a type is concrete or a constraint's name."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    rows = []
    for schema in get_all_operator_schema():
        single = {
            constraint.type_param_str: next(iter(constraint.allowed_type_strs))
            for constraint in schema.type_constraints
            if len(constraint.allowed_type_strs) == 1
        }
        sides = [
            [single.get(formal.typeStr, formal.typeStr) for formal in side] for side in (schema.inputs, schema.outputs)
        ]
        rows.append([schema.domain, schema.name, schema.since_version, *sides])
    return rows


def host_operands(graphs: Iterable[str]) -> list[list[Any]]:
    """[domain, operator, version, inputs, outputs]: the operands of CUDA kernels that lie in host memory."""
    versions: dict[tuple[str, str], set[int]] = {}
    for domain, operator, first, _, _ in kernels():
        versions.setdefault((domain, operator), set()).add(first)
    seen: set[tuple[object, ...]] = set()
    found: dict[tuple[str, str, int], tuple[set[int], set[int]]] = {}
    for model in (*_test_models(), *_single_nodes(graphs)):
        node = model.graph.node[0]
        domain = "" if node.domain == "ai.onnx" else node.domain
        for version in sorted(versions.get((domain, node.op_type), ())):
            form = (domain, node.op_type, version, *map(bool, node.input), None, *map(bool, node.output))
            if form in seen or not (sides := _host_sides(model, domain, version)):
                continue
            seen.add(form)
            known = found.setdefault((domain, node.op_type, version), (set(), set()))
            for side, indices in zip(known, sides, strict=True):
                side |= indices
    return [[*key, *map(sorted, sides)] for key, sides in sorted(found.items())]


def _test_models() -> Iterator[ModelProto]:
    """The one-node models of the onnx package's own tests of operators."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(action="ignore"):  # of the arithmetic that makes the expected results
        cases = collect_testcases(None)
    yield from (case.model for case in cases if case.model is not None and len(case.model.graph.node) == 1)


def _single_nodes(graphs: Iterable[str]) -> Iterator[ModelProto]:
    """Every node of the given graphs as a model of its own, initializers turned into inputs."""
    for path in graphs:
        model = onnx.load(path, load_external_data=False)
        values = {value.name: value for value in _declared(model.graph)}
        for node in model.graph.node:
            names = [name for name in (*node.input, *node.output) if name]
            if all(name in values for name in names):
                inputs = [values[name] for name in dict.fromkeys(node.input) if name]
                outputs = [values[name] for name in node.output if name]
                yield make_model(
                    make_graph([node], "one", inputs, outputs), ir_version=10, opset_imports=model.opset_import
                )


def _declared(graph: GraphProto) -> Iterator[ValueInfoProto]:
    yield from (*graph.value_info, *graph.input, *graph.output)
    for tensor in graph.initializer:
        yield make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)


def _host_sides(model: ModelProto, domain: str, version: int) -> tuple[set[int], set[int]] | None:
    """The inputs and outputs of a model's one node that lie in host memory; None where CUDA does not take the node."""
    node = model.graph.node[0]
    probe = _with_readers(model, domain, version)
    if probe is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "placed.onnx"
        try:
            opened = session(probe.SerializeToString(), written)
        except Exception:  # an older version of the operator, to which the node's attributes or types do not belong
            return None
        if _assigned(opened).get("probed") != CUDA:
            return None
        placed = onnx.load(written).graph.node
    copied_in = {copy.input[0] for copy in placed if copy.op_type == "MemcpyFromHost"}
    copied_out = {copy.output[0] for copy in placed if copy.op_type == "MemcpyToHost"}
    given = {value.name for value in probe.graph.input}
    inputs = {index for index, name in enumerate(node.input) if name in given and name not in copied_in}
    return inputs, {index for index, name in enumerate(node.output) if name and name not in copied_out}


def _with_readers(model: ModelProto, domain: str, version: int) -> ModelProto | None:
    """The model with every input and output read by a CPU node too; None where one is not a fixed-size tensor."""
    readers, results = [], []
    for value in {value.name: value for value in (*model.graph.input, *model.graph.output)}.values():
        kind = value.type.tensor_type.elem_type
        if kind in (TensorProto.UNDEFINED, TensorProto.STRING):
            return None
        readers.append(make_node(READER, [value.name, "axis"], [f"{value.name}/read"], domain="com.microsoft"))
        results.append(make_tensor_value_info(f"{value.name}/read", kind, None))
    opsets = {entry.domain: entry.version for entry in model.opset_import} | {domain: version, "com.microsoft": 1}
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.opset_import[:]
    probe.opset_import.extend(make_opsetid(name, number) for name, number in opsets.items())
    probe.graph.node[0].name = "probed"
    probe.graph.node.extend(readers)
    probe.graph.output.extend(results)
    probe.graph.initializer.append(make_tensor("axis", TensorProto.INT32, [], [0]))
    return probe


def _assigned(opened: ort.InferenceSession) -> dict[str, str]:
    """Node -> provider. Nodes that an optimizer made have names of their own."""
    groups = opened.get_provider_graph_assignment_info()
    return {node.name: group.ep_name for group in groups for node in group.get_nodes()}


def assignments(path: str) -> dict[str, Any]:
    """The provider of every node of a graph, and the copies; as it stands, and after ONNX Runtime's optimizers.
    Whether the graph may be captured, optimized.

    Where no session can be created: the error.
    """
    try:
        return _assignments(path)
    except Exception as error:  # the runtime's exceptions share no base class of their own
        return {"graph": path, "error": str(error)}


def _assignments(path: str) -> dict[str, Any]:
    found: dict[str, Any] = {"graph": path}
    for key, optimized in (("plain", False), ("optimized", True)):
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "placed.onnx"
            nodes = _assigned(session(path, written, optimized=optimized))
            placed: Iterable[NodeProto] = onnx.load(written, load_external_data=False).graph.node
        copies = [[node.op_type, node.input[0], node.output[0]] for node in placed if node.op_type.startswith("Memcpy")]
        found[key] = {"nodes": nodes, "copies": sorted(copies)}
    found["capture"] = _takes_capture(path)
    return found


def _takes_capture(path: str) -> bool:
    """Whether the provider takes the graph with CUDA graph capture on; it says so before anything runs."""
    try:
        session(path, optimized=True, capture=True)
    except Exception as error:  # as in assignments
        if "cannot use the graph capture feature" in str(error):
            return False
        raise
    return True


def ran(path: str) -> dict[str, Any]:
    """Provider of each node and number of copies, from the profile of one run. No kernel does anything in it."""
    try:
        found = profile_run(Path(path), "cuda")
    except ModelError as error:
        return {"graph": path, "error": str(error)}
    return {"graph": path, "nodes": {each.node: each.provider for each in found.nodes}, "copies": len(found.copies)}


def main(arguments: list[str]) -> None:
    command, *graphs = arguments
    if graphs and graphs[0].startswith("@"):
        graphs = json.loads(Path(graphs[0][1:]).read_text())
    result: Mapping[str, Any] | list[Any]
    if command == "kernels":
        result = {
            "onnxruntime": ort.__version__,
            "kernels": kernels(),
            "schemas": schemas(),
            "host": host_operands(graphs),
        }
    else:
        result = [(ran if command == "ran" else assignments)(path) for path in graphs]
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
