"""A two-graph export in miniature: every form of attention that the exporter writes, and numbers that run.

Four layers: 0 sliding (GroupQueryAttention) and 1 full (unfused) have caches of their own, 2 and 3 share them. Every
operator is in ONNX Runtime's CPU provider, weights are random and inline, sizes are the smallest that work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_graph, make_model, make_node, make_operatorsetid, make_tensor_value_info
from onnx.numpy_helper import from_array
from places import TINY

from passes.base import Outcome, Pass, apply
from surgery.architecture import Architecture, architecture
from surgery.errors import PassError
from surgery.graph.model import Model

Array = NDArray[Any]
Shape = Sequence[str | int | None]

HIDDEN, VOCAB, HEADS, KV_HEADS, PER_LAYER, LAYERS = 16, 32, 2, 1, 4, 4
HEAD_SIZE = {0: 8, 1: 16}
OWNER = {0: 0, 1: 1, 2: 0, 3: 1}
IR_VERSION, OPSET = 10, 21
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32

CONFIG = {
    "model_type": "gemma4_text", "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_SIZE[0], "global_head_dim": HEAD_SIZE[1],
    "num_kv_shared_layers": 2, "sliding_window": 64, "hidden_size_per_layer_input": PER_LAYER,
    "max_position_embeddings": 128,
}  # fmt: skip


def arch(**changes: Any) -> Architecture:
    return architecture({**CONFIG, **changes})


@dataclass
class Writer:
    """Collects nodes and initializers. `op` returns the name of the node's first output."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def op(self, kind: str, name: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any) -> str:
        outputs = outputs or [f"{name}/output_0"]
        self.nodes.append(make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def ints(self, values: int | list[int]) -> str:
        name = f"/model/constants/INT64/{values}"
        self.initializers[name] = from_array(np.array(values, dtype=np.int64), name)
        return name

    def floats(self, name: str, *shape: int) -> str:
        values = self.rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[0] if shape else 1))
        self.initializers[name] = from_array(values, name)
        return name

    def scalar(self, name: str, value: float) -> str:
        self.initializers[name] = from_array(np.array(value, dtype=np.float32), name)
        return name

    def model(self, name: str, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
        graph = make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))
        opsets = [make_operatorsetid("", OPSET), make_operatorsetid("com.microsoft", 1)]
        return make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="small")


def embed_tokens(*, per_layer: bool = True) -> ModelProto:
    w = Writer(rng=np.random.default_rng(3))
    token = w.op(
        "Gather", "/model/embed_tokens/Gather", [w.floats("model.embed_tokens.weight", VOCAB, HIDDEN), "input_ids"]
    )
    w.op("Mul", "/model/embed_tokens/Mul", [token, w.scalar("embed_scale", 4.0)], ["inputs_embeds"])
    outputs = [make_tensor_value_info("inputs_embeds", FLOAT, ["batch", "tokens", HIDDEN])]
    if per_layer:
        table = w.floats("model.embed_tokens_per_layer.weight", VOCAB, LAYERS * PER_LAYER)
        rows = w.op("Gather", "/model/embed_tokens_per_layer/Gather", [table, "input_ids"])
        shape = w.ints([0, 0, LAYERS, PER_LAYER])
        w.op("Reshape", "/model/embed_tokens_per_layer/Reshape", [rows, shape], ["per_layer_inputs"])
        outputs.append(make_tensor_value_info("per_layer_inputs", FLOAT, ["batch", "tokens", LAYERS, PER_LAYER]))
    return w.model("embed", [make_tensor_value_info("input_ids", INT64, ["batch", "tokens"])], outputs)


def decoder(*, per_layer: bool = True, mask: int = INT64, keep: bool = True) -> ModelProto:
    w = Writer()
    bias, seqlens, total = _masks(w, mask)
    hidden = w.op("Identity", "/model/graph_inputs/inputs_embeds/Identity", ["inputs_embeds"])
    for layer in range(LAYERS):
        hidden = _layer(w, layer, hidden, bias, seqlens, total, per_layer)
    if keep:
        negative = w.op("Neg", "/lm_head/num_logits_to_keep/Neg", ["num_logits_to_keep"])
        starts = w.op("Unsqueeze", "/lm_head/num_logits_to_keep/Unsqueeze", [negative, w.ints([0])])
        bounds = [hidden, starts, w.ints([2**31 - 1]), w.ints([1])]
        hidden = w.op("Slice", "/lm_head/num_logits_to_keep/Slice", bounds)
    w.op("MatMul", "/lm_head/MatMul", [hidden, w.floats("lm_head.weight", HIDDEN, VOCAB)], ["logits"])

    def cache(name: str, tokens: str) -> list[ValueInfoProto]:
        return [
            make_tensor_value_info(f"{name}.{layer}.{kind}", FLOAT, ["batch_size", KV_HEADS, tokens, size])
            for layer, size in HEAD_SIZE.items()
            for kind in ("key", "value")
        ]

    inputs = [
        make_tensor_value_info("inputs_embeds", FLOAT, ["batch_size", "sequence_length", HIDDEN]),
        make_tensor_value_info("attention_mask", mask, ["batch_size", "total_sequence_length"]),
        make_tensor_value_info("position_ids", INT64, ["batch_size", "sequence_length"]),
    ]
    if keep:
        inputs.append(make_tensor_value_info("num_logits_to_keep", INT64, []))
    if per_layer:
        shape: Shape = ["batch_size", "sequence_length", LAYERS, PER_LAYER]
        inputs.append(make_tensor_value_info("per_layer_inputs", FLOAT, shape))
    tokens = "num_logits_to_keep" if keep else "sequence_length"
    logits = make_tensor_value_info("logits", FLOAT, ["batch_size", tokens, VOCAB])
    proto = w.model(
        "decoder",
        [*inputs, *cache("past_key_values", "past_sequence_length")],
        [logits, *cache("present", "total_sequence_length")],
    )
    if keep:
        sliced = make_tensor_value_info(
            "/lm_head/num_logits_to_keep/Slice/output_0", FLOAT, ["batch_size", tokens, HIDDEN]
        )
        proto.graph.value_info.append(sliced)
    return proto


def _masks(w: Writer, mask: int) -> tuple[str, str, str]:
    """Additive bias [B,1,S,T] of padding and causality; seqlens_k and total length for GroupQueryAttention."""
    root, zero, one = "/model/masks", w.ints(0), w.ints(1)
    whole = "attention_mask" if mask == INT64 else w.op("Cast", f"{root}/ToInt64", ["attention_mask"], to=INT64)
    sizes = w.op("Shape", f"{root}/Shape", [whole])
    total = w.op("Gather", f"{root}/Total", [sizes, one])
    count = w.op("Gather", f"{root}/Sequence", [w.op("Shape", f"{root}/ShapeIds", ["position_ids"]), one])
    columns = w.op("Range", f"{root}/Columns", [zero, total, one])
    rows = w.op("Range", f"{root}/Rows", [w.op("Sub", f"{root}/Past", [total, count]), total, one])
    rows = w.op("Unsqueeze", f"{root}/RowsColumn", [rows, w.ints([1])])
    future = w.op("Greater", f"{root}/Future", [columns, rows])
    padded = w.op("Equal", f"{root}/Padded", [w.op("Unsqueeze", f"{root}/Mask4", [whole, w.ints([1, 2])]), zero])
    hidden = w.op("Or", f"{root}/Hidden", [future, padded])
    bias = w.op("Where", f"{root}/Bias", [hidden, w.scalar("lowest", -1e9), w.scalar("nought", 0.0)])
    last = w.op("Cast", f"{root}/Last", [w.op("Sub", f"{root}/TotalLess1", [total, one])], to=INT32)
    batch = w.op("Slice", f"{root}/Batch", [sizes, w.ints([0]), w.ints([1])])
    target = w.op("Concat", f"{root}/Target", [batch, w.ints([1])], axis=0)
    seqlens = w.op("Expand", f"{root}/Seqlens", [last, target])
    return bias, seqlens, w.op("Cast", f"{root}/Total32", [total], to=INT32)


def _layer(w: Writer, layer: int, hidden: str, bias: str, seqlens: str, total: str, per_layer: bool) -> str:
    root, owner = f"/model/layers.{layer}/attn", OWNER[layer]
    size = HEAD_SIZE[owner]

    def project(name: str, width: int) -> str:
        table = w.floats(f"model.layers.{layer}.attn.{name}_proj.weight", HIDDEN, width)
        return w.op("MatMul", f"{root}/{name}_proj/MatMul", [hidden, table])

    def heads(name: str, flat: str, count: int) -> str:
        split = w.op("Reshape", f"{root}/{name}_reshape", [flat, w.ints([0, 0, count, size])])
        return w.op("Transpose", f"{root}/{name}_transpose", [split], perm=[0, 2, 1, 3])

    caches = {kind: (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}") for kind in ("key", "value")}
    query = project("q", HEADS * size)
    if owner == layer and layer == 0:
        key, value = project("k", KV_HEADS * size), project("v", KV_HEADS * size)
        pasts = [caches["key"][0], caches["value"][0]]
        mixed = w.op(
            "GroupQueryAttention", f"{root}/GroupQueryAttention",
            [query, key, value, *pasts, seqlens, total, "", "", "", bias],
            [f"{root}/GroupQueryAttention/output_0", caches["key"][1], caches["value"][1]],
            domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, scale=1.0, local_window_size=-1,
        )  # fmt: skip
    else:
        if owner == layer:
            for kind, (past, present) in caches.items():
                new = heads(kind, project(kind[0], KV_HEADS * size), KV_HEADS)
                w.op("Concat", f"{root}/manual/{kind}/Concat", [past, new], [present], axis=2)
        keys = w.op("Transpose", f"{root}/manual/key_t", [f"present.{owner}.key"], perm=[0, 1, 3, 2])
        scores = w.op("MatMul", f"{root}/manual/Scores", [heads("q", query, HEADS), keys])
        masked = w.op("Add", f"{root}/manual/Masked", [scores, bias])
        weights = w.op("Softmax", f"{root}/manual/Softmax", [masked], axis=-1)
        mixed = w.op("MatMul", f"{root}/manual/Mixed", [weights, f"present.{owner}.value"])
        mixed = w.op("Transpose", f"{root}/manual/Back", [mixed], perm=[0, 2, 1, 3])
        mixed = w.op("Reshape", f"{root}/manual/Flat", [mixed, w.ints([0, 0, HEADS * size])])
    out = w.floats(f"model.layers.{layer}.attn.o_proj.weight", HEADS * size, HIDDEN)
    hidden = w.op("Add", f"{root}/Residual", [hidden, w.op("MatMul", f"{root}/o_proj/MatMul", [mixed, out])])
    if per_layer:
        part = w.op("Gather", f"/model/layers.{layer}/per_layer/Gather", ["per_layer_inputs", w.ints(layer)], axis=2)
        table = w.floats(f"model.layers.{layer}.per_layer_projection.weight", PER_LAYER, HIDDEN)
        part = w.op("MatMul", f"/model/layers.{layer}/per_layer/MatMul", [part, table])
        hidden = w.op("Add", f"/model/layers.{layer}/per_layer/Add", [hidden, part])
    return hidden


# Files and numbers


def opened(folder: Path, proto: ModelProto, name: str = "decoder.onnx", **config: Any) -> Model:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(proto.SerializeToString())
    return Model.open(folder / name, arch(**config))


def applied(folder: Path, proto: ModelProto, *steps: Pass, **config: Any) -> tuple[Model, Outcome]:
    """The model after these passes, and what the last one did; the model that was given is as it was."""
    model = opened(folder, proto, **config)
    before = model.fingerprint()
    try:
        result, outcomes = apply(model, steps)
    finally:
        assert model.fingerprint() == before, "the model that was given changed"
    return result, outcomes[-1]


def refused(folder: Path, proto: ModelProto, step: Pass, sentence: str, **config: Any) -> None:
    """The pass refuses the model in one sentence."""
    with pytest.raises(PassError, match=sentence) as raised:
        applied(folder, proto, step, **config)
    assert "\n" not in str(raised.value)


def run(proto: ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    used = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in used}), strict=True))


def feeds(mask: Array, past: int = 0, *, seed: int = 0, layers: tuple[int, ...] = (0, 1)) -> dict[str, Array]:
    """Inputs for a mask [B,T] of which the last T - past columns are new tokens."""
    rng = np.random.default_rng(seed)
    batch, total = mask.shape
    given: dict[str, Array] = {
        "input_ids": rng.integers(0, VOCAB, (batch, total - past)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(past, total), (batch, 1)),
        "num_logits_to_keep": np.array(0, dtype=np.int64),
    }
    for layer in layers:
        for kind in ("key", "value"):
            shape = (batch, KV_HEADS, past, HEAD_SIZE[OWNER[layer]])
            given[f"past_key_values.{layer}.{kind}"] = rng.standard_normal(shape).astype(np.float32)
    return given


def run_pair(embed: ModelProto, decode: ModelProto, given: dict[str, Array]) -> dict[str, Array]:
    """What the two-graph loop computes: the truth for a merged graph."""
    return run(decode, given | run(embed, given))


def graph_of(
    *nodes: NodeProto, inputs: Mapping[str, tuple[int, Shape]], outputs: Mapping[str, tuple[int, Shape]]
) -> GraphProto:
    """A graph out of nodes and {name: (dtype, shape)}, for wiring that need not run."""
    given, made = ([make_tensor_value_info(n, t, s) for n, (t, s) in side.items()] for side in (inputs, outputs))
    return make_graph(nodes, "wiring", given, made)


def externalised(proto: ModelProto, file: Path) -> ModelProto:
    """Move the larger initializers to a data file."""
    with file.open("wb") as writer:
        for tensor in proto.graph.initializer:
            if len(tensor.raw_data) < 256:
                continue
            offset, length = writer.tell(), writer.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", file.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    return proto


def write_export(folder: Path) -> Path:
    """An export of the smallest graphs, in the community's layout."""
    (folder / "onnx").mkdir(parents=True)
    for name, proto in (
        ("embed_tokens_q4.onnx", embed_tokens()),
        ("decoder_model_merged_q4.onnx", decoder()),
    ):
        data = folder / "onnx" / f"{name}_data"
        (folder / "onnx" / name).write_bytes(externalised(proto, data).SerializeToString())
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": CONFIG, **ids}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5], "do_sample": True, "top_k": 64}))
    return folder
