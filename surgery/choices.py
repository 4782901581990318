"""What can be chosen of a repack, each with the words of the command line: one list, read by library, passes and
commands."""

from __future__ import annotations

from typing import Literal

Preset = Literal["compatible", "fast"]
"""compatible: bit by bit the source. fast: attention fused, caches updated in place."""

Provider = Literal["cpu", "cuda"]
"""An execution provider of ONNX Runtime."""

ProviderChoice = Literal["auto", "cpu", "cuda"]
"""auto: cuda where onnxruntime can use a GPU, else cpu."""

KVLayout = Literal["aliased", "unique"]
"""aliased: a pair of caches for every layer. unique: those of the KV source layers alone."""

Target = Literal["genai-0.15", "genai-0.14", "genai-0.12"]
"""The oldest onnxruntime-genai that must load the folder: 0.14 refuses the ids of tool calls and thoughts, which go into
the configuration from 0.15 on; genai-0.12 pads all caches to one size."""

OnnxRuntime = Literal["1.31", "1.27"]
"""The oldest ONNX Runtime that must run the fast preset."""

WeightMode = Literal["copy", "link", "consolidate"]
"""How the data files get to the folder: copied, linked to the source's bytes, or joined into one aligned file."""

PerLayerTable = Literal["keep", "split", "fused"]
"""The table of per-layer inputs: as it is, one table for each layer, or one for all."""

AccuracyLevel = Literal["0", "1", "4"]
"""MatMulNBits' accuracy_level: 0 leaves it to the runtime, 1 multiplies in float32, 4 in int8."""

AccuracyChoice = Literal["auto", "keep", "1", "4"]
"""keep: as published. auto: on the CPU 4 for the products that are slow without a level, with `fast` for all; but not
for kinds that, by the proof, cost too much."""

PrefillChoice = Literal["keep", "int8"]
"""keep: long prompts as they are. int8: on the CPU they multiply in int8, by weights beside the codes."""

Modality = Literal["image", "audio"]
"""What a model takes beside text."""

Policy = Literal["breaking", "numerics", "any"]
"""From which change on a comparison fails: callers break, numbers may differ, anything differs."""
