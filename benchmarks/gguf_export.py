"""An export's weights as GGUF, value for value, so that llama.cpp runs the same model.

Plain matrices become F32. Quantised ones become Q4_0, which has no zero points and float16 scales: an export of
`python -m fixtures NAME q4 DIR --reading symmetric` is of that kind. The keys and names are those that
`conversion/gemma.py` of llama.cpp writes for Gemma 4 (read at commit 0c1e57098).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.architecture import read_config
from surgery.graph.model import Model
from surgery.source.export import GraphPair

_BLOCK = 32

_LAYER = {  # initializer of the export -> tensor of GGUF
    "input_layernorm.weight": "attn_norm",
    "attn.q_norm.layernorm.weight": "attn_q_norm",
    "attn.k_norm.layernorm.weight": "attn_k_norm",
    "attn.q_proj.MatMul.weight": "attn_q",
    "attn.k_proj.MatMul.weight": "attn_k",
    "attn.v_proj.MatMul.weight": "attn_v",
    "attn.o_proj.MatMul.weight": "attn_output",
    "post_attention_layernorm.weight": "post_attention_norm",
    "pre_feedforward_layernorm.weight": "ffn_norm",
    "post_feedforward_layernorm.weight": "post_ffw_norm",
    "mlp.down_proj.MatMul.weight": "ffn_down",
    "per_layer.per_layer_input_gate.MatMul.weight": "inp_gate",
    "per_layer.per_layer_projection.MatMul.weight": "proj",
    "post_per_layer_input_norm.weight": "post_norm",
    "layer_scalar": "layer_output_scale",
}
_GATE_UP = "mlp.gate_up_proj.MatMul.weight"
_ONCE = {
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd",
    "model.per_layer_projection.MatMul.weight": "per_layer_model_proj",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm",
}
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.MatMul.weight"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`values` is float32 [N, K] or [N], or Q4_0 blocks as bytes [N, K / 32 * 18]."""

    name: str
    values: np.ndarray
    quantised: bool


def write_gguf(pair: GraphPair, config: Path, out: Path) -> None:
    """Write the text model of `pair` with its `config.json` to `out`, without a tokenizer: it is fed ids.

    Raises ValueError where a quantised matrix is not symmetric in blocks of 32, or a tensor is missing.
    """
    import gguf

    text = read_config(config)
    text = text.get("text_config", text)
    writer = gguf.GGUFWriter(out, "gemma4", use_temp_file=False)
    for key, value in _keys(text).items():
        _add(writer, f"gemma4.{key}", value)
    writer.add_tokenizer_model("none")
    for tensor in _tensors(pair, text):
        kind = gguf.GGMLQuantizationType.Q4_0 if tensor.quantised else None
        writer.add_tensor(f"{tensor.name}.weight", tensor.values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _keys(text: dict[str, Any]) -> dict[str, Any]:
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    shared, width = text["num_kv_shared_layers"], text["intermediate_size"]
    first_shared = len(sliding) - shared
    wide = 2 if text.get("use_double_wide_mlp") else 1
    rotary = text["rope_parameters"]
    return {
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "embedding_length_per_layer_input": text["hidden_size_per_layer_input"],
        "block_count": len(sliding),
        "feed_forward_length": [width if layer < first_shared else wide * width for layer in range(len(sliding))],
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": text["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(text["rms_norm_eps"]),
        "attention.key_length": text["global_head_dim"],
        "attention.value_length": text["global_head_dim"],
        "attention.key_length_swa": text["head_dim"],
        "attention.value_length_swa": text["head_dim"],
        "attention.sliding_window": text["sliding_window"],
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": shared,
        "rope.dimension_count": text["global_head_dim"],
        "rope.dimension_count_swa": text["head_dim"],
        "rope.freq_base": float(rotary["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rotary["sliding_attention"]["rope_theta"]),
        "final_logit_softcapping": float(text["final_logit_softcapping"]),
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _tensors(pair: GraphPair, text: dict[str, Any]) -> Iterator[GgufTensor]:
    weights = _Weights(pair)
    for source, name in _ONCE.items():
        yield weights.matrix(source, name)
    head, table = weights.matrix(_HEAD, "output"), weights.matrix(_TABLE, "token_embd")
    yield table
    if not np.array_equal(head.values, table.values):  # else llama.cpp multiplies by the table, as it does by default
        yield head
    layers = len(text["layer_types"])
    yield weights.matrix(weights.last_norm(layers), "output_norm")
    yield _rotary_factors(text)
    for layer in range(layers):
        for source, name in _LAYER.items():
            if weights.holds(f"model.layers.{layer}.{source}"):
                yield weights.matrix(f"model.layers.{layer}.{source}", f"blk.{layer}.{name}")
        both = weights.matrix(f"model.layers.{layer}.{_GATE_UP}", "")
        for name, values in zip(("ffn_gate", "ffn_up"), np.split(both.values, 2), strict=True):
            yield GgufTensor(f"blk.{layer}.{name}", values, both.quantised)


def _rotary_factors(text: dict[str, Any]) -> GgufTensor:
    """float32 [head size / 2] of the full layers: the dimensions that "proportional" does not rotate get a factor that
    leaves no angle."""
    half = text["global_head_dim"] // 2
    rotated = int(text["global_head_dim"] * text["rope_parameters"]["full_attention"]["partial_rotary_factor"] / 2)
    return GgufTensor("rope_freqs", np.array([1.0] * rotated + [1e30] * (half - rotated), np.float32), quantised=False)


class _Weights:
    """The initializers of both graphs, read where they are asked for."""

    def __init__(self, pair: GraphPair) -> None:
        from onnx import numpy_helper

        self._read = numpy_helper.to_array
        self._places = {}
        for path in (pair.embed, pair.decoder):
            model = Model.open(path)
            for initializer in model.graph.initializer:
                self._places[initializer.name] = (initializer, str(path.parent))

    def holds(self, name: str) -> bool:
        return name in self._places or _quantised(name, "quant") in self._places

    def last_norm(self, layers: int) -> str:
        """The norm before lm_head: the exporter numbers it as one layer more, or names it `norm`."""
        for name in (f"model.layers.{layers}.final_norm_layernorm.weight", "model.norm.weight"):
            if name in self._places:
                return name
        raise ValueError("no norm before lm_head was found")

    def matrix(self, source: str, name: str) -> GgufTensor:
        codes = _quantised(source, "quant")
        if codes in self._places:
            if _quantised(source, "zp") in self._places:
                raise ValueError(f"{source} has zero points, which Q4_0 has not: build with --reading symmetric")
            return GgufTensor(name, _q4_0(self._array(codes), self._array(_quantised(source, "scales"))), True)
        values = self._array(source).astype(np.float32)
        return GgufTensor(name, np.ascontiguousarray(values.T) if ".MatMul." in source else values, False)

    def _array(self, name: str) -> np.ndarray:
        if name not in self._places:
            raise ValueError(f"{name} is missing")
        return self._read(*self._places[name])


def _quantised(source: str, part: str) -> str:
    return f"{source.replace('.', '_')}_{part}"


def _q4_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8 codes, two neighbours a byte, and scales [N, blocks] -> u8 [N, blocks * 18]: a float16 scale, then the codes of
    which a byte has the i-th and the (i + 16)-th."""
    rows, blocks = scales.shape
    halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(scales.dtype), scales) or codes.size != rows * blocks * _BLOCK // 2:
        raise ValueError("a matrix is not of blocks of 32 with float16 scales: build with --reading symmetric")
    found = np.empty((rows, blocks, 18), np.uint8)
    found[..., :2] = halves.view(np.uint8).reshape(rows, blocks, 2)
    for start in range(0, rows, 8192):
        pairs = codes[start : start + 8192].reshape(-1, blocks, _BLOCK // 2)
        low, high = pairs & 15, pairs >> 4
        # element 2i is in low[i], 2i + 1 in high[i]; wanted are elements i and i + 16
        ordered = np.stack([low, high], axis=-1).reshape(*pairs.shape[:2], _BLOCK)
        found[start : start + 8192, :, 2:] = ordered[..., :16] | ordered[..., 16:] << 4
    return found.reshape(rows, blocks * 18)
