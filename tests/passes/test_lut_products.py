"""lut-products: products of 2 bits in float32 and nothing else, and the session option where they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from onnx import ModelProto, TensorProto
from onnx.helper import make_graph, make_model, make_node, make_operatorsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

import fixtures
from passes import LutProducts, SetAccuracyLevel
from passes.base import apply
from passes.set_accuracy_level import quantised_products
from surgery.folder.admission import admit
from surgery.folder.opened import open_genai_folder
from surgery.graph.look_up_tables import OPTION, SETTING, has_lut_products
from surgery.graph.model import Model
from surgery.graph.nodes import int_attribute
from surgery.graph.tensor_types import declared_types
from surgery.runtime.sessions import OpenGraph, Settings
from surgery.source.export import open_export
from surgery.verify.source_files import source_file_gates

DEPTH, WIDTH, BLOCK = 64, 96, 32


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lut") / "qat"
    fixtures.build("tiny-e2b-qat", "q2f16", root)
    return root


def codes() -> np.ndarray:
    """Of 2 bits, [WIDTH, DEPTH]."""
    return np.random.default_rng(3).integers(0, 4, (WIDTH, DEPTH)).astype(np.uint8)


def scales() -> np.ndarray:
    return (np.random.default_rng(4).random((WIDTH, DEPTH // BLOCK)) / 8).astype(np.float16)


def product(dtype: int = TensorProto.FLOAT16, level: int = 4, bits: int = 2, zeros: bool = False) -> Model:
    """One product of x [1,n,DEPTH], its value read twice."""
    each = 8 // bits
    packed = np.bitwise_or.reduce(codes().reshape(WIDTH, -1, each) << (bits * np.arange(each)).astype(np.uint8), axis=2)
    stored = [
        from_array(packed.reshape(WIDTH, DEPTH // BLOCK, -1).astype(np.uint8), "codes"),
        from_array(scales().astype(np.float16 if dtype == TensorProto.FLOAT16 else np.float32), "scales"),
        from_array(np.full((WIDTH, 1), 0b1010, np.uint8), "zeros"),
    ]
    names = ["x", "codes", "scales", *(["zeros"] if zeros else [])]
    node = make_node("MatMulNBits", names, ["y"], "product", domain="com.microsoft", K=DEPTH, N=WIDTH, bits=bits,
                     block_size=BLOCK, accuracy_level=level)  # fmt: skip
    graph = make_graph(
        [node],
        "g",
        [make_tensor_value_info("x", dtype, [1, "n", DEPTH])],
        [make_tensor_value_info("y", dtype, [1, "n", WIDTH])],
        stored[: 3 if zeros else 2],
    )
    opsets = [make_operatorsetid("", 21), make_operatorsetid("com.microsoft", 1)]
    proto: ModelProto = make_model(graph, ir_version=10, opset_imports=opsets)
    return Model.from_proto(proto)


def computed(model: Model, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.to_bytes(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0]).astype(np.float64)


def test_products_of_2_bits_and_no_others(export: Path) -> None:
    source = Model.open(open_export(export).pair("q2f16").decoder)
    model, (_, outcome) = apply(source, [SetAccuracyLevel(), LutProducts()])
    assert [str(f) for f in outcome.findings] == [
        "changed 11 MatMulNBits: 2 bits; they compute in float32, between casts"
    ]
    assert outcome.operators == {"Cast": 33}
    types = declared_types(model.graph)
    for node in quantised_products(model):
        in_float32 = types[node.input[0]].dtype == "FLOAT"
        assert in_float32 is (int_attribute(node, "bits", 4) == 2), node.name
    assert [t.SerializeToString() for t in model.graph.initializer] == [
        t.SerializeToString() for t in source.graph.initializer
    ]
    assert [*model.graph.input, *model.graph.output] == [*source.graph.input, *source.graph.output]


def test_second_run_finds_nothing_to_do() -> None:
    _, (_, again) = apply(product(), [LutProducts(), LutProducts()])
    assert (
        not again.changed and str(again.findings[0]) == "skipped MatMulNBits: none of 2 bits with level 4 is in float16"
    )


@pytest.mark.parametrize(
    "other",
    [
        product(bits=4),
        product(bits=8),
        product(level=0),
        product(level=1),
        product(zeros=True),
        product(TensorProto.FLOAT),
    ],
    ids=["4 bits", "8 bits", "no level", "float32 level", "zero points", "float32"],
)
def test_others_stay_as_they_are(other: Model) -> None:
    model, (outcome,) = apply(other, [LutProducts()])
    assert not outcome.changed and model.to_bytes() == other.to_bytes()


@pytest.mark.parametrize("tokens", [1, 5])
def test_numbers_are_the_products(tokens: int) -> None:
    """Without tables the same kernel's, rounded once; both within int8 of the weights written out."""
    x = np.random.default_rng(5).standard_normal((1, tokens, DEPTH)).astype(np.float16)
    weights = (codes().astype(np.float64) - 2) * np.repeat(scales().astype(np.float64), BLOCK, axis=1)
    truth = x.astype(np.float64) @ weights.T
    found = computed(apply(product(), [LutProducts()])[0], x)
    assert np.abs(found - truth).max() < 0.06 * truth.std()
    assert np.abs(found - computed(product(), x)).max() < 0.06 * truth.std()


def test_option_goes_with_products_that_use_it() -> None:
    made = apply(product(), [LutProducts()])[0]
    assert has_lut_products(made.graph) and has_lut_products(product(TensorProto.FLOAT).graph)
    for other in (product(), product(TensorProto.FLOAT, level=0), product(TensorProto.FLOAT, bits=4)):
        assert not has_lut_products(other.graph)


def test_sessions_of_such_a_graph_have_the_option(export: Path) -> None:
    source = Model.open(open_export(export).pair("q2f16").decoder)
    for recipe, expected in (
        ([SetAccuracyLevel()], False),
        ([SetAccuracyLevel(), LutProducts()], True),
        ([SetAccuracyLevel(), LutProducts(), SetAccuracyLevel("0")], False),
    ):
        graph = OpenGraph(apply(source, recipe)[0], Settings(threads=1))
        options = graph._session.get_session_options()
        try:
            found = options.get_session_config_entry(OPTION) == SETTING
        except RuntimeError:  # the runtime's word for one that is not set
            found = False
        assert found is expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--preset fast", True),
        ("--preset fast --accuracy-level 4", False),
        ("", False),
    ],
)
def test_folder_says_so(words: str, expected: bool, export: Path, tmp_path: Path) -> None:
    done = run("repack", str(export), str(tmp_path / "out"), "--no-validate", "--ep", "cpu", *words.split())
    assert done.returncode == 0, done.stderr
    config = admit(tmp_path / "out")
    assert (config["model"]["decoder"]["session_options"].get(OPTION) == SETTING) is expected
    said = " ".join(done.stderr.split())
    assert ("those of 2 bits by look-up tables (--accuracy-level 4: without them)" in said) is expected


def test_folder_whose_option_is_missing_fails(export: Path, tmp_path: Path) -> None:
    done = run("repack", str(export), str(tmp_path / "out"), "--preset", "fast", "--ep", "cpu", "--no-validate")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "genai_config.json"

    def failed() -> list[str]:
        gates = source_file_gates(open_genai_folder(tmp_path / "out"), open_export(export).pair("q2f16"), export, "cpu")
        return [gate.detail for gate in gates if not gate.passed]

    assert failed() == []
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["model"]["decoder"]["session_options"][OPTION]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert OPTION in failed()[0]
