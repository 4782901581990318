"""rename-io: by spelling and by wiring; where they disagree, or neither tells, the candidates are shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto
from onnx.helper import make_node, make_tensor_value_info
from small import FLOAT, INT64, KV_HEADS, applied, decoder, embed_tokens, feeds, opened, refused, run

from passes import MergeEmbeddings, RenameIO
from passes.base import apply
from surgery.attention.kv_wiring import slot_of_name
from surgery.graph.model import Model
from surgery.graph.renaming import rename


def spelt(**names: str) -> ModelProto:
    proto = decoder()
    rename(proto.graph, {old.replace("__", "."): new for old, new in names.items()})
    return proto


def caches(past: str, present: str) -> ModelProto:
    """The decoder with its caches spelt by two patterns of {n} and {k} (key) or {v} (k)."""
    proto = decoder()
    names = {}
    for layer in (0, 1):
        for kind in ("key", "value"):
            parts = {"n": layer, "k": kind, "v": kind[0], "K": kind.upper(), "s": f"{kind}s"}
            names[f"past_key_values.{layer}.{kind}"] = past.format(**parts)
            names[f"present.{layer}.{kind}"] = present.format(**parts)
    rename(proto.graph, names)
    return proto


def interface(proto: ModelProto) -> list[str]:
    return [value.name for value in (*proto.graph.input, *proto.graph.output)]


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ("past_{k}_{n}", "present_{k}_{n}"),
        ("past.{n}.{k}", "present_key_values.{n}.{k}"),
        ("past_{n}_{k}", "{v}_out_{n}"),
        ("{k}_cache_{n}", "{k}_cache_out_{n}"),
        ("layers.{n}.{v}_past", "layers.{n}.{v}_present"),
        ("PAST_{K}_{n}", "PRESENT_{K}_{n}"),
        ("in_{s}_{n}", "out_{s}_{n}"),
        ("past_key_values.{n:05d}.{k}", "present.{n:05d}.{k}"),
    ],
)
def test_many_spellings_of_caches(past: str, present: str, tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, caches(past, present), RenameIO())
    assert interface(model.proto) == interface(decoder()) and outcome.changed
    assert model.proto == decoder()


def test_caches_with_names_that_say_nothing_are_found_by_their_wiring(tmp_path: Path) -> None:
    proto = decoder()
    pasts = [value.name for value in (*proto.graph.input, *proto.graph.output) if "." in value.name]
    rename(proto.graph, {name: "c" + "x" * i for i, name in enumerate(reversed(pasts))})
    model, _ = applied(tmp_path, proto, RenameIO())
    assert model.proto == decoder()


@pytest.mark.parametrize("tokens", ["tokens", "token_ids", "INPUT", "nonsense"])
def test_token_inputs_of_a_merged_graph(tokens: str, tmp_path: Path) -> None:
    embed = opened(tmp_path, embed_tokens(), "embed.onnx").path
    model, _ = apply(opened(tmp_path, decoder()), [MergeEmbeddings(embed)])
    expected = model.proto
    other = Model(model.copy().proto, tmp_path / "a.onnx")
    rename(
        other.graph,
        {"input_ids": tokens, "attention_mask": "attn_mask", "position_ids": "positions", "logits": "output"},
    )
    result, (outcome,) = apply(other, [RenameIO()])
    assert result.proto == expected and len(outcome.findings) == 4
    given = feeds(np.ones((1, 3), np.int64))
    np.testing.assert_array_equal(run(result.proto, given)["logits"], run(expected, given)["logits"])


def test_names_that_are_right_are_left_alone(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, decoder(), RenameIO())
    assert not outcome.changed and model.proto == decoder()
    assert [str(f) for f in outcome.findings] == [
        "skipped interface: every input and output has the name that the runtime looks for"
    ]


def test_a_second_run_finds_nothing_to_do(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, caches("past_{k}_{n}", "present_{k}_{n}"), RenameIO())
    _, (outcome,) = apply(model, [RenameIO()])
    assert not outcome.changed


def test_findings_say_old_and_new_names(tmp_path: Path) -> None:
    _, outcome = applied(tmp_path, spelt(logits="scores", attention_mask="mask"), RenameIO())
    assert [str(f) for f in outcome.findings] == [
        "changed mask: is now attention_mask", "changed scores: is now logits"
    ]  # fmt: skip


def test_inputs_that_other_passes_remove_keep_their_names(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, spelt(attention_mask="mask"), RenameIO())
    assert {"inputs_embeds", "per_layer_inputs", "num_logits_to_keep"} <= set(interface(model.proto))


def test_captures_in_subgraphs_are_renamed(tmp_path: Path) -> None:
    from torture import CONDITION, body, if_node

    proto = decoder()
    branches = [body([make_node(op, ["attention_mask"], [op])], op, op) for op in ("Neg", "Abs")]
    proto.graph.node.insert(0, if_node(branches[0], branches[1], "unused", "if"))
    proto.graph.input.append(CONDITION)
    rename(proto.graph, {"attention_mask": "mask"})
    model, _ = applied(tmp_path, proto, RenameIO())
    assert {a.g.node[0].input[0] for a in model.graph.node[0].attribute} == {"attention_mask"}


# Refusals


def test_spelling_and_wiring_that_disagree_about_the_layer(tmp_path: Path) -> None:
    proto = spelt(past_key_values__0__key="past_key_values.7.key")
    refused(tmp_path, proto, RenameIO(), r"'past_key_values\.7\.key' is spelt as layer 7's key, but attention 0 reads it as its key; "
        r"it could be past_key_values\.7\.key or past_key_values\.0\.key")  # fmt: skip


def test_swapped_key_and_value_names(tmp_path: Path) -> None:
    proto = spelt(past_key_values__0__key="past_key_values.0.value", past_key_values__0__value="past_key_values.0.key")
    refused(
        tmp_path,
        proto,
        RenameIO(),
        r"'past_key_values\.0\.value' is spelt as layer 0's value, but attention 0 reads it as its key",
    )


def test_a_packed_cache_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    shape = [2, "batch_size", KV_HEADS, "past", 8]
    proto.graph.input.append(make_tensor_value_info("past_5", FLOAT, shape))
    refused(
        tmp_path,
        proto,
        RenameIO(),
        r"'past_5' is FLOAT \[2, batch_size, 1, past, 8\], several caches in one; one \[batch, kv heads",
    )


def test_a_cache_that_nothing_tells_about_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    proto.graph.input.append(make_tensor_value_info("mystery", FLOAT, ["b", 1, "t", 8]))
    refused(
        tmp_path,
        proto,
        RenameIO(),
        "'mystery' has rank 4 as a cache has, but its name spells no layer and key or value",
    )


def test_two_masks_are_ambiguous(tmp_path: Path) -> None:
    proto = spelt(attention_mask="mask")
    proto.graph.input.append(make_tensor_value_info("attn_mask", INT64, ["b", "other"]))
    refused(tmp_path, proto, RenameIO(), "attention_mask could be mask or attn_mask; rename one of them")
    proto = decoder()
    proto.graph.input.append(make_tensor_value_info("second", INT64, ["b", "other"]))
    refused(
        tmp_path, proto, RenameIO(), r"input 'second' \(INT64 \[b, other\]\) is not understood; it could be input_ids"
    )


def test_positions_of_another_name_are_not_taken_for_token_ids(tmp_path: Path) -> None:
    proto = spelt(position_ids="where")
    proto.graph.node.append(make_node("Gather", ["embed_tokens", "where"], ["angles"]))
    proto.graph.initializer.add(name="embed_tokens", data_type=FLOAT, dims=[0, 4])
    refused(tmp_path, proto, RenameIO(), "input 'where' .* is not understood; it could be input_ids or position_ids")


def test_two_outputs_that_could_be_the_logits(tmp_path: Path) -> None:
    proto = spelt(logits="one")
    proto.graph.node.append(make_node("Identity", ["one"], ["two"]))
    proto.graph.output.append(make_tensor_value_info("two", FLOAT, ["b", "s", 32]))
    refused(
        tmp_path, proto, RenameIO(), "the logits could be one or two; one floating-point output of rank 3 is expected"
    )


def test_an_output_of_whole_numbers_is_not_the_logits(tmp_path: Path) -> None:
    proto = spelt(logits="scores")
    proto.graph.node.append(make_node("Cast", ["scores"], ["counts"], to=INT64))
    proto.graph.output.append(make_tensor_value_info("counts", INT64, ["b", "s", 32]))
    model, _ = applied(tmp_path, proto, RenameIO())
    assert [value.name for value in model.graph.output if value.name in ("logits", "counts")] == ["logits", "counts"]


def test_a_name_that_another_input_has_is_refused(tmp_path: Path) -> None:
    """An input of no role: whatever it is, it cannot have the name of one."""
    proto = spelt(past_key_values__0__key="past_key_0")
    proto.graph.input.append(make_tensor_value_info("past_key_values.0.key", FLOAT, ["b", "s", 2]))
    sentence = "'past_key_0' should be named 'past_key_values.0.key', but another input or output has that name"
    refused(tmp_path, proto, RenameIO(), sentence)


def test_two_caches_for_one_name(tmp_path: Path) -> None:
    proto = spelt(past_key_values__0__key="past_key_0")
    proto.graph.input.append(make_tensor_value_info("past_k_0", FLOAT, ["b", 1, "t", 8]))
    refused(tmp_path, proto, RenameIO(), r"past_key_0 and past_k_0 would both be named past_key_values\.0\.key")


def test_a_name_that_an_inner_value_has_is_refused(tmp_path: Path) -> None:
    proto = spelt(attention_mask="mask")
    rename(proto.graph, {"/model/masks/Total/output_0": "attention_mask"})
    refused(
        tmp_path,
        proto,
        RenameIO(),
        "'mask' should be named 'attention_mask', but a value inside the graph has that name",
    )


def test_a_node_may_have_the_name_of_a_value(tmp_path: Path) -> None:
    proto = spelt(logits="scores")
    proto.graph.node[0].name = "logits"
    assert applied(tmp_path, proto, RenameIO())[1].changed


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("past_key_values.3.value", (3, "value")), ("past_key_values.3.key", (3, "key")), ("key_cache_12", (12, "key")),
        ("present_key_values.0.v", (0, "value")), ("k12", (12, "key")), ("past.0", None), ("past_key_values", None),
        ("past.0.1.key", None), ("key_value_3", None), ("", None), ("layers.2.k_and_v", None), ("9" * 30 + "key", None),
    ],
)  # fmt: skip
def test_spelling(name: str, slot: tuple[int, str] | None) -> None:
    assert slot_of_name(name) == slot
