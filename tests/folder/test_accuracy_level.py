"""The accuracy level that `repack` chooses: for which products, and what the proof shows of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from exhaustive import in_full
from onnx import GraphProto, NodeProto
from onnx.helper import make_attribute, make_node
from onnx.numpy_helper import from_array
from signing import sign

import fixtures
import surgery
from passes import SetAccuracyLevel
from passes.presets import accuracy, fast
from passes.recipe import recipe_text
from passes.set_accuracy_level import kind_of, quantised_products
from surgery.choices import AccuracyChoice, Preset, Provider
from surgery.errors import GateFailed
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute
from surgery.jobs.listener import Listener
from surgery.runtime.sessions import Settings
from surgery.source.export import Export, open_export
from surgery.verify import Request, closing_proof, prove_folder
from surgery.verify.accuracy import LevelOfFolder, keeps_to
from surgery.verify.parity import parity
from surgery.verify.prompts import Case
from surgery.verify.report import Report
from surgery.verify.thresholds import default_thresholds

SENTENCE = "--accuracy-level keep turns it off"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    root = tmp_path_factory.mktemp("exports")
    fixtures.build("tiny-e2b-qat", "q2f16", root / "qat")
    for precision in ("q4", "quantized", "fp32"):
        fixtures.build("tiny-e2b", precision, root / "base")
    return {name: open_export(root / name) for name in ("qat", "base")}


class Log(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def said(self, text: str) -> None:
        self.lines.append(text)


def levels(path: Path) -> dict[int, set[int]]:
    """Bits -> the levels that products of as many bits have."""
    found: dict[int, set[int]] = {}
    for node in quantised_products(Model.open(path)):
        found.setdefault(int_attribute(node, "bits", 4), set()).add(int_attribute(node, "accuracy_level", 0))
    return found


@pytest.mark.parametrize(
    ("name", "precision", "choice", "preset", "provider", "step"),
    [
        ("base", "q4", "auto", "compatible", "cpu", None),
        ("base", "q4", "auto", "fast", "cpu", SetAccuracyLevel()),
        ("base", "q4", "auto", "fast", "cuda", None),
        ("base", "fp32", "auto", "fast", "cpu", None),
        ("base", "quantized", "auto", "compatible", "cpu", SetAccuracyLevel("4", "slow")),
        ("base", "quantized", "keep", "fast", "cpu", None),
        ("base", "quantized", "1", "fast", "cuda", SetAccuracyLevel("1")),
        ("qat", "q2f16", "auto", "compatible", "cpu", SetAccuracyLevel("4", "slow")),
        ("qat", "q2f16", "auto", "fast", "cpu", SetAccuracyLevel()),
    ],
)
def test_rule(
    name: str,
    precision: str,
    choice: AccuracyChoice,
    preset: Preset,
    provider: Provider,
    step: SetAccuracyLevel | None,
    exports: dict[str, Export],
) -> None:
    decoder = Model.open(exports[name].pair(precision).decoder)
    assert accuracy(decoder, choice, preset, provider) == (() if step is None else (step,))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--no-validate", {2: {4}, 4: {0}, 8: {4}}),
        ("--preset fast --no-validate", {2: {4}, 4: {4}, 8: {4}}),
        ("--accuracy-level keep --no-validate", {2: {0}, 4: {0}, 8: {0}}),
    ],
)
def test_products_of_2_and_8_bits_are_not_left_unusable(
    words: str, expected: dict[int, set[int]], exports: dict[str, Export], tmp_path: Path
) -> None:
    done = run("repack", str(exports["qat"].root), str(tmp_path / "out"), *words.split())
    assert done.returncode == 0, done.stderr
    assert levels(tmp_path / "out" / "model.onnx") == expected
    said = " ".join(done.stderr.split())
    assert (SENTENCE in said) is ("keep" not in words)


def test_four_bits_stay_the_source_bit_by_bit(exports: dict[str, Export], tmp_path: Path) -> None:
    done = run("repack", str(exports["base"].root), str(tmp_path / "out"), "--precision", "q4")
    assert done.returncode == 0, done.stderr
    assert SENTENCE not in done.stderr
    assert levels(tmp_path / "out" / "model.onnx") == {4: {0}}


def test_report_says_which_was_shown_how(exports: dict[str, Export], tmp_path: Path) -> None:
    """A slow source: the surgery is exact with the level on both sides, the level is measured on the source itself."""
    done = run("repack", str(exports["qat"].root), str(tmp_path / "out"), "--json")
    proof = json.loads(done.stdout)["proof"]
    assert proof["parity"]["max_abs"] == 0 < proof["level"]["max_abs"]
    details = [gate["detail"] for gate in proof["gates"] if gate["section"] == "accuracy"]
    assert details[0].startswith("set on both sides above; alone, on 6")
    assert "against the source as published" in details[0]
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["numbers"]["exact"] is False, "for who compares the folder with the export"
    assert "the accuracy level, apart from that: worst KL 0.0" in report["numbers"]["summary"]


def test_folder_without_the_level_of_its_recipe_fails(exports: dict[str, Export], tmp_path: Path) -> None:
    made = run("repack", str(exports["qat"].root), str(tmp_path / "out"), "--accuracy-level", "keep", "--no-validate")
    assert made.returncode == 0, made.stderr
    manifest = tmp_path / "out" / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace("annotate-head-sizes", "annotate-head-sizes,set-accuracy-level{products=slow}"))
    report = prove_folder(tmp_path / "out", exports["qat"].pair("q2f16"), request=Request(cases=[WORDS]))
    assert "logits" in {gate.name for gate in report.failed}


WORDS = Case("words", "", (tuple(range(5, 25)),))
Fault = Callable[[GraphProto, NodeProto, dict[str, int]], None]


def scaled(graph: GraphProto, node: NodeProto, sizes: dict[str, int]) -> None:
    """Scales a quarter too large: what the product gives is, too."""
    (made,) = node.output
    node.output[0] = f"{made}/before"
    graph.initializer.append(from_array(np.array(1.25, np.float16 if sizes["half"] else np.float32), f"{made}/factor"))
    place = list(graph.node).index(node) + 1
    graph.node.insert(place, make_node("Mul", [node.output[0], f"{made}/factor"], [made]))


def shifted(graph: GraphProto, node: NodeProto, sizes: dict[str, int]) -> None:
    """Zero points that are one more than the default."""
    bits, blocks = sizes["bits"], -(-sizes["K"] // sizes["block_size"])
    byte = sum((2 ** (bits - 1) + 1) << shift for shift in range(0, 8, bits))
    points = np.full(sizes["N"] * -(-blocks * bits // 8), byte, np.uint8)
    graph.initializer.append(from_array(points, f"{node.name}/points"))
    inputs = [*node.input[:3], f"{node.name}/points"]
    del node.input[:]
    node.input.extend(inputs)


@pytest.mark.parametrize(
    ("name", "precision", "product", "fault"),
    [
        ("qat", "q2f16", "layers.3/mlp/gate_up_proj", scaled),
        in_full("qat", "q2f16", "layers.9/mlp/down_proj", shifted),
        in_full("base", "quantized", "layers.3/mlp/gate_up_proj", scaled),
        ("base", "quantized", "layers.3/attn/o_proj", shifted),
    ],
)
def test_fault_of_one_layer_fails_in_the_sources_own_arithmetic(
    name: str, precision: str, product: str, fault: Fault, exports: dict[str, Export], tmp_path: Path
) -> None:
    """Where int8 on both sides would forgive it: what they round apart is larger."""
    export = exports[name]
    pair = export.pair(precision)
    recipe = (*fast(pair.embed), *accuracy(Model.open(pair.decoder), "auto", "fast", "cpu"))
    folder = tmp_path / "out"
    build_folder(export, pair, recipe, folder, recipe_text=recipe_text(recipe))
    request = Request(cases=[WORDS])
    assert [gate.name for gate in prove_folder(folder, pair, request=request).failed] == []
    model = Model.open(folder / "model.onnx")
    node = next(node for node in quantised_products(model) if product in node.name)
    fault(model.graph, node, {each.name: each.i for each in node.attribute} | {"half": precision == "q2f16"})
    (folder / "model.onnx").write_bytes(model.to_bytes())
    failed = {gate.name for gate in prove_folder(sign(folder), pair, request=request).failed}
    assert {"logits, as published", "divergence, as published"} <= failed


def test_slow_folder_is_proven_in_both_arithmetics(exports: dict[str, Export], tmp_path: Path) -> None:
    """What `keep` leaves slow is compared with the level on both sides, and as published on few prompts."""
    made = run("repack", str(exports["base"].root), str(tmp_path / "out"), "--precision", "quantized", "--accuracy-level",
               "keep", "--json")  # fmt: skip
    assert made.returncode == 0, made.stderr
    proof = json.loads(made.stdout)["proof"]
    gates = {gate["name"]: gate for gate in proof["gates"]}
    assert "2 prompts" in gates["products as published"]["detail"] and proof["level"] is None
    assert gates["logits"]["found"] == gates["logits, as published"]["found"] == 0
    model = Model.open(tmp_path / "out" / "model.onnx")
    shifted(model.graph, node := quantised_products(model)[9], {each.name: each.i for each in node.attribute})
    (tmp_path / "out" / "model.onnx").write_bytes(model.to_bytes())
    report = prove_folder(sign(tmp_path / "out"), exports["base"].pair("quantized"), request=Request(cases=[WORDS]))
    assert {"logits", "logits, as published"} <= {gate.name for gate in report.failed}


def test_level_that_ruins_a_product_fails_and_its_kind_is_found(exports: dict[str, Export], tmp_path: Path) -> None:
    """An activation that is far larger than its neighbours takes the steps of int8 from them; in float32 they add up."""
    pair = exports["base"].pair("quantized")
    source = Model.open(pair.decoder)
    node = next(node for node in quantised_products(source) if "layers.3/mlp/down_proj" in node.name)
    sizes = {each.name: each.i for each in node.attribute}
    spike = np.where(np.arange(sizes["K"]) % sizes["block_size"], 0, 1e4).astype(np.float32)
    (read, *weights), (made,) = node.input, node.output
    source.graph.initializer.append(from_array(spike, "spike"))
    node.input[0], node.output[0] = "with/spike", "product/with/spike"
    exact = make_node("MatMulNBits", ["spike", *weights], ["product/of/spike"], "spike/product", domain=node.domain)
    exact.attribute.extend([*node.attribute, make_attribute("accuracy_level", 1)])
    place = list(source.graph.node).index(node)
    source.graph.node.insert(place + 1, make_node("Sub", ["product/with/spike", "product/of/spike"], [made]))
    source.graph.node.insert(place, make_node("Add", [read, "spike"], ["with/spike"]))
    source.graph.node.insert(place, exact)
    spiked = pair.decoder.with_name("spiked.onnx")
    spiked.write_bytes(source.to_bytes())
    level = LevelOfFolder(SetAccuracyLevel("4", "slow"), replace(pair, decoder=spiked), Settings(threads=1))
    limits = default_thresholds("float32", [SetAccuracyLevel.numerics])
    sample = level.sample([WORDS])
    assert not keeps_to(parity(level.effect(sample)), limits)
    kinds = level.costly_kinds(sample, limits)
    assert kinds and "/model/layers.#/mlp/down_proj/MatMul_Quant" in kinds and len(kinds) < 4
    assert keeps_to(parity(level.effect(sample, SetAccuracyLevel("4", "slow", " ".join(kinds)))), limits)


@pytest.mark.exhaustive
def test_costliest_kinds_are_found_and_no_more(exports: dict[str, Export], tmp_path: Path) -> None:
    pair = exports["qat"].pair("q2f16")
    level = LevelOfFolder(SetAccuracyLevel(), pair, Settings(threads=1))
    sample = level.sample([Case("words", "", (tuple(range(5, 45)),))])
    whole = parity(level.effect(sample))
    limits = default_thresholds("float16", [SetAccuracyLevel.numerics])
    assert keeps_to(whole, limits)
    tight = replace(limits, kl=whole.kl * 0.8)
    kinds = level.costly_kinds(sample, tight)
    assert kinds and set(kinds) < {kind_of(node) for node in quantised_products(Model.open(pair.decoder))}
    assert keeps_to(parity(level.effect(sample, SetAccuracyLevel(but=" ".join(kinds)))), tight)
    assert level.costly_kinds(sample, replace(limits, kl=0.0)) == (), "nothing helps, and that is said"


def test_repack_keeps_costly_products_in_float32(
    exports: dict[str, Export], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first proof is made to name a kind; what the second one holds is not asked."""
    proof, kind = closing_proof.closing_proof, "/lm_head/MatMul_Quant"
    calls: list[str] = []
    reports: list[Report] = []

    def failing_once(*arguments: Any) -> Any:
        check = proof(*arguments)

        def checked(folder: Path) -> Any:
            calls.append(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["recipe"])
            if len(calls) == 1:
                reports.append(check(folder))
                raise GateFailed(["divergence at level 4"], replace(reports[0], costly=(kind,)))
            return reports[0]

        return checked

    monkeypatch.setattr(closing_proof, "closing_proof", failing_once)
    log = Log()
    surgery.repack(exports["qat"].root, tmp_path / "out", listener=log)
    assert [call.rpartition("set-accuracy-level")[2] for call in calls] == [
        "{products=slow}",
        f"{{products=slow,but={kind}}}",
    ]
    assert levels(tmp_path / "out" / "model.onnx") == {2: {0, 4}, 4: {0}, 8: {4}}
    assert any("keep float32" in line for line in log.lines)
