"""The architecture out of each published form of config.json; malformed ones are one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgery.architecture import Architecture, architecture, read_config, text_config
from surgery.errors import ArchitectureError

S, F = "sliding_attention", "full_attention"

E2B: dict[str, Any] = {
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text", "hidden_size": 1536, "num_hidden_layers": 35, "layer_types": ([S] * 4 + [F]) * 7,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512,
        "num_kv_shared_layers": 20, "sliding_window": 512, "hidden_size_per_layer_input": 256, "vocab_size": 262144,
        "max_position_embeddings": 131072, "attention_k_eq_v": False,
    },
}  # fmt: skip
E4B: dict[str, Any] = {
    "model_type": "gemma4",
    "text_config": {
        **E2B["text_config"], "hidden_size": 2560, "num_hidden_layers": 42, "layer_types": ([S] * 5 + [F]) * 7,
        "num_key_value_heads": 2, "num_kv_shared_layers": 18,
    },
}  # fmt: skip
TINY_E2B_HUB: dict[str, Any] = {
    "model_type": "gemma4_text", "vocab_size": 128, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8,
    "max_position_embeddings": 256, "hidden_size": 64, "num_hidden_layers": 10, "layer_types": ([S] * 4 + [F]) * 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 5,
    "attention_k_eq_v": False,
}  # fmt: skip
TINY_31B_HUB: dict[str, Any] = {
    **TINY_E2B_HUB, "num_hidden_layers": 6, "layer_types": [S] * 5 + [F], "num_key_value_heads": 4,
    "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "attention_k_eq_v": True,
}  # fmt: skip


def as_transformers_writes_it(hub: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    text = {k: v for k, v in hub.items() if k not in ("global_head_dim", "num_global_key_value_heads")}
    return {**text, "per_layer_config": overrides}


TINY_E2B_WRITTEN = as_transformers_writes_it(TINY_E2B_HUB, {"4": {"head_dim": 32}, "9": {"head_dim": 32}})
TINY_31B_WRITTEN = as_transformers_writes_it(TINY_31B_HUB, {"5": {"head_dim": 32, "num_key_value_heads": 2}})


def changed(**values: Any) -> dict[str, Any]:
    return {k: v for k, v in {**TINY_E2B_HUB, **values}.items() if v != "absent"}


def kv_source_numbers(arch: Architecture) -> list[int]:
    return [layer.index for layer in arch.kv_sources]


def test_e2b_has_fifteen_owners_and_its_borrowers_read_13_and_14() -> None:
    arch = architecture(E2B)
    assert kv_source_numbers(arch) == list(range(15))
    assert {(layer.attention, layer.kv_source) for layer in arch.kv_shared_layers} == {("sliding", 13), ("full", 14)}
    assert [layer.index for layer in arch.layers if layer.attention == "full"] == list(range(4, 35, 5))
    assert {layer.head_size for layer in arch.layers if layer.attention == "full"} == {512}
    assert {layer.window for layer in arch.layers} == {512, None}
    assert arch.per_layer_input_size == 256


def test_e4b_has_24_owners_and_its_borrowers_read_22_and_23() -> None:
    arch = architecture(E4B)
    assert kv_source_numbers(arch) == list(range(24))
    assert {(layer.attention, layer.kv_source) for layer in arch.kv_shared_layers} == {("sliding", 22), ("full", 23)}
    assert len(arch.layers) == 42 and arch.layers[-1].kv_heads == 2


def test_31b_shares_nothing_and_its_full_layers_have_heads_of_their_own() -> None:
    arch = architecture(TINY_31B_HUB)
    assert arch.kv_shared_layers == ()
    assert [(layer.head_size, layer.kv_heads) for layer in arch.layers] == [(16, 4)] * 5 + [(32, 2)]
    assert arch.per_layer_input_size == 0


@pytest.mark.parametrize(
    ("hub", "written"), [(TINY_E2B_HUB, TINY_E2B_WRITTEN), (TINY_31B_HUB, TINY_31B_WRITTEN)], ids=["e2b", "31b"]
)
def test_both_published_forms_mean_the_same(hub: dict[str, Any], written: dict[str, Any]) -> None:
    assert architecture(hub) == architecture(written)


def test_text_config_and_its_contents_mean_the_same() -> None:
    assert architecture(E2B) == architecture(E2B["text_config"])
    assert text_config(E2B)["hidden_size"] == 1536


def test_per_layer_config_counts_for_sliding_layers_too_and_its_keys_are_padded() -> None:
    arch = architecture(
        {**TINY_E2B_WRITTEN, "per_layer_config": {"00": {"head_dim": 24}, "09": {"num_key_value_heads": 3}}}
    )
    assert [arch.layers[i].head_size for i in (0, 1, 4, 9)] == [24, 16, 16, 16]
    assert arch.layers[9].kv_heads == 3


def test_global_kv_heads_only_count_with_k_eq_v() -> None:
    assert architecture(changed(num_global_key_value_heads=2)).layers[4].kv_heads == 1


def test_default_layer_types_are_five_to_one_and_gemma4_ends_with_full_attention() -> None:
    arch = architecture(changed(layer_types="absent", num_hidden_layers=14, num_kv_shared_layers=0))
    assert [layer.index for layer in arch.layers if layer.attention == "full"] == [5, 11, 13]
    gemma3 = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 14, "hidden_size": 64, "head_dim": 8}}
    arch = architecture(gemma3)
    assert [layer.index for layer in arch.layers if layer.attention == "full"] == [5, 11]
    assert {layer.head_size for layer in arch.layers} == {8} and arch.family == "gemma3"
    assert arch.per_layer_input_size == 0


def test_a_declared_last_layer_is_full_attention_in_gemma4_as_transformers_has_it() -> None:
    arch = architecture(changed(layer_types=[F, *[S] * 9], num_kv_shared_layers=0))
    assert [layer.index for layer in arch.layers if layer.attention == "full"] == [0, 9]


UNIFIED_12B = {
    "model_type": "gemma4_unified",
    "text_config": {
        "model_type": "gemma4_unified_text", "hidden_size": 3840, "num_hidden_layers": 48, "layer_types": None,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1, "head_dim": 256,
        "global_head_dim": None, "num_kv_shared_layers": None, "sliding_window": 1024, "vocab_size": None,
        "hidden_size_per_layer_input": 0, "max_position_embeddings": 262144, "attention_k_eq_v": True,
    },
}  # fmt: skip


def test_12b_has_its_own_model_type_and_null_is_the_default() -> None:
    arch = architecture(UNIFIED_12B)
    assert [layer.index for layer in arch.layers if layer.attention == "full"] == list(range(5, 48, 6))
    assert {(layer.head_size, layer.kv_heads) for layer in arch.layers} == {(256, 8), (512, 1)}
    assert arch.kv_shared_layers == () and arch.per_layer_input_size == 0 and arch.vocab_size == 262144


def test_absent_per_layer_input_size_means_256_in_gemma4() -> None:
    assert architecture(changed(hidden_size_per_layer_input="absent")).per_layer_input_size == 256


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "model_type is absent; gemma4, gemma4_text, gemma3, gemma3_text, gemma3n or gemma3n_text is expected"),
        ({"model_type": "llama"}, "model_type is llama; gemma4"),
        ({"model_type": "gemma4"}, "config.json has no num_hidden_layers"),
        (changed(hidden_size="absent"), "config.json has no hidden_size"),
        (changed(num_hidden_layers=0), "num_hidden_layers is 0; a whole number from 1 to 4096 is expected"),
        (changed(num_hidden_layers=2**31 - 1), "num_hidden_layers is 2147483647; a whole number from 1 to 4096"),
        (changed(num_hidden_layers=True), "num_hidden_layers is True; a whole number"),
        (changed(num_hidden_layers=10.0), r"num_hidden_layers is 10\.0; a whole number"),
        (changed(head_dim="16"), "head_dim is '16'; a whole number"),
        (changed(head_dim=-1), "head_dim is -1; a whole number"),
        (changed(vocab_size=10**30), "vocab_size is 1000000000000000000000000000000; a whole number"),
        (changed(num_kv_shared_layers=10), "num_kv_shared_layers is 10, but the model has only 10 layers"),
        (changed(num_kv_shared_layers=6), "layer 4 shares a full KV cache, but no full layer before it has one"),
        (changed(layer_types=[S] * 9), "layer_types has 9 entries, but num_hidden_layers is 10"),
        (changed(layer_types="full"), "layer_types has 'full', but num_hidden_layers is 10"),
        (changed(layer_types=[S] * 9 + ["mamba"]), r"layer_types\[9\] is 'mamba'; sliding_attention or full_attention"),
        (changed(layer_types=[S] * 9 + [[]]), r"layer_types\[9\] is \[\]; sliding_attention or full_attention"),
        (changed(layer_types=None, sliding_window_pattern="x"), "sliding_window_pattern is 'x'; a whole number"),
        (changed(layer_types=None, sliding_window_pattern=-6), "sliding_window_pattern is -6; a whole number"),
        (changed(per_layer_config=[1]), "per_layer_config is a list; an object is expected"),
        (changed(per_layer_config={"10": {}}), "per_layer_config has '10': {}; the number of one of 10 layers"),
        (changed(per_layer_config={"x": {}}), "per_layer_config has 'x': {}; the number of one of 10 layers"),
        (changed(per_layer_config={"4": 32}), "per_layer_config has '4': 32; the number of one of 10 layers"),
        (changed(per_layer_config={"4": {"head_dim": "a"}}), "head_dim is 'a'; a whole number"),
    ],
)  # fmt: skip
def test_a_malformed_config_is_one_sentence(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArchitectureError, match=sentence) as raised:
        architecture(config)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not JSON: Expecting value"),
        ("[1]", "holds a JSON list; an object is expected"),
        ('{"a": }', "is not JSON: Expecting value: line 1 column 7"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", r"is not JSON: it holds the number 9{20}\.\.\., which has 5,000 digits"),
        (f'{{"temperature": {10**400}}}', "is not JSON: it holds the number 1000.*, which has 401 digits"),
        ('{"a": -1e999}', "is not JSON: it holds the number -1e999, which is larger than any float"),
        ('{"a": [{"b\\uDC00": 1}]}', r"is not JSON: it holds '\\udc00', half of a pair"),
    ],
    ids=["empty", "list", "fault", "deep", "digits", "more digits", "infinite", "surrogate"],
)
def test_a_file_that_is_no_json_object(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArchitectureError, match=sentence):
        read_config(tmp_path / "config.json")


def test_numbers_and_pairs_that_files_in_the_wild_have(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_max_length": 1000000000000000019884624838656, "a": "\\ud83d\\ude00"}'
    )
    assert read_config(tmp_path / "config.json") == {"model_max_length": int(1e30), "a": "\U0001f600"}


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"config\.json is missing"):
        read_config(tmp_path / "config.json")
    with pytest.raises(ArchitectureError, match="cannot be read: Is a directory"):
        read_config(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ArchitectureError, match="is not JSON: 'utf-8' codec"):
        read_config(tmp_path / "latin")
    (tmp_path / "good").write_text(json.dumps(E2B))
    assert read_config(tmp_path / "good") == E2B
