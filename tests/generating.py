"""Tokens from the real runtime, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime_genai as og


def generated(folder: Path, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy tokens from the real runtime, after the prompt; it stops early at an eos."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + count)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def before_end(tokens: list[int]) -> list[int]:
    """The tokens before the first eos: the runtime stops there, and does not append it."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in (1, 50, 106)), len(tokens))]
