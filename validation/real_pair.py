"""Repack a real exporter's pair whose weight files were not published with it: fill them, repack, prove.

    python -m validation.real_pair REAL OUT

REAL holds `embed_tokens_X.onnx` and `decoder_model_merged_X.onnx` of a Gemma 3 export. Their external data files are
written under OUT/source with seeded numbers at the recorded offsets and lengths (2.8 GB for gemma-3-4b q4f16), the
configuration is read off the graphs, the tokenizer is the fixtures'. Then `gemma4-surgery repack` runs on it with all
its checks: the merged graph against the two-session loop, and GenAI against both.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from surgery.attention.kv_wiring import attentions
from surgery.graph.external_data import WeightReference
from surgery.graph.model import Model
from surgery.source.export import find_pairs

SEED = 20261120
BLOCK = 1 << 22
"""Numbers drawn at a time; each file repeats its own block, so that filling runs at the speed of the disk."""

TOKENIZER = Path(__file__).parent.parent / "fixtures" / "tiny-e2b"


def fill(model: Model, folder: Path, generator: np.random.Generator) -> int:
    """Write the external data files of a graph. Returns the bytes written."""
    blocks = _blocks(generator)
    written = 0
    handles = {location: open(folder / location, "wb") for location in model.weight_files}  # noqa: SIM115
    try:
        for ref in model.weight_references():
            handle = handles[ref.location]
            handle.seek(ref.offset)
            written += _write(handle, ref, blocks)
    finally:
        for handle in handles.values():
            handle.close()
    return written


def _blocks(generator: np.random.Generator) -> dict[str, bytes]:
    """Numbers that keep activations small: scales near 2e-3, norms near 1, cosines in [-1, 1]."""
    return {
        "quant": generator.integers(0, 256, BLOCK, dtype=np.uint8).tobytes(),
        "zp": np.full(BLOCK, 0x88, dtype=np.uint8).tobytes(),
        "scales": generator.uniform(1e-3, 3e-3, BLOCK).astype(np.float16).tobytes(),
        "weight": generator.uniform(0.9, 1.1, BLOCK).astype(np.float32).tobytes(),
        "cache": np.cos(generator.uniform(0, 6.28, BLOCK)).astype(np.float16).tobytes(),
    }


def _write(handle: Any, ref: WeightReference, blocks: dict[str, bytes]) -> int:
    kind = next((kind for kind in ("quant", "zp", "scales") if ref.name.endswith(kind)), "weight")
    block = blocks["cache" if "_cache_" in ref.name else kind]
    left = ref.length
    while left:
        left -= handle.write(block[: min(left, len(block))])
    return ref.length


def config_of(decoder: Model) -> dict[str, Any]:
    """config.json as the graph itself tells it: caches, hidden size, vocabulary and windows are in the interface."""
    types = {value.name: value.type.tensor_type.shape.dim for value in (*decoder.graph.input, *decoder.graph.output)}
    windows = [
        attribute.i
        for node in decoder.graph.node
        if node.op_type == "GroupQueryAttention"
        for attribute in node.attribute
        if attribute.name == "local_window_size"
    ]
    key = types["past_key_values.0.key"]
    text = {
        "model_type": "gemma3_text",
        "hidden_size": types["inputs_embeds"][2].dim_value,
        "num_hidden_layers": len(attentions(decoder.graph)),
        "num_attention_heads": 8,
        "num_key_value_heads": key[1].dim_value,
        "head_dim": key[3].dim_value,
        "vocab_size": types["logits"][2].dim_value,
        "sliding_window": max(windows),
        "layer_types": ["sliding_attention" if window > 0 else "full_attention" for window in windows],
        "max_position_embeddings": 131072,
    }
    return {"model_type": "gemma3", "text_config": text}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m validation.real_pair REAL OUT")
    real, out = Path(sys.argv[1]), Path(sys.argv[2])
    source = out / "source"
    (source / "onnx").mkdir(parents=True, exist_ok=True)
    pair = next(iter(find_pairs(real).values()))
    generator = np.random.default_rng(SEED)
    for graph in (pair.embed, pair.decoder):
        shutil.copyfile(graph, source / "onnx" / graph.name)
        print(f"{graph.name}: {fill(Model.open(graph), source / 'onnx', generator):,} bytes of seeded weights")
    (source / "config.json").write_text(json.dumps(config_of(Model.open(pair.decoder)), indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, source / name)

    sys.argv = ["gemma4-surgery", "repack", str(source), str(out / "folder"), "--weights", "link", "--ep", "cpu"]
    from surgery.commands.app import main

    main()


if __name__ == "__main__":
    main()
