"""mask-media-ids: what row a placeholder reads is computed, and made 0 where it is another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx.helper import make_node
from onnx.numpy_helper import from_array
from places import TINY
from small import applied, embed_tokens, refused, run

import fixtures
from fixtures.precision import Reading
from passes import MaskMediaIds
from passes.base import apply
from surgery.graph.model import Model

IMAGE, AUDIO = 29, 30
BOTH = MaskMediaIds(image=IMAGE, audio=AUDIO)
GRAPHS = TINY / "onnx"


def test_placeholders_read_row_zero_and_other_tokens_their_own(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, embed_tokens(), BOTH)
    ids = np.array([[1, IMAGE, 2, AUDIO, IMAGE, 3]], np.int64)
    row_zero = np.where((ids == IMAGE) | (ids == AUDIO), 0, ids)
    found, plain = run(model.proto, {"input_ids": ids}), run(embed_tokens(), {"input_ids": ids})
    wanted = run(embed_tokens(), {"input_ids": row_zero})["per_layer_inputs"]
    np.testing.assert_array_equal(found["per_layer_inputs"], wanted, strict=True)
    np.testing.assert_array_equal(found["inputs_embeds"], plain["inputs_embeds"], strict=True)
    assert not np.array_equal(plain["per_layer_inputs"], wanted), "the ids were masked already: this tests nothing"
    assert outcome.operators == {"Equal": 2, "Or": 1, "Where": 1}


def test_a_second_run_finds_nothing_to_do(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, embed_tokens(), BOTH)
    again, (outcome,) = apply(model, [BOTH])
    assert not outcome.changed and again.proto == model.proto
    assert str(outcome.findings[0]) == f"skipped token {IMAGE}: it is looked up in row 0 already"


@pytest.mark.parametrize("precision", ["", "_fp16", "_q4", "_q4f16", "_quantized"])
def test_the_communitys_own_masks_are_recognised(precision: str) -> None:
    _, (outcome,) = apply(Model.open(GRAPHS / f"embed_tokens{precision}.onnx"), [MaskMediaIds(image=113, audio=114)])
    assert not outcome.changed and len(outcome.findings) == 2


def test_a_mask_of_other_ids_is_not_taken_for_one() -> None:
    """The export masks 113 and 114; a configuration that says 112 gets a mask of its own."""
    model, (outcome,) = apply(Model.open(GRAPHS / "embed_tokens.onnx"), [MaskMediaIds(image=112, audio=114)])
    assert [str(finding) for finding in outcome.findings] == [
        "skipped token 114: it is looked up in row 0 already",
        "changed token 112: it is looked up in row 0 now",
    ]
    assert outcome.changed and model.graph.node


def test_an_export_without_masks_becomes_one_with(tmp_path: Path) -> None:
    fixtures.build("tiny-e2b", "fp32", tmp_path, reading=Reading(mask_placeholders=False))
    _, (outcome,) = apply(Model.open(tmp_path / "onnx" / "embed_tokens.onnx"), [MaskMediaIds(image=113, audio=114)])
    assert outcome.changed and {finding.verb for finding in outcome.findings} == {"changed"}


def test_a_model_without_a_per_layer_table_is_left_alone(tmp_path: Path) -> None:
    _, outcome = applied(tmp_path, embed_tokens(per_layer=False), BOTH)
    assert [str(f) for f in outcome.findings] == ["skipped per_layer_inputs: the graph has no per-layer table"]


def test_lookups_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, embed_tokens(), MaskMediaIds(), "no placeholder token is given")
    two = embed_tokens()
    two.graph.node.insert(3, make_node("Gather", ["model.embed_tokens_per_layer.weight", "input_ids"], ["more"]))
    two.graph.node.insert(4, make_node("Add", ["/model/embed_tokens_per_layer/Gather/output_0", "more"], ["sum"]))
    two.graph.node[5].input[0] = "sum"
    refused(tmp_path, two, BOTH, "comes from one lookup in a table")
    random = embed_tokens()
    lookup = next(node for node in random.graph.node if node.name == "/model/embed_tokens_per_layer/Gather")
    random.graph.initializer.append(from_array(np.array([1.0], np.float32), "ratio"))
    random.graph.node.insert(0, make_node("Nonsense", ["input_ids", "ratio"], ["rows"], name="odd"))
    lookup.input[1] = "rows"
    refused(tmp_path, random, BOTH, "looks a token up by cannot be computed")
