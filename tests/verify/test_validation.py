"""The proof: it passes what the recipe makes, differences being exactly 0, and each fault fails its gate."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exhaustive import in_full
from folders import repack
from onnx import GraphProto, NodeProto, numpy_helper
from signing import sign

import fixtures
from passes import ExpandSharedKV, FoldLogitsToKeep, MovePadding
from passes.presets import compatible
from surgery.errors import RuntimeMissing
from surgery.folder.building import build_folder
from surgery.graph.metadata_props import set_property
from surgery.graph.model import Model
from surgery.runtime.decoding import Step, prompt_feeds
from surgery.runtime.sessions import Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, open_export
from surgery.source.layer_table import KEY, layer_table, read_layer_table
from surgery.verify import Request, prove_folder, structure
from surgery.verify.agreement import agreement_of
from surgery.verify.gates import number_gates
from surgery.verify.prompt_file import cases_of, shipped
from surgery.verify.prompts import Case, ModelTokens, Skipped, admissible, of_ids
from surgery.verify.recording import Answer, Recording, record
from surgery.verify.report import Report
from surgery.verify.thresholds import default_thresholds

PRECISIONS = ("fp32", "fp16", "q4", "q4f16", "quantized")
SHORT = Case("short", "a short prompt", ((2, 10, 77, 31),))
RAGGED = Case("ragged", "a padded batch", ((2, 10, 77), (2, 9, 33, 61, 17, 40, 8, 8, 12)))
EXACT = default_thresholds("float16")
OWNERS = {**{layer: layer for layer in range(5)}, 5: 3, 6: 3, 7: 3, 8: 3, 9: 4}


@pytest.fixture(scope="module")
def sound(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repacked folder in float32, not to be damaged."""
    return repack(export, tmp_path_factory.mktemp("sound") / "out", "fp32").folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "out"))


def edit(folder: Path, change: Callable[[GraphProto], None]) -> None:
    model = Model.open(folder / "model.onnx")
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.proto.SerializeToString())


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    change(config)
    (folder / "genai_config.json").write_text(json.dumps(config))


def node(graph: GraphProto, name: str) -> NodeProto:
    return next(each for each in graph.node if each.name == name)


def check(folder: Path, export: Export, *, source: bool = True) -> Report:
    """A short validation of a float32 folder, signed as it is."""
    sign(folder)
    return prove_folder(
        folder, export.pair("fp32") if source else None, request=Request(cases=[SHORT, RAGGED], tokens=4)
    )


def failures(report: Report, section: str) -> set[str]:
    return {gate.name for gate in report.failed if gate.section == section}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_repacked_folder_is_its_source_bit_by_bit(export: Export, precision: str, tmp_path: Path) -> None:
    """All cases in one precision; those of a light check, one for each way in which a pass could be wrong, in the others."""
    folder, full = repack(export, tmp_path / "out", precision).folder, precision == "q4"
    told: list[str] = []
    request = Request(scope="full" if full else "light")
    report = prove_folder(folder, export.pair(precision), request=request, progress=told.append)
    assert report.passed, report.failed
    assert len(report.cases) >= 14
    assert all(case.max_abs == case.cache_max_abs == 0 for case in report.cases)
    even = [case for case in report.cases if len(case.continuations) == 1 or case.name == "batch"]
    assert all(case.mean_abs == case.kl == case.regrouped_max_abs == 0 for case in even)
    assert not full or len(even) == len(report.cases) - 4, "four are padded batches"
    wanted = {"conversation", "latin", "scripts", "past-the-window" if full else "cached-past-the-window"}
    assert wanted <= {case.name for case in report.cases}
    # of 8 bits, as published, the runtime runs two prompts: each token multiplies by a whole weight made anew
    assert len(report.section("runtime")) == (5 if precision == "quantized" else 8)
    assert "source" in told and any(text.startswith("source runs: ") and "ragged-batch" in text for text in told)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", [in_full("tiny-e4b"), "tiny-31b"])
def test_other_architectures_too(name: str, tmp_path: Path) -> None:
    fixtures.build(name, "q4f16", tmp_path / "source")
    export = open_export(tmp_path / "source")
    report = prove_folder(
        repack(export, tmp_path / "out", "q4f16").folder, export.pair("q4f16"), request=Request(scope="light")
    )
    assert report.passed, report.failed
    assert max(case.max_abs for case in report.cases) == 0
    assert "past-the-window-in-chunks" in {case.name for case in report.skipped}


def test_unique_caches_and_all_logits(export: Export, tmp_path: Path) -> None:
    pair = export.pair("fp32")
    recipe = tuple(
        FoldLogitsToKeep(keep="all") if isinstance(step, FoldLogitsToKeep) else step
        for step in compatible(pair.embed)
        if not isinstance(step, ExpandSharedKV)
    )
    report = check(build_folder(export, pair, recipe, tmp_path / "out").folder, export)
    assert report.passed, report.failed
    assert all(case.cache_max_abs == 0 for case in report.cases)


def test_without_a_source_the_folder_must_load_and_generate(sound: Path, export: Export) -> None:
    report = check(sound, export, source=False)
    assert report.passed and not report.cases and not report.section("numbers")
    assert "generates tokens" in {gate.name for gate in report.gates}


def double_embedding_scale(graph: GraphProto) -> None:
    scale = node(graph, "/model/embed_tokens/Mul")
    doubled = numpy_helper.from_array(np.float32(16), "doubled")
    graph.initializer.append(doubled)
    scale.input[1] = "doubled"


def no_softcap(graph: GraphProto) -> None:
    node(graph, "/lm_head/softcap/Tanh").op_type = "Identity"


def other_owner(graph: GraphProto) -> None:
    for part, operand in (("k_transpose", 0), ("MatMul_1", 1)):
        reader = node(graph, f"/model/layers.6/attn/shared/{part}")
        reader.input[operand] = reader.input[operand].replace("present.3", "present.2")


@pytest.mark.parametrize("change", [double_embedding_scale, no_softcap])
def test_wrong_arithmetic_fails_the_logits(change: Callable[[GraphProto], None], folder: Path, export: Export) -> None:
    edit(folder, change)
    report = check(folder, export)
    assert "logits" in failures(report, "numbers")
    assert any(case.max_abs > 1e-2 and case.worst is not None for case in report.cases)


def test_a_borrower_of_the_wrong_owner_fails_the_wiring(folder: Path, export: Export) -> None:
    edit(folder, other_owner)
    assert failures(check(folder, export), "structure") == {"layer table agrees with the wiring"}


@pytest.mark.parametrize("wrong", ["present.2.key", "present.3.value"])
def test_a_wrong_alias_fails_the_structure_and_nothing_runs(wrong: str, folder: Path, export: Export) -> None:
    """Of another layer, or the value for the key; neither moves a logit."""
    edit(folder, lambda graph: node(graph, "/model/layers.5/attn/present/key").input.__setitem__(0, wrong))
    report = check(folder, export)
    assert failures(report, "structure") == {"KV-shared layers' caches are their source layers'"}
    assert failures(report, "runtime") == {"generation"} and not report.section("numbers")


def test_a_changed_weight_byte_fails_the_logits_and_generation_is_compared(folder: Path, export: Export) -> None:
    model = Model.open(folder / "model.onnx")
    weight = next(each for each in model.weight_references() if each.name.startswith("model.layers.0"))
    with weight.file.open("r+b") as file:
        file.seek(weight.offset + 3)  # sign and exponent of the first float32
        byte = file.read(1)[0]
        file.seek(weight.offset + 3)
        file.write(bytes([byte ^ 0x80]))
    report = check(folder, export)
    assert not failures(report, "structure")
    assert "logits" in failures(report, "numbers")
    assert len(report.section("runtime")) == 6


def test_padding_between_a_prompt_and_its_continuation_fails_the_padded_batch(export: Export, tmp_path: Path) -> None:
    """The source's own graphs have it there, and their window meets it: the truth is the row alone."""
    pair = export.pair("fp32")
    recipe = tuple(step for step in compatible(pair.embed) if not isinstance(step, MovePadding))
    report = check(build_folder(export, pair, recipe, tmp_path / "out").folder, export)
    assert failures(report, "numbers") == {"logits computed in other groups", "greedy tokens"}
    assert failures(report, "runtime") == {"tokens are the source's for each row alone, in a padded batch"}


def declare_logits(*dims: int) -> Callable[[GraphProto], None]:
    def change(graph: GraphProto) -> None:
        shape = next(value for value in graph.output if value.name == "logits").type.tensor_type.shape
        del shape.dim[:]
        for dim in dims:
            shape.dim.add(dim_value=dim)

    return change


@pytest.mark.parametrize(
    ("dims", "gate"),
    [
        ((1, 1, 127), "vocabulary is the logits' last axis"),
        ((1, 3, 128), "logits have one row or all"),
        ((1, 128), "logits have one row or all"),
    ],
)
def test_wrongly_declared_logits(dims: tuple[int, ...], gate: str, folder: Path, export: Export) -> None:
    edit(folder, declare_logits(*dims))
    report = check(folder, export)
    assert failures(report, "structure") == {gate}
    assert failures(report, "runtime") == {"generation"}


def symbolic_heads(graph: GraphProto) -> None:
    graph.input[-1].type.tensor_type.shape.dim[1].dim_param = "heads"


def extra_input(graph: GraphProto) -> None:
    graph.input.add().CopyFrom(graph.input[0])
    graph.input[-1].name = "foo"


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (symbolic_heads, "caches have concrete sizes"),
        (extra_input, "interface is what the configuration names"),
    ],
)
def test_an_interface_that_the_runtime_cannot_serve(
    change: Callable[[GraphProto], None], gate: str, folder: Path, export: Export
) -> None:
    edit(folder, change)
    assert gate in failures(check(folder, export, source=False), "structure")


@pytest.mark.parametrize(
    ("key", "value", "gate"),
    [
        ("model.vocab_size", 127, "vocabulary is the logits' last axis"),
        ("model.vocab_size", "128", "folder can be read"),
        ("model.eos_token_id", [1, 128], "token ids are in the vocabulary"),
        ("model.eos_token_id", None, "folder can be read"),
        ("model.bos_token_id", True, "token ids are in the vocabulary"),
        ("model.decoder.sliding_window", {"window_size": 8}, "folder can be read"),
        ("model.decoder.layer_types", [], "folder can be read"),
        ("model.decoder.filename", "../model.onnx", "folder can be read"),
        ("model.decoder.filename", "absent.onnx", "folder can be read"),
        ("model.decoder", 5, "folder can be read"),
        ("model.decoder.inputs.position_ids", "positions", "interface is what the configuration names"),
        ("model.decoder.inputs.past_key_names", "past", "folder can be read"),
        ("search.past_present_share_buffer", True, "shared buffer only where it can be"),
    ],
)
def test_a_wrong_genai_config(key: str, value: object, gate: str, folder: Path, export: Export) -> None:
    def change(config: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for part in path:
            config = config[part]
        config[last] = value

    edit_config(folder, change)
    report = check(folder, export, source=False)
    assert gate in failures(report, "structure")
    assert not any(gate.passed for gate in report.section("runtime"))


def test_a_context_without_room_for_any_prompt_proves_nothing(folder: Path, export: Export) -> None:
    edit_config(folder, lambda config: config["model"].update(context_length=4))
    report = check(folder, export, source=False)
    assert failures(report, "numbers") == {"prompts can be made"} and len(report.skipped) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff", '{"model": 1}', '{"model": {"decoder": {}}}'])
def test_a_garbled_genai_config_is_a_failed_gate(content: str, folder: Path, export: Export) -> None:
    (folder / "genai_config.json").write_text(content, encoding="latin-1")
    report = check(folder, export)
    assert failures(report, "structure") == {"folder can be read"}
    assert all(gate.detail for gate in report.failed) and len(report.gates) == 3


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_file(name: str, folder: Path, export: Export) -> None:
    (folder / name).unlink()
    report = check(folder, export)
    assert failures(report, "structure") == {"tokenizer files are there", "files are the source's"}
    assert not report.section("numbers")


def test_short_weights_fail_before_anything_runs(folder: Path, export: Export) -> None:
    data = max(folder.glob("*.onnx_data"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    report = check(folder, export)
    assert "weights are where the graph says" in failures(report, "structure")
    assert not report.section("numbers")


def test_a_config_that_the_runtime_refuses_is_told_in_its_words(folder: Path, export: Export) -> None:
    edit_config(folder, lambda config: config["model"].update(type="nonesuch"))
    report = check(folder, export, source=False)
    assert not failures(report, "structure") and not failures(report, "numbers")
    (gate,) = [gate for gate in report.failed if gate.section == "runtime"]
    assert "nonesuch" in gate.detail and "\n" not in gate.detail


def test_a_missing_runtime_is_one_sentence(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(RuntimeMissing, match="pip install 'gemma4-surgery"):
        prove_folder(sound, None)
    with pytest.raises(RuntimeMissing, match="CUDA"):
        prove_folder(sound, None, provider="cuda")


@pytest.fixture(scope="module")
def recorded(export: Export) -> Recording:
    return record(TwoGraphModel.open(export.pair("fp16"), Settings()), [SHORT, RAGGED], steps=2)


def with_logits(recorded: Recording, change: Callable[[np.ndarray], np.ndarray]) -> Recording:
    def changed(answer: Answer) -> Answer:
        steps = [Step(change(step.logits), step.computed_rows) for step in answer.steps]
        return replace(answer, steps=tuple(steps))

    return Recording(tuple(changed(answer) for answer in recorded.answers))


def test_a_source_that_is_not_finite_is_its_own_failure(recorded: Recording) -> None:
    broken = with_logits(recorded, lambda logits: np.where(np.arange(128) == 5, np.nan, logits))
    gates = {gate.name: gate.passed for gate in number_gates(agreement_of(broken, broken, OWNERS), EXACT)}
    assert not gates["source itself is finite"]
    assert gates["finite where the source is"] and gates["logits"]
    gates = {gate.name: gate.passed for gate in number_gates(agreement_of(recorded, broken, OWNERS), EXACT)}
    assert gates["source itself is finite"]
    assert not gates["finite where the source is"] and not gates["logits"]


def test_numbers_of_a_known_difference(recorded: Recording) -> None:
    """Logits shifted by 0.5: every difference is 0.5, and softmax does not see it."""
    shifted = with_logits(recorded, lambda logits: logits.astype(np.float32) + np.float32(0.5))
    found = agreement_of(recorded, shifted, OWNERS, tolerance=0.6)
    assert found.max_abs == pytest.approx(0.5) == found.smallest_tolerance
    for case in found.cases:
        assert case.mean_abs == pytest.approx(0.5, rel=1e-6)
        assert case.kl < 1e-12 and case.top1 == case.top10 == 1 and case.token_faults == 0
    assert all(gate.passed for gate in number_gates(found, replace(EXACT, logits=0.6)))
    assert [gate.name for gate in number_gates(found, replace(EXACT, logits=0.4)) if not gate.passed] == ["logits"]


def test_tokens_may_differ_only_where_the_source_hardly_prefers_its_own(recorded: Recording) -> None:
    flipped = with_logits(recorded, lambda logits: -logits)
    assert agreement_of(recorded, flipped, OWNERS).cases[0].token_faults == 3
    assert agreement_of(recorded, flipped, OWNERS, tolerance=1e3).cases[0].token_faults == 0


def test_caches_beyond_the_budget_are_compared_by_digest(export: Export) -> None:
    pair = TwoGraphModel.open(export.pair("fp32"), Settings())
    one, other = (record(pair, [case], steps=1, budget=0) for case in (SHORT, replace(SHORT, rows=((2, 10, 77, 32),))))
    assert all(cache.values is None for cache in one.answers[0].caches.values())
    assert agreement_of(one, one, OWNERS).cache_max_abs == 0
    relabelled = Recording((replace(other.answers[0], case=SHORT),))
    assert agreement_of(one, relabelled, OWNERS).cache_max_abs == np.inf


def every_case(vocabulary: ModelTokens, encode: Any, converse: Any) -> tuple[list[Case], list[Skipped]]:
    found = [*of_ids(vocabulary), *cases_of(shipped(), vocabulary, encode, converse)]
    return admissible(found, vocabulary, steps=8)


def test_prompts_that_do_not_fit_are_skipped_with_the_reason() -> None:
    cases, skipped = every_case(ModelTokens(size=10, context=12, window=4096), None, None)
    reasons = {case.name: case.reason for case in skipped}
    assert reasons["bos-only"] == "no bos_token_id is given"
    assert reasons["past-the-window"] == "4160 tokens and 8 more do not fit the context of 12"
    assert reasons["cached-padded-batch"] == "4160 tokens and 23 more do not fit the context of 12"
    assert reasons["repeated"] == "12 tokens and 8 more do not fit the context of 12"
    assert reasons["latin"] == "the folder has no tokenizer that works"
    assert all(token < 10 for case in cases for row in case.rows for token in row)
    cases, skipped = every_case(ModelTokens(size=10, context=99, image=11), lambda text: [3, 12], None)
    assert Skipped("latin", "token id 12 is outside of the vocabulary of 10") in skipped
    assert "image-placeholder" in {case.name for case in skipped}


def test_prompts_are_the_same_in_every_run() -> None:
    vocabulary = ModelTokens(
        size=262144, context=131072, bos=2, pad=0, eos=(1, 106), image=258880, audio=258881, window=512
    )

    def run() -> tuple[list[Case], list[Skipped]]:
        return every_case(vocabulary, lambda text: [ord(c) for c in text], lambda messages: [2, 105])

    cases, skipped = run()
    assert (cases, skipped) == run()
    assert not skipped and len(cases) >= 24 + 16
    assert {case.name for case in cases if case.heavy} == {"past-the-window", "past-the-window-in-chunks", "long"}
    assert 262143 in cases[[case.name for case in cases].index("highest-ids")].rows[0]


def test_a_padded_prompt_is_fed_in_pieces_with_the_positions_of_its_own_tokens() -> None:
    first, second = prompt_feeds(((5, 6), (7, 8, 9)), pad=1, chunk=2)
    assert first.ids.tolist() == [[5, 6], [7, 8]] and first.mask.shape == (2, 2)
    assert second.ids.tolist() == [[1], [9]]
    assert second.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert second.positions.tolist() == [[1], [2]]


# What is proven by something else than the pass that wrote it


def test_the_end_of_sequence_is_the_source_s(folder: Path, export: Export) -> None:
    """GenAI stops where the folder says, and tokens are compared up to there: a missing id would go unseen."""
    edit_config(folder, lambda config: config["model"].update(eos_token_id=[1, 50], pad_token_id=3))
    report = check(folder, export)
    assert failures(report, "structure") == {"token ids are the source's"}
    (gate,) = (gate for gate in report.gates if gate.name == "token ids are the source's")
    assert re.search(r"eos_token_id is 1, 50, and 1, 50, 106 in .*; pad_token_id is 3, and 0 in", gate.detail)


def test_the_layer_table_is_the_source_s(folder: Path, export: Export) -> None:
    model = Model.open(folder / "model.onnx")
    layers = list(read_layer_table(model) or ())
    layers[9] = replace(layers[9], window=8, attention="sliding")
    set_property(model.proto, KEY, layer_table(tuple(layers)))
    (folder / "model.onnx").write_bytes(model.to_bytes())
    assert failures(check(folder, export), "structure") == {"layers are the source's"}


def without_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "_RULES", {})


def test_numbers_see_another_owner_s_cache_without_a_rule_that_reads_the_wiring(
    folder: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_owner(graph: GraphProto) -> None:
        for each in graph.node:
            if "layers.7/" in each.name:
                each.input[:] = [name.replace("present.3.", "present.2.") for name in each.input]

    without_rules(monkeypatch)
    edit(folder, other_owner)
    report = check(folder, export)
    assert not failures(report, "structure") and "logits" in failures(report, "numbers")


def test_the_runtime_sees_a_buffer_that_cannot_be_shared_without_a_rule(
    folder: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_rules(monkeypatch)
    edit_config(folder, lambda config: config["search"].update(past_present_share_buffer=True))
    report = check(folder, export)
    assert not failures(report, "structure") and failures(report, "runtime")
