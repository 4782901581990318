"""python -m validation.sampling_reference: writes fixtures/data/sampling_ref.npz, with torch 2.13 and transformers 5.23.

The probabilities that the logits processors of Hugging Face leave, in the order in which `generate` applies them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

TARGET = Path(__file__).parent.parent / "fixtures" / "data" / "sampling_ref.npz"
CASES = [  # temperature, top_k, top_p, repetition_penalty
    (1.0, 0, 1.0, 1.0),
    (0.7, 0, 1.0, 1.0),
    (1.0, 5, 1.0, 1.0),
    (1.0, 0, 0.6, 1.0),
    (1.0, 1, 0.6, 1.0),
    (1.3, 8, 0.9, 1.0),
    (1.0, 0, 1.0, 1.5),
    (0.8, 64, 0.95, 1.2),
    (0.5, 6, 0.3, 0.8),
]


def main() -> None:
    numbers = np.random.default_rng(20261120)
    logits = numbers.normal(0, 3, (3, 40)).astype(np.float32)
    logits[1, 7:11] = logits[1].max()  # equals: all of them stay
    seen = numbers.integers(0, 40, (3, 12))
    found: dict[str, Any] = {"logits": logits, "seen": seen, "cases": np.array(CASES)}
    for index, (temperature, top_k, top_p, penalty) in enumerate(CASES):
        steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
        if top_k:
            steps.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            steps.append(TopPLogitsWarper(top_p))
        scores = steps(torch.tensor(seen), torch.tensor(logits))
        found[f"probabilities_{index}"] = torch.softmax(scores, -1).numpy()
    np.savez_compressed(TARGET, **found)


if __name__ == "__main__":
    main()
