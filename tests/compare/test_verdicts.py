"""What a comparison comes to, by hand: each kind of difference alone, in aspects, in one line, and under each policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from comparisons import cache, nothing

from surgery.compare.comparison import (
    ASPECTS,
    Aspect,
    Comparison,
    Costs,
    FewerTokens,
    FieldChange,
    FileChange,
    InterfaceChange,
    InterfaceValue,
    LayerCache,
    LayerChange,
    NodeChange,
    NodeGroup,
    Nodes,
    NumberGate,
    Numbers,
    Weight,
    WeightChange,
)
from surgery.compare.impact import impact_of

SAME = nothing()
LOGITS, INPUT = InterfaceValue("logits", "FLOAT [b, 1, 8]"), InterfaceValue("input_ids", "INT64 [b, s]")
WEIGHT = Weight("w", "FLOAT [4]", 16, "a.onnx_data", 0)


def layers(before: LayerCache | None, after: LayerCache | None) -> Comparison:
    """The first layer is these, the others are as they were."""
    return replace(SAME, layers=(LayerChange(0, before, after), *SAME.layers[1:]))


def node(verb: Any) -> Comparison:
    group = NodeGroup((), (), (NodeChange(verb, "Add", "a", "b", "model", "", None),))
    return replace(SAME, nodes=Nodes((group,), 3))


def weights(**fields: Any) -> Comparison:
    return replace(SAME, weights=replace(SAME.weights, **fields))


def weight(verb: Any) -> Comparison:
    return weights(changes=(WeightChange(verb, WEIGHT, WEIGHT),))


def file(name: str, kind: Any = "side") -> Comparison:
    return weights(files=(FileChange(name, 1, 2, False, kind),))


def interface(verb: Any, kind: Any, before: InterfaceValue | None, after: InterfaceValue | None) -> Comparison:
    return replace(SAME, interface=(InterfaceChange(verb, kind, before, after),))


def edited(**fields: Any) -> Comparison:
    return layers(cache(0), replace(cache(0), **fields))


MOVED = interface("moved", "input", INPUT, INPUT)
FIELD = FieldChange("changed", "search.top_k", "1", "2")
CASES: dict[str, tuple[Comparison, tuple[Aspect, ...], str, str]] = {
    "nothing": (SAME, (), "same", "interface: unchanged · nodes: unchanged · weights: 0 changed · numbers identical"),
    "an input more": (interface("added", "input", None, INPUT), ("interface",), "breaking", "interface: 1 added"),
    "an output more": (interface("added", "output", None, LOGITS), ("interface",), "compatible", "interface: 1 added"),
    "an input less": (interface("removed", "input", INPUT, None), ("interface",), "breaking", "1 removed"),
    "another type": (
        interface("changed", "output", LOGITS, replace(LOGITS, type="FLOAT16 [b, 1, 8]")),
        ("interface",), "breaking", "1 changed",
    ),
    "a dimension's name": (interface("renamed", "dimension", INPUT, LOGITS), ("interface",), "compatible", "1 renamed"),
    "an input of another graph": (MOVED, ("interface",), "compatible", "1 moved"),
    "a layer more": (layers(None, cache(0)), ("caches",), "breaking", "KV caches: 1 of 35 layers changed"),
    "a layer less": (layers(cache(0), None), ("caches",), "breaking", "KV caches: 1 of 35 layers changed"),
    "another operator": (edited(operator="Softmax"), ("caches",), "compatible", "KV caches: 1 of 35"),
    "a window": (edited(window=8), ("caches",), "compatible", "KV caches: 1 of 35"),
    "a window where none was": (layers(cache(4), replace(cache(4), window=8)), ("caches",), "compatible", "1 of 35"),
    "a window of no known attention": (edited(window=8, attention=None), (), "same", "nodes: unchanged"),
    "a head size": (edited(head_size=8), ("caches",), "breaking", "KV caches: 1 of 35"),
    "a head size that one side alone knows": (edited(head_size=None), (), "same", "interface: unchanged · nodes"),
    "KV heads": (edited(kv_heads=8), ("caches",), "breaking", "KV caches: 1 of 35"),
    "an owner": (edited(owner=8), ("caches",), "compatible", "KV caches: 1 of 35"),
    "a past": (edited(past="cache"), ("caches",), "breaking", "KV caches: 1 of 35"),
    "a present": (edited(present=None), ("caches",), "breaking", "KV caches: 1 of 35"),
    "an alias": (edited(alias="cache"), ("caches",), "compatible", "KV caches: 1 of 35"),
    "metadata": (replace(SAME, metadata=(FIELD,)), ("metadata",), "compatible", "metadata: 1 changed"),
    "caches in place": (
        replace(SAME, metadata=(replace(FIELD, key="gemma4_surgery.caches"),)), ("metadata",), "breaking", "metadata: 1 c",
    ),
    **{verb: (node(verb), ("nodes",), "numerics", f"nodes: 1 {verb}") for verb in ("added", "removed", "changed", "moved")},
    "a node's name": (node("renamed"), ("names",), "compatible", "nodes: 1 renamed"),
    "a weight": (weight("changed"), ("weights",), "numerics", "weights: 1 changed"),
    "a weight more": (weight("added"), ("weights",), "numerics", "weights: 0 changed, 1 added"),
    "a weight's name": (weight("renamed"), ("names",), "compatible", "weights: 0 changed, 1 renamed"),
    "weights that nobody compared": (weights(uncompared=2), ("weights",), "numerics", "2 not compared"),
    "weights in another place": (weights(relocated=2), (), "same", "weights: 0 changed, 2 in another place"),
    "fewer tokens": (
        weights(vocabulary=FewerTokens(1000, 16, ("w",), -5)), ("weights",), "numerics",
        "vocabulary: 1,000 -> 16, rows equal · weights: 0 changed",
    ),
    "a setting": (replace(SAME, config=(FIELD,)), ("config",), "numerics", "config: 1 changed"),
    "a tokenizer": (file("tokenizer.json"), ("files",), "numerics", "files: 1 differ"),
    "a page": (file("README.md"), ("files",), "compatible", "files: 1 differ"),
    "a data file": (file("a.onnx_data", "data"), (), "same", "weights: 0 changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_difference_alone(name: str) -> None:
    found, aspects, level, line = CASES[name]
    assert found.differing == aspects and found.same is (not aspects)
    assert [aspect for aspect in ASPECTS if found.fails((aspect,))] == list(aspects)
    impact = impact_of(found)
    assert (impact.level, bool(impact.why)) == (level, level in ("numerics", "breaking")) and line in found.verdict
    forbidden = {"same": (), "compatible": ("any",), "numerics": ("any", "numerics")}
    assert [policy for policy in ("any", "numerics", "breaking") if impact.fails(policy)] == list(  # type: ignore[arg-type]
        forbidden.get(level, ("any", "numerics", "breaking"))
    )
    ignored = replace(found, ignored=aspects)
    assert ignored.same and not ignored.fails(ASPECTS) and impact_of(ignored).level == "same"
    assert ignored.verdict == found.verdict, "what is ignored is shown"


@pytest.mark.parametrize(("found", "same"), [
    (SAME, True), (node("renamed"), True), (weight("renamed"), True), (edited(operator="Softmax"), True),
    (node("moved"), False), (weight("changed"), False), (weights(uncompared=1), False), (MOVED, False),
])  # fmt: skip
def test_equal_numbers_are_concluded_from_equal_graphs_and_weights(found: Comparison, same: bool) -> None:
    assert found.computes_the_same is same
    assert found.verdict.endswith("graphs and weights are the same" if same else "numbers not measured")


PROOF = Numbers("a proof", True, True, "all gates passed", (NumberGate("numbers", "logits", True, ""),))


@pytest.mark.parametrize(("proof", "level", "said", "line"), [
    (PROOF, "compatible", "all gates passed", "numbers identical"),
    (replace(PROOF, exact=False), "numerics", "all gates passed", "numbers within tolerance"),
    (replace(PROOF, passed=False, exact=False), "numerics", "the proof FAILS: all gates passed", "numbers FAIL"),
    (replace(PROOF, passed=False), "numerics", "the proof FAILS: all gates passed", "numbers FAIL"),
    (replace(PROOF, recorded=True), "compatible", "all gates passed", "numbers identical by the author's record"),
])  # fmt: skip
def test_a_proof_says_what_other_nodes_are_worth(proof: Numbers, level: str, said: str, line: str) -> None:
    found = replace(node("changed"), numbers=proof)
    impact = impact_of(found)
    assert (impact.level, impact.why) == (level, (said,)) and found.verdict.endswith(line)
    broken = replace(found, interface=interface("removed", "input", INPUT, None).interface)
    assert impact_of(broken).level == "breaking" and impact_of(broken).why == ("1 input removed", f"numbers: {said}")


@pytest.mark.parametrize(("old", "new", "why"), [
    ("0.9.0", "0.18.0", ("it needs onnxruntime-genai 0.18.0, not 0.9.0",)), ("0.18.0", "0.9.0", ()), ("0.18.0", "0.18.0", ()),
    (None, "0.18.0", ()),
])  # fmt: skip
def test_a_newer_runtime_breaks_and_versions_are_numbers(old: str | None, new: str, why: tuple[str, ...]) -> None:
    one, other = (replace(SAME.before, costs=Costs(1, None, None, version, None)) for version in (old, new))
    impact = impact_of(replace(edited(operator="Softmax"), before=one, after=other))
    assert (impact.level, impact.why) == ("breaking" if why else "compatible", why)


ONE_FOR_TWO = "one graph with the inputs and outputs of onnxruntime-genai where there were two of another interface"


@pytest.mark.parametrize(
    ("kind", "why"), [("folder", (ONE_FOR_TWO, "1 input removed")), ("pair", ("1 input removed",))]
)
def test_two_graphs_become_one_where_they_do(kind: Any, why: tuple[str, ...]) -> None:
    sides = {"before": replace(SAME.before, kind="pair"), "after": replace(SAME.after, kind=kind)}
    assert impact_of(replace(interface("removed", "input", INPUT, None), **sides)).why == why
