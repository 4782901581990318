"""The fixtures: shaped as the community's exports are known to be, and numerically Gemma 4.

The reference numbers in fixtures/data come from Hugging Face transformers 5.23.0 (Gemma4ForCausalLM, float32,
eager attention); `*_q4_*` from the same model run on dequantised weights.
"""

from __future__ import annotations

import dataclasses
import filecmp
import functools
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from exhaustive import in_full, some
from onnx import TensorProto
from two_sessions import TOLERANCE, Pair, Trace, attributes, prompts, reference, stored_name

import fixtures
from fixtures import FIXTURES, PRECISIONS, FixtureError, Reading, build, external_data_sizes
from fixtures.__main__ import main, parse_reading
from fixtures.build import graphs
from fixtures.embed import embedding_scale
from fixtures.precision import Codes
from fixtures.quantize import dequantise, pack, quantise
from fixtures.zoo import DATA

ort = pytest.importorskip("onnxruntime")

ROOT = Path(fixtures.__file__).parent
COMMITTED = ROOT / "tiny-e2b"
TINIES = ("tiny-e2b", "tiny-e4b", "tiny-31b", "tiny-12b", "tiny-26b-a4b")
DENSE = tuple(name for name in TINIES if not FIXTURES[name].architecture.num_experts)
"""Where rounding moves the numbers a little: a router that rounds may choose another expert, which moves them much."""
STEPS = 24


# Running a pair


def run(pair: Pair, ids: np.ndarray, forced: np.ndarray, chunk: int = 0) -> Trace:
    """Prefill `ids`, then feed the tokens of `forced`; `tokens` are what greedy decoding would choose."""
    pair.start()
    chunk = chunk or len(ids)
    prefill = np.concatenate([pair.step(ids[i : i + chunk])[0] for i in range(0, len(ids), chunk)])
    decode = np.stack([pair.step(token, keep=1)[0, -1] for token in forced])
    tokens = np.argmax(np.concatenate([prefill[-1:], decode[:-1]]), axis=-1)
    return Trace(prefill, decode, tokens)


def run_all(pair: Pair, name: str, chunk: int = 0) -> list[Trace]:
    """Every prompt of the reference `name`, along the reference's own continuation."""
    steps = zip(prompts(name), reference(name), strict=True)
    return [run(pair, ids, trace.tokens, chunk) for ids, trace in steps]


@functools.cache
def traces_of(directory: Path, precision: str, name: str) -> list[Trace]:
    """As `run_all`, once for each pair of a folder that no test changes."""
    return run_all(Pair(directory, precision), name)


def distance(one: list[Trace], other: list[Trace]) -> float:
    return max(a.distance(b) for a, b in zip(one, other, strict=True))


def same_tokens(one: list[Trace], other: list[Trace]) -> bool:
    return all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each tiny fixture in every precision."""
    root = tmp_path_factory.mktemp("exports")
    for name in TINIES:
        build(name, "all", root / name)
    return {name: root / name for name in TINIES}


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    return load("decoder_model_merged_q4f16")


def load(stem: str) -> onnx.ModelProto:
    return onnx.load(COMMITTED / "onnx" / f"{stem}.onnx", load_external_data=False)


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


# The proof: transformers' logits


@pytest.mark.parametrize("name", TINIES)
def test_fp32_pair_gives_the_logits_of_transformers(name: str, exports: dict[str, Path]) -> None:
    traces = traces_of(exports[name], "fp32", stored_name(name))
    expected = reference(stored_name(name))
    assert distance(traces, expected) < TOLERANCE
    assert same_tokens(traces, expected)


def test_q4_pair_gives_the_logits_of_transformers_on_dequantised_weights() -> None:
    traces = traces_of(COMMITTED, "q4", "tiny_e2b_q4")
    expected = reference("tiny_e2b_q4")
    assert distance(traces, expected) < TOLERANCE
    assert same_tokens(traces, expected)


@pytest.mark.parametrize("name", TINIES)
def test_embeddings_are_those_of_transformers(name: str, exports: dict[str, Path]) -> None:
    with np.load(DATA / f"{stored_name(name)}_ref.npz") as stored:
        found = Pair(exports[name], "fp32").embeddings(stored["p4_ids"][None])
        for key, value in found.items():
            np.testing.assert_allclose(value[0], stored[f"p4_{key}"], rtol=1e-6)


def test_per_layer_inputs_carry_both_factors() -> None:
    """hidden^-0.5 and 2^-0.5 vanish in the norms behind them: they show in intermediate values alone."""
    with np.load(DATA / "tiny_e2b_weights.npz") as weights, np.load(DATA / "tiny_e2b_ref.npz") as stored:
        embeds, tokens = stored["p4_inputs_embeds"], stored["p4_per_layer_inputs"]
        projection = weights["model.per_layer_model_projection.weight"]
        scale = weights["model.per_layer_projection_norm.weight"]
        ids = stored["p4_ids"]
    context = (embeds.astype(np.float64) @ projection.T).reshape(tokens.shape) * 64**-0.5
    normal = context / np.sqrt((context**2).mean(axis=-1, keepdims=True) + 1e-6) * scale
    expected = {
        "/model/per_layer_projection/Reshape/output_0": context,
        "/model/per_layer_projection_norm/output_0": normal,
        "/model/per_layer_inputs/Mul/output_0": (normal + tokens) * 2**-0.5,
    }
    found = intermediate_values(ids, list(expected))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-4, atol=1e-5)


def intermediate_values(ids: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Values inside the fp32 decoder of the committed fixture, for one prefill of `ids`."""
    path = COMMITTED / "onnx" / "decoder_model_merged.onnx"
    model = onnx.load(path)
    known = {value.name: value for value in model.graph.value_info}
    del model.graph.output[1:]
    model.graph.output.extend(known[name] for name in names)
    pair = Pair(COMMITTED, "fp32")
    count = len(ids)
    feeds = {
        **pair.embeddings(ids[None]),
        **pair.past,
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
        "num_logits_to_keep": np.array(1, np.int64),
    }
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_prefill_in_chunks(chunk: int) -> None:
    traces = run_all(Pair(COMMITTED, "fp32"), "tiny_e2b", chunk)
    assert distance(traces, reference("tiny_e2b")) < TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", TINIES)
def test_padded_batch(name: str, side: str, exports: dict[str, Path]) -> None:
    """Two prompts of 9 and 13 tokens: each gets its own logits, in prefill and in the steps after it.

    Padding is masked by the bias alone, so it may stand on either side; positions count real tokens only.
    """
    pair = Pair(exports[name], "fp32")
    traces = [reference(stored_name(name))[i] for i in (3, 4)]
    rows = [prompts(stored_name(name))[i] for i in (3, 4)]
    width = max(map(len, rows))
    ids, mask = np.zeros((2, width), np.int64), np.zeros((2, width), np.int64)
    places = [slice(0, len(row)) if side == "right" else slice(width - len(row), width) for row in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = row, 1
    pair.start(batch=2)
    logits = pair.step(ids, mask=mask, positions=np.maximum(mask.cumsum(axis=1) - 1, 0))
    for i, place in enumerate(places):
        assert np.abs(logits[i, place] - traces[i].prefill).max() < TOLERANCE
    if side == "right":
        return  # the window of a sliding layer counts cache slots, so padding between tokens narrows it
    for step in range(4):
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        tokens = np.array([[trace.tokens[step]] for trace in traces])
        logits = pair.step(tokens, keep=1, mask=mask, positions=mask.sum(axis=1, keepdims=True) - 1)
        for i in range(2):
            assert np.abs(logits[i, -1] - traces[i].decode[step]).max() < TOLERANCE


# Other precisions


@pytest.mark.parametrize(("name", "precision"), some(itertools.product(TINIES, ("q4", "quantized")), 3))
def test_quantised_pair_equals_the_fp32_pair_of_its_dequantised_weights(
    name: str, precision: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    """Only the storage differs: no activation is quantised (no accuracy_level)."""
    fixture = FIXTURES[name]
    weights = tmp_path / "weights.npz"
    arrays = dequantised(DATA / fixture.checkpoint, PRECISIONS[precision].bits)
    np.savez(weights, allow_pickle=False, **arrays)
    plain = dataclasses.replace(fixture, checkpoint=str(weights))
    (tmp_path / "onnx").mkdir()
    for graph in graphs(plain, PRECISIONS["fp32"], Reading(), plain.weights()):
        graph.write(tmp_path / "onnx")
    expected = run_all(Pair(tmp_path, "fp32"), stored_name(name))
    traces = traces_of(exports[name], precision, stored_name(name))
    assert distance(traces, expected) < TOLERANCE
    assert same_tokens(traces, expected)


def dequantised(path: Path, bits: int) -> dict[str, np.ndarray]:
    """The checkpoint with every matrix rounded to its codes."""
    with np.load(path) as stored:
        return {name: round_trip(stored[name].astype(np.float32), Codes(bits)) for name in stored.files}


def round_trip(array: np.ndarray, codes: Codes) -> np.ndarray:
    return dequantise(quantise(array, codes), codes, array.shape[1]) if array.ndim == 2 else array


# Largest |difference| of a logit, logits up to 17: measured 0.045 .. 0.080 and 0.080 .. 0.104.
HALF_TOLERANCE = {("fp16", "fp32"): 0.12, ("q4f16", "q4"): 0.15}


@pytest.mark.parametrize(
    ("name", "half", "single"), some([(name, *pair) for name in DENSE for pair in HALF_TOLERANCE], 3)
)
def test_float16_pair_is_close_to_the_float32_one(name: str, half: str, single: str, exports: dict[str, Path]) -> None:
    expected, traces = (traces_of(exports[name], precision, stored_name(name)) for precision in (single, half))
    assert all(np.isfinite(trace.prefill).all() and np.isfinite(trace.decode).all() for trace in traces)
    assert distance(traces, expected) < HALF_TOLERANCE[half, single]


# Measured 1.03: eight bits move logits by less than a tenth of what four do.
def test_quantized_pair_is_close_to_the_fp32_one(exports: dict[str, Path]) -> None:
    for name in DENSE:
        traces = traces_of(exports[name], "quantized", stored_name(name))
        assert distance(traces, reference(stored_name(name))) < 1.5


def test_quantiser_reproduces_the_reference_codes() -> None:
    with (
        np.load(DATA / "tiny_e2b_weights.npz") as weights,
        np.load(DATA / "tiny_e2b_q4_packed.npz") as packed,
    ):
        names = {key.split("|")[0] for key in packed.files}
        assert len(names) == 5 * 9 + 5 * 7 + 3  # KV source layers, KV-shared layers, tables and projection
        for name in names:
            found = quantise(weights[name], Codes(4))
            np.testing.assert_array_equal(found.codes, packed[f"{name}|packed"])
            np.testing.assert_array_equal(found.scales, packed[f"{name}|scales"])
            np.testing.assert_array_equal(found.zero_points, packed[f"{name}|zp"])


def test_an_odd_number_of_zero_points_is_filled_up() -> None:
    np.testing.assert_array_equal(pack(np.array([[1, 2, 3]], np.uint8), 4), [[0x21, 0x03]])


# Readings

# Largest |difference| of a logit from the default reading. Measured: 0.078 with norm casts (float16 noise),
# 0.0039 with float32 logits (their rounding), 0 with rotation inside attention, 0.047 without the mask
# (float16 noise: no reference holds a placeholder).
READINGS = {
    Reading(norm_casts=True): 0.15,
    Reading(float32_logits=True): 0.008,
    Reading(rotary_in_attention=True): 0.02,
    Reading(mask_placeholders=False): 0.1,
    Reading(norm_casts=True, float32_logits=True, rotary_in_attention=True, mask_placeholders=False): 0.15,
}


@pytest.mark.parametrize(
    ("precision", "reading"),
    [*some([("q4f16", reading) for reading in READINGS], 4), in_full("fp16", list(READINGS)[-1])],
    ids=str,
)
def test_readings_agree_with_the_default(precision: str, reading: Reading, tmp_path: Path) -> None:
    build("tiny-e2b", precision, tmp_path / "export", reading=reading)
    traces = run_all(Pair(tmp_path / "export", precision), "tiny_e2b")
    expected = traces_of(COMMITTED, precision, "tiny_e2b")
    assert distance(traces, expected) < READINGS[reading]


def test_what_each_reading_changes(tmp_path: Path) -> None:
    fixture = FIXTURES["tiny-e2b"]
    weights = fixture.weights()

    def written(reading: Reading) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        embed, decoder = graphs(fixture, PRECISIONS["q4f16"], reading, weights)
        return embed.model(), decoder.model()

    def counts(model: onnx.ModelProto) -> Counter[str]:
        return Counter(node.op_type for node in model.graph.node)

    embed, decoder = written(Reading())
    _, casts = written(Reading(norm_casts=True))
    norms = counts(decoder)["SimplifiedLayerNormalization"]
    assert counts(casts) - counts(decoder) == Counter({"Cast": 2 * norms})
    kinds = {tensor.name: tensor.data_type for tensor in casts.graph.initializer}
    assert kinds["model.layers.0.attn.q_norm.layernorm.weight"] == TensorProto.FLOAT
    assert kinds["/model/layers.0/attn/v_norm/ones_weight"] == TensorProto.FLOAT

    _, single = written(Reading(float32_logits=True))
    assert single.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert single.graph.node[-1].op_type == "Cast"

    _, rotary = written(Reading(rotary_in_attention=True))
    attention = next(node for node in rotary.graph.node if node.op_type == "GroupQueryAttention")
    assert list(attention.input[7:9]) == ["cos_cache_local", "sin_cache_local"]
    assert attributes(attention)["do_rotary"] == 1
    # One full KV source layer's queries and keys, and the queries of five KV-shared layers.
    assert counts(rotary)["RotaryEmbedding"] == 2 + 5

    unmasked, _ = written(Reading(mask_placeholders=False))
    assert counts(embed) - counts(unmasked) == Counter({"Equal": 2, "Not": 2, "And": 2, "Less": 1, "Where": 1})


def test_placeholders_look_up_row_zero() -> None:
    architecture = FIXTURES["tiny-e2b"].architecture
    ids = np.array([[5, architecture.image_token_id, architecture.audio_token_id, 0]])
    found = Pair(COMMITTED, "fp32").embeddings(ids)
    rows = found["per_layer_inputs"][0]
    np.testing.assert_array_equal(rows[1], rows[3])
    np.testing.assert_array_equal(rows[2], rows[3])
    assert not np.array_equal(rows[0], rows[3])
    assert not np.array_equal(found["inputs_embeds"][0, 1], found["inputs_embeds"][0, 3])


def test_no_reference_uses_a_placeholder() -> None:
    for name in ("tiny_e2b", "tiny_e4b", "tiny_31b", "tiny_e2b_q4"):
        used = set(np.concatenate([*prompts(name), *(trace.tokens for trace in reference(name))]).tolist())
        assert not used & {113, 114}


# The published sizes

EMBED, DECODER = "embed_tokens", "decoder_model_merged"
PUBLISHED = {
    ("e2b", "fp32", EMBED): [1_610_612_736, 9_395_240_960],
    ("e2b", "fp16", EMBED): [805_306_368, 4_697_620_480],
    ("e2b", "q4", EMBED): [1_762_656_256],
    ("e2b", "q4f16", EMBED): [1_590_689_792],
    ("e2b", "quantized", EMBED): [465_567_744, 2_348_810_240, 367_001_600],
    ("e2b", "q4", DECODER): [1_864_102_912],
    ("e2b", "q4f16", DECODER): [1_519_700_992],
    ("e4b", "q4", EMBED): [1_839_202_304, 396_361_728],
    ("e4b", "q4f16", EMBED): [2_017_460_224],
    ("e4b", "q4", DECODER): [2_093_703_168, 1_286_205_440],
    ("e4b", "q4f16", DECODER): [2_074_847_232, 812_318_720],
}


@pytest.mark.parametrize(("name", "precision", "stem"), PUBLISHED)
def test_external_data_has_the_published_sizes(name: str, precision: str, stem: str) -> None:
    sizes = external_data_sizes(name, precision)
    base = f"{stem}{PRECISIONS[precision].suffix}.onnx_data"
    expected = PUBLISHED[name, precision, stem]
    names = [base + (f"_{i}" if i else "") for i in range(len(expected))]
    assert {file: size for file, size in sizes.items() if file.startswith(stem)} == dict(
        zip(names, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("precision", "gibibytes"), [("fp32", 8.868), ("fp16", 4.434), ("quantized", 3_039_456_256 / 2**30)]
)
def test_e2b_decoder_totals(precision: str, gibibytes: float) -> None:
    """Published only as a total."""
    sizes = external_data_sizes("e2b", precision)
    total = sum(size for file, size in sizes.items() if file.startswith(DECODER))
    assert total / 2**30 == pytest.approx(gibibytes, abs=5e-4)


@pytest.mark.parametrize(("name", "matrices"), [("e2b", 242), ("e4b", 302)])
def test_published_matrix_counts(name: str, matrices: int) -> None:
    for precision in ("q4", "q4f16", "quantized"):
        fixture = FIXTURES[name]
        _, decoder = graphs(fixture, PRECISIONS[precision], Reading(), fixture.weights())
        assert sum(node.op_type == "MatMulNBits" for node in decoder.nodes) == matrices


def test_e4b_q4f16_has_the_published_node_and_initializer_counts() -> None:
    fixture = FIXTURES["e4b"]
    embed, decoder = graphs(fixture, PRECISIONS["q4f16"], Reading(), fixture.weights())
    assert len(embed.nodes) == 15
    assert len(decoder.nodes) == 1615
    assert len(decoder.tensors) == 1322
    assert len({tensor.name for tensor in decoder.tensors}) == 1322
    layers = nodes_by_layer(decoder.nodes)
    full, kv_sources = {5, 11, 17, 23, 29, 35, 41}, range(24)
    expected = {
        **{layer: 60 if layer in full else 35 for layer in kv_sources},
        **{layer: 33 if layer in full else 35 for layer in range(24, 42)},
        5: 61,
        24: 49,
    }
    assert layers == {-1: 28, **expected, 42: 8}


def nodes_by_layer(nodes: list[onnx.NodeProto]) -> dict[int, int]:
    """Nodes from one input_layernorm to the next; -1 is the prefix, the tail counts as one layer more."""
    sizes: Counter[int] = Counter()
    layer = -1
    for node in nodes:
        if node.name.endswith(("/input_layernorm/LayerNorm", "/final_norm_layernorm/LayerNorm")):
            layer += 1
        sizes[layer] += 1
    return dict(sizes)


@pytest.mark.parametrize(("precision", "count"), [("fp32", 13), ("q4", 13), ("fp16", 15), ("q4f16", 15)])
def test_embed_node_count(precision: str, count: int) -> None:
    assert len(load(f"embed_tokens{PRECISIONS[precision].suffix}").graph.node) == count


def test_embedding_scales() -> None:
    scales = {
        width: embedding_scale(FIXTURES[name].architecture, width)
        for name, width in (("e2b", 1536), ("e4b", 2560), ("e4b", 256), ("tiny-e2b", 64))
    }
    assert scales == {1536: 39.25, 2560: 50.5, 256: 16.0, 64: 8.0}


# The exporter's habits


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stem", [EMBED, DECODER])
def test_header(stem: str, precision: str) -> None:
    model = load(f"{stem}{PRECISIONS[precision].suffix}")
    assert [field.name for field, _ in model.ListFields()] == [
        "ir_version",
        "producer_name",
        "graph",
        "opset_import",
    ]
    assert (model.ir_version, model.producer_name, model.graph.name) == (10, "huggingface", "main_graph")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21), ("com.microsoft", 1)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_interface(precision: str) -> None:
    half = PRECISIONS[precision].half
    model = load(f"{DECODER}{PRECISIONS[precision].suffix}").graph
    single, own, integer = (
        TensorProto.FLOAT,
        TensorProto.FLOAT16 if half else TensorProto.FLOAT,
        TensorProto.INT64,
    )
    batch, sequence, past, total = (
        "batch_size",
        "sequence_length",
        "past_sequence_length",
        "total_sequence_length",
    )
    sizes = [16, 16, 16, 16, 32]
    parts = [(layer, size, part) for layer, size in enumerate(sizes) for part in ("key", "value")]
    assert [described(value) for value in model.input] == [
        ("inputs_embeds", single, [batch, sequence, 64]),
        ("attention_mask", integer, [batch, total]),
        ("position_ids", integer, [batch, sequence]),
        ("num_logits_to_keep", integer, []),
        ("per_layer_inputs", single, [batch, sequence, 10, 32]),
        *((f"past_key_values.{layer}.{part}", own, [batch, 1, past, size]) for layer, size, part in parts),
    ]
    assert [described(value) for value in model.output] == [
        ("logits", own, [batch, "num_logits_to_keep", 128]),
        *((f"present.{layer}.{part}", own, [batch, 1, total, size]) for layer, size, part in parts),
    ]
    scalar = model.input[3].type.tensor_type
    assert scalar.HasField("shape")
    embed = load(f"{EMBED}{PRECISIONS[precision].suffix}").graph
    assert [described(value) for value in embed.input] == [("input_ids", integer, [batch, sequence])]
    assert [described(value) for value in embed.output] == [
        ("inputs_embeds", single, [batch, sequence, 64]),
        ("per_layer_inputs", single, [batch, sequence, 10, 32]),
    ]


def described(value: onnx.ValueInfoProto) -> tuple[str, int, list[int | str]]:
    return value.name, value.type.tensor_type.elem_type, shape(value)


def test_half_precision_graph_starts_with_its_input_casts(decoder: onnx.ModelProto) -> None:
    names = [node.name for node in decoder.graph.node[:2]]
    assert names == ["/model/graph_inputs/inputs_embeds/Cast", "/model/graph_inputs/per_layer_inputs/Cast"]


def test_prefix_and_tail(decoder: onnx.ModelProto) -> None:
    nodes = decoder.graph.node
    assert [node.op_type for node in nodes[14:20]] == [
        "MatMulNBits",
        "Mul",
        "Reshape",
        "SimplifiedLayerNormalization",
        "Add",
        "Mul",
    ]
    assert [node.name.removeprefix("/model/gqa_attention_bias/") for node in nodes[20:28]] == [
        "Cast",
        "Sub",
        "Mul",
        "Unsqueeze",
        "Unsqueeze_S",
        "Unsqueeze_T",
        "Target4D",
        "Expand",
    ]
    assert [node.op_type for node in nodes[-8:]] == [
        "SimplifiedLayerNormalization",
        "Neg",
        "Unsqueeze",
        "Slice",
        "MatMulNBits",
        "Div",
        "Tanh",
        "Mul",
    ]
    assert nodes[-8].name == "/model/layers.10/final_norm_layernorm/LayerNorm"


def test_group_query_attention(decoder: onnx.ModelProto) -> None:
    node = next(node for node in decoder.graph.node if node.op_type == "GroupQueryAttention")
    base = "/model/layers.0/attn"
    assert (node.name, node.domain) == (f"{base}/GroupQueryAttention", "com.microsoft")
    assert list(node.input) == [
        f"{base}/q_rotary/RotaryEmbedding/output_0",
        f"{base}/k_rotary/RotaryEmbedding/output_0",
        f"{base}/v_norm/Reshape_2/output_0",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "/model/attn_mask_reformat/attn_mask_subgraph/Expand/Cast/output_0",
        "/model/attn_mask_reformat/attn_mask_subgraph/Gather/Cast/output_0",
        "",
        "",
        "",
        "/model/gqa_attention_bias/Expand/output_0",
    ]
    assert list(attributes(node).items()) == [
        ("num_heads", 4),
        ("kv_num_heads", 1),
        ("scale", 1.0),
        ("local_window_size", 8),
        ("softcap", 0.0),
        ("do_rotary", 0),
        ("rotary_interleaved", 0),
    ]


def test_full_owner_writes_its_cache_with_concat(decoder: onnx.ModelProto) -> None:
    producers = {output: node for node in decoder.graph.node for output in node.output}
    for part in ("key", "value"):
        node = producers[f"present.4.{part}"]
        assert (node.op_type, node.input[0]) == ("Concat", f"past_key_values.4.{part}")
        assert node.name.startswith("/model/layers.4/attn/manual/")
    assert "/model/layers.4/attn/manual/output/Reshape/output_0" in producers


def test_borrowers_read_their_owner(decoder: onnx.ModelProto) -> None:
    consumers: dict[str, list[str]] = {}
    for node in decoder.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node.name)
    shared = "/model/layers.{}/attn/shared/{}"
    sliding = range(5, 9)
    assert consumers["present.3.key"] == [shared.format(i, "k_transpose") for i in sliding]
    assert consumers["present.3.value"] == [shared.format(i, "MatMul_1") for i in sliding]
    assert consumers["present.4.value"][-1] == shared.format(9, "MatMul_1")
    assert "/model/shared_donor.4/k_transpose" in consumers["present.4.key"]
    window = "/model/shared_donor.3/mask/slide_unsq/output_0"
    assert consumers[window] == [shared.format(i, "scores/Where_slide") for i in sliding]
    shared = [tensor.name for tensor in decoder.graph.initializer if "layers_7_attn_" in tensor.name]
    assert {name.split("_attn_")[1].split("_proj")[0] for name in shared} == {"q", "o"}


def test_matrices_have_explicit_zero_points_and_no_accuracy_level(decoder: onnx.ModelProto) -> None:
    nodes = [node for node in decoder.graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 10 * 6 + 5 * 2 + 2
    dims = {tensor.name: list(tensor.dims) for tensor in decoder.graph.initializer}
    for node in nodes:
        assert node.name.endswith("/MatMul_Quant")
        assert list(attributes(node)) == ["K", "N", "bits", "block_size"]
        columns, rows = (int(str(attributes(node)[key])) for key in ("K", "N"))
        base = node.name.removesuffix("_Quant").removeprefix("/").replace("/", "_").replace(".", "_") + "_weight"
        assert list(node.input[1:]) == [f"{base}_quant", f"{base}_scales", f"{base}_zp"]
        blocks = columns // 32
        assert dims[node.input[1]] == [rows, blocks, 16]
        assert dims[node.input[2]] == [rows, blocks]
        assert dims[node.input[3]] == [rows, (blocks + 1) // 2]


def test_initializers_come_in_first_use_order_and_quantised_ones_last(decoder: onnx.ModelProto) -> None:
    graph = decoder.graph
    names = [tensor.name for tensor in graph.initializer]
    plain = [name for name in names if not name.endswith(("_quant", "_scales", "_zp"))]
    triplets = [name for node in graph.node if node.op_type == "MatMulNBits" for name in node.input[1:]]
    assert names == plain + triplets
    first_use = dict.fromkeys(name for node in graph.node for name in node.input)
    assert plain == [name for name in first_use if name in set(plain)]
    assert names[:4] == [f"/model/constants/INT64/{value}" for value in ("1", "0", "[0]", "[1]")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stem", [EMBED, DECODER])
def test_value_info_lists_plain_initializers_then_node_outputs(stem: str, precision: str) -> None:
    """Where matrices are quantised, their unquantised names stay on the list."""
    graph = load(f"{stem}{PRECISIONS[precision].suffix}").graph
    outputs = {value.name for value in graph.output}
    computed = [name for node in graph.node for name in node.output if name not in outputs]
    listed = [value.name for value in graph.value_info]
    initializers = listed[: -len(computed)]
    assert listed[-len(computed) :] == computed
    unquantised = load(stem).graph
    assert [of_any_precision(name) for name in initializers] == [
        of_any_precision(tensor.name) for tensor in unquantised.initializer
    ]


def of_any_precision(name: str) -> str:
    """Constants without what the float type changes in them."""
    for prefix in ("FLOAT16", "FLOAT"):
        name = name.replace(f"/model/constants/{prefix}/", "/model/constants/any float/")
    return name.replace("-65504.0", "lowest").replace("-3.4028234663852886e+38", "lowest")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_external_data_is_gapless(precision: str) -> None:
    """Tensors of 1024 bytes and more, in initializer order, without padding."""
    stem = f"{DECODER}{PRECISIONS[precision].suffix}"
    end = 0
    for tensor in load(stem).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if not entries:
            assert len(tensor.raw_data) < 1024
            continue
        assert list(entries) == ["location", "offset", "length"]
        assert entries["location"] == f"{stem}.onnx_data"
        assert int(entries["offset"]) == end
        end += int(entries["length"])
    assert (COMMITTED / "onnx" / f"{stem}.onnx_data").stat().st_size == end


# Files around the graphs


def test_committed_fixture_is_what_the_builder_writes(exports: dict[str, Path]) -> None:
    built = exports["tiny-e2b"]
    names = sorted(str(path.relative_to(built)) for path in built.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(COMMITTED)) for path in COMMITTED.rglob("*") if path.is_file())
    _, different, unreadable = filecmp.cmpfiles(built, COMMITTED, names, shallow=False)
    assert (different, unreadable) == ([], [])


def test_configuration_is_the_hubs(exports: dict[str, Path]) -> None:
    config = json.loads((exports["tiny-31b"] / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gemma4"
    assert {"vision_config", "audio_config", "image_token_id", "audio_token_id"} <= set(config)
    text = config["text_config"]
    assert (text["global_head_dim"], text["num_global_key_value_heads"]) == (32, 2)
    assert "per_layer_config" not in text
    generation = json.loads((COMMITTED / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [1, 106, 50]


@pytest.mark.parametrize(
    "text",
    [
        "Hello world, the weather in 2024?",
        "привет",
        "γεια",
        "سلام",
        "你好世界",
        "<|turn>user\nhello<turn|>\n",
        "a  b",
    ],
)
def test_tokenizer_round_trip(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(COMMITTED / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 128
    ids = tokenizer.encode(text).ids
    assert ids[0] == 2
    assert 3 not in ids
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


def test_chat_template() -> None:
    jinja2 = pytest.importorskip("jinja2")
    source = (COMMITTED / "chat_template.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "yes"}]
    rendered = environment.from_string(source).render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    assert rendered == "<bos><|turn>user\nhello<turn|>\n<|turn>model\nyes<turn|>\n<|turn>model\n"


def test_genai_reads_tokenizer_and_template(tmp_path: Path) -> None:
    """A one-node model is enough for og.Tokenizer, which finds its files beside it."""
    og = pytest.importorskip("onnxruntime_genai")
    tokenizers = pytest.importorskip("tokenizers")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(COMMITTED / name, tmp_path / name)
    write_stub_model(tmp_path)
    tokenizer = og.Tokenizer(og.Model(str(tmp_path)))
    messages = json.dumps([{"role": "user", "content": " hello "}])
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == "<bos><|turn>user\nhello<turn|>\n<|turn>model\n"
    expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (rendered, "привет", "γεια", "سلام", "你好世界", "a  b"):
        assert list(tokenizer.encode(text)) == expected.encode(text, add_special_tokens=False).ids


def write_stub_model(directory: Path) -> None:
    """A genai_config.json and a model whose single node turns ids into float32."""
    integers = onnx.helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    logits = onnx.helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length"])
    cast = onnx.helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)
    graph = onnx.helper.make_graph([cast], "stub", [integers], [logits])
    opsets = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), directory / "model.onnx")
    decoder = {
        "filename": "model.onnx",
        "head_size": 16,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"logits": "logits"},
    }
    model = {
        "type": "gemma4_text",
        "vocab_size": 128,
        "context_length": 64,
        "bos_token_id": 2,
        "eos_token_id": [1, 106, 50],
        "pad_token_id": 0,
        "decoder": decoder,
    }
    config = {"model": model, "search": {"max_length": 64}}
    (directory / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")


# The command


def test_command_adds_a_precision_and_refuses_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "export")
    assert main(["tiny-e2b", "q4", target]) == 0
    assert main(["tiny-e2b", "fp32", target]) == 0
    assert {path.name for path in (tmp_path / "export" / "onnx").glob("decoder*.onnx")} == {
        "decoder_model_merged.onnx",
        "decoder_model_merged_q4.onnx",
    }
    capsys.readouterr()
    for arguments, reason in (
        (["tiny-e2b", "q4", target], "already holds tiny-e2b in q4"),
        (["tiny-e4b", "q4", target], "holds something other than tiny-e4b"),
        (
            ["tiny", "q4", target],
            "there is no fixture 'tiny'; there are tiny-e2b, tiny-e4b, tiny-31b, tiny-12b, tiny-26b-a4b, e2b, e4b, tiny-e2b-qat",
        ),
        (["tiny-e2b", "int4", target], "there is no precision 'int4'; there are fp32, fp16, q4, q4f16"),
        (["tiny-e2b", "fp16", target, "--reading", "x"], "there is no reading 'x'; there are norm-casts"),
    ):
        assert main(arguments) == 2
        complaint = capsys.readouterr().err
        assert reason in complaint
        assert complaint.count("\n") == 1
    assert main(["tiny-e2b", "q4", target, "--force"]) == 0


def test_readings_by_name() -> None:
    assert parse_reading([]) == Reading()
    assert parse_reading(["norm-casts", "no-mask-placeholders"]) == Reading(norm_casts=True, mask_placeholders=False)


def test_module_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fixtures", "tiny-31b", "q4f16", str(tmp_path / "export")]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith("decoder_model_merged_q4f16.onnx")


def test_build_rejects_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(FixtureError, match="there is no fixture"):
        build("gemma", "q4", tmp_path)
