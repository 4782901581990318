"""Rewrites of the two graphs of an export that change what they say and not what they compute.

Each takes the pair (embedding graph, decoder) without its weights and changes it in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

INT64, INT32, FLOAT, BOOL = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.BOOL
LOWEST = np.float32(-3e38)
MICROSOFT = "com.microsoft"


@dataclass
class Pair:
    """The graphs of an export, and what the architecture says."""

    embed: ModelProto
    decoder: ModelProto
    config: dict[str, Any]
    folder: Path
    """Where the weights of both lie."""

    @property
    def text(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["text_config"]
        return found

    @property
    def both(self) -> tuple[ModelProto, ModelProto]:
        return self.embed, self.decoder


Rewrite = Callable[[Pair], None]


class Nodes:
    """New nodes under one name, and their constants."""

    def __init__(self, graph: GraphProto, scope: str) -> None:
        self._graph = graph
        self._scope = scope
        self.made: list[NodeProto] = []

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.array(value, dtype)
        name = f"{self._scope}/constant_{len(self._graph.initializer)}"
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def __call__(self, kind: str, inputs: Sequence[str], output: str = "", domain: str = "", **attributes: Any) -> str:
        label = f"{self._scope}/{kind}_{len(self.made)}"
        output = output or f"{label}/output_0"
        self.made.append(helper.make_node(kind, list(inputs), [output], label, domain=domain, **attributes))
        return output


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def rewritten(graph: GraphProto, kind: str, change: Callable[[NodeProto, Nodes], None]) -> None:
    """Put what `change` makes in place of each node of a kind; a node for which it makes nothing stays."""
    held: list[NodeProto] = []
    for node in [NodeProto.FromString(node.SerializeToString()) for node in graph.node]:
        nodes = Nodes(graph, f"{node.name}/rewritten")
        if node.op_type == kind:
            change(node, nodes)
        held += nodes.made or [node]
    del graph.node[:]
    graph.node.extend(held)


def set_opset(model: ModelProto, version: int) -> None:
    next(entry for entry in model.opset_import if not entry.domain).version = version


# Rotary embeddings


def rotary_explicit(pair: Pair) -> None:
    """x cos - rotated x sin, of Gathers by position_ids."""

    def change(node: NodeProto, nodes: Nodes) -> None:
        x, positions, cos, sin = node.input
        size = 2 * next(tensor.dims[1] for tensor in pair.decoder.graph.initializer if tensor.name == cos)
        heads = nodes("Reshape", [x, nodes.constant([0, 0, -1, size])])
        half = size // 2
        bounds = [nodes.constant([0]), nodes.constant([half]), nodes.constant([size]), nodes.constant([3])]
        first = nodes("Slice", [heads, bounds[0], bounds[1], bounds[3]])
        second = nodes("Slice", [heads, bounds[1], bounds[2], bounds[3]])
        tables = [nodes("Unsqueeze", [nodes("Gather", [t, positions]), nodes.constant([2])]) for t in (cos, sin)]
        one = nodes("Sub", [nodes("Mul", [first, tables[0]]), nodes("Mul", [second, tables[1]])])
        other = nodes("Add", [nodes("Mul", [second, tables[0]]), nodes("Mul", [first, tables[1]])])
        whole = nodes("Concat", [one, other], axis=3)
        nodes("Reshape", [whole, nodes.constant([0, 0, -1])], node.output[0])

    rewritten(pair.decoder.graph, "RotaryEmbedding", change)


def rotary_23(pair: Pair) -> None:
    """ONNX's own operator."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in pair.decoder.graph.value_info}

    def change(node: NodeProto, nodes: Nodes) -> None:
        x, positions, cos, sin = node.input
        size = 2 * next(tensor.dims[1] for tensor in pair.decoder.graph.initializer if tensor.name == cos)
        nodes(
            "RotaryEmbedding",
            [x, cos, sin, positions],
            node.output[0],
            num_heads=shapes[node.output[0]][-1].dim_value // size,
        )

    rewritten(pair.decoder.graph, "RotaryEmbedding", change)
    set_opset(pair.decoder, 23)


# Attention of sliding layers, which the export has as GroupQueryAttention


def _visible(nodes: Nodes, query: str, window: int) -> str:
    """bool [B,1,S,T]: no padding, not after the query, and in the window."""
    total = nodes("Shape", ["attention_mask"], start=1, end=2)
    new = nodes("Shape", [query], start=1, end=2)
    flat = [nodes("Squeeze", [name]) for name in (nodes("Sub", [total, new]), total)]
    zero, one = nodes.constant(0), nodes.constant(1)
    rows = nodes("Unsqueeze", [nodes("Range", [flat[0], flat[1], one]), nodes.constant([1])])
    distance = nodes("Sub", [rows, nodes("Range", [zero, flat[1], one])])
    near = nodes("And", [nodes("GreaterOrEqual", [distance, zero]), nodes("Less", [distance, nodes.constant(window)])])
    kept = nodes("Cast", [nodes("Unsqueeze", ["attention_mask", nodes.constant([1, 2])])], to=BOOL)
    return nodes("And", [near, kept])


def attention_plain(pair: Pair) -> None:
    """Sliding layers in plain operators too, each with its mask."""
    heads = pair.text["num_attention_heads"]

    def change(node: NodeProto, nodes: Nodes) -> None:
        kv_heads, size = attribute(node, "kv_num_heads"), pair.text["head_dim"]
        query, *new = node.input[:3]

        def split(flat: str, count: int) -> str:
            shaped = nodes("Reshape", [flat, nodes.constant([0, 0, count, size])])
            return nodes("Transpose", [shaped], perm=[0, 2, 1, 3])

        caches = []
        for flat, past, present in zip(new, node.input[3:5], node.output[1:3], strict=True):
            whole = nodes("Concat", [past, split(flat, kv_heads)], present, axis=2)
            grouped = nodes("Unsqueeze", [whole, nodes.constant([2])])
            shape = nodes("Concat", [nodes("Shape", [whole], end=2), nodes.constant([heads // kv_heads]),
                                     nodes("Shape", [whole], start=2)], axis=0)  # fmt: skip
            repeated = nodes("Expand", [grouped, shape])
            joined = nodes("Concat", [nodes("Shape", [whole], end=1), nodes.constant([heads]),
                                      nodes("Shape", [whole], start=2)], axis=0)  # fmt: skip
            caches.append(nodes("Reshape", [repeated, joined]))
        scores = nodes("MatMul", [split(query, heads), nodes("Transpose", [caches[0]], perm=[0, 1, 3, 2])])
        visible = _visible(nodes, query, attribute(node, "local_window_size"))
        masked = nodes("Where", [visible, scores, nodes.constant(LOWEST, np.float32)])
        mixed = nodes("MatMul", [nodes("Softmax", [masked], axis=-1), caches[1]])
        back = nodes("Transpose", [mixed], perm=[0, 2, 1, 3])
        nodes("Reshape", [back, nodes.constant([0, 0, heads * size])], node.output[0])

    rewritten(pair.decoder.graph, "GroupQueryAttention", change)


def attention_23(pair: Pair) -> None:
    """ONNX's own operator, with a mask of truth values."""

    def change(node: NodeProto, nodes: Nodes) -> None:
        visible = _visible(nodes, node.input[0], attribute(node, "local_window_size"))
        nodes.made.append(
            helper.make_node(
                "Attention", [*node.input[:3], visible, *node.input[3:5]], list(node.output), f"{node.name}/Attention",
                q_num_heads=attribute(node, "num_heads"), kv_num_heads=attribute(node, "kv_num_heads"), scale=1.0,
            )
        )  # fmt: skip

    rewritten(pair.decoder.graph, "GroupQueryAttention", change)
    set_opset(pair.decoder, 23)


def rotary_inside(pair: Pair) -> None:
    """GroupQueryAttention rotates by itself: do_rotary, and the tables among its inputs."""
    graph = pair.decoder.graph
    made = {node.output[0]: node for node in graph.node}
    gone = set()
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            tables = made[node.input[0]].input[2:4]
            for place in (0, 1):
                rotary = made[node.input[place]]
                node.input[place] = rotary.input[0]
                gone.add(rotary.output[0])
            node.input[7], node.input[8] = tables
            next(each for each in node.attribute if each.name == "do_rotary").i = 1
    for node in [node for node in graph.node if node.output[0] in gone]:
        graph.node.remove(node)


# Attention of KV-shared layers, which the export has in plain operators


def _shared_cores(pair: Pair) -> list[tuple[NodeProto, NodeProto, str, str, int]]:
    """Of each KV-shared layer: the first and the last node of its attention, its present key and value, its number."""
    by_name = {node.name: node for node in pair.decoder.graph.node}
    cores = []
    for name, node in by_name.items():
        if name.endswith("/attn/shared/q_reshape"):
            base, layer = name.removesuffix("/q_reshape"), int(name.split(".")[1].split("/")[0])
            value = by_name[f"{base}/MatMul_1"].input[1]
            cores.append((node, by_name[f"{base}/output/Reshape"], value.replace("value", "key"), value, layer))
    return cores


def _replace_cores(pair: Pair, make: Callable[[Nodes, str, str, str, int, str], None]) -> None:
    """Put what `make` makes of (nodes, query, key, value, layer, output) in place of each KV-shared layer's attention."""
    graph = pair.decoder.graph
    for first, last, key, value, layer in _shared_cores(pair):
        nodes = Nodes(graph, f"/model/layers.{layer}/attn/rewritten")
        make(nodes, first.input[0], key, value, layer, last.output[0])
        base = first.name.removesuffix("q_reshape")
        scope = ("q_reshape", "q_transpose", "k_transpose", "MatMul", "scores/", "Softmax", "Transpose", "output/")
        held: list[NodeProto] = []
        for node in [NodeProto.FromString(node.SerializeToString()) for node in graph.node]:
            inside = node.name.startswith(base) and node.name.removeprefix(base).startswith(scope)
            held += [] if inside and node.output[0] != last.output[0] else nodes.made if inside else [node]
        del graph.node[:]
        graph.node.extend(held)
    _drop_what_nothing_reads(graph)


def _drop_what_nothing_reads(graph: GraphProto) -> None:
    """What only the attention that is gone has read, as no exporter writes it."""
    results = {value.name for value in graph.output}
    while True:
        read = results.union(*(node.input for node in graph.node))
        unread = [node for node in graph.node if not read & set(node.output)]
        if not unread:
            return
        for node in unread:
            graph.node.remove(node)


def _windows(pair: Pair) -> list[int | None]:
    kinds = pair.text["layer_types"]
    return [pair.text["sliding_window"] if kind == "sliding_attention" else None for kind in kinds]


def multi_head(pair: Pair) -> None:
    """MultiHeadAttention over the source layer's present, repeated for each query head, with a bias for its mask."""
    heads, windows = pair.text["num_attention_heads"], _windows(pair)

    def make(nodes: Nodes, query: str, key: str, value: str, layer: int, output: str) -> None:
        repeated = []
        for cache in (key, value):
            shape = nodes("Concat", [nodes("Shape", [cache], end=1), nodes.constant([heads]),
                                     nodes("Shape", [cache], start=2)], axis=0)  # fmt: skip
            repeated.append(nodes("Expand", [cache, shape]))
        visible = _visible(nodes, query, windows[layer] or 2**30)
        bias = nodes("Where", [visible, nodes.constant(0, np.float32), nodes.constant(LOWEST, np.float32)])
        inputs = [query, *repeated, "", "", bias]
        nodes("MultiHeadAttention", inputs, output, MICROSOFT, num_heads=heads, scale=1.0)

    _replace_cores(pair, make)


def grouped_without_rows(pair: Pair) -> None:
    """GroupQueryAttention with empty keys and values, the source layer's present as its past."""
    _grouped(pair, None)


def grouped_recomputing(pair: Pair) -> None:
    """GroupQueryAttention that appends the source layer's new rows to the source layer's past once more."""
    _grouped(pair, {present: node for node in pair.decoder.graph.node for present in node.output[1:2]})


def _grouped(pair: Pair, sources: dict[str, NodeProto] | None) -> None:
    windows = _windows(pair)
    like = next(node for node in pair.decoder.graph.node if node.op_type == "GroupQueryAttention")
    kv_heads = attribute(like, "kv_num_heads")

    def make(nodes: Nodes, query: str, key: str, value: str, layer: int, output: str) -> None:
        size = pair.text["head_dim"] if windows[layer] else pair.text["global_head_dim"]
        source = sources.get(key) if sources is not None else None
        if source is not None:
            caches = list(source.input[1:5])
        else:
            ends = nodes.constant([0, kv_heads * size])
            empty = nodes("Slice", [query, nodes.constant([0, 0]), ends, nodes.constant([1, 2])])
            caches = [empty, empty, key, value]
        inputs = [query, *caches, *like.input[5:7], "", "", "", like.input[10]]
        nodes("GroupQueryAttention", inputs, output, MICROSOFT)
        fused = nodes.made[-1]
        fused.attribute.extend(like.attribute)
        next(each for each in fused.attribute if each.name == "local_window_size").i = windows[layer] or -1
        if source is not None:
            fused.output.extend(f"{output}/unread_{kind}" for kind in ("key", "value"))

    _replace_cores(pair, make)


# Norms


def norm_23(pair: Pair) -> None:
    """ONNX's own RMSNormalization."""
    for node in pair.decoder.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type = "RMSNormalization"
    set_opset(pair.decoder, 23)


def norm_decomposed(pair: Pair) -> None:
    """Pow, ReduceMean, Add, Sqrt, Div, Mul."""

    def change(node: NodeProto, nodes: Nodes) -> None:
        x, scale = node.input
        square = nodes("Pow", [x, nodes.constant(2, np.float32)])
        mean = nodes("ReduceMean", [square, nodes.constant([-1])], keepdims=1)
        root = nodes("Sqrt", [nodes("Add", [mean, nodes.constant(attribute(node, "epsilon"), np.float32)])])
        nodes("Mul", [nodes("Div", [x, root]), scale], node.output[0])

    rewritten(pair.decoder.graph, "SimplifiedLayerNormalization", change)


# Versions and containers


def opsets(embed: int, decoder: int) -> Rewrite:
    def change(pair: Pair) -> None:
        set_opset(pair.embed, embed)
        set_opset(pair.decoder, decoder)

    return change


def ir(version: int) -> Rewrite:
    def change(pair: Pair) -> None:
        for model in pair.both:
            model.ir_version = version

    return change


def initializers_as_inputs(pair: Pair) -> None:
    """Every initializer is an input with a default, as IR 3 had it."""
    for model in pair.both:
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def constants(pair: Pair) -> None:
    """Small initializers are Constant nodes."""
    for model in pair.both:
        graph = model.graph
        small = [tensor for tensor in graph.initializer if not tensor.external_data]
        nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in small]
        held = [NodeProto.FromString(node.SerializeToString()) for node in (*nodes, *graph.node)]
        for tensor in small:
            graph.initializer.remove(tensor)
        del graph.node[:]
        graph.node.extend(held)


def functions(pair: Pair) -> None:
    """Gelu and the scale of embeddings are functions of the model."""
    for model, kind in ((pair.decoder, "Gelu"), (pair.embed, "Mul")):
        inner = ["x"] if kind == "Gelu" else ["x", "y"]
        attributes = next(list(node.attribute) for node in model.graph.node if node.op_type == kind)
        body = helper.make_node(kind, inner, ["z"])
        body.attribute.extend(attributes)
        version = next(entry.version for entry in model.opset_import if not entry.domain)
        imports = [helper.make_operatorsetid("", version)]
        model.functions.append(helper.make_function("local", f"My{kind}", inner, ["z"], [body], imports))
        model.opset_import.append(helper.make_operatorsetid("local", 1))
        for node in model.graph.node:
            if node.op_type == kind:
                node.op_type, node.domain = f"My{kind}", "local"
                del node.attribute[:]


def bodies(pair: Pair) -> None:
    """The soft cap of the logits and the scale of embeddings stand in the body of an If that captures their input."""
    for model, kind in ((pair.decoder, "Tanh"), (pair.embed, "Mul")):

        def change(node: NodeProto, nodes: Nodes) -> None:
            branches = []
            for word in ("then", "else"):
                name = f"{node.output[0]}/{word}"
                inner = helper.make_node(node.op_type, list(node.input), [name])
                value = helper.make_tensor_value_info(name, FLOAT, None)
                branches.append(helper.make_graph([inner], word, [], [value]))
            always = nodes.constant(True, np.bool_)
            nodes("If", [always], node.output[0], then_branch=branches[0], else_branch=branches[1])

        rewritten(model.graph, kind, change)


# Weights


def _norm_scales(pair: Pair, change: Callable[[Nodes, NodeProto, TensorProto], None]) -> None:
    tensors = {tensor.name: tensor for tensor in pair.decoder.graph.initializer if not tensor.external_data}

    def one(node: NodeProto, nodes: Nodes) -> None:
        if (tensor := tensors.get(node.input[1])) is not None:
            change(nodes, node, tensor)

    rewritten(pair.decoder.graph, "SimplifiedLayerNormalization", one)


def quantised_8(pair: Pair) -> None:
    """The scales of norms are 8-bit codes behind DequantizeLinear, worth the same."""

    def change(nodes: Nodes, node: NodeProto, tensor: TensorProto) -> None:
        value = numpy_helper.to_array(tensor)
        codes = [nodes.constant(np.full(value.shape, 64), np.int8), nodes.constant(value / 64, np.float32)]
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        nodes(node.op_type, [node.input[0], nodes("DequantizeLinear", codes, axis=0)], node.output[0], **attributes)

    _norm_scales(pair, change)


def _matrices(pair: Pair, change: Callable[[Nodes, str, TensorProto], str]) -> None:
    """Each product of the layers multiplies by what `change` makes of its matrix, a value by name."""
    tensors = {tensor.name: tensor for tensor in pair.decoder.graph.initializer if tensor.external_data}

    def one(node: NodeProto, nodes: Nodes) -> None:
        if "/layers." in node.name and (tensor := tensors.get(node.input[1])) is not None:
            nodes("MatMul", [node.input[0], change(nodes, node.name, tensor)], node.output[0])

    rewritten(pair.decoder.graph, "MatMul", one)


def rounded_on_the_way(pair: Pair) -> None:
    """The layers' matrices go through QuantizeLinear and DequantizeLinear, as training with quantisation leaves them."""

    def change(nodes: Nodes, _: str, tensor: TensorProto) -> str:
        steps = [nodes.constant(1 / 64, np.float32), nodes.constant(0, np.int8)]
        return nodes("DequantizeLinear", [nodes("QuantizeLinear", [tensor.name, *steps]), *steps])

    _matrices(pair, change)


def quantised_matrices(pair: Pair) -> None:
    """The layers' matrices are 8-bit codes behind DequantizeLinear, with a scale for each column."""
    old: set[str] = set()

    def change(nodes: Nodes, _: str, tensor: TensorProto) -> str:
        values = numpy_helper.to_array(tensor, str(pair.folder))
        scale = np.maximum(np.abs(values).max(0) / 127, 1e-9).astype(np.float32)
        old.add(tensor.name)
        codes = nodes.constant(np.rint(values / scale), np.int8)
        return nodes("DequantizeLinear", [codes, nodes.constant(scale, np.float32)], axis=1)

    _matrices(pair, change)
    graph = pair.decoder.graph
    held = [tensor for tensor in graph.initializer if tensor.name not in old]
    del graph.initializer[:]
    graph.initializer.extend(held)


def bfloat_16_everywhere(pair: Pair) -> None:
    """What is FLOAT16 is BFLOAT16: interface, weights, casts."""
    half, brain = TensorProto.FLOAT16, TensorProto.BFLOAT16
    for model in pair.both:
        graph = model.graph
        for tensor in graph.initializer:
            if tensor.data_type == half:
                tensor.data_type = brain
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == half:
                value.type.tensor_type.elem_type = brain
        for node in graph.node:
            for each in node.attribute:
                if each.name in ("to", "dtype") and each.i == half:
                    each.i = brain


def bfloat_16(pair: Pair) -> None:
    """The scales of norms are BFLOAT16, and cast to FLOAT: other numbers than the export's."""

    def change(nodes: Nodes, node: NodeProto, tensor: TensorProto) -> None:
        name = f"{node.name}/bfloat16"
        values = numpy_helper.to_array(tensor)
        made = helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, values.tolist())
        pair.decoder.graph.initializer.append(made)
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        cast = nodes("Cast", [name], to=FLOAT)
        nodes(node.op_type, [node.input[0], cast], node.output[0], **attributes)

    _norm_scales(pair, change)


# Inputs


def _read_through(model: ModelProto, name: str, kind: int, to: int) -> None:
    """An input of another dtype, cast to what the graph reads."""
    (value,) = [value for value in model.graph.input if value.name == name]
    model.graph.value_info.append(value)
    model.graph.value_info[-1].name = f"{name}/wide"
    value.type.tensor_type.elem_type = kind
    for node in model.graph.node:
        node.input[:] = [f"{name}/wide" if each == name else each for each in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", [name], [f"{name}/wide"], f"{name}/Cast", to=to))


def mask_32(pair: Pair) -> None:
    _read_through(pair.decoder, "attention_mask", INT32, INT64)


def ids_32(pair: Pair) -> None:
    _read_through(pair.embed, "input_ids", INT32, INT64)


def positions_inside(pair: Pair) -> None:
    """position_ids are counted in the mask; there is no such input."""
    graph = pair.decoder.graph
    (value,) = [value for value in graph.input if value.name == "position_ids"]
    graph.input.remove(value)
    nodes = Nodes(graph, "/model/positions")
    one = nodes.constant(1)
    counted = nodes("CumSum", ["attention_mask", one])
    places = nodes("Max", [nodes("Sub", [counted, one]), nodes.constant(0)])
    start = nodes("Neg", [nodes("Shape", ["inputs_embeds"], start=1, end=2)])
    nodes("Slice", [places, start, nodes.constant([2**62]), nodes.constant([1])], "position_ids")
    held = [NodeProto.FromString(node.SerializeToString()) for node in (*nodes.made, *graph.node)]
    del graph.node[:]
    graph.node.extend(held)


def logits_padded(pair: Pair) -> None:
    """The logits have 32 columns more than the vocabulary, far below all others."""
    graph = pair.decoder.graph
    nodes = Nodes(graph, "/lm_head/padded")
    (maker,) = [node for node in graph.node if "logits" in node.output]
    maker.output[0] = "logits/own"
    inputs = ["logits/own", nodes.constant([0, 0, 0, 0, 0, PADDING]), nodes.constant(-1e4, np.float32)]
    nodes("Pad", inputs, "logits")
    graph.node.extend(nodes.made)
    (logits,) = [value for value in graph.output if value.name == "logits"]
    logits.type.tensor_type.shape.dim[2].dim_value += PADDING


PADDING = 32
"""Rows that no token has."""


def tables_padded(pair: Pair) -> None:
    """The tables of embeddings have rows that no token has; the logits have none."""
    for tensor in pair.embed.graph.initializer:
        if tensor.external_data:
            values = numpy_helper.to_array(tensor, str(pair.folder))
            padded = np.concatenate([values, np.full((PADDING, values.shape[1]), 7, values.dtype)])
            tensor.CopyFrom(numpy_helper.from_array(padded, tensor.name))


def logits_and_size_padded(pair: Pair) -> None:
    """The logits, and config.json's vocabulary, are wider than the tables."""
    logits_padded(pair)
    pair.text["vocab_size"] += PADDING
    (pair.folder.parent / "config.json").write_text(json.dumps(pair.config))
