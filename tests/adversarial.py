"""Small files that ask for much work: each form is a decoder's graph with `count` of something added to it.

`FORMS` is by name. What a command takes for a form may grow as `count` does, not as its square; past a bound that no
real export comes near, the file is refused. `python -m validation.hostile costs` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import small
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import make_node, make_tensor, make_tensor_value_info

Form = Callable[[ModelProto, int], None]
FORMS: dict[str, Form] = {}
DATA = "form.onnx_data"
"""The data file of the forms that have one, beside the graph."""
LENGTHS = ["/model/masks/Seqlens/output_0", "/model/masks/Total32/output_0"]
"""What the decoder's own attention takes for lengths; a node without any is refused before a pass looks at it."""
CACHE: small.Shape = ["batch_size", 1, "tokens", 8]


def form(function: Form) -> Form:
    FORMS[function.__name__.replace("_", " ")] = function
    return function


def write(folder: Path, name: str, count: int) -> Path:
    """The decoder of the smallest export, with a form added to it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "form.onnx"
    path.write_bytes(small.decoder().SerializeToString())
    add(path, name, count)
    return path


def add(path: Path, name: str, count: int) -> None:
    """Add a form to a graph, with the data file that it refers to."""
    proto = ModelProto.FromString(path.read_bytes())
    FORMS[name](proto, count)
    path.write_bytes(proto.SerializeToString())
    if "weights" in name or "external" in name:
        (path.parent / DATA).write_bytes(bytes(64 * count))


def _chain(graph: GraphProto, operator: str, first: str, count: int, second: str = "") -> str:
    """`count` nodes, each reading the one before; the last one's output."""
    nodes = []
    for index in range(count):
        nodes.append(make_node(operator, [first, second] if second else [first], [f"chain_{index}"]))
        first = f"chain_{index}"
    graph.node.extend(nodes)
    return first


def _softmaxes(graph: GraphProto, scores: str, count: int) -> None:
    for index in range(count):
        graph.node.append(make_node("Softmax", [scores], [f"shares_{index}"], name=f"softmax_{index}"))
        graph.node.append(make_node("MatMul", [f"shares_{index}", "present.1.value"], [f"mixed_{index}"]))


@form
def softmaxes_behind_masks(proto: ModelProto, count: int) -> None:
    proto.graph.node.append(make_node("MatMul", ["inputs_embeds", "present.1.key"], ["scores"]))
    _softmaxes(proto.graph, _chain(proto.graph, "Add", "scores", count, "nought"), count)


@form
def softmaxes_of_nothing_behind_masks(proto: ModelProto, count: int) -> None:
    """No MatMul is behind them, and each branches off the masks somewhere else."""
    _chain(proto.graph, "Add", "inputs_embeds", count, "nought")
    for index in range(count):
        proto.graph.node.append(make_node("Softmax", [f"chain_{index}"], [f"shares_{index}"]))
        proto.graph.node.append(make_node("MatMul", [f"shares_{index}", "present.1.value"], [f"mixed_{index}"]))


@form
def attention_behind_identities(proto: ModelProto, count: int) -> None:
    """GroupQueryAttention reads the past through a long way, from its end and from every place on it."""
    _chain(proto.graph, "Identity", "past_key_values.0.key", count)
    for index in range(count):
        reads = f"chain_{count - 1 if index % 2 else index}"
        node = make_node("GroupQueryAttention", ["inputs_embeds", *[reads] * 4, *LENGTHS], [f"attended_{index}"])
        node.domain = "com.microsoft"
        proto.graph.node.append(node)


@form
def unfused_attention_behind_transposes(proto: ModelProto, count: int) -> None:
    """Keys and values that come a long way; the way on is as long."""
    keys = _chain(proto.graph, "Identity", "present.1.key", count)
    for index in range(count):
        names = [f"{what}_{index}" for what in ("scores", "shares", "mixed")]
        proto.graph.node.append(make_node("MatMul", ["inputs_embeds", keys], names[:1]))
        proto.graph.node.append(make_node("Softmax", names[:1], names[1:2]))
        proto.graph.node.append(make_node("MatMul", [names[1], keys], names[2:]))


@form
def endless_lengths(proto: ModelProto, count: int) -> None:
    """Sequence lengths and biases, of which passes try what they mean, that ask for any memory and time."""
    graph = proto.graph
    shape = make_tensor("vast", TensorProto.INT64, [2], [2**40, 2**40])
    end = make_tensor("end", TensorProto.INT64, [], [2**60])
    graph.initializer.extend([shape, end, make_tensor("one", TensorProto.INT64, [], [1])])
    doubled = "attention_mask"
    for index in range(100):
        graph.node.append(make_node("Concat", [doubled, doubled], [f"doubled_{index}"], axis=0))
        doubled = f"doubled_{index}"
    makers = [("Expand", ["one", "vast"]), ("ConstantOfShape", ["vast"]), ("Range", ["one", "end", "one"])]
    makers += [("Add", [doubled, doubled]), ("StringNormalizer", ["one"])]
    for index in range(count):
        operator, reads = makers[index % len(makers)]
        graph.node.append(make_node(operator, reads, [f"lengths_{index}"]))
        names = ["inputs_embeds", *["present.1.key"] * 4, f"lengths_{index}", f"lengths_{index}"]
        node = make_node("GroupQueryAttention", names, [f"attended_{index}"])
        node.domain = "com.microsoft"
        graph.node.append(node)


@form
def caches(proto: ModelProto, count: int) -> None:
    """Attention cores with pasts and presents of their own, and as many that share them."""
    graph = proto.graph
    for layer in range(10, 10 + count):
        names = [f"{way}.{layer}.{kind}" for way in ("past_key_values", "present") for kind in ("key", "value")]
        for name, ports in zip(names, (graph.input, graph.input, graph.output, graph.output), strict=True):
            ports.append(make_tensor_value_info(name, TensorProto.FLOAT, CACHE))
        kv_source = make_node(
            "GroupQueryAttention", ["inputs_embeds", "", "", *names[:2], *LENGTHS], [f"attended_{layer}", *names[2:]]
        )
        reads = ["inputs_embeds", *names[2:], *names[2:], *LENGTHS]
        kv_shared_layer = make_node("GroupQueryAttention", reads, [f"borrowed_{layer}"])
        for node in (kv_source, kv_shared_layer):
            node.domain = "com.microsoft"
            graph.node.append(node)


@form
def dimensions(proto: ModelProto, count: int) -> None:
    proto.graph.input.append(make_tensor_value_info("wide", TensorProto.FLOAT, [f"d{i}" for i in range(count)]))


@form
def dimensions_of_a_tensor(proto: ModelProto, count: int) -> None:
    proto.graph.initializer.add(name="wide", data_type=TensorProto.FLOAT, dims=[1] * count, raw_data=bytes(4))


@form
def large_sizes(proto: ModelProto, count: int) -> None:
    """The bytes of such a tensor are a number with many digits."""
    proto.graph.initializer.add(name="large", data_type=TensorProto.FLOAT, dims=[2**62] * count)


@form
def empty_inputs(proto: ModelProto, count: int) -> None:
    for node in proto.graph.node:
        if node.op_type == "Concat" and "present" in node.output[0]:
            node.input.extend([""] * count)


@form
def operands(proto: ModelProto, count: int) -> None:
    """One node that makes as much as another reads."""
    names = [f"part_{index}" for index in range(count)]
    proto.graph.node.append(make_node("Split", ["inputs_embeds"], names))
    proto.graph.node.append(make_node("Concat", names, ["whole"], axis=0))


@form
def empty_nodes(proto: ModelProto, count: int) -> None:
    proto.graph.node.extend(NodeProto() for _ in range(count))


@form
def empty_attributes(proto: ModelProto, count: int) -> None:
    proto.graph.node[0].attribute.extend(AttributeProto() for _ in range(count))


@form
def empty_tensors(proto: ModelProto, count: int) -> None:
    proto.graph.initializer.extend(TensorProto() for _ in range(count))


@form
def declared_values(proto: ModelProto, count: int) -> None:
    for index in range(count):
        proto.graph.value_info.append(make_tensor_value_info(f"value_{index}", TensorProto.FLOAT, ["a", index]))


@form
def inputs(proto: ModelProto, count: int) -> None:
    for index in range(count):
        proto.graph.input.append(make_tensor_value_info(f"input_{index}", TensorProto.FLOAT, ["a", index]))


@form
def outputs(proto: ModelProto, count: int) -> None:
    for index in range(count):
        proto.graph.output.append(make_tensor_value_info(f"output_{index}", TensorProto.FLOAT, ["a", index]))
        proto.graph.node.append(make_node("Identity", ["inputs_embeds"], [f"output_{index}"]))


@form
def metadata(proto: ModelProto, count: int) -> None:
    for index in range(count):
        proto.metadata_props.add(key=f"key_{index}", value=str(index))


@form
def opsets(proto: ModelProto, count: int) -> None:
    for index in range(count):
        proto.opset_import.add(domain=f"domain_{index}", version=1)


@form
def functions(proto: ModelProto, count: int) -> None:
    for index in range(count):
        function = proto.functions.add(name=f"function_{index}", domain="d", input=["x"], output=["y"])
        function.node.append(make_node("Identity", ["x"], ["y"]))


@form
def bodies(proto: ModelProto, count: int) -> None:
    """Ifs one after the other, each body reading what is before it, and hiding another name."""
    for index in range(count):
        body = GraphProto(name="body")
        body.node.append(make_node("Identity", ["inputs_embeds"], ["position_ids" if index % 2 else f"inner_{index}"]))
        body.output.add(name=body.node[0].output[0])
        proto.graph.node.append(
            make_node("If", ["nought"], [f"chosen_{index}"], then_branch=body, else_branch=body, name=f"if_{index}")
        )


@form
def bodies_in_bodies(proto: ModelProto, count: int) -> None:
    """As deep as protobuf reads, with all the nodes inside the innermost one."""
    inner = GraphProto(name="inner")
    inner.node.extend(make_node("Identity", ["inputs_embeds"], [f"inner_{index}"]) for index in range(count))
    inner.output.add(name="inner_0")
    for depth in range(28):
        outer = GraphProto(name="outer")
        outer.node.append(make_node("If", ["nought"], [f"deep_{depth}"], then_branch=inner, else_branch=GraphProto()))
        outer.output.add(name=f"deep_{depth}")
        inner = outer
    proto.graph.node.append(make_node("If", ["nought"], ["deep"], then_branch=inner, else_branch=GraphProto()))


@form
def hiding_bodies(proto: ModelProto, count: int) -> None:
    """One body in which every node hides another name of the graph around."""
    names = [f"outer_{index}" for index in range(count)]
    proto.graph.node.extend(make_node("Identity", ["inputs_embeds"], [name]) for name in names)
    body = GraphProto(name="body")
    body.node.extend(make_node("Identity", [name], [name]) for name in names)
    body.output.add(name=names[-1])
    proto.graph.node.append(make_node("If", ["nought"], ["chosen"], then_branch=body, else_branch=body))


@form
def twins(proto: ModelProto, count: int) -> None:
    """Nodes that nothing tells apart."""
    for index in range(count):
        proto.graph.node.append(make_node("Neg", ["inputs_embeds"], [f"twin_{index}"], name="twin"))


@form
def nodes_of_one_name(proto: ModelProto, count: int) -> None:
    for index in range(count):
        proto.graph.node.append(
            make_node("Neg", [f"twin_{index - 1}" if index else "logits"], [f"twin_{index}"], name="twin")
        )


@form
def numbered_names(proto: ModelProto, count: int) -> None:
    """Names that are free for nobody: what a pass would call a new value is taken."""
    for name in ("embed_tokens/Gather", "/model/constants/INT64/0", "input_ids", "logits"):
        for index in range(2, 2 + count // 4):
            proto.graph.node.append(make_node("Neg", ["inputs_embeds"], [f"{name}_{index}"], name=f"{name}_{index}"))


@form
def long_name(proto: ModelProto, count: int) -> None:
    name = "n" * (32 * count)
    proto.graph.node.append(make_node("Neg", ["inputs_embeds"], [name], name=name))
    proto.graph.node.append(make_node("Neg", [name], ["after"]))


@form
def long_names_of_caches(proto: ModelProto, count: int) -> None:
    """What a regular expression may go back and forth over."""
    name = "past_key" + "1a" * (4 * count) + "_"
    proto.graph.input.append(make_tensor_value_info(name, TensorProto.FLOAT, CACHE))
    proto.graph.output.append(make_tensor_value_info("0" * (8 * count), TensorProto.FLOAT, CACHE))


@form
def long_operator(proto: ModelProto, count: int) -> None:
    for index in range(8):
        proto.graph.node.append(make_node("O" * (4 * count), ["inputs_embeds"], [f"odd_{index}"], domain="d" * count))


@form
def layer_table(proto: ModelProto, count: int) -> None:
    row = '{{"layer": {0}, "attention": "full", "head_size": 8, "kv_heads": 1, "owner": {0}, "window": null}}'
    rows = ", ".join(row.format(index) for index in range(count))
    proto.metadata_props.add(key="gemma4_surgery.layers", value=f'{{"version": 1, "layers": [{rows}]}}')
    caches(proto, count // 4)


@form
def overlapping_weights(proto: ModelProto, count: int) -> None:
    """Tensors of nearly all of the data file, each beginning a byte later than the one before."""
    for index in range(count):
        length = 63 * count
        tensor = proto.graph.initializer.add(name=f"w_{index}", data_type=TensorProto.UINT8, dims=[length])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", index), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))


@form
def shared_weights(proto: ModelProto, count: int) -> None:
    """Tensors that are all the whole of one data file, under different shapes."""
    for index in range(count):
        tensor = proto.graph.initializer.add(name=f"w_{index}", data_type=TensorProto.UINT8, dims=[64 * count])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", 0), ("length", 64 * count)):
            tensor.external_data.add(key=key, value=str(value))


@form
def entries_of_external_data(proto: ModelProto, count: int) -> None:
    shared_weights(proto, 1)
    for index in range(count):
        proto.graph.initializer[-1].external_data.add(key=f"key_{index}", value="v")


@form
def data_files(proto: ModelProto, count: int) -> None:
    for index in range(count):
        tensor = proto.graph.initializer.add(name=f"w_{index}", data_type=TensorProto.UINT8, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"file_{index}.data")


@form
def reversed_order(proto: ModelProto, count: int) -> None:
    """Every node before the one that it reads."""
    for index in range(count, 0, -1):
        proto.graph.node.append(make_node("Neg", [f"step_{index - 1}"], [f"step_{index}"]))


@form
def ring(proto: ModelProto, count: int) -> None:
    """Identities that read each other, as what an attention reads."""
    last = _chain(proto.graph, "Identity", f"chain_{count - 1}", count)
    proto.graph.node.append(make_node("MatMul", ["inputs_embeds", last], ["round_scores"]))
    proto.graph.node.append(make_node("Softmax", ["round_scores"], ["round_shares"], name="round"))
    proto.graph.node.append(make_node("MatMul", ["round_shares", last], ["round_mixed"]))
