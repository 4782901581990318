"""Hold the predicted placement against the real CUDA provider's, node by node, on a machine without a GPU.

    python -m validation.cuda.placement FOLDER

FOLDER is as in validation.cuda.kernels. The released provider is loaded over stub CUDA libraries and asked for the
placement of the tiny fixtures' graphs, of the graphs that repack makes of them, and of the tests of operators that the
onnx package brings. Writes docs/validation/cuda-placement.md; exit code 1 where a node of a fixture disagrees.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixtures.build import build
from passes import HostEmbeddings
from passes.presets import compatible, fast
from surgery.choices import KVLayout
from surgery.cuda.kernels import cuda_kernels
from surgery.cuda.prediction import Copy, Prediction, predict
from surgery.folder.building import plan
from surgery.graph.model import Model
from surgery.graph.scopes import graphs
from surgery.source.export import BEST, Export, GraphPair, open_export
from validation.cuda.stubs import ROOT, StubbedRuntime, prepare

EVIDENCE = ROOT / "docs" / "validation" / "cuda-placement.md"
FIXTURES = ("tiny-e2b", "tiny-e4b", "tiny-31b")
LAYOUTS: tuple[KVLayout, ...] = ("aliased", "unique")
PROVIDERS = {"CUDAExecutionProvider": "cuda", "CPUExecutionProvider": "cpu"}


@dataclass(frozen=True)
class Comparison:
    """One graph. `agree` counts nodes; `differ` holds (node, operator, real, predicted, reason) of the others."""

    name: str
    predicted: Prediction
    agree: int
    differ: tuple[tuple[str, str, str, str, str], ...]
    copies: int
    same_copies: bool
    kept: int
    kept_agree: int
    kept_copies: int
    captured: bool

    @property
    def equal(self) -> bool:
        same = not self.differ and self.same_copies and self.agree == len(self.predicted.assignments)
        return same and self.captured == self.predicted.can_be_captured


def compare(name: str, path: Path, real: dict[str, Any]) -> Comparison:
    """The prediction for a graph against what the provider did with it, as it stands and after the optimizers."""
    predicted = predict(Model.open(path))
    expected = {each.node: each for each in predicted.assignments}
    plain = {node: PROVIDERS.get(provider, provider) for node, provider in real["plain"]["nodes"].items()}
    differ = [
        (node, expected[node].operator, provider, expected[node].provider, expected[node].reason)
        for node, provider in plain.items()
        if node in expected and expected[node].provider != provider
    ]
    optimized = {n: PROVIDERS.get(p, p) for n, p in real["optimized"]["nodes"].items() if n in expected}
    return Comparison(
        name=name,
        predicted=predicted,
        agree=sum(expected[node].provider == provider for node, provider in plain.items() if node in expected),
        differ=tuple(differ),
        copies=len(real["plain"]["copies"]),
        same_copies={_copied(*copy) for copy in real["plain"]["copies"]} == set(predicted.copies),
        kept=len(optimized),
        kept_agree=sum(expected[node].provider == provider for node, provider in optimized.items()),
        kept_copies=len(real["optimized"]["copies"]),
        captured=real["capture"],
    )


@dataclass(frozen=True)
class Traced:
    """What the profiles of runs over the stubs say: nodes with a prediction, how many agree, and copies as predicted."""

    graphs: int
    nodes: int
    agree: int
    few_copies: int
    refused: tuple[str, ...]


def traced(runtime: StubbedRuntime, ours: list[Comparison], found: dict[str, Path]) -> Traced:
    """One run of each graph; over the stubs kernels do nothing, and what needs cuDNN cannot start."""
    answers = json.loads(runtime.run("validation.cuda.real_provider", "ran", f"@{_listed(runtime, found)}"))
    nodes = agree = few = 0
    refused = []
    for each, answer in zip(ours, answers, strict=True):
        if "error" in answer:
            refused.append(str(answer["error"]))
            continue
        known = {assignment.node: assignment.provider for assignment in each.predicted.assignments}
        both = [known[node] == provider for node, provider in answer["nodes"].items() if node in known]
        nodes, agree = nodes + len(both), agree + sum(both)
        few += answer["copies"] <= len(each.predicted.copies)
    return Traced(len(ours) - len(refused), nodes, agree, few, tuple(refused))


def _copied(operator: str, read: str, written: str) -> Copy:
    """A Memcpy node as a prediction has it: the name that the graph gave the value is on the host's side."""
    return Copy(read, "cuda") if operator == "MemcpyFromHost" else Copy(written, "cpu")


def write_graphs(folder: Path) -> dict[str, Path]:
    """Name -> graph: the pairs of each tiny fixture, and what repack makes of them in both cache layouts."""
    found: dict[str, Path] = {}
    for fixture in FIXTURES:
        build(fixture, "all", folder / fixture, force=True)
        export = open_export(folder / fixture)
        for precision, pair in export.pairs.items():
            found[f"{fixture} {precision} embed_tokens"] = pair.embed
            found[f"{fixture} {precision} decoder"] = pair.decoder
            for layout in LAYOUTS:
                target = folder / f"{fixture}-{precision}-{layout}" / "model.onnx"
                target.parent.mkdir(parents=True, exist_ok=True)
                plan(pair, export, compatible(pair.embed, layout))[0].save(target, force=True)
                found[f"{fixture} {precision} {layout}"] = target
            if precision in BEST["cuda"]:
                found |= _more_forms(folder, fixture, precision, pair, export)
    return found


def _more_forms(folder: Path, fixture: str, precision: str, pair: GraphPair, export: Export) -> dict[str, Path]:
    """What other options of repack make for CUDA: attention fused, and the token tables in host memory."""
    forms = {"fast": fast(pair.embed, "cuda"), "host": (*compatible(pair.embed, "unique"), HostEmbeddings())}
    found: dict[str, Path] = {}
    for form, recipe in forms.items():
        target = folder / f"{fixture}-{precision}-{form}" / "model.onnx"
        target.parent.mkdir(parents=True, exist_ok=True)
        plan(pair, export, recipe)[0].save(target, force=True)
        found[f"{fixture} {precision} {form}"] = target
    return found


def write_tests(folder: Path) -> dict[str, Path]:
    """Name -> graph: the onnx package's tests of operators, every node with a name of its own."""
    from onnx.backend.test.case.node import collect_testcases

    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # of the arithmetic that makes the expected results
        cases = collect_testcases(None)
    found: dict[str, Path] = {}
    for model, name in ((case.model, case.name) for case in cases):
        if model is not None:
            for number, node in enumerate(node for graph in graphs(model.graph) for node in graph.node):
                node.name = f"node{number}"
            found[name] = folder / f"{name}.onnx"
            found[name].write_bytes(model.SerializeToString())
    return found


def compared(runtime: StubbedRuntime, found: dict[str, Path]) -> Iterator[Comparison]:
    """Graphs for which the provider could not create a session are left out."""
    answers = json.loads(runtime.run("validation.cuda.real_provider", "assign", f"@{_listed(runtime, found)}"))
    for (name, path), real in zip(found.items(), answers, strict=True):
        if "error" not in real:
            yield compare(name, path, real)


def _listed(runtime: StubbedRuntime, found: dict[str, Path]) -> Path:
    """A file with the graphs' paths, which are too many for a command line."""
    listing = runtime.site.parent / "graphs.json"
    listing.write_text(json.dumps([str(path) for path in found.values()]))
    return listing


def evidence(
    runtime: StubbedRuntime, ours: list[Comparison], runs: Traced, tests: list[Comparison], written: int
) -> str:
    """The page that is committed."""
    rows = [
        f"| {each.name} | {len(each.predicted.assignments)} | {len(each.predicted.on('cuda'))} | "
        f"{len(each.predicted.on('cpu'))} | {len(each.predicted.faults)} | {each.agree} | {len(each.predicted.copies)} | "
        f"{each.copies} | {each.kept_agree} of {each.kept} | {each.kept_copies} | {'yes' if each.captured else 'no'} |"
        for each in ours
    ]
    nodes, agree = sum(len(each.predicted.assignments) for each in ours), sum(each.agree for each in ours)
    kept, kept_agree = sum(each.kept for each in ours), sum(each.kept_agree for each in ours)
    return PAGE.format(
        version=cuda_kernels().onnxruntime,
        wheel=runtime.wheel,
        sha256=runtime.sha256,
        graphs=len(ours),
        nodes=nodes,
        agree=agree,
        kept=kept,
        kept_agree=kept_agree,
        same_copies=sum(each.same_copies for each in ours),
        captures=sum(each.captured == each.predicted.can_be_captured for each in ours),
        rows="\n".join(rows),
        reasons="\n".join(_reasons(ours)),
        runs=runs,
        refused=len(runs.refused),
        tests=_tests(tests, written),
    )


def _reasons(ours: Iterable[Comparison]) -> Iterator[str]:
    seen: dict[tuple[str, str], list[str]] = {}
    for each in ours:
        for group in each.predicted.groups:
            seen.setdefault((group.operator, group.reason), []).append(f"{each.name} ({len(group.nodes)})")
    for (operator, reason), where in seen.items():
        shown = where if len(where) <= 3 else [*where[:2], f"{len(where) - 2} more graphs"]
        yield f"- {operator}: {reason}. In {'; '.join(shown)}."


def _tests(tests: list[Comparison], written: int) -> str:
    known = [each for test in tests for each in test.predicted.assignments]
    unknown = sum(each.provider == "unknown" for each in known)
    differ = [entry for test in tests for entry in test.differ if entry[3] != "unknown"]
    agree = sum(test.agree for test in tests)
    other = [test for test in tests if not test.same_copies]
    vague = sum(bool(test.predicted.on("unknown")) for test in other)
    lines = [
        f"{written} models, sessions for {len(tests)} of them, {agree + len(differ)} nodes with a prediction: "
        f"{agree} agree, {len(differ)} differ; {unknown} were reported as unknown.",
        f"Nodes said to have no place on CUDA that the provider took: {sum(e[2] == 'cuda' for e in differ)}; "
        f"nodes said to go to CUDA that it left on the CPU: {sum(e[2] == 'cpu' for e in differ)}.",
        f"Models with the predicted copies: {len(tests) - len(other)}; of the {len(other)} others {vague} hold a node that "
        "was reported as unknown, mostly an operator that ONNX defines by others, which ONNX Runtime puts in its place.",
        "The nodes that differ have an attribute that the provider's kernel does not implement (select_last_index of ArgMax "
        "and ArgMin, forms of GRU, LSTM and ConvTranspose); no kernel's registration tells that.",
        "",
        "| operator | real | predicted | nodes |",
        "|---|---|---|---|",
    ]
    counted = Counter((operator, real, predicted) for _, operator, real, predicted, _ in differ)
    lines += [f"| {op} | {real} | {predicted} | {count} |" for (op, real, predicted), count in counted.most_common()]
    return "\n".join(lines)


PAGE = """# Placement on CUDA: predicted against the real provider

Placement only: **nothing was executed on a GPU**, and no number here says anything about speed or results.
Made by `python -m validation.cuda.placement FOLDER`.

The CUDA provider of onnxruntime-gpu {version} was loaded on a machine without a GPU, over stub CUDA libraries
(validation/cuda/stubs.py). Its own code assigned the nodes and inserted the copies; the sessions were created, not run.
Wheel: `{wheel}`, sha256 `{sha256}`.

## The fixtures, and what repack makes of them

{graphs} graphs, {nodes} nodes, without graph optimizations: {agree} agree. The copies (Memcpy nodes) are the predicted ones,
value by value, in {same_copies} of {graphs} graphs. With all of ONNX Runtime's optimizers, {kept_agree} of the {kept} nodes that keep
their name are placed as predicted; the optimizers remove and fuse nodes before the provider is asked.
`faults` are the nodes for which `require_cuda` refuses the model. `capture`: whether the provider takes the graph with
`enable_cuda_graph`, which is as predicted for {captures} of {graphs} graphs; it refuses where a value is copied between the
memories. `fast` is what --preset fast makes, `host` what --embed-device cpu makes.

| graph | nodes | CUDA | CPU | faults | agree | copies | real | optimized: agree | real copies | capture |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

Not on CUDA, and why:

{reasons}

## The same, read from profiles

`validate --ep cuda` reads where nodes ran from the session's profile. To try that reader on what the CUDA provider
writes, each graph was run once over the stubs, where every kernel returns without computing: {runs.graphs} graphs ran
to their end, {runs.agree} of {runs.nodes} nodes with a prediction agree, and {runs.few_copies} graphs had no more copies than
predicted. {refused} graphs did not run: where float32 attention falls to the CPU, it refuses lengths that no kernel computed.

## Other operators: the tests of the onnx package

{tests}
"""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m validation.cuda.placement FOLDER")
    folder = Path(sys.argv[1])
    runtime = prepare(cuda_kernels().onnxruntime, folder)
    made = write_graphs(folder / "graphs")
    ours = list(compared(runtime, made))
    runs = traced(runtime, ours, made)
    found = write_tests(folder / "tests")
    tests = list(compared(runtime, found))
    EVIDENCE.write_text(evidence(runtime, ours, runs, tests, len(found)), encoding="utf-8")
    for each in ours:
        for entry in each.differ:
            print(f"{each.name}: {entry}")
    print(f"{EVIDENCE}: {sum(each.equal for each in ours)} of {len(ours)} graphs as predicted")
    sys.exit(0 if all(each.equal for each in ours) else 1)


if __name__ == "__main__":
    main()
