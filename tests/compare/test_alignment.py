"""What a comparison finds: properties of known edits, on a decoder of the exporter's form and on small graphs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from limits import cpu_limit
from onnx import ModelProto, parser
from onnx.helper import make_attribute, make_node, make_tensor_value_info
from places import TINY

from surgery.compare import Comparison, Subject, compare
from surgery.compare.comparison import Edit, NodeChange
from surgery.compare.subjects import SubjectGraph, open_subject
from surgery.graph.model import Model
from surgery.graph.renaming import rename_in_every_scope
from surgery.graph.scopes import all_names, reads

ONNX = TINY / "onnx"

Change = Callable[[ModelProto], None]

BRANCHES = """
<ir_version: 10, opset_import: ["" : 21]>
branches (bool choice, float[n] x) => (float[n] y)
{
    doubled = Add(x, x)
    y = If (choice) <
        then_branch = yes () => (float[n] a) { half = Abs(doubled)  a = Neg(half) },
        else_branch = no () => (float[n] b) { b = Identity(doubled) }
    >
}
"""

FUNCTIONS = """
<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
calls (float[n] x) => (float[n] y) { y = own.twice(x) }
<domain: "own", opset_import: ["" : 21]>
twice (v) => (w) { t = Add(v, v)  w = Neg(t) }
"""


def decoder() -> ModelProto:
    return Model.open(ONNX / "decoder_model_merged_q4.onnx").proto


def parsed(text: str) -> ModelProto:
    model: ModelProto = parser.parse_model(text)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


def side(proto: ModelProto) -> Subject:
    path = ONNX / "decoder_model_merged_q4.onnx"
    files = {location: ONNX / location for location in ("decoder_model_merged_q4.onnx_data",)}
    return Subject("a", "file", (SubjectGraph("model", "a.onnx", Model(proto, path, files)),), ONNX)


def edited(proto: ModelProto, change: Change) -> ModelProto:
    twin = ModelProto()
    twin.CopyFrom(proto)
    change(twin)
    return twin


def difference(proto: ModelProto, change: Change) -> Comparison:
    return compare(side(proto), side(edited(proto, change)))


def nodes(found: Comparison) -> list[NodeChange]:
    return list(found.nodes)


def test_a_model_is_the_same_as_itself() -> None:
    found = compare(side(decoder()), side(decoder()))
    assert found.same and found.verdict.startswith("interface: unchanged")
    assert found.nodes.unchanged == len(decoder().graph.node) and found.weights.unchanged == 335


def test_renamed_values_are_renamed_and_nothing_else() -> None:
    proto = decoder()

    def rename_all(twin: ModelProto) -> None:
        names = sorted(all_names(twin.graph))
        rename_in_every_scope(twin.graph, {name: f"v{index}" for index, name in enumerate(names)})

    found = difference(proto, rename_all)
    assert {change.verb for change in nodes(found)} == {"renamed"}
    assert len(nodes(found)) == len(proto.graph.node)
    assert {change.verb for change in found.interface} == {"renamed"}
    assert len(found.interface) == len(proto.graph.input) + len(proto.graph.output)
    assert {change.verb for change in found.weights.changes} == {"renamed"}


@pytest.mark.parametrize("seed", range(4))
def test_an_inserted_node_is_one_added_node_and_one_rewired_input(seed: int) -> None:
    proto = decoder()
    at = random.Random(seed).randrange(40, len(proto.graph.node) - 10)
    target = proto.graph.node[at]
    old = target.input[0]

    def insert(twin: ModelProto) -> None:
        twin.graph.node.insert(at, make_node("Abs", [old], ["inserted"], name="inserted"))
        twin.graph.node[at + 1].input[0] = "inserted"

    found = difference(proto, insert)
    assert [(c.verb, c.name) for c in nodes(found)] == [("added", "inserted"), ("changed", target.name)]
    assert nodes(found)[1].edits == (Edit("input 0", old, "inserted"),)
    assert not {"interface", "metadata", "weights"} & set(found.differing)


def test_an_inserted_node_is_found_where_every_later_node_is_renumbered() -> None:
    """As exporters do that number their nodes: no name after the insertion means what it meant before."""
    proto = decoder()

    def number(twin: ModelProto) -> None:
        names = [name for node in twin.graph.node for name in node.output if name]
        kept = {value.name for value in twin.graph.output}
        renamed = {name: f"value_{index}" for index, name in enumerate(names) if name not in kept}
        rename_in_every_scope(twin.graph, renamed)
        for index, node in enumerate(twin.graph.node):
            node.name = f"node_{index}"

    def insert_and_number(twin: ModelProto) -> None:
        old = twin.graph.node[200].input[0]
        twin.graph.node.insert(200, make_node("Abs", [old], ["inserted"], name="inserted"))
        twin.graph.node[201].input[0] = "inserted"
        number(twin)

    before = edited(proto, number)
    found = compare(side(before), side(edited(proto, insert_and_number)))
    changed = [change for change in nodes(found) if change.verb != "renamed"]
    assert [change.verb for change in changed] == ["added", "changed"]
    assert changed[0].operator == "Abs" and changed[1].edits[0].what == "input 0"


@pytest.mark.parametrize("seed", range(3))
def test_another_order_of_independent_nodes_is_no_difference(seed: int) -> None:
    found = difference(decoder(), lambda twin: shuffle(twin, seed))
    assert found.same, found.verdict


def shuffle(proto: ModelProto, seed: int) -> None:
    """Another topological order of the nodes, and another order of the initializers."""
    rng = random.Random(seed)
    inner = {name for node in proto.graph.node for name in node.output}
    left, known, order = list(proto.graph.node), set(), []
    while left:
        ready = [node for node in left if all(name in known for name in reads(node) & inner)]
        node = rng.choice(ready)
        left = [other for other in left if other is not node]
        order.append(node)
        known.update(node.output)
    assert [node.name for node in order] != [node.name for node in proto.graph.node]
    held = [make_copy(node) for node in order]
    del proto.graph.node[:]
    proto.graph.node.extend(held)
    tensors = list(proto.graph.initializer)
    rng.shuffle(tensors)
    held_tensors = [make_copy(tensor) for tensor in tensors]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(held_tensors)


def make_copy(message):  # type: ignore[no-untyped-def]
    twin = type(message)()
    twin.CopyFrom(message)
    return twin


def test_a_changed_attribute_shows_old_and_new() -> None:
    def change(twin: ModelProto) -> None:
        node = next(node for node in twin.graph.node if node.op_type == "GroupQueryAttention")
        at = next(index for index, attribute in enumerate(node.attribute) if attribute.name == "scale")
        node.attribute[at].CopyFrom(make_attribute("scale", 0.5))

    (found,) = nodes(difference(decoder(), change))
    assert found.verb == "changed" and found.layer == 0
    assert found.edits == (Edit("attribute scale", "1", "0.5"),)


def test_a_removed_node_and_its_readers() -> None:
    def bypass(twin: ModelProto) -> None:
        at = next(i for i, node in enumerate(twin.graph.node) if node.name.endswith("layers.3/mlp/act_fn/FastGelu"))
        gone = make_copy(twin.graph.node[at])
        del twin.graph.node[at]
        for node in twin.graph.node:
            for index, name in enumerate(node.input):
                if name == gone.output[0]:
                    node.input[index] = gone.input[0]

    found = nodes(difference(decoder(), bypass))
    assert [(change.verb, change.layer) for change in found] == [("removed", 3), ("changed", 3)]


def test_a_change_inside_a_branch_is_seen() -> None:
    def change(twin: ModelProto) -> None:
        twin.graph.node[1].attribute[0].g.node[0].op_type = "Exp"

    found = nodes(difference(parsed(BRANCHES), change))
    assert {(c.verb, c.operator) for c in found if c.verb != "changed"} == {("removed", "Abs"), ("added", "Exp")}
    assert {change.scope for change in found} == {"If 'If_1' then_branch"}


def test_a_branch_that_reads_another_outer_value_is_rewired() -> None:
    def change(twin: ModelProto) -> None:
        twin.graph.node[1].attribute[1].g.node[0].input[0] = "x"

    (found,) = nodes(difference(parsed(BRANCHES), change))
    assert found.scope == "If 'If_1' else_branch" and found.edits == (Edit("input 0", "doubled", "x"),)


def test_renamed_values_in_a_branch_are_renamed_and_nothing_else() -> None:
    proto = parsed(BRANCHES)
    names = {name: f"new_{name}" for name in sorted(all_names(proto.graph))}
    found = difference(proto, lambda twin: rename_in_every_scope(twin.graph, names))
    assert {change.verb for change in nodes(found)} == {"renamed"} and len(nodes(found)) == 5


def test_a_change_inside_a_function_is_seen() -> None:
    def change(twin: ModelProto) -> None:
        twin.functions[0].node[1].op_type = "Abs"

    found = nodes(difference(parsed(FUNCTIONS), change))
    assert [(c.verb, c.operator) for c in found] == [("removed", "Neg"), ("added", "Abs")]
    assert {c.scope for c in found} == {"function own::twice"}


def test_a_renamed_dimension_is_one_line() -> None:
    def change(twin: ModelProto) -> None:
        for value in (*twin.graph.input, *twin.graph.output, *twin.graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == "batch_size":
                    dim.dim_param = "rows"

    found = difference(decoder(), change)
    assert [(c.kind, c.before.name, c.after.name) for c in found.interface if c.before and c.after] == [
        ("dimension", "batch_size", "rows")
    ]
    assert found.differing == ("interface",)


def test_a_dimension_renamed_in_one_place_is_a_changed_type() -> None:
    def change(twin: ModelProto) -> None:
        twin.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "rows"

    (found,) = difference(decoder(), change).interface
    assert found.verb == "changed" and found.before and found.after
    assert (found.before.type, found.after.type) == ("INT64 [batch_size, total_sequence_length]",
                                                     "INT64 [rows, total_sequence_length]")  # fmt: skip


def test_a_changed_weight_is_changed_and_its_readers_are_not() -> None:
    def change(twin: ModelProto) -> None:
        tensor = next(t for t in twin.graph.initializer if t.name == "model.per_layer_projection_norm.weight")
        tensor.raw_data = bytes(len(tensor.raw_data))

    found = difference(decoder(), change)
    assert [(c.verb, c.after.name) for c in found.weights.changes if c.after] == [
        ("changed", "model.per_layer_projection_norm.weight")
    ]
    assert found.differing == ("weights",)


MIRRORED = {"added": "removed", "removed": "added"}


@pytest.mark.parametrize(("before", "after"), [("decoder_model_merged_q4", "decoder_model_merged"),
                                               ("decoder_model_merged_fp16", "decoder_model_merged_q4f16")])  # fmt: skip
def test_the_other_direction_is_the_mirror_image(before: str, after: str) -> None:
    sides = [open_subject(ONNX / f"{name}.onnx") for name in (before, after)]
    there, back = compare(*sides), compare(*reversed(sides))
    turned = {(MIRRORED.get(c.verb, c.verb), c.after, c.before, turn(c.edits)) for c in nodes(there)}
    assert turned == {(c.verb, c.before, c.after, tuple(sorted(c.edits, key=str))) for c in nodes(back)}
    assert there.nodes.unchanged == back.nodes.unchanged
    assert there.differing == back.differing


def turn(edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
    return tuple(sorted((Edit(edit.what, edit.after, edit.before) for edit in edits), key=str))


def test_twenty_thousand_nodes_take_seconds() -> None:
    """Two hundred blocks of a hundred nodes, each value read twice; one block loses a node, all later names shift."""
    before, after = blocks(200, skip=None), blocks(200, skip=(90, 50))
    with cpu_limit(10):
        found = compare(side(before), side(after))
    assert [c.verb for c in nodes(found) if c.verb != "renamed"] == ["removed", "changed"]


def blocks(count: int, skip: tuple[int, int] | None) -> ModelProto:
    proto = ModelProto(ir_version=10)
    proto.graph.input.append(make_tensor_value_info("x", 1, ["n"]))
    last, kept = "x", "x"
    for block in range(count):
        for step in range(100):
            if (block, step) == skip:
                continue
            name = f"v{len(proto.graph.node)}"
            operands = [last, kept] if step % 3 == 0 else [last]
            kind = "Add" if step % 3 == 0 else "Neg" if step % 7 else "Abs"
            proto.graph.node.append(make_node(kind, operands, [name], name=name))
            last, kept = name, last
    proto.graph.output.append(make_tensor_value_info(last, 1, ["n"]))
    return proto
