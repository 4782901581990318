"""set-accuracy-level: the attribute and nothing else; int8 on the CPU, within what is stated, and back again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from exhaustive import in_full
from onnx.helper import make_attribute
from places import TINY
from signing import sign
from typer.testing import CliRunner

import fixtures
from passes import SetAccuracyLevel
from passes.base import EXACT, apply
from passes.presets import compatible
from passes.recipe import parse, recipe_text
from passes.set_accuracy_level import INT8, kind_of, quantised_products
from surgery.commands.app import app
from surgery.errors import PassError
from surgery.folder.building import build_folder
from surgery.graph.model import Model
from surgery.source.export import open_export
from surgery.verify import Request, prove_folder
from surgery.verify.prompts import Case
from surgery.verify.thresholds import default_thresholds, numerics_of


def decoder(precision: str = "q4") -> Model:
    return Model.open(open_export(TINY).pair(precision).decoder)


def levels(model: Model) -> set[int]:
    found = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    return {next((a.i for a in node.attribute if a.name == "accuracy_level"), 0) for node in found}


def test_every_quantised_product_gets_the_level_and_loses_it_again() -> None:
    source = decoder()
    model, (outcome,) = apply(source, [SetAccuracyLevel()])
    assert levels(model) == {4} and outcome.operators == {}
    assert [str(f) for f in outcome.findings] == ["changed 72 MatMulNBits: accuracy_level is 4, int8; 72 of 4 bits"]
    back, _ = apply(model, [SetAccuracyLevel("0")])
    assert back.to_bytes() == source.to_bytes()


def test_second_run_finds_nothing_to_do() -> None:
    _, (_, again) = apply(decoder(), [SetAccuracyLevel(), SetAccuracyLevel()])
    assert not again.changed and str(again.findings[0]) == "skipped MatMulNBits: each of 72 has level 4"


def test_another_level_takes_the_place_of_one() -> None:
    model, (_, outcome) = apply(decoder(), [SetAccuracyLevel(), SetAccuracyLevel("1")])
    assert levels(model) == {1} and "accuracy_level is 1, float32" in str(outcome.findings[0])


def test_slow_products_are_those_without_a_level_and_of_other_codes_than_4_bits() -> None:
    model = decoder().copy()
    first, second, third, *_ = quantised_products(model)
    for node, bits, level in ((first, 2, 0), (second, 2, 1), (third, 8, 0)):
        kept = [attribute for attribute in node.attribute if attribute.name not in ("bits", "accuracy_level")]
        del node.attribute[:]
        node.attribute.extend([*kept, make_attribute("bits", bits), make_attribute("accuracy_level", level)])
    assert [node.name for node in SetAccuracyLevel(products="slow").concerns(model)] == [first.name, third.name]
    assert [node.name for node in SetAccuracyLevel(products="slow", but=kind_of(first)).concerns(model)] == [third.name]


def test_kinds_that_are_named_stay_and_have_to_be_there() -> None:
    model, kind = decoder(), "/model/layers.#/attn/q_proj/MatMul_Quant"
    chosen = SetAccuracyLevel(but=kind).concerns(model)
    assert (
        len(quantised_products(model)) - len(chosen)
        == sum("q_proj" in node.name for node in quantised_products(model))
        > 0
    )
    sentence = f"no MatMulNBits is of the kind '{kind[:-1]}' (did you mean '{kind}'?)"
    with pytest.raises(PassError, match=re.escape(sentence)):
        SetAccuracyLevel(but=kind[:-1]).requires(model)


def test_plain_matrices_are_refused() -> None:
    sentence = r"decoder_model_merged.onnx has no MatMulNBits, .* to be 4; its matrix products are MatMul"
    with pytest.raises(PassError, match=sentence) as raised:
        apply(decoder("fp32"), [SetAccuracyLevel()])
    assert raised.value.hint == "take a quantised precision: q4, q4f16 or quantized"


@pytest.mark.parametrize("target", ["tiny-e2b:q4f16", in_full("tiny-e4b:q4")])
def test_int8_is_within_what_is_stated_and_not_equal(target: str, tmp_path: Path) -> None:
    """The report says by how much; the same folder fails where equality is asked for."""
    name, precision = target.split(":")
    fixtures.build(name, precision, tmp_path / "source")
    export = open_export(tmp_path / "source")
    pair = export.pair(precision)
    recipe = (*compatible(pair.embed), SetAccuracyLevel())
    build_folder(export, pair, recipe, tmp_path / "out", recipe_text=recipe_text(recipe), weights="link")
    report = prove_folder(tmp_path / "out", pair, request=Request(scope="light", tokens=8))
    assert [f"{gate.name}: {gate.found}" for gate in report.failed] == []
    assert report.parity is not None and report.parity.max_abs == 0  # what the other passes do
    assert report.level is not None and report.level.max_abs > 0.1
    strict = default_thresholds("float32").to_dict()
    strict.pop("headroom")
    few = [Case("words", "", (tuple(range(5, 25)),))]
    again = prove_folder(tmp_path / "out", pair, request=Request(cases=few, tokens=2, thresholds=strict))
    assert {"logits at level 4", "mean difference at level 4"} <= {gate.name for gate in again.failed}


def test_fault_is_outside_of_what_is_stated(tmp_path: Path) -> None:
    """Query weights of one layer that are all zero codes, in a folder whose recipe is lossy, are no rounding."""
    export = open_export(TINY)
    pair = export.pair("q4")
    recipe = (*compatible(pair.embed), SetAccuracyLevel())
    build_folder(export, pair, recipe, tmp_path / "out", recipe_text=recipe_text(recipe))
    model = Model.open(tmp_path / "out" / "model.onnx")
    node = next(node for node in model.graph.node if node.name == "/model/layers.3/attn/q_proj/MatMul_Quant")
    codes = next(ref for ref in model.weight_references() if ref.name == node.input[1])
    with codes.file.open("r+b") as file:
        file.seek(codes.offset)
        file.write(bytes(codes.length))
    report = prove_folder(sign(tmp_path / "out"), pair, request=Request(scope="light"))
    assert {"logits", "direction", "logits at level 4"} <= {gate.name for gate in report.failed}


def test_recipe_of_the_option_parses_back_and_is_known_as_lossy(tmp_path: Path) -> None:
    recipe = (*compatible(Path("e.onnx")), SetAccuracyLevel("1"))
    assert parse(recipe_text(recipe)) == recipe and recipe_text(recipe).endswith(",set-accuracy-level{level=1}")
    assert numerics_of(tmp_path) == []
    (tmp_path / "manifest.json").write_text('{"version": 1, "recipe": "rename-io,set-accuracy-level"}')
    assert numerics_of(tmp_path) == [EXACT, INT8]
    assert default_thresholds("float32", [EXACT, INT8]).to_dict() == {**INT8.bound, "headroom": 1.0}


def test_command_takes_the_level(tmp_path: Path) -> None:
    arguments = [
        "repack",
        str(TINY),
        str(tmp_path / "out"),
        "--accuracy-level",
        "4",
        "--precision",
        "q4",
        "-v",
        "--no-validate",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert levels(Model.open(tmp_path / "out" / "model.onnx")) == {4}
    assert "accuracy_level is 4, int8" in result.output
