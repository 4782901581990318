"""Each prompt is there for one way in which a graph can be wrong: that it takes this way, and that a closing proof has it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from surgery.verify.prompts import CLOSING, Case, ModelTokens, Skipped, admissible, of_ids, within

SMALL = ModelTokens(size=128, context=256, bos=2, pad=0, eos=(1,), image=113, audio=114, window=8)
PUBLISHED = ModelTokens(size=128, context=4096, bos=2, pad=0, eos=(1,), image=113, audio=114, window=512)


def cases(vocabulary: ModelTokens) -> dict[str, Case]:
    return {case.name: case for case in of_ids(vocabulary) if isinstance(case, Case)}


@pytest.mark.parametrize("vocabulary", [SMALL, PUBLISHED], ids=["8", "512"])
def test_windows_are_crossed_by_what_is_cached_and_by_what_is_fed(vocabulary: ModelTokens) -> None:
    found, window = cases(vocabulary), vocabulary.window or 0
    alone, together = found["cached-past-the-window"], found["cached-padded-batch"]
    assert alone.past[0] > window and alone.window == window
    assert together.past[0] >= window > together.past[1], "one row is past it"
    assert together.past[1] + len(together.rows[1]) + together.tokens > window + 1, "the other one gets there"
    for name in ("past-the-window", "past-the-window-in-chunks"):
        assert found[name].longest > window + 1
    pieces = found["past-the-window-in-chunks"].chunk
    assert pieces is not None and 1 < pieces < window


def test_a_padded_batch_crosses_a_small_window_too() -> None:
    case = cases(SMALL)["ragged-batch"]
    assert case.ragged and min(case.lengths) + case.tokens > 8 + 1
    assert cases(PUBLISHED)["ragged-batch"].tokens == 0


def test_rows_of_tables_and_placeholders_are_looked_up() -> None:
    found = cases(SMALL)
    assert {0, 1, 2, 3} <= set(found["lowest-ids"].rows[0]) and {126, 127} <= set(found["highest-ids"].rows[0])
    assert found["image-placeholder"].rows[0].count(113) == found["audio-placeholder"].rows[0].count(114) == 3
    assert found["pad-inside"].rows[0].count(0) == 2


def test_batches_and_chunks_are_what_they_are_called() -> None:
    found = cases(SMALL)
    assert len(found["batch"].rows) == 2 and not found["batch"].ragged and len(found["ragged-batch"].rows) == 2
    assert found["batch"].rows[0] != found["batch"].rows[1]
    for chunk in (1, 3, 7):
        case = found[f"chunks-of-{chunk}"]
        assert case.chunk == chunk and case.longest > 2 * chunk


def test_a_closing_proof_has_one_of_each() -> None:
    left = {case.name for case in within("closing", list(of_ids(PUBLISHED))) if isinstance(case, Case)}
    assert left >= {
        "one-token", "lowest-ids", "highest-ids", "pad-inside", "image-placeholder", "audio-placeholder", "batch",
        "ragged-batch", "chunks-of-7", "cached-past-the-window", "cached-padded-batch",
    }  # fmt: skip
    assert left <= CLOSING


def test_what_does_not_fit_is_left_out() -> None:
    long = Case("long", "", (tuple(range(4, 100)) * 3,))
    found, skipped = admissible([long, Case("short", "", ((4,),))], SMALL, 2)
    assert [case.name for case in found] == ["short"] and isinstance(skipped[0], Skipped)
    assert "do not fit the context of 256" in skipped[0].reason


def test_runs_of_many_tokens_are_fed_in_each_way() -> None:
    """Alone, in chunks with a few tokens behind, in a batch and padded; where no run is computed otherwise, not at all."""
    found = cases(replace(SMALL, many=16))
    many = {name: [len(row) for row in case.rows] for name, case in found.items() if name not in cases(SMALL)}
    assert many == {
        "many-tokens": [17], "many-tokens-in-chunks": [34], "many-tokens-in-a-batch": [17, 17], "many-tokens-padded": [20, 9],
    }  # fmt: skip
    assert all(found[name].run_tokens >= 16 for name in many) and found["many-tokens-in-chunks"].chunk == 16
    assert found["ragged-batch"].run_tokens == 11 and found["chunks-of-3"].run_tokens == 3
