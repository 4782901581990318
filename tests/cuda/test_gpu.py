"""The repacked fixture on a CUDA device: the numbers of the CPU, every node where it was predicted, the real runtime.

Skipped, with the reason, where there is no device. GEMMA4_SURGERY_GPU_TESTS=cpu runs the same code on the CPU
provider instead, to see that the tests themselves work; it proves nothing about CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import TINY

from passes.presets import compatible, fast
from surgery.choices import Provider
from surgery.cuda.kernels import cuda_kernels
from surgery.cuda.prediction import predict
from surgery.errors import RuntimeMissing
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.runtime.genai import GenAI
from surgery.runtime.sessions import MergedModel, Settings, load_onnxruntime, machine_provider
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, GraphPair, open_export
from surgery.verify.agreement import agreement_of
from surgery.verify.execution_profile import profile_gates, profile_run
from surgery.verify.genai_proof import check_generation
from surgery.verify.prompts import Case
from surgery.verify.recording import Recording, record
from validation.cuda.fixed_buffers import FixedBuffers

pytestmark = pytest.mark.gpu

PRECISIONS = ("fp16", "q4f16")
FORMS = {
    "aliased": lambda embed: compatible(embed, "aliased"),
    "unique": lambda embed: compatible(embed, "unique"),
    "fast": lambda embed: fast(embed, "cuda"),
}
OWNERS = {**{layer: layer for layer in range(5)}, 5: 3, 6: 3, 7: 3, 8: 3, 9: 4}
EOS = (1, 50, 106)
TOLERANCE = 0.1
"""Largest difference of a logit or a cache value between the providers: six float16 steps at 30, where logits are
capped. A token may differ where the CPU prefers its own by no more than twice that."""
STEPS = 8
CASES = (
    Case("short", "a short prompt", ((2, 10, 77, 31),)),
    Case("long", "a prompt beyond the sliding window", (tuple(2 + 7 * n % 120 for n in range(48)),)),
    Case("batch", "two rows of equal length", ((2, 10, 77, 31), (2, 9, 33, 61))),
)


def absent() -> str | None:
    """Why nothing can run on CUDA here; None where it can."""
    try:
        if machine_provider() != "cuda":
            return "needs a CUDA device: there is no GPU, or the installed onnxruntime has no CUDA provider"
        runtime = load_onnxruntime("cuda")
        runtime.preload_dlls()
        TwoGraphModel.open(open_export(TINY).pair("fp16"), Settings("cuda"))
    except RuntimeMissing as error:
        return f"needs a CUDA device: {error}"
    return None


@pytest.fixture(scope="module")
def provider() -> Provider:
    if os.environ.get("GEMMA4_SURGERY_GPU_TESTS") == "cpu":
        return "cpu"
    if reason := absent():
        pytest.skip(reason)
    return "cuda"


@pytest.fixture(scope="module", params=[(p, form) for p in PRECISIONS for form in FORMS], ids="-".join)
def repacked(
    request: pytest.FixtureRequest, provider: Provider, export: Export, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GraphPair, Path]:
    """The source pair and the folder made of it for the provider."""
    precision, form = request.param
    pair = export.pair(precision)
    target = tmp_path_factory.mktemp("gpu") / "out"
    return pair, build_folder(export, pair, FORMS[form](pair.embed), target, provider=provider).folder


@pytest.fixture(scope="module")
def references(provider: Provider, export: Export) -> Iterator[dict[str, Recording]]:
    """Precision -> what the source pair answers on the CPU."""
    yield {p: record(TwoGraphModel.open(export.pair(p), Settings("cpu")), CASES, steps=STEPS) for p in PRECISIONS}


def test_logits_caches_and_tokens_are_those_of_the_cpu(
    provider: Provider, repacked: tuple[GraphPair, Path], references: dict[str, Recording]
) -> None:
    pair, folder = repacked
    reference = references[pair.precision]
    found = record(MergedModel(folder / "model.onnx", Settings(provider)), CASES, steps=STEPS, follow=reference)
    compared = agreement_of(reference, found, OWNERS, TOLERANCE)
    assert max(compared.max_abs, compared.regrouped_max_abs) <= TOLERANCE
    assert compared.cache_max_abs <= TOLERANCE
    for case in compared.cases:
        assert case.merged_not_finite == case.token_faults == 0, case.name
        assert not case.alias_faults, case.name
        assert case.cosine > 0.999, case.name


def test_every_node_runs_where_it_was_predicted(provider: Provider, repacked: tuple[GraphPair, Path]) -> None:
    path = repacked[1] / "model.onnx"
    expected, found = predict(Model.open(path)), profile_run(path, provider)
    known = {each.node: each.provider for each in expected.assignments}
    ran = {each.node: each.provider for each in found.nodes if each.node in known}
    assert len(ran) > len(known) / 2  # the optimizers fuse the others, and name what they make
    if provider == "cpu":
        assert set(ran.values()) == {"cpu"} and not found.copies
        return
    if load_onnxruntime("cuda").__version__ == cuda_kernels().onnxruntime:
        assert {node: where for node, where in ran.items() if where != known[node]} == {}
        assert len(found.copies) == len(expected.copies)
    gates = profile_gates(found, expected)
    assert [gate.detail for gate in gates if not gate.passed] == []


def test_genai_generates_what_the_source_does_on_the_cpu(
    provider: Provider, repacked: tuple[GraphPair, Path], references: dict[str, Recording]
) -> None:
    pair, folder = repacked
    gates = check_generation(GenAI(folder, provider), references[pair.precision].answers, EOS, TOLERANCE, TOLERANCE)
    assert gates and [gate.detail for gate in gates if not gate.passed] == []


@pytest.mark.parametrize("repacked", [(p, "fast") for p in PRECISIONS], ids="-".join, indirect=True)
def test_a_captured_graph_gives_the_same_tokens(provider: Provider, repacked: tuple[GraphPair, Path]) -> None:
    graph, rows = repacked[1] / "model.onnx", 80
    single = [case for case in CASES if len(case.rows) == 1]
    plain = record(FixedBuffers(graph, provider, rows), single, steps=STEPS)
    captured = record(FixedBuffers(graph, provider, rows, capture=True), single, steps=STEPS)
    for one, other in zip(plain.answers, captured.answers, strict=True):
        assert one.tokens().tolist() == other.tokens().tolist(), one.case.name


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_float32_attention_falls_to_the_cpu_as_predicted(provider: Provider, export: Export, precision: str) -> None:
    path = export.pair(precision).decoder
    expected = predict(Model.open(path))
    fallen = {each.node for each in profile_run(path, provider).fallen(expected)}
    faults = {each.node for each in expected.faults}
    assert faults <= fallen if provider == "cpu" else faults == fallen
