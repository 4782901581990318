"""uniform-heads: one size for every cache in the interface, and every number inside as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from exhaustive import in_full
from folders import repack
from onnx import TensorProto
from onnx.helper import make_graph, make_node, make_tensor_value_info
from places import DATA, TINY
from small import FLOAT, LAYERS, applied, decoder, embed_tokens, feeds, opened, refused, run

import fixtures
from passes import AnnotateHeadSizes, ExpandSharedKV, UniformHeads
from passes.base import apply
from passes.presets import compatible
from passes.recipe import parse, recipe_text
from surgery.attention.cache_padding import declared_sizes, own_sizes
from surgery.attention.kv_wiring import attentions
from surgery.choices import KVLayout, Target
from surgery.errors import ModelError, PassError
from surgery.folder.building import plan
from surgery.folder.genai_config import cache_costs, genai_config, shares_buffer
from surgery.folder.opened import open_genai_folder
from surgery.graph.model import Model
from surgery.graph.tensor_types import declared_types
from surgery.runtime.sessions import MergedModel, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, open_export
from surgery.source.layer_table import read_layer_table
from surgery.verify.agreement import agreement_of
from surgery.verify.prompts import Case
from surgery.verify.recording import record
from surgery.verify.structure import structure_gates

REFERENCES = {"tiny-e2b": "tiny_e2b", "tiny-e4b": "tiny_e4b", "tiny-31b": "tiny_31b"}
SIZES = {"tiny-e2b": (1, 32), "tiny-e4b": (2, 32), "tiny-31b": (4, 32)}


def widened(given: dict[str, Any], size: int = 16) -> dict[str, Any]:
    """Feeds whose caches are padded; with ones, which nothing may read."""
    fit = {
        k: np.pad(v, [(0, 0)] * 3 + [(0, size - v.shape[3])], constant_values=1)
        for k, v in given.items()
        if "past" in k
    }
    return given | fit  # fmt: skip


def cache_sizes(model: Model) -> set[object]:
    return {size for name, size in declared_sizes(model.graph).items() if name.startswith(("past_key", "present."))}


# In the graph


def test_every_number_inside_is_as_it_was(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, decoder(), UniformHeads())
    given = feeds(np.ones((1, 6), np.int64), 2)
    given |= run(embed_tokens(), given)
    truth, found = run(decoder(), given), run(model.proto, widened(given))
    for name, values in truth.items():
        own = found[name][..., : values.shape[-1]]
        np.testing.assert_array_equal(own, values)
        assert not found[name][..., values.shape[-1] :].any(), "the padding is not zero"
    assert outcome.operators == {"Pad": 2, "Slice": 2}
    assert [str(f) for f in outcome.findings] == [
        "changed layer 0's key and value: 1 KV head of 8, padded to 1 KV head of 16",
        "skipped 4 caches: each has 1 KV head of 16 already",
    ]


def test_aliases_copy_the_padded_cache_and_unread_pasts_are_only_declared(tmp_path: Path) -> None:
    model, outcome = applied(tmp_path, decoder(), AnnotateHeadSizes(), ExpandSharedKV(), UniformHeads())
    given = feeds(np.ones((1, 5), np.int64), 2, layers=tuple(range(LAYERS)))
    given |= run(embed_tokens(), given)
    found = run(model.proto, widened(given))
    for kind in ("key", "value"):
        np.testing.assert_array_equal(found[f"present.2.{kind}"], found[f"present.0.{kind}"])
    assert cache_sizes(model) == {(1, 16)} and outcome.operators == {"Pad": 2, "Slice": 2}


def test_the_layer_table_stays_true_and_the_wiring_is_still_found(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), AnnotateHeadSizes(), ExpandSharedKV(), UniformHeads())
    again, outcomes = apply(model, [AnnotateHeadSizes(), ExpandSharedKV(), UniformHeads()])
    assert not any(outcome.changed for outcome in outcomes) and again.proto == model.proto
    assert [layer.head_size for layer in read_layer_table(model) or ()] == [8, 16, 8, 16]
    own = own_sizes(model.graph)
    assert own["past_key_values.0.key"] == own["present.2.value"] == own["past_key_values.2.key"] == (1, 8)
    assert own["past_key_values.1.key"] == own["present.3.key"] == (1, 16)
    assert attentions(model.graph) == attentions(apply(opened(tmp_path, decoder()), [ExpandSharedKV()])[0].graph)


def test_inner_values_are_declared_with_their_own_size(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), UniformHeads())
    types = declared_types(model.graph)
    cut = next(node for node in model.graph.node if "past_key_values.0.key" in node.input)
    pad = next(node for node in model.graph.node if "present.0.key" in node.output)
    assert str(types[cut.output[0]]) == "FLOAT [batch_size, 1, past_sequence_length, 8]"
    assert str(types[pad.input[0]]) == "FLOAT [batch_size, 1, total_sequence_length, 8]"
    assert str(types["present.0.key"]) == "FLOAT [batch_size, 1, total_sequence_length, 16]"


def test_a_reader_inside_of_a_subgraph_reads_the_layers_own_part(tmp_path: Path) -> None:
    proto = decoder()
    body = [
        make_graph([make_node("ReduceSum", ["present.0.key"], [name], keepdims=0)], name,
                   [], [make_tensor_value_info(name, FLOAT, [])])
        for name in ("then", "else")
    ]  # fmt: skip
    proto.graph.input.append(make_tensor_value_info("which", TensorProto.BOOL, []))
    proto.graph.node.append(make_node("If", ["which"], ["summed"], then_branch=body[0], else_branch=body[1]))
    proto.graph.output.append(make_tensor_value_info("summed", FLOAT, []))
    model, _ = applied(tmp_path, proto, UniformHeads())
    given = feeds(np.ones((1, 5), np.int64), 2) | {"which": np.array(True)}
    given |= run(embed_tokens(), given)
    np.testing.assert_array_equal(run(model.proto, widened(given))["summed"], run(proto, given)["summed"])


def test_caches_of_one_size_are_left_alone_with_the_reason(tmp_path: Path) -> None:
    model, _ = applied(tmp_path, decoder(), UniformHeads())
    again, (outcome,) = apply(model, [UniformHeads()])
    assert not outcome.changed and again.proto == model.proto
    assert [str(f) for f in outcome.findings] == ["skipped 8 caches: each has 1 KV head of 16 already"]


def test_what_cannot_be_padded_is_refused(tmp_path: Path) -> None:
    proto = decoder()
    proto.graph.input[-1].type.tensor_type.shape.dim[3].dim_param = "size"
    refused(
        tmp_path,
        proto,
        UniformHeads(),
        r"past_key_values\.1\.value is FLOAT \[.*, size\]; numbers are expected for its KV heads",
    )
    proto = decoder()
    proto.graph.output[-1].type.tensor_type.shape.dim[3].dim_value = 24
    refused(tmp_path, proto, UniformHeads(), r"layer 1's value is \(1, 16\) as past, but \(1, 24\) as present")
    proto = decoder()
    proto.opset_import[0].version = 10
    with pytest.raises(PassError, match="opset 10 has no Slice with inputs; 11 or newer is expected"):
        UniformHeads().requires(Model.from_proto(proto))
    proto = decoder()
    del proto.graph.input[-4:]
    del proto.graph.output[1:]
    with pytest.raises(PassError, match=r"no past_key_values\.N\.key is in the interface"):
        UniformHeads().requires(Model.from_proto(proto))


# In the folder


def written(export: Export, precision: str, layout: KVLayout, target: Path, runtime: Target = "genai-0.12") -> Path:
    repack(export, target, precision, lambda embed: compatible(embed, layout, runtime), runtime=runtime)
    return target


@pytest.mark.parametrize(
    "fixture, precision, layout",
    [
        ("tiny-e2b", "fp32", "unique"),
        ("tiny-e2b", "q4f16", "aliased"),
        in_full("tiny-e4b", "q4f16", "unique"),
        ("tiny-31b", "fp32", "aliased"),
    ],
)
def test_folder_equals_its_source_bit_for_bit(fixture: str, precision: str, layout: KVLayout, tmp_path: Path) -> None:
    fixtures.build(fixture, precision, tmp_path / "source")
    export = open_export(tmp_path / "source")
    folder = open_genai_folder(written(export, precision, layout, tmp_path / "out"))
    assert cache_sizes(folder.model) == {SIZES[fixture]}
    assert [gate for gate in structure_gates(folder) if not gate.passed] == []
    assert not shares_buffer(folder.model)
    cases = [
        Case("one", "", ((2, 5, 9, 30, 31, 7, 8, 9, 10, 11, 12),)),
        Case("chunks", "", ((2, 17, 4, 4, 9),), chunk=2),
    ]
    settings = Settings(threads=1)
    theirs = record(TwoGraphModel.open(export.pair(precision), settings), cases, steps=6)
    ours = record(MergedModel(folder.model.path, settings), cases, steps=6, follow=theirs)
    found = agreement_of(theirs, ours, folder.kv_sources)
    assert (found.max_abs, found.regrouped_max_abs, found.cache_max_abs) == (0, 0, 0)
    assert not any(case.alias_faults for case in found.cases)


@pytest.mark.parametrize("fixture", ["tiny-e2b", "tiny-31b"])
def test_runtime_generates_the_tokens_of_transformers(fixture: str, tmp_path: Path) -> None:
    fixtures.build(fixture, "fp32", tmp_path / "source")
    model = og.Model(str(written(open_export(tmp_path / "source"), "fp32", "aliased", tmp_path / "out")))
    expected = np.load(DATA / f"{REFERENCES[fixture]}_ref.npz")
    for prompt in range(6):
        ids, wanted = (expected[f"p{prompt}_{part}"].reshape(-1).tolist() for part in ("ids", "tokens"))
        end = next((i for i, token in enumerate(wanted) if token in (1, 50, 106)), len(wanted))
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + len(wanted))
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0)[len(ids) :].tolist() == wanted[:end]


def test_configuration_is_one_that_old_runtimes_take(tmp_path: Path) -> None:
    folder = written(open_export(TINY), "q4", "aliased", tmp_path / "out")
    settings = json.loads((folder / "genai_config.json").read_text())
    decoder = settings["model"]["decoder"]
    assert settings["model"]["type"] == "gemma3_text"
    assert json.loads((folder / "manifest.json").read_text())["target"] == "genai-0.12"
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (32, 1, 10)
    assert settings["search"]["past_present_share_buffer"] is False


def test_costs_count_the_padding(tmp_path: Path) -> None:
    export = open_export(TINY)
    pair = export.pair("q4f16")
    plain, _ = plan(pair, export, compatible(pair.embed))
    uniform, _ = plan(pair, export, compatible(pair.embed, target="genai-0.12"))
    assert cache_costs(plain)["aliased"].bytes_per_token == 768
    assert cache_costs(uniform)["aliased"].bytes_per_token == 10 * 2 * 32 * 2
    assert cache_costs(uniform)["unique"].bytes_per_token == 5 * 2 * 32 * 2


def test_old_runtimes_are_refused_caches_of_several_sizes_and_gaps() -> None:
    export = open_export(TINY)
    pair = export.pair("q4")
    model, _ = plan(pair, export, compatible(pair.embed))
    with pytest.raises(ModelError, match=r"one size for all caches, but past_key_values\.\d\.\w+ is \(1, 16\) and"):
        genai_config(model, export, target="genai-0.12")
    uniform, _ = plan(pair, export, compatible(pair.embed, "unique", "genai-0.12"))
    for value in (*uniform.graph.input, *uniform.graph.output):
        value.name = value.name.replace(".3.", ".7.")
    with pytest.raises(ModelError, match=r"counts the caches from 0, but there is no past_key_values\.3\.key"):
        genai_config(uniform, export, target="genai-0.12")


def test_a_layer_table_that_the_padding_contradicts_is_found(tmp_path: Path) -> None:
    path = written(open_export(TINY), "q4", "aliased", tmp_path / "out") / "model.onnx"
    model = Model.open(path)
    ends = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("constants/ends_16"))
    ends.raw_data = np.array([24], np.int64).tobytes()
    path.write_bytes(model.to_bytes())
    gate = next(
        g for g in structure_gates(open_genai_folder(path.parent)) if g.name == "layer table agrees with the caches"
    )
    assert not gate.passed and "used as 1 KV heads of 24; the layer table says 1 KV heads of 16" in gate.detail


def test_padding_that_is_not_zero_is_a_difference(tmp_path: Path) -> None:
    folder = open_genai_folder(written(open_export(TINY), "q4", "unique", tmp_path / "out"))
    export, settings, cases = open_export(TINY), Settings(threads=1), [Case("one", "", ((2, 5, 9),))]
    theirs = record(TwoGraphModel.open(export.pair("q4"), settings), cases, steps=1)
    ours = record(MergedModel(folder.model.path, settings), cases, steps=1, follow=theirs)
    cache = ours.answers[0].caches[0, "key"].values
    assert cache is not None and agreement_of(theirs, ours, {}).cache_max_abs == 0
    cache[0, 0, 0, -1] = 1e-6
    assert agreement_of(theirs, ours, {}).cache_max_abs > 0


def test_the_recipe_for_old_runtimes_ends_with_it() -> None:
    recipe = compatible(Path("a.onnx"), "aliased", "genai-0.12")
    assert recipe[-1] == UniformHeads() and parse(recipe_text(recipe)) == recipe
    assert UniformHeads() not in compatible(Path("a.onnx"))
