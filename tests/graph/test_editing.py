"""Edits through the view: what was edited changes, everything else stays identical."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from limits import cpu_limit
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper
from onnx.helper import make_node, make_tensor_value_info
from torture import CONDITION, FLOAT, TRAPS, X, body, external, if_node, model, relu, sparse, weight

from surgery.errors import ModelError
from surgery.graph.definitions import check_definitions
from surgery.graph.editing import edited


def chain() -> ModelProto:
    """x -> Relu -> a -> Add(w) -> b -> LeakyRelu -> y, with metadata, docs and value_info on everything."""
    proto = model(
        [
            relu("x", "a"),
            make_node("Add", ["a", "w"], ["b"], name="add"),
            make_node("LeakyRelu", ["b"], ["y"], "leaky", alpha=0.5),
        ],
        initializers=[weight("unused"), weight("w"), external("far", [1024])],
        value_info=[
            make_tensor_value_info(name, FLOAT, ["n"], doc_string=f"doc of {name}") for name in ("a", "b", "left_over")
        ],
    )
    for node in proto.graph.node:
        node.metadata_props.add(key="k", value=node.name)
    return proto


def named(graph: GraphProto, name: str) -> NodeProto:
    return next(node for node in graph.node if node.name == name)


def shown(view: gs.Graph, name: str) -> gs.Node:
    return next(node for node in view.nodes if node.name == name)


def names(values: Iterable[Any]) -> list[str]:
    return [value.name for value in values]


def test_a_node_is_added_at_its_position_and_the_rest_is_identical() -> None:
    proto, before = chain(), chain()
    with edited(proto.graph) as view:
        add = shown(view, "add")
        value = add.inputs[0]
        new = gs.Variable("a_neg", dtype=np.float32, shape=["n"])
        view.nodes.insert(1, gs.Node("Neg", "neg", inputs=[value], outputs=[new]))
        add.inputs[0] = new
    check_definitions(proto)
    assert names(proto.graph.node) == ["relu_a", "neg", "add", "leaky"]
    assert proto.graph.value_info[-1] == make_tensor_value_info("a_neg", FLOAT, ["n"])
    del proto.graph.node[1], proto.graph.value_info[-1]
    proto.graph.node[1].input[0] = "a"
    assert proto == before


def test_a_rewired_node_keeps_its_metadata_docs_and_attributes() -> None:
    proto = TRAPS["sparse_tensor_attribute"]()
    proto.graph.node[0].doc_string = "kept"
    before = proto.graph.node[0].SerializeToString()
    with edited(proto.graph) as view:
        new = gs.Variable("h", dtype=np.float32, shape=["n"])
        view.nodes[0].inputs[0] = new
        view.nodes.insert(0, gs.Node("Neg", "neg", inputs=[view.inputs[0]], outputs=[new]))
    node = proto.graph.node[1]
    assert list(node.input) == ["h"]
    node.input[0] = "x"
    assert node.SerializeToString() == before


def test_a_dropped_node_takes_its_value_info_and_initializer_along() -> None:
    proto = chain()
    with edited(proto.graph) as view:
        leaky = shown(view, "leaky")
        leaky.inputs[0] = shown(view, "relu_a").outputs[0]
        view.nodes.remove(shown(view, "add"))
    check_definitions(proto)
    assert names(proto.graph.node) == ["relu_a", "leaky"]
    assert names(proto.graph.initializer) == ["unused", "far"]
    assert names(proto.graph.value_info) == ["a", "left_over"]
    assert proto.graph.value_info[0].doc_string == "doc of a"


def test_pruning_takes_what_the_edit_left_unread_and_nothing_else() -> None:
    """`idle` was read by nobody before, and reads `of_idle`; the bodies of an If capture `captured` and `far_from`."""
    branches = [body([relu(name, f"{name}_value")], f"{name}_value", name) for name in ("captured", "far_from")]
    nodes = [
        relu("x", "of_idle"), relu("of_idle", "idle"), relu("x", "captured"), relu("x", "far_from"), relu("far_from", "lost"),
        if_node(*branches, output="chosen"), make_node("Add", ["lost", "chosen"], ["y"], name="add"),
    ]  # fmt: skip
    proto = model(nodes, inputs=[CONDITION, X])
    with edited(proto.graph, prune=True) as view:
        shown(view, "add").inputs[0] = next(value for value in view.inputs if value.name == "x")
    check_definitions(proto)
    assert names(proto.graph.node) == ["relu_of_idle", "relu_idle", "relu_captured", "relu_far_from", "if", "add"]


def test_an_initializer_goes_with_its_last_reader_only() -> None:
    nodes = [make_node("Add", ["x", "w"], ["a"], name="one"), make_node("Add", ["a", "w"], ["y"], name="two")]
    proto = model(nodes, initializers=[weight("w")])
    with edited(proto.graph) as view:
        shown(view, "two").inputs[0] = view.inputs[0]
        view.nodes.remove(shown(view, "one"))
    assert names(proto.graph.initializer) == ["w"]


def test_an_initializer_that_only_a_subgraph_reads_stays() -> None:
    branch = body([make_node("Add", ["x", "w"], ["r"])], "r", "then")
    other = body([relu("x", "e")], "e", "else")
    nodes = [make_node("Add", ["x", "w"], ["a"], name="direct"), if_node(branch, other)]
    proto = model(nodes, inputs=[CONDITION, X], initializers=[weight("w")])
    with edited(proto.graph) as view:
        view.nodes.remove(shown(view, "direct"))
    assert names(proto.graph.initializer) == ["w"]
    assert proto.graph.node[0] == nodes[1]


def test_an_initializer_that_overrides_as_an_input_stays() -> None:
    proto = TRAPS["initializer_overridable_as_an_input"]()
    with edited(proto.graph) as view:
        view.nodes[0].inputs[1] = view.inputs[0]
    assert names(proto.graph.initializer) == ["w"] and names(proto.graph.input) == ["x", "w"]


def test_sparse_initializers_and_annotations_go_with_their_last_reader() -> None:
    proto = model([make_node("Add", ["x", "s"], ["a"], name="add"), relu("x", "y")])
    proto.graph.sparse_initializer.extend([sparse("s"), sparse("unused")])
    proto.graph.quantization_annotation.add(tensor_name="a")
    proto.graph.quantization_annotation.add(tensor_name="x")
    with edited(proto.graph) as view:
        view.nodes.remove(shown(view, "add"))
    assert [entry.values.name for entry in proto.graph.sparse_initializer] == ["unused"]
    assert [entry.tensor_name for entry in proto.graph.quantization_annotation] == ["x"]


def test_a_new_constant_becomes_an_inline_initializer_once() -> None:
    proto = chain()
    with edited(proto.graph) as view:
        constant = gs.Constant("two", np.array([2], dtype=np.int64))
        for name in ("relu_a", "leaky"):
            shown(view, name).inputs.append(constant)
    assert names(proto.graph.initializer) == ["unused", "w", "far", "two"]
    assert numpy_helper.to_array(proto.graph.initializer[-1]).tolist() == [2]


def test_a_new_constant_cannot_take_a_name_that_is_in_use() -> None:
    for taken in ("w", "unused", "a", "x"):
        proto = chain()
        with pytest.raises(ModelError, match=f"a new constant is named '{taken}'"), edited(proto.graph) as view:
            view.nodes[0].inputs.append(gs.Constant(taken, np.zeros(4, np.float32)))
        assert proto == chain()
    with pytest.raises(ModelError, match="two new constants are named 'c'"), edited(chain().graph) as view:
        view.nodes[0].inputs += [gs.Constant("c", np.zeros(1)), gs.Constant("c", np.ones(1))]


def test_other_values_of_a_constant_are_written_and_read_ones_are_not() -> None:
    proto, before = chain(), chain()
    with edited(proto.graph) as view:
        assert shown(view, "add").inputs[1].values.tolist() == [0, 1, 2, 3]
    assert proto == before
    with edited(proto.graph) as view:
        shown(view, "add").inputs[1].values = np.ones(3, np.float32)
    assert names(proto.graph.initializer) == ["unused", "w", "far"]
    assert numpy_helper.to_array(proto.graph.initializer[1]).tolist() == [1, 1, 1]


def test_attributes_are_changed_added_and_removed_in_place() -> None:
    proto = TRAPS["attribute_doc_string"]()
    with edited(proto.graph) as view:
        attributes = view.nodes[0].attrs
        attributes["before"] = 2
        del attributes["after"]
        attributes["new"] = [1, 2]
    kept = {attribute.name: attribute for attribute in proto.graph.node[0].attribute}
    assert list(kept) == ["before", "alpha", "new"]
    assert kept["before"].i == 2 and list(kept["new"].ints) == [1, 2] and kept["alpha"].doc_string == "why alpha"


def test_a_list_attribute_that_is_changed_in_place_is_written() -> None:
    proto = model([make_node("Custom", ["x"], ["y"], axes=[1, 2])])
    with edited(proto.graph) as view:
        view.nodes[0].attrs["axes"].append(3)
    assert list(proto.graph.node[0].attribute[0].ints) == [1, 2, 3]


def test_a_float_attribute_that_is_set_to_a_whole_number_stays_a_float() -> None:
    proto = chain()
    with edited(proto.graph) as view:
        shown(view, "leaky").attrs["alpha"] = 1
    attribute = named(proto.graph, "leaky").attribute[0]
    assert (attribute.type, attribute.f) == (1, 1.0)


def test_operator_name_and_domain_are_written() -> None:
    proto = chain()
    with edited(proto.graph) as view:
        node = shown(view, "leaky")
        node.op, node.name, node.domain = "FastGelu", "gelu", "com.microsoft"
        node.attrs.clear()
    node = proto.graph.node[2]
    assert (node.op_type, node.name, node.domain, len(node.attribute)) == ("FastGelu", "gelu", "com.microsoft", 0)
    assert node.metadata_props[0].value == "leaky"


def test_interface_entries_come_and_go() -> None:
    proto = chain()
    with edited(proto.graph) as view:
        view.inputs.append(gs.Variable("new_in", dtype=np.int64, shape=["batch", 2]))
        extra = gs.Variable("new_out", dtype=np.float32, shape=["n"])
        view.nodes.append(gs.Node("Identity", "alias", inputs=[view.outputs[0]], outputs=[extra]))
        view.outputs = [extra]
    check_definitions(proto)
    assert names(proto.graph.input) == ["x", "new_in"] and names(proto.graph.output) == ["new_out"]
    assert proto.graph.value_info[-1] == chain().graph.output[0], "an output that turns inner stays declared"


def test_a_new_output_without_a_type_is_refused_and_changes_nothing() -> None:
    proto = chain()
    with pytest.raises(ModelError, match="'untyped' has no dtype"), edited(proto.graph) as view:
        view.nodes.clear()
        view.outputs.append(gs.Variable("untyped"))
    assert proto == chain()


def test_a_value_is_not_renamed_in_the_view() -> None:
    proto = chain()
    sentence = r"value 'a' cannot be renamed to 'z' in the view; surgery\.graph\.renaming\.rename can"
    with pytest.raises(ModelError, match=sentence), edited(proto.graph) as view:
        view.nodes[0].outputs[0].name = "z"
    assert proto == chain()


def test_an_exception_inside_the_view_leaves_the_graph_as_it_was() -> None:
    proto = chain()
    with pytest.raises(RuntimeError, match="mine"), edited(proto.graph) as view:
        view.nodes.clear()
        view.inputs.clear()
        raise RuntimeError("mine")
    assert proto == chain()


def test_optional_inputs_and_outputs_keep_their_positions() -> None:
    proto = TRAPS["grouped_query_attention_with_gaps"]()
    with edited(proto.graph) as view:
        node = view.nodes[0]
        node.inputs[10] = gs.Variable.empty()
        node.outputs[1] = gs.Variable.empty()
    node = proto.graph.node[0]
    assert list(node.input) == ["q", "k", "v", "past_key", "past_value", "seqlens", "total", "", "", "", ""]
    assert list(node.output) == ["y", "", ""]


def test_two_runs_of_one_edit_write_the_same_bytes() -> None:
    def edit() -> bytes:
        proto = chain()
        with edited(proto.graph) as view:
            view.nodes[0].attrs.update({name: 1 for name in "qwertyuiop"})
        return proto.SerializeToString(deterministic=True)

    assert edit() == edit()
    proto = chain()
    with edited(proto.graph) as view:
        view.nodes[0].attrs.update({name: 1 for name in "qwertyuiop"})
    assert "".join(attribute.name for attribute in proto.graph.node[0].attribute) == "qwertyuiop"


def test_a_reference_to_a_far_weight_is_kept_when_its_reader_is_rewired() -> None:
    proto = model([make_node("Add", ["x", "far"], ["y"])], initializers=[external("far", [2**40])])
    with edited(proto.graph) as view:
        assert list(view.nodes[0].inputs[1].shape) == [2**40]
        view.nodes[0].op = "Mul"
    assert proto.graph.initializer[0] == external("far", [2**40]) and proto.graph.node[0].op_type == "Mul"


@pytest.mark.parametrize("name", ["chain_of_ten_thousand_nodes", "four_thousand_consumers_of_one_value"])
def test_big_graphs_are_edited_in_linear_time(name: str) -> None:
    proto = TRAPS[name]()
    with cpu_limit(8), edited(proto.graph) as view:
        source, new = view.inputs[0], gs.Variable("source", dtype=np.float32, shape=["n"])
        for reader in list(source.outputs):
            reader.inputs[0] = new
        view.nodes.insert(0, gs.Node("Identity", "identity", inputs=[source], outputs=[new]))
    check_definitions(proto)
    assert len(proto.graph.node) in (10_001, 4_002)


def test_a_chain_of_twenty_thousand_nodes_is_shown_and_written_in_seconds() -> None:
    links = ["x", *(f"v{i}" for i in range(19_999)), "y"]
    inner = [make_tensor_value_info(name, FLOAT, ["n"]) for name in links[1:-1]]
    proto = model([relu(a, b) for a, b in itertools.pairwise(links)], value_info=inner)
    with cpu_limit(12), edited(proto.graph) as view:
        view.nodes.pop()
        view.outputs = [view.nodes[-1].outputs[0]]
    assert len(proto.graph.node) == 19_999 and names(proto.graph.output) == ["v19998"]
