"""The numbers that fixtures are held to: tiny random Gemma 4 models, evaluated by Hugging Face transformers.

    python -m validation.reference NAME [DIR]

Needs `torch` and `transformers==5.23.0`, which nothing else here does: an environment of its own is enough. NAME is a
fixture with a checkpoint in fixtures/data (tiny-12b, tiny-26b-a4b); DIR, that folder by default, gets

    NAME_weights.npz   the checkpoint under its Hugging Face names, float16: what it holds, every precision holds exactly
    NAME_ref.npz       for prompt i: p{i}_ids, p{i}_prefill_logits [S, V], p{i}_tokens [24] greedy, p{i}_decode_logits
                       [24, V]; p4_hidden_states and p4_inputs_embeds. Gemma4ForCausalLM, float32, eager attention

Norms, scalars and expert scales are random as well: a weight at its default would hide a mistake. Seeds are tried until
every greedy choice is clear (the best logit leads by MARGIN), so that rounding cannot change a token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from fixtures.architecture import Architecture
from fixtures.sidecars import text_config
from fixtures.zoo import DATA, FIXTURES

LENGTHS = (1, 3, 8, 9, 13, 29)
STEPS = 24
MARGIN = 0.005
VARIETY = 16
"""Different tokens over all greedy paths: a model that repeats one token proves little."""

SEEDS = 60


def build(architecture: Architecture, seed: int) -> Any:
    """The model with random weights that float16 holds exactly."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(**text_config(architecture))
    config._attn_implementation = "eager"
    model = Gemma4ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" not in name and not name.endswith("embed_scale"):
                tensor.copy_(_drawn(name, tensor.shape, generator).half().float())
    return model


def _drawn(name: str, shape: Any, generator: Any) -> Any:
    import torch

    values = torch.randn(shape, generator=generator)
    if name.endswith("layer_scalar"):
        return 0.5 + 0.9 * torch.rand(shape, generator=generator)
    if name.endswith("q_norm.weight"):
        return shape[-1] ** -0.5 * 1.5 * (1 + 0.3 * values)
    if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "layernorm.weight", ".scale", "expert_scale")):
        return 1 + 0.3 * values
    if name.endswith("embed_tokens.weight"):
        return 0.2 * values
    return values * shape[-1] ** -0.5


def evaluate(model: Any, vocabulary: int) -> dict[str, np.ndarray]:
    """Prefill and greedy decoding of every prompt, all in one pass each step: no cache is trusted."""
    import torch

    numbers: dict[str, np.ndarray] = {}
    prompts = np.random.default_rng(20261120)
    for index, length in enumerate(LENGTHS):
        ids = prompts.integers(3, min(100, vocabulary), length)
        sequence = torch.tensor(ids)[None]
        with torch.no_grad():
            prefill = model(sequence, use_cache=False, output_hidden_states=True)
            rows = [prefill.logits[0, -1]]
            for _ in range(STEPS):
                sequence = torch.cat([sequence, rows[-1].argmax()[None, None]], dim=1)
                rows.append(model(sequence, use_cache=False).logits[0, -1])
        numbers[f"p{index}_ids"] = ids.astype(np.int64)
        numbers[f"p{index}_prefill_logits"] = prefill.logits[0].numpy()
        numbers[f"p{index}_tokens"] = sequence[0, length:].numpy()
        numbers[f"p{index}_decode_logits"] = torch.stack(rows[1:]).numpy()
        if index == 4:
            numbers["p4_hidden_states"] = torch.stack([state[0] for state in prefill.hidden_states]).numpy()
            with torch.no_grad():
                numbers["p4_inputs_embeds"] = model.model.embed_tokens(torch.tensor(ids)).numpy()
    return numbers


def smallest_margin(numbers: dict[str, np.ndarray]) -> float:
    """How far the best logit leads in the closest choice."""
    margins = []
    for index in range(len(LENGTHS)):
        prefill, decode = numbers[f"p{index}_prefill_logits"], numbers[f"p{index}_decode_logits"]
        best = np.sort(np.concatenate([prefill[-1:], decode[:-1]]), axis=-1)
        margins.append(float((best[:, -1] - best[:, -2]).min()))
    return min(margins)


def variety(numbers: dict[str, np.ndarray]) -> int:
    return len({int(token) for index in range(len(LENGTHS)) for token in numbers[f"p{index}_tokens"]})


def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in FIXTURES:
        sys.exit(f"usage: python -m validation.reference NAME [DIR]; NAME is one of {', '.join(FIXTURES)}")
    fixture, folder = FIXTURES[sys.argv[1]], Path(sys.argv[2]) if len(sys.argv) == 3 else DATA
    for seed in range(SEEDS):
        model = build(fixture.architecture, seed)
        numbers: dict[str, Any] = evaluate(model, fixture.architecture.vocab_size)
        if smallest_margin(numbers) >= MARGIN and variety(numbers) >= VARIETY:
            break
        print(f"seed {seed}: margin {smallest_margin(numbers):.3f}, {variety(numbers)} tokens", flush=True)
    else:
        sys.exit("no seed gives clear and varied choices")
    stem = fixture.name.replace("-", "_")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    weights: dict[str, Any] = {name: value.numpy().astype(np.float16) for name, value in state.items()}
    np.savez_compressed(folder / f"{stem}_weights.npz", **weights)
    np.savez_compressed(folder / f"{stem}_ref.npz", **dict[str, Any](numbers))
    print(f"{fixture.name}: seed {seed}, margin {smallest_margin(numbers):.3f}, {variety(numbers)} tokens")


if __name__ == "__main__":
    main()
