"""The numbers after each pass of the fast preset that rewrites attention, within what another order is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto
from onnx.helper import make_model, make_node, make_operatorsetid
from onnx.numpy_helper import from_array
from small import applied, graph_of, refused, run

import fixtures
from passes import DropAttentionBias, FuseAttention, SliceCaches
from passes.base import REORDERED, Outcome, Pass, apply
from passes.presets import fast
from surgery.attention.kv_wiring import attention_nodes
from surgery.attention.sequence_lengths import SCOPE, padding_of
from surgery.attention.shared_buffer import has_shared_buffer
from surgery.graph.model import Model
from surgery.runtime.sessions import MergedModel, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import open_export
from surgery.verify.agreement import agreement_of, coarsest
from surgery.verify.gates import number_gates
from surgery.verify.prompts import Case, ModelTokens, of_ids
from surgery.verify.recording import Recording, record
from surgery.verify.thresholds import default_thresholds

# One fused attention by itself: 2 heads of 16 that the operator rotates, behind a bias that hides padding

HEAD = 16
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def rotating(**changed: str) -> ModelProto:
    """`changed` has another input for a node, by the node's output and the input's place: end_0="tokens"."""
    angles = np.arange(64)[:, None] / 10.0 ** np.arange(HEAD // 2)
    constants = {
        "zero": np.array(0), "one": np.array(1), "first": np.array([0]), "axis": np.array([1]), "two": np.array([2]),
        "axes": np.array([1, 2]), "lowest": np.float32(-1e9), "nought": np.float32(0),
        "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32),
    }  # fmt: skip
    fused = [
        "inputs_embeds", "key", "value", "past_key_values.0.key", "past_key_values.0.value", "last", "total", "cos", "sin", "", "bias",
        *(["sink"] if "sink" in changed else []),
    ]  # fmt: skip
    nodes = [
        make_node("Shape", ["attention_mask"], ["sizes"]),
        make_node("Gather", ["sizes", "one"], ["width"]),
        make_node("Sub", ["width", "one"], ["less"]),
        make_node("Cast", ["width"], ["total"], to=INT32),
        make_node("Shape", ["inputs_embeds"], ["query_sizes"]),
        make_node("Slice", ["query_sizes", "axis", "two"], ["tokens"]),
        make_node("Sub", ["width", "one"], ["end"]),
        make_node("Cast", ["end"], ["end32"], to=INT32),
        make_node("Slice", ["sizes", "first", "axis"], ["batch"]),
        make_node("Concat", ["batch", "axis"], ["shape"], axis=0),
        make_node("Expand", ["end32", "shape"], ["last"]),
        make_node("Unsqueeze", ["attention_mask", "axes"], ["mask4"]),
        make_node("Equal", ["mask4", "zero"], ["padded"]),
        make_node("Where", ["padded", "lowest", "nought"], ["row"]),
        make_node("Concat", ["axis", "axis", "tokens", "axis"], ["broadcast"], axis=0),
        make_node("Expand", ["row", "broadcast"], ["bias"]),
        make_node(
            "GroupQueryAttention", fused, ["logits", "present.0.key", "present.0.value"], "attention",
            domain="com.microsoft", num_heads=2, kv_num_heads=1, scale=1.0, do_rotary=1,
        ),
    ]  # fmt: skip
    for node in nodes:
        for place in range(len(node.input)):
            node.input[place] = changed.get(f"{node.output[0]}_{place}", node.input[place])
    caches = {"past_key_values": "past", "present": "all"}
    sides = [
        {f"{family}.0.{kind}": (FLOAT, ["b", 1, tokens, HEAD]) for kind in ("key", "value")}
        for family, tokens in caches.items()
    ]
    widths = {"inputs_embeds": 2 * HEAD, "key": HEAD, "value": HEAD}
    flat = {name: (FLOAT, ["b", "s", width]) for name, width in widths.items()}
    given = {"attention_mask": (INT64, ["b", "t"]), **flat, **sides[0]}
    graph = graph_of(*nodes, inputs=given, outputs={"logits": (FLOAT, ["b", "s", 2 * HEAD]), **sides[1]})
    graph.initializer.extend(from_array(array, name) for name, array in constants.items())
    graph.initializer.append(from_array(np.zeros(2, np.float32), "sink"))
    opsets = [make_operatorsetid("", 21), make_operatorsetid("com.microsoft", 1)]
    return make_model(graph, ir_version=10, opset_imports=opsets)


def test_a_node_that_rotates_keeps_its_tables_and_its_numbers(tmp_path: Path) -> None:
    before = rotating()
    model, outcome = applied(tmp_path, before, DropAttentionBias())
    assert outcome.changed
    (node,) = attention_nodes(model.graph)
    assert list(node.node.input[5:]) == [f"{SCOPE}/last", f"{SCOPE}/total", "cos", "sin"]
    numbers = np.random.default_rng(0)
    widths = {"inputs_embeds": 2 * HEAD, "key": HEAD, "value": HEAD}
    for past, new in ((0, 5), (5, 1), (4, 3)):
        given = {name: numbers.standard_normal((1, new, width)).astype(np.float32) for name, width in widths.items()}
        for kind in ("key", "value"):
            cache = numbers.standard_normal((1, 1, past, HEAD)).astype(np.float32)
            given[f"past_key_values.0.{kind}"] = cache
        given["attention_mask"] = np.ones((1, past + new), np.int64)
        one, other = run(before, given), run(model.proto, given)
        for name, array in one.items():
            np.testing.assert_allclose(other[name], array, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"end_0": "tokens"}, "are neither the mask's length nor its rows'"),
        ({"width_1": "zero"}, "are neither the mask's length nor its rows'"),
        ({"total_0": "less"}, "are neither the mask's length nor its rows'"),
        ({"row_1": "nought"}, "is no mask of padding alone"),
        ({"row_2": "lowest"}, "is no mask of padding alone"),
        ({"sink": "sink"}, "it has inputs behind the bias"),
    ],
)
def test_what_is_no_padding_alone_stays(changed: dict[str, str], reason: str, tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, rotating(**changed), DropAttentionBias())
    assert not outcome.changed and reason in "\n".join(map(str, outcome.findings))
    assert attention_nodes(model.graph)[0].node.input[10] == "bias"


def test_a_mask_of_another_rank_is_refused(tmp_path: Path) -> None:
    proto = rotating()
    proto.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 1
    refused(tmp_path, proto, DropAttentionBias(), r"attention_mask is INT64 \[b, t, 1\]; \[batch, tokens\] is expected")


# Each pass of the preset

MODELS = [("tiny-e2b", "fp32"), ("tiny-31b", "fp32"), ("tiny-e4b", "q4f16")]
NAMES = {"one-token", "chunks-of-7", "batch", "ragged-batch", "cached-past-the-window", "cached-padded-batch"}
CASES = [
    case
    for case in of_ids(ModelTokens(size=100, context=256, bos=2, pad=0, window=8))
    if isinstance(case, Case) and case.name in NAMES
]
STAGES: dict[type[Pass], list[type[Pass]]] = {
    FuseAttention: [DropAttentionBias, SliceCaches],
    DropAttentionBias: [SliceCaches],
    SliceCaches: [],
}
"""A pass -> those behind it, which are left out."""


@dataclass
class Subject:
    """A decoder of an export, the recipe that makes it fast, and what the export answers to the cases."""

    decoder: Model
    recipe: Sequence[Pass]
    source: Recording

    def made(self, without: Sequence[type[Pass]]) -> tuple[Model, list[Outcome]]:
        return apply(self.decoder, [step for step in self.recipe if not isinstance(step, tuple(without))])


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name, precision = request.param
    root = tmp_path_factory.mktemp("attention")
    fixtures.build(name, precision, root)
    export = open_export(root)
    pair = export.pair(precision)
    source = record(TwoGraphModel.open(pair, Settings()), CASES, steps=2, padding="none")
    return Subject(Model.open(pair.decoder, export.architecture), fast(pair.embed), source)


@pytest.mark.parametrize("last", STAGES)
def test_each_pass_leaves_the_source_s_numbers(last: type[Pass], subject: Subject) -> None:
    model, outcomes = subject.made(STAGES[last])
    assert last.name in {outcome.name for outcome in outcomes if outcome.changed}
    counted = last is not FuseAttention
    assert has_shared_buffer(model) is (last is SliceCaches)
    assert {core.node.op_type for core in attention_nodes(model.graph)} == {"GroupQueryAttention"}
    cases = [case for case in CASES if counted or not case.ragged]  # without counted lengths padding is in the way
    theirs = Recording(tuple(answer for answer in subject.source.answers if answer.case in cases))
    ours = record(MergedModel(model, Settings()), cases, steps=2, follow=theirs, padding=padding_of(model.graph))
    layers = model.require_architecture().layers
    limits = default_thresholds(coarsest(theirs, ours), [REORDERED])
    found = agreement_of(theirs, ours, {layer.index: layer.kv_source for layer in layers}, limits.logits)
    failed = [gate for gate in number_gates(found, limits) if not gate.passed]
    assert not failed, failed
