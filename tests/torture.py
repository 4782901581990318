"""Models made to break round trips: one builder per trap, named after what a plain import and export breaks.

`TRAPS[name]()` is a fresh ModelProto. The external ones name `torture.data`, which nobody has to write:
opening and editing never read it. Not all of them run; all of them must come back as they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, TypeProto
from onnx.helper import (
    make_attribute,
    make_function,
    make_graph,
    make_map_type_proto,
    make_model,
    make_node,
    make_operatorsetid,
    make_optional_type_proto,
    make_sequence_type_proto,
    make_tensor,
    make_tensor_type_proto,
    make_tensor_value_info,
    make_value_info,
)
from onnx.numpy_helper import from_array

Builder = Callable[[], ModelProto]
TRAPS: dict[str, Builder] = {}

FLOAT = TensorProto.FLOAT
IR_VERSION = 10
OPSETS = [make_operatorsetid("", 21), make_operatorsetid("com.microsoft", 1)]

PACKED = {
    "INT4": 2, "UINT4": 2, "INT2": 4, "UINT2": 4, "FLOAT4E2M1": 2,
    "FLOAT8E4M3FN": 1, "FLOAT8E4M3FNUZ": 1, "FLOAT8E5M2": 1, "FLOAT8E5M2FNUZ": 1, "FLOAT8E8M0": 1,
    "BFLOAT16": 0.5, "FLOAT16": 0.5, "FLOAT": 0.25, "DOUBLE": 0.125, "BOOL": 1,
    "INT8": 1, "UINT8": 1, "INT16": 0.5, "UINT16": 0.5, "INT32": 0.25, "UINT32": 0.25, "INT64": 0.125, "UINT64": 0.125,
    "COMPLEX64": 0.125, "COMPLEX128": 0.0625,
}  # fmt: skip
"""Every dtype with bytes -> elements in a byte."""


def trap(build: Builder) -> Builder:
    TRAPS[build.__name__] = build
    return build


def relu(source: str = "x", target: str = "y", **fields: str) -> NodeProto:
    return make_node("Relu", [source], [target], name=fields.pop("name", f"relu_{target}"), **fields)


def model(nodes: list[NodeProto] | None = None, **fields: Any) -> ModelProto:
    """y = f(x) with float vectors, unless `fields` of the graph say otherwise."""
    graph = make_graph(
        nodes if nodes is not None else [relu()],
        "torture",
        fields.pop("inputs", [make_tensor_value_info("x", FLOAT, ["n"])]),
        fields.pop("outputs", [make_tensor_value_info("y", FLOAT, ["n"])]),
        initializer=fields.pop("initializers", []),
        value_info=fields.pop("value_info", []),
    )
    assert not fields, fields
    return make_model(graph, ir_version=IR_VERSION, opset_imports=OPSETS, producer_name="torture")


def weight(name: str = "w", size: int = 4) -> TensorProto:
    return from_array(np.arange(size, dtype=np.float32), name)


def external(name: str, dims: list[int], offset: int = 0) -> TensorProto:
    tensor = TensorProto(name=name, data_type=FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="torture.data")
    tensor.external_data.add(key="offset", value=str(offset))
    tensor.external_data.add(key="length", value=str(4 * int(np.prod(dims))))
    return tensor


def body(nodes: list[NodeProto], output: str, name: str = "body", **fields: Any) -> GraphProto:
    return make_graph(nodes, name, [], [make_tensor_value_info(output, FLOAT, ["n"])], **fields)


def if_node(then: GraphProto, other: GraphProto, output: str = "y", name: str = "if") -> NodeProto:
    return make_node("If", ["c"], [output], name=name, then_branch=then, else_branch=other)


CONDITION = make_tensor_value_info("c", TensorProto.BOOL, [])
X = make_tensor_value_info("x", FLOAT, ["n"])


def with_attribute(attribute: AttributeProto) -> ModelProto:
    node = relu()
    node.domain, node.op_type = "com.example", "Custom"
    node.attribute.append(make_attribute("before", 1))
    node.attribute.append(attribute)
    node.attribute.append(make_attribute("after", [1.5, 2.5]))
    return model([node])


@trap
def plain() -> ModelProto:
    return model()


@trap
def metadata_at_every_level() -> ModelProto:
    proto = model(
        [relu("x", "h"), make_node("Add", ["h", "w"], ["y"], name="add")],
        initializers=[weight()],
        value_info=[make_tensor_value_info("h", FLOAT, ["n"])],
    )
    places = (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output)
    for place in (*places, *proto.graph.value_info, *proto.graph.initializer):
        place.metadata_props.add(key="pkg.torch.onnx.name", value="model.layers.0")
        place.metadata_props.add(key="repeated", value="1")
        place.metadata_props.add(key="repeated", value="2")
    return proto


@trap
def model_header_fields() -> ModelProto:
    proto = model()
    proto.doc_string, proto.domain, proto.model_version = "model doc", "com.example", 7
    proto.producer_version = "1.2"
    return proto


@trap
def absent_producer() -> ModelProto:
    proto = model()
    proto.ClearField("producer_name")
    return proto


@trap
def empty_but_present_strings() -> ModelProto:
    proto = model()
    proto.producer_version = proto.doc_string = proto.graph.doc_string = ""
    proto.graph.node[0].domain = proto.graph.node[0].doc_string = ""
    return proto


@trap
def doc_strings_everywhere() -> ModelProto:
    proto = metadata_at_every_level()
    for place in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        place.doc_string = "doc\n\tof this"
    for place in (*proto.graph.value_info, *proto.graph.initializer):
        place.doc_string = "doc\nof this"
    return proto


@trap
def empty_list_attributes() -> ModelProto:
    kinds = AttributeProto
    node = relu()
    for name, kind in (
        ("ints", kinds.INTS),
        ("floats", kinds.FLOATS),
        ("strings", kinds.STRINGS),
        ("tensors", kinds.TENSORS),
    ):
        node.attribute.append(AttributeProto(name=name, type=kind))
    node.attribute.append(make_attribute("graphs", [], attr_type=kinds.GRAPHS))
    return model([node])


@trap
def non_utf8_string_attribute() -> ModelProto:
    return with_attribute(make_attribute("blob", b"\xff\xfe\x00EPContext"))


@trap
def non_utf8_strings_attribute() -> ModelProto:
    return with_attribute(make_attribute("blobs", [b"\xff", b"ok"]))


@trap
def type_proto_attribute() -> ModelProto:
    return with_attribute(make_attribute("type", make_tensor_type_proto(FLOAT, [1, "n"])))


@trap
def type_protos_attribute() -> ModelProto:
    attribute = AttributeProto(name="types", type=AttributeProto.TYPE_PROTOS)
    attribute.type_protos.add().CopyFrom(make_tensor_type_proto(FLOAT, None))
    return with_attribute(attribute)


@trap
def tensor_and_tensors_attributes() -> ModelProto:
    proto = with_attribute(make_attribute("tensors", [weight("a"), weight("b")]))
    proto.graph.node[0].attribute.append(make_attribute("tensor", weight("inner")))
    return proto


@trap
def external_tensor_attribute() -> ModelProto:
    return with_attribute(make_attribute("tensor", external("inner", [16])))


@trap
def graphs_attribute() -> ModelProto:
    bodies = [body([relu("x", "inner", name="in_body")], "inner", name) for name in ("one", "two")]
    return with_attribute(make_attribute("graphs", bodies))


@trap
def sparse_tensor_attribute() -> ModelProto:
    return with_attribute(make_attribute("sparse", sparse("s")))


@trap
def sparse_tensors_attribute() -> ModelProto:
    attribute = AttributeProto(name="sparse", type=AttributeProto.SPARSE_TENSORS)
    attribute.sparse_tensors.add().CopyFrom(sparse("s"))
    return with_attribute(attribute)


@trap
def attribute_doc_string() -> ModelProto:
    attribute = make_attribute("alpha", 0.5)
    attribute.doc_string = "why alpha"
    return with_attribute(attribute)


@trap
def special_floats_in_attributes() -> ModelProto:
    return with_attribute(make_attribute("floats", [float("nan"), float("inf"), -0.0, 1e-45, 0.1]))


@trap
def attribute_without_a_type() -> ModelProto:
    attribute = make_attribute("old", 3)
    attribute.ClearField("type")
    return with_attribute(attribute)


@trap
def domain_ai_onnx_on_a_node() -> ModelProto:
    return model([relu(domain="ai.onnx")])


@trap
def schema_unknown_operator_in_the_default_domain() -> ModelProto:
    node = make_node("SimplifiedLayerNormalization", ["x", "w"], ["y"], name="norm", axis=-1, stash_type=1)
    return model([node], initializers=[weight()])


@trap
def overloaded_functions() -> ModelProto:
    proto = model([relu("x", "h"), relu("h", "y")])
    for overload, node in zip(("one", "two"), proto.graph.node, strict=True):
        node.op_type, node.domain, node.overload = "Twice", "com.example", overload
        function = make_function(
            "com.example", "Twice", ["a"], ["b"], [make_node("Add", ["a", "a"], ["b"])], OPSETS[:1], overload=overload
        )
        function.metadata_props.add(key="k", value=overload)
        function.value_info.append(make_tensor_value_info("b", FLOAT, ["n"]))
        proto.functions.append(function)
    return proto


@trap
def function_with_a_referring_attribute() -> ModelProto:
    proto = model([make_node("Leak", ["x"], ["y"], name="leak", domain="com.example", alpha=0.25)])
    inner = make_node("LeakyRelu", ["a"], ["b"])
    inner.attribute.append(AttributeProto(name="alpha", ref_attr_name="alpha", type=AttributeProto.FLOAT))
    proto.functions.append(make_function("com.example", "Leak", ["a"], ["b"], [inner], OPSETS[:1], ["alpha"]))
    return proto


@trap
def if_bodies_capture_an_outer_initializer() -> ModelProto:
    branches = [body([make_node(op, ["x", "w"], [f"r_{op}"], name=op)], f"r_{op}", op) for op in ("Add", "Mul")]
    return model([if_node(*branches)], inputs=[CONDITION, X], initializers=[external("w", [4])])


@trap
def if_bodies_capture_a_computed_value() -> ModelProto:
    branches = [body([make_node(op, ["h"], [f"r_{op}"], name=op)], f"r_{op}", op) for op in ("Neg", "Abs")]
    value_info = [make_tensor_value_info("h", FLOAT, ["n"])]
    return model([relu("x", "h"), if_node(*branches)], inputs=[CONDITION, X], value_info=value_info)


@trap
def captured_name_is_shadowed_in_a_body() -> ModelProto:
    hides = body([make_node("Add", ["x", "w"], ["r"], name="inner")], "r", initializer=[weight("w")])
    reads = body([make_node("Mul", ["x", "w"], ["r"], name="inner")], "r")
    return model([if_node(hides, reads)], inputs=[CONDITION, X], initializers=[weight("w")])


@trap
def captured_value_is_shadowed_after_it_was_read() -> ModelProto:
    late = body([make_node("Neg", ["h"], ["r"]), make_node("Abs", ["r"], ["h"])], "h")
    other = body([make_node("Neg", ["h"], ["r2"])], "r2")
    return model([relu("x", "h"), if_node(late, other)], inputs=[CONDITION, X])


@trap
def loop_body_captures_and_has_its_own_metadata() -> ModelProto:
    scalar = make_tensor_value_info("i", TensorProto.INT64, [])
    keep_in, keep_out = (make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("k", "k2"))
    carried, result = (make_tensor_value_info(name, FLOAT, ["n"]) for name in ("v", "v2"))
    nodes = [make_node("Add", ["v", "w"], ["v2"], name="step", doc_string="d"), make_node("Identity", ["k"], ["k2"])]
    graph = make_graph(nodes, "loop", [scalar, keep_in, carried], [keep_out, result], value_info=[result])
    graph.node[0].metadata_props.add(key="inside", value="1")
    node = make_node("Loop", ["trips", "", "x"], ["y"], name="loop", body=graph)
    trips = make_tensor_value_info("trips", TensorProto.INT64, [])
    return model([node], inputs=[trips, X], initializers=[weight()])


@trap
def nested_if_captures_two_levels_up() -> ModelProto:
    inner = if_node(body([make_node("Add", ["x", "w"], ["a"])], "a"), body([relu("x", "b")], "b"), "m", "inner")
    outer = if_node(body([inner], "m"), body([relu("x", "e")], "e"), "y", "outer")
    return model([outer], inputs=[CONDITION, X], initializers=[weight()])


@trap
def body_output_is_an_outer_value() -> ModelProto:
    return model([if_node(body([], "x"), body([relu("x", "e")], "e"))], inputs=[CONDITION, X])


@trap
def unused_initializers() -> ModelProto:
    return model(initializers=[weight("unused"), external("unused_external", [1024])])


@trap
def initializer_overridable_as_an_input() -> ModelProto:
    inputs = [X, make_tensor_value_info("w", FLOAT, [4])]
    return model([make_node("Add", ["x", "w"], ["y"])], inputs=inputs, initializers=[weight()])


@trap
def initializer_is_a_graph_output() -> ModelProto:
    outputs = [make_tensor_value_info("y", FLOAT, ["n"]), make_tensor_value_info("w", FLOAT, [4])]
    return model(outputs=outputs, initializers=[weight()])


@trap
def input_is_a_graph_output() -> ModelProto:
    return model(outputs=[make_tensor_value_info("y", FLOAT, ["n"]), X])


@trap
def sequence_optional_and_map_inputs() -> ModelProto:
    tensor = make_tensor_type_proto(FLOAT, ["n", 3])
    types: dict[str, TypeProto] = {
        "sequence": make_sequence_type_proto(tensor),
        "optional": make_optional_type_proto(tensor),
        "optional_sequence": make_optional_type_proto(make_sequence_type_proto(tensor)),
        "map": make_map_type_proto(TensorProto.INT64, tensor),
    }
    values = [make_value_info(name, kind) for name, kind in types.items()]
    node = make_node("SequenceAt", ["sequence", "i"], ["y"], name="at")
    index = make_tensor_value_info("i", TensorProto.INT64, [])
    inner = make_value_info("left_over", types["sequence"])
    return model([node], inputs=[*values, index], value_info=[inner])


@trap
def untyped_values() -> ModelProto:
    proto = model([relu("x", "h"), relu("h", "y")])
    proto.graph.input[0].ClearField("type")
    proto.graph.value_info.add(name="h")
    return proto


@trap
def unknown_element_types() -> ModelProto:
    values = [make_tensor_value_info("h", TensorProto.UNDEFINED, ["n"])]
    proto = model([relu("x", "h"), relu("h", "y")], value_info=values)
    proto.graph.output[0].type.tensor_type.elem_type = 99
    return proto


@trap
def value_info_docs_and_denotations() -> ModelProto:
    value = make_tensor_value_info("h", FLOAT, ["n", 4], doc_string="hidden", shape_denotation=["DATA_BATCH", ""])
    value.type.denotation = "IMAGE"
    return model([relu("x", "h"), relu("h", "y")], value_info=[value])


@trap
def leftover_value_info() -> ModelProto:
    return model(value_info=[make_tensor_value_info("nobody_makes_this", FLOAT, ["n"])])


@trap
def value_info_for_an_initializer_and_an_output() -> ModelProto:
    values = [make_tensor_value_info("w", FLOAT, [4]), make_tensor_value_info("y", FLOAT, ["n"])]
    return model([make_node("Add", ["x", "w"], ["y"])], initializers=[weight()], value_info=values)


@trap
def quantization_annotation() -> ModelProto:
    proto = model([make_node("Add", ["x", "w"], ["y"])], initializers=[weight(), weight("w_scale")])
    note = proto.graph.quantization_annotation.add(tensor_name="w")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w_scale")
    return proto


@trap
def training_info() -> ModelProto:
    proto = model()
    training = proto.training_info.add()
    training.algorithm.CopyFrom(make_graph([relu("x", "g")], "step", [X], [make_tensor_value_info("g", FLOAT, ["n"])]))
    training.update_binding.add(key="w", value="g")
    return proto


@trap
def external_checksum_and_odd_entries() -> ModelProto:
    tensor = external("w", [4], offset=4096)
    tensor.external_data.add(key="checksum", value="da39a3ee5e6b4b0d3255bfef95601890afd80709")
    tensor.external_data.add(key="basepath", value="kept")
    return model([make_node("Add", ["x", "w"], ["y"])], initializers=[tensor])


@trap
def external_without_offset_and_length() -> ModelProto:
    tensor = external("w", [4])
    del tensor.external_data[1:]
    return model([make_node("Add", ["x", "w"], ["y"])], initializers=[tensor])


@trap
def tensor_kept_in_typed_fields_and_in_segments() -> ModelProto:
    typed = make_tensor("typed", TensorProto.INT32, [3], [1, 2, 3])
    half = make_tensor("half", TensorProto.FLOAT16, [2], [1.0, 2.0])
    segment = weight("segment")
    segment.segment.begin, segment.segment.end = 0, 4
    return model([make_node("Custom", ["x", "typed", "half"], ["y"])], initializers=[typed, half, segment])


@trap
def trailing_and_middle_empty_names() -> ModelProto:
    node = make_node("Custom", ["", "x", "", "x", ""], ["", "y", "", ""], name="gaps", domain="com.example")
    return model([node])


@trap
def grouped_query_attention_with_gaps() -> ModelProto:
    names = ["q", "k", "v", "past_key", "past_value", "seqlens", "total", "", "", "", "bias"]
    inputs = [make_tensor_value_info(name, FLOAT, [1, "s", 8]) for name in names if name]
    node = make_node(
        "GroupQueryAttention",
        names,
        ["y", "pk", ""],
        "gqa",
        domain="com.microsoft",
        num_heads=2,
        kv_num_heads=1,
        scale=1.0,
    )
    return model([node], inputs=inputs)


@trap
def every_dtype_as_initializer() -> ModelProto:
    tensors = []
    for dtype, per_byte in PACKED.items():
        raw = bytes(range(0x10, 0x30))
        elements = int(len(raw) * per_byte)
        tensors.append(
            TensorProto(name=f"w_{dtype}", data_type=TensorProto.DataType.Value(dtype), dims=[elements], raw_data=raw)
        )
    text = TensorProto(name="w_STRING", data_type=TensorProto.STRING, dims=[2], string_data=[b"\xff\xfe", b"ok"])
    tensors.append(text)
    node = make_node("Custom", ["x", *(tensor.name for tensor in tensors)], ["y"], domain="com.example")
    return model([node], initializers=tensors)


@trap
def every_dtype_as_input_output_and_inner_value() -> ModelProto:
    kinds = [*PACKED, "STRING"]
    declared = {kind: TensorProto.DataType.Value(kind) for kind in kinds}
    nodes = [make_node("Identity", [f"i_{kind}"], [f"h_{kind}"], name=f"a_{kind}") for kind in kinds]
    nodes += [make_node("Identity", [f"h_{kind}"], [f"o_{kind}"], name=f"b_{kind}") for kind in kinds]
    sides = [[make_tensor_value_info(f"{s}_{k}", declared[k], ["n"]) for k in kinds] for s in "iho"]
    return model(nodes, inputs=sides[0], value_info=sides[1], outputs=sides[2])


@trap
def every_dtype_stored_externally() -> ModelProto:
    tensors = []
    for dtype, per_byte in PACKED.items():
        tensor = external(f"w_{dtype}", [int(32 * per_byte)])
        tensor.data_type = TensorProto.DataType.Value(dtype)
        tensor.external_data[2].value = "32"
        tensors.append(tensor)
    node = make_node("Custom", ["x", *(tensor.name for tensor in tensors)], ["y"], domain="com.example")
    return model([node], initializers=tensors)


def sparse(name: str) -> SparseTensorProto:
    indices = make_tensor(f"{name}_indices", TensorProto.INT64, [2], [0, 3])
    return SparseTensorProto(values=weight(name, 2), indices=indices, dims=[4])


@trap
def sparse_initializers() -> ModelProto:
    proto = model([make_node("Add", ["x", "s"], ["y"])])
    proto.graph.sparse_initializer.append(sparse("s"))
    proto.graph.sparse_initializer.append(sparse("unused"))
    return proto


@trap
def rank_zero_and_unknown_rank() -> ModelProto:
    values = [make_tensor_value_info("scalar", FLOAT, []), make_tensor_value_info("unranked", FLOAT, None)]
    values.append(make_tensor_value_info("unknown_dim", FLOAT, [None, 2]))
    nodes = [relu("x", "scalar"), relu("scalar", "unranked"), relu("unranked", "unknown_dim"), relu("unknown_dim", "y")]
    return model(nodes, value_info=values)


@trap
def scalar_and_empty_initializers() -> ModelProto:
    tensors = [make_tensor("scalar", FLOAT, [], [1.0]), make_tensor("empty", FLOAT, [0, 4], [])]
    return model([make_node("Custom", ["x", "scalar", "empty"], ["y"], domain="com.example")], initializers=tensors)


@trap
def symbolic_dims() -> ModelProto:
    names = ["batch_size", "past_sequence_length + sequence_length", 0, -1, ""]
    proto = model([relu("x", "h"), relu("h", "y")], value_info=[make_tensor_value_info("h", FLOAT, names)])
    proto.graph.value_info[0].type.tensor_type.shape.dim[4].dim_param = ""
    return proto


@trap
def repeated_and_unsorted_opset_imports() -> ModelProto:
    proto = model()
    proto.opset_import.insert(0, make_operatorsetid("zzz", 3))
    proto.opset_import.append(make_operatorsetid("", 21))
    return proto


@trap
def unnamed_and_equally_named_nodes() -> ModelProto:
    nodes = [relu("x", "a", name=""), relu("a", "b", name="same"), relu("b", "c", name="same"), relu("c", "y", name="")]
    return model(nodes)


@trap
def identical_nodes_but_for_their_outputs() -> ModelProto:
    nodes = [relu("x", name, name="twin") for name in ("a", "b", "y")]
    return model(nodes)


@trap
def two_chains_in_a_valid_order_that_a_sort_would_change() -> ModelProto:
    nodes = [relu("x" if i == 0 else f"a{i - 1}", f"a{i}") for i in range(4)]
    nodes += [relu("x" if i == 0 else f"b{i - 1}", f"b{i}") for i in range(4)]
    return model([*nodes, make_node("Add", ["b3", "a3"], ["y"])])


@trap
def nodes_in_an_invalid_order() -> ModelProto:
    return model([relu("h", "y"), relu("x", "h")])


@trap
def dead_nodes_and_unread_outputs() -> ModelProto:
    split = make_node("Split", ["x"], ["y", "unread"], name="split", num_outputs=2)
    return model([relu("x", "dead"), split])


@trap
def constant_nodes_of_every_form() -> ModelProto:
    forms: dict[str, Any] = {"value_int": 1, "value_ints": [1, 2], "value_float": 1.0, "value_string": "s"}
    nodes = [make_node("Constant", [], [key], name=key, **{key: value}) for key, value in forms.items()]
    nodes.append(make_node("Constant", [], ["value"], value=weight("value")))
    nodes.append(make_node("Constant", [], ["sparse"], sparse_value=sparse("sv")))
    return model([*nodes, make_node("Custom", ["x", *forms, "value", "sparse"], ["y"])])


@trap
def names_with_control_characters_and_unicode() -> ModelProto:
    return model([relu("x", "\x1b[31mred\x07", name="ß / 层"), relu("\x1b[31mred\x07", "y", name="\u202e")])


@trap
def graph_without_nodes() -> ModelProto:
    return model([], outputs=[X])


@trap
def fields_that_this_schema_does_not_know() -> ModelProto:
    """A newer onnx.proto may add fields; protobuf carries them along."""
    proto = model()
    unknown = b"\xc2\x3e\x03abc"  # field 1000, length-delimited
    proto.graph.node[0].MergeFromString(unknown)
    proto.graph.MergeFromString(unknown)
    proto.MergeFromString(unknown)
    return proto


@trap
def sharded_and_parallel_annotations() -> ModelProto:
    proto = model()
    device = proto.graph.node[0].device_configurations.add(configuration_id="tp")
    device.sharding_spec.add(tensor_name="x")
    proto.configuration.add(name="tp", num_devices=2)
    return proto


@trap
def four_thousand_consumers_of_one_value() -> ModelProto:
    nodes = [relu("x", f"r{i}") for i in range(4000)]
    nodes.append(make_node("Sum", [f"r{i}" for i in range(4000)], ["y"]))
    return model(nodes)


@trap
def chain_of_ten_thousand_nodes() -> ModelProto:
    names = ["x", *(f"v{i}" for i in range(9999)), "y"]
    return model([relu(a, b) for a, b in itertools.pairwise(names)])


@trap
def two_thousand_ifs_around_two_thousand_values() -> ModelProto:
    """Each body may read every value: a scope that is copied for each body is quadratic."""
    nodes = [relu("x", f"v{i}") for i in range(2000)]
    for i in range(2000):
        then = body([relu(f"v{i}", f"t{i}")], f"t{i}", "then")
        nodes.append(if_node(then, body([], f"v{i}", "else"), f"y{i}", f"if{i}"))
    return model(nodes, inputs=[CONDITION, X], outputs=[make_tensor_value_info("y0", FLOAT, ["n"])])
