"""Which cache each attention reads, from the graph's wiring alone."""

from __future__ import annotations

import pytest
from onnx import GraphProto, NodeProto
from onnx.helper import make_node
from small import FLOAT, INT32, decoder, graph_of

from surgery.attention.kv_wiring import KVCache, attentions
from surgery.graph.renaming import rename

CACHE = (FLOAT, ["batch", 1, "tokens", 8])
FLAT = (FLOAT, ["batch", "sequence", 8])


def gqa(layer: int, past: tuple[str, str], present: tuple[str, str], key: str = "k", value: str = "v") -> NodeProto:
    inputs = ["q", key, value, *past, "lengths", "total"]
    return make_node("GroupQueryAttention", inputs, [f"y{layer}", *present], f"gqa{layer}", domain="com.microsoft")


def fused(*nodes: NodeProto, kv_sources: int = 1) -> GraphProto:
    inputs = {name: FLAT for name in ("q", "k", "v")} | {name: (INT32, ["b"]) for name in ("lengths", "total")}
    pasts = {f"{kind}_in_{i}": CACHE for i in range(kv_sources) for kind in ("k", "v")}
    presents = {f"{kind}_out_{i}": CACHE for i in range(kv_sources) for kind in ("k", "v")}
    return graph_of(*nodes, inputs=inputs | pasts, outputs=presents)


def caches(graph: GraphProto) -> list[tuple[KVCache | None, KVCache | None]]:
    return [(core.key, core.value) for core in attentions(graph)]


OWN = (KVCache("k_in_0", "k_out_0"), KVCache("v_in_0", "v_out_0"))
OWNER = gqa(0, ("k_in_0", "v_in_0"), ("k_out_0", "v_out_0"))


def test_every_form_of_the_exporter_whatever_its_values_are_called() -> None:
    graph = decoder().graph
    expected = caches(graph)
    assert [key.past for key, _ in expected if key] == [f"past_key_values.{n}.key" for n in (0, 1, 0, 1)]
    assert [value.present for _, value in expected if value] == [f"present.{n}.value" for n in (0, 1, 0, 1)]
    names = {value.name: f"v{i}" for i, value in enumerate((*graph.input, *graph.output))}
    rename(graph, names)
    renamed = [tuple(KVCache(names[c.past or ""], names[c.present or ""]) for c in pair if c) for pair in expected]
    assert caches(graph) == renamed


def test_a_fused_owner() -> None:
    assert caches(fused(OWNER)) == [OWN]


def test_a_fused_borrower_whose_past_is_its_owners_present() -> None:
    assert caches(fused(OWNER, gqa(1, ("k_out_0", "v_out_0"), ("", ""), "", ""))) == [OWN, OWN]


def test_a_fused_borrower_whose_key_and_value_are_its_owners_present() -> None:
    move = [
        make_node("Transpose", ["k_out_0"], ["kt"]), make_node("Reshape", ["kt", "shape"], ["k1"]),
        make_node("Identity", ["v_out_0"], ["v1"]),
    ]  # fmt: skip
    assert caches(fused(OWNER, *move, gqa(1, ("", ""), ("", ""), "k1", "v1"))) == [OWN, OWN]


def test_an_owner_with_casts_around_its_cache() -> None:
    casts = [make_node("Cast", ["k_in_0"], ["kc"], to=1), make_node("Cast", ["v_in_0"], ["vc"], to=1)]
    assert caches(fused(*casts, gqa(0, ("kc", "vc"), ("k_out_0", "v_out_0")))) == [OWN]


@pytest.mark.parametrize(
    ("operator", "past", "inputs"), [("MultiHeadAttention", 6, 8), ("Attention", 4, 6)], ids=["MultiHead", "opset23"]
)
def test_other_fused_operators(operator: str, past: int, inputs: int) -> None:
    names = ["q", "k", "v", *[""] * (inputs - 3)]
    names[past : past + 2] = ["k_in_0", "v_in_0"]
    node = make_node(operator, names, ["y", "k_out_0", "v_out_0"], name="mha")
    assert caches(fused(node)) == [OWN]


def test_attention_without_a_cache_has_none() -> None:
    node = make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], name="mha")
    assert caches(fused(node, kv_sources=0)) == [(None, None)]


def test_a_softmax_that_is_no_attention_is_not_counted() -> None:
    nodes = [make_node("Softmax", ["q"], ["p"], name="router"), make_node("TopK", ["p", "n"], ["a", "b"])]
    assert attentions(fused(*nodes)) == []


def test_key_and_value_are_told_apart_by_their_place() -> None:
    swapped = gqa(0, ("v_in_0", "k_in_0"), ("v_out_0", "k_out_0"))
    assert caches(fused(swapped)) == [(OWN[1], OWN[0])]


def test_repeated_heads_and_masks_of_unrolled_attention() -> None:
    nodes = [
        make_node("Concat", ["k_in_0", "k"], ["k_out_0"], axis=2),
        make_node("Concat", ["v_in_0", "v"], ["v_out_0"], axis=2),
        make_node("Unsqueeze", ["k_out_0", "two"], ["ku"]), make_node("Expand", ["ku", "shape"], ["ke"]),
        make_node("Reshape", ["ke", "flat"], ["kr"]), make_node("Transpose", ["kr"], ["kt"]),
        make_node("MatMul", ["q", "kt"], ["s"]), make_node("Mul", ["s", "scale"], ["scaled"]),
        make_node("Where", ["total", "scaled", "lowest"], ["masked"]),
        make_node("Softmax", ["masked"], ["p"], name="soft"),
        make_node("Cast", ["p"], ["pc"], to=1), make_node("Expand", ["v_out_0", "shape"], ["ve"]),
        make_node("MatMul", ["pc", "ve"], ["y"]),
    ]  # fmt: skip
    (core,) = attentions(fused(*nodes))
    assert (core.operator, core.node, core.key, core.value) == ("Softmax", "soft", *OWN)


def test_a_cycle_in_a_broken_graph_ends() -> None:
    nodes = [make_node("Identity", ["b"], ["a"]), make_node("Identity", ["a"], ["b"]), gqa(0, ("a", "b"), ("", ""))]
    assert caches(fused(*nodes)) == [(None, None)]
