"""Caches of tokens that no model was fed: a prompt longer than the window for the price of its last token.

Numbers are normal, and the same for every model that has the slot: they depend on the layer, on key or value, and on
how many tokens a row has. Keys are zero but for those of the oldest tokens, which leave the window while the case runs:
each attention gives them weight while it sees them, so that a window of one token more or less moves the logits by far
more than rounding does, in float16 too. With keys alike one token in 512 would not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from surgery.attention.kv_wiring import Slot
from surgery.attention.sequence_lengths import Padding
from surgery.runtime.sessions import Array, KVCaches, host
from surgery.verify.prompts import Case

LEAST_LIVE = 8
"""Tokens with a key of their own, where fewer leave the window."""


def mask_of(past: tuple[int, ...]) -> Array:
    """The mask of rows that were padded on the right, int64 [B, tokens]."""
    return (np.arange(max(past)) < np.array(past)[:, None]).astype(np.int64)


def made_up_caches(
    empty: KVCaches, case: Case, steps: int, padding: Padding, own: Mapping[Slot, tuple[int, ...]] | None = None
) -> KVCaches:
    """What the caches of a model hold before a case that has a past.

    `empty` are those that the model starts with. `own` are the shapes of the caches that it is compared with: what one
    of this model's has beyond that is padding, and one that is not among them holds nothing that is read.
    """
    made: KVCaches = {}
    for slot, value in empty.items():
        values = host(value)
        _, heads, _, size = (own or {}).get(slot, (0, 0, 0, 0) if own else values.shape)
        cache = np.zeros((len(case.past), values.shape[1], max(case.past), values.shape[3]), values.dtype)
        for row, count in enumerate(case.past):
            places = slice(-count, None) if padding == "front" else slice(count)
            cache[row, :heads, places, :size] = _numbers(slot, count, _live(case, row, steps), heads, size)
        made[slot] = cache
    return made


def _live(case: Case, row: int, steps: int) -> int:
    """How many tokens of a row's past leave the window until the case ends, and one that does not."""
    tokens = case.past[row] + len(case.rows[row]) + steps
    return max(LEAST_LIVE, tokens - case.window + 1)


def _numbers(slot: Slot, count: int, live: int, heads: int, size: int) -> Array:
    layer, kind = slot
    numbers = np.random.default_rng([layer, kind == "value", count]).standard_normal((heads, count, size), np.float32)
    if kind == "key":
        numbers[:, live:] = 0
    return numbers
