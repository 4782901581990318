"""The fast preset: attention fused, rows counted in the mask, caches in one buffer, and the source's numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
from onnx import ModelProto, NodeProto
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array
from places import DATA, TINY
from typer.testing import CliRunner

import fixtures
from passes import AnnotateHeadSizes, DropAttentionBias, ExpandSharedKV, FuseAttention, SliceCaches
from passes.base import Outcome, Pass, apply
from passes.presets import fast
from passes.recipe import parse, recipe_text
from surgery.architecture import architecture
from surgery.attention.gqa import BIAS
from surgery.attention.kv_wiring import attention_nodes, attentions
from surgery.attention.unfused import UnfusedSearch
from surgery.commands.app import app
from surgery.errors import ModelError, PassError, RequestError
from surgery.folder.building import build_folder
from surgery.folder.genai_config import shares_buffer
from surgery.folder.opened import open_genai_folder
from surgery.graph.evaluation import Subgraph
from surgery.graph.model import Model
from surgery.graph.nodes import copied, node_in_words
from surgery.graph.renaming import rename
from surgery.graph.tensor_types import declared_types
from surgery.runtime.decoding import DecodeLoop, prompt_feeds
from surgery.runtime.sessions import MergedModel, OpenGraph, Settings, host
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export, open_export
from surgery.verify import Request, prove_folder
from surgery.verify.structure import structure_gates

REFERENCES = {"tiny-e2b": "tiny_e2b", "tiny-e4b": "tiny_e4b", "tiny-31b": "tiny_31b"}
EOS = (1, 50, 106)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    root = tmp_path_factory.mktemp("exports")
    for name in REFERENCES:
        fixtures.build(name, "fp32", root / name)
    fixtures.build("tiny-e4b", "q4f16", root / "tiny-e4b", force=True)
    return {name: open_export(root / name) for name in REFERENCES}


@pytest.fixture(scope="module")
def folders(exports: dict[str, Export], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for name, export in exports.items():
        repacked(export, "fp32", root / name)
    return {name: root / name for name in exports}


def repacked(export: Export, precision: str, target: Path) -> None:
    pair = export.pair(precision)
    recipe = fast(pair.embed)
    build_folder(export, pair, recipe, target, recipe_text=recipe_text(fast(Path(pair.embed.name))))


def decoder(exports: dict[str, Export], name: str) -> Model:
    export = exports[name]
    return Model.open(export.pair("fp32").decoder, export.architecture)


def fused(model: Model, *steps: FuseAttention | DropAttentionBias) -> tuple[Model, list[Outcome]]:
    return apply(model, steps or (FuseAttention(), DropAttentionBias()))


def said(outcome: Outcome) -> str:
    return "\n".join(map(str, outcome.findings))


def operators(model: Model) -> set[str]:
    return {node.op_type for node in model.graph.node}


# The folder


@pytest.mark.parametrize("name", REFERENCES)
def test_runtime_generates_the_tokens_of_transformers(name: str, folders: dict[str, Path]) -> None:
    expected = np.load(DATA / f"{REFERENCES[name]}_ref.npz")
    model = og.Model(str(folders[name]))
    for prompt in range(6):
        ids = expected[f"p{prompt}_ids"].reshape(-1)
        wanted = [int(token) for token in expected[f"p{prompt}_tokens"].reshape(-1)]
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + len(wanted))
        generator = og.Generator(model, params)
        generator.append_tokens(ids.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        ends = next((i for i, token in enumerate(wanted) if token in EOS), len(wanted))
        assert [int(t) for t in generator.get_sequence(0)[len(ids) :]] == wanted[:ends]


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_are_those_of_transformers(name: str, folders: dict[str, Path]) -> None:
    expected = np.load(DATA / f"{REFERENCES[name]}_ref.npz")
    runner = MergedModel(folders[name] / "model.onnx", Settings())
    for prompt in range(6):
        loop = DecodeLoop(runner, 1)
        prefill, tokens = (expected[f"p{prompt}_{part}"] for part in ("prefill_logits", "tokens"))
        wanted = [
            prefill.reshape(-1, prefill.shape[-1])[-1],
            *expected[f"p{prompt}_decode_logits"].reshape(-1, prefill.shape[-1]),
        ]
        (step,) = loop.prompt(expected[f"p{prompt}_ids"].reshape(1, -1).tolist())
        found = [step.logits[0], *(loop.append(tokens.reshape(-1)[[i]]).logits[0] for i in range(len(wanted) - 1))]
        assert np.abs(np.array(found) - np.array(wanted)).max() < 1e-4


@pytest.mark.parametrize("name", ["tiny-e2b"])
def test_every_gate_passes_within_the_tolerance_of_another_order(
    name: str, folders: dict[str, Path], exports: dict[str, Export]
) -> None:
    report = prove_folder(folders[name], exports[name].pair("fp32"), request=Request(scope="closing"))
    assert report.passed, [gate for gate in report.gates if not gate.passed]
    assert report.settings["thresholds"]["logits"] == 1e-4
    assert report.parity is not None and report.parity.exact == report.parity.continuations


def test_float16_keeps_to_its_own_tolerance(tmp_path: Path) -> None:
    repacked(open_export(TINY), "q4f16", tmp_path / "out")
    report = prove_folder(tmp_path / "out", open_export(TINY).pair("q4f16"), request=Request(scope="closing"))
    assert report.passed, [gate for gate in report.gates if not gate.passed]
    assert 0 < report.settings["thresholds"]["logits"] < 1


@pytest.mark.parametrize("name", REFERENCES)
def test_past_and_present_share_a_buffer(name: str, folders: dict[str, Path]) -> None:
    assert json.loads((folders[name] / "genai_config.json").read_text())["search"]["past_present_share_buffer"] is True
    model = Model.open(folders[name] / "model.onnx")
    assert not operators(model) & {"Softmax", "Trilu"}


def test_buffer_is_not_shared_by_aliases(exports: dict[str, Export]) -> None:
    model, _ = apply(decoder(exports, "tiny-e2b"), [FuseAttention(), ExpandSharedKV()])
    assert not shares_buffer(model)


# Padding


def test_a_padded_row_is_what_it_is_alone(folders: dict[str, Path], exports: dict[str, Export]) -> None:
    """The shorter row's padding is longer than the window: the source's own graphs lose its prompt there."""
    numbers = np.random.default_rng(5)
    rows = [tuple(numbers.integers(4, 100, size).tolist()) for size in (3, 15)]
    source, merged = (
        TwoGraphModel.open(exports["tiny-e2b"].pair("fp32"), Settings()),
        folders["tiny-e2b"] / "model.onnx",
    )
    together, wrong = DecodeLoop(MergedModel(merged, Settings()), 2), DecodeLoop(source, 2)
    alone = [DecodeLoop(source, 1) for _ in rows]
    steps = [next(iter(loop.prompt(given))) for loop, given in ((together, rows), (wrong, rows))]
    wanted = np.concatenate([next(iter(loop.prompt([row]))).logits for loop, row in zip(alone, rows, strict=True)])
    for _ in range(10):
        assert np.abs(steps[0].logits - wanted).max() < 1e-4
        chosen = wanted.argmax(1)
        steps = [together.append(chosen), wrong.append(chosen)]
        wanted = np.concatenate([loop.append(chosen[[i]]).logits for i, loop in enumerate(alone)])
    assert np.abs(steps[1].logits - wanted).max() > 1, "the source's graphs take padding for tokens"


# Windows


@pytest.mark.parametrize("step", [FuseAttention(), SliceCaches(), ExpandSharedKV(), AnnotateHeadSizes()])
@pytest.mark.parametrize("window", [7, 1024])
def test_a_window_that_is_not_config_jsons_is_an_error_that_names_both(
    window: int, step: Pass, exports: dict[str, Export]
) -> None:
    model, _ = fused(decoder(exports, "tiny-e2b"))
    export = exports["tiny-e2b"]
    text_model = {**export.config["text_config"], "sliding_window": window}
    model.architecture = architecture({**export.config, "text_config": text_model})
    sentence = (
        f"layer 0 sees {window} tokens by config.json, but local_window_size of GroupQueryAttention node '.*' is 8"
    )
    with pytest.raises(PassError, match=sentence):
        apply(model, [step])


def test_a_window_that_is_not_the_layer_tables_fails_a_gate(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["tiny-e2b"], tmp_path / "out"))
    model = Model.open(folder / "model.onnx")
    node = next(node for node in model.graph.node if "layers.5/" in node.name and node.op_type == "GroupQueryAttention")
    next(attribute for attribute in node.attribute if attribute.name == "local_window_size").i = 2048
    (folder / "model.onnx").write_bytes(model.to_bytes())
    failed = [gate.detail for gate in structure_gates(open_genai_folder(folder)) if not gate.passed]
    assert failed == [
        f"layer 5 sees 8 tokens by the layer table, but local_window_size of {node_in_words(node)} is 2048"
    ]


# fuse-attention


@pytest.mark.parametrize("name", REFERENCES)
def test_each_unrolled_layer_is_fused_and_keeps_its_cache(name: str, exports: dict[str, Export]) -> None:
    before = decoder(exports, name)
    after, (outcome,) = fused(before, FuseAttention())
    cores = attentions(after.graph)
    assert {core.operator for core in cores} == {"GroupQueryAttention"}
    assert [(c.key, c.value) for c in cores] == [(c.key, c.value) for c in attentions(before.graph)]
    assert outcome.operators["Softmax"] == -outcome.operators["GroupQueryAttention"]
    scales = [
        a.f for n in after.graph.node if n.op_type == "GroupQueryAttention" for a in n.attribute if a.name == "scale"
    ]
    assert set(scales) == {1.0}


def test_a_second_run_finds_nothing_to_do(exports: dict[str, Export]) -> None:
    model, _ = fused(decoder(exports, "tiny-e2b"))
    _, (again, lengths) = fused(model)
    assert not again.changed and said(again) == "skipped attention: each of 10 layers is fused already"
    assert not lengths.changed and "counted in the mask already" in said(lengths)


def test_fused_alone_it_keeps_the_owners_bias_for_its_borrowers(exports: dict[str, Export]) -> None:
    """Row by row as the source has it: a KV source layer and its KV-shared layers must agree on where a row's tokens are."""
    model, _ = fused(decoder(exports, "tiny-e2b"), FuseAttention())
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert [len(node.input) for node in nodes] == [11] * 4 + [7] + [11] * 4 + [7]
    assert len({tuple(node.input[5:7]) for node in nodes if len(node.input) == 11}) == 1


def test_older_runtimes_get_presents_by_name(exports: dict[str, Export]) -> None:
    for version, outputs in (("1.31", 1), ("1.27", 3)):
        (step,) = parse(f"fuse-attention{{onnxruntime={version}}}")
        model, _ = apply(decoder(exports, "tiny-e2b"), [step])
        kv_shared_layers = [
            n for n in model.graph.node if n.op_type == "GroupQueryAttention" and "no_rows" in n.input[1]
        ]
        assert {len(node.output) for node in kv_shared_layers} == {outputs}
        read = {name for node in model.graph.node for name in node.input}
        assert not any(set(node.output[1:]) & read for node in kv_shared_layers)


def constant(proto: ModelProto, node: NodeProto, index: int, value: float) -> None:
    """Give one input of one node another value, in a constant of its own."""
    old = next(tensor for tensor in proto.graph.initializer if tensor.name == node.input[index])
    new = np.full_like(to_array(old), value)
    node.input[index] = f"{old.name}/other"
    proto.graph.initializer.append(from_array(new, node.input[index]))


def find(proto: ModelProto, name: str) -> NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def another_window(proto: ModelProto) -> None:
    constant(proto, find(proto, "/model/shared_donor.3/mask/slide"), 1, 7)


def another_scale(proto: ModelProto) -> None:
    constant(proto, find(proto, "/model/layers.4/attn/manual/scores/Mul"), 1, 0.5)


def no_padding(proto: ModelProto) -> None:
    constant(proto, find(proto, "/model/layers.4/attn/manual/scores/Where"), 2, 0.0)


def keys_swapped(proto: ModelProto) -> None:
    node = find(proto, "/model/layers.4/attn/manual/k_concat/Concat")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def the_last_row_s_padding(proto: ModelProto) -> None:
    """Every row of a batch takes the padding of its last one."""
    node = make_node("Slice", ["X", "last", "end", "first"], ["last_row"])
    between(proto, "/model/shared_donor.3/mask/pad_unsq", 0, node, last=[-1], end=[2**31], first=[0])


def no_append(proto: ModelProto) -> None:
    node = find(proto, "/model/layers.4/attn/manual/k_concat/Concat")
    node.op_type = "TensorScatter"


def not_a_number(proto: ModelProto) -> None:
    constant(proto, find(proto, "/model/layers.4/attn/manual/scores/Mul"), 1, np.nan)


def padding_of_new_tokens_alone(proto: ModelProto) -> None:
    """Of what is past all is a token; the longest prompt that a padded batch is tried with is new to its end."""
    between(
        proto, "/model/shared_donor.3/mask/pad_unsq", 0,
        make_node("Slice", ["X", "front", "edge", "columns"], ["old"]), make_node("Or", ["old", "always"], ["kept"]),
        make_node("Slice", ["X", "edge", "far", "columns"], ["new"]), make_node("Concat", ["kept", "new"], ["mask"], axis=1),
        front=[0], edge=[-6], far=[2**31], columns=[1], always=True,
    )  # fmt: skip


def clipped(place: int) -> Callable[[ModelProto], None]:
    """Scores of no more than 6, which random ones do not reach, or of no less than -6."""

    def damage(proto: ModelProto) -> None:
        bounds = ["", ""]
        bounds[place] = "bound"
        node = make_node("Clip", ["X", *bounds], ["clipped"])
        between(proto, "/model/layers.4/attn/manual/scores/Where", 1, node, bound=np.float32((-6, 6)[place]))

    return damage


def another_way(proto: ModelProto) -> None:
    node = find(proto, "/model/layers.7/attn/shared/q_reshape")
    node.op_type = "Softplus"
    del node.input[1:]


@pytest.mark.parametrize(
    ("damage", "layers", "sentence"),
    [
        (another_window, (5, 6, 7, 8), "layer 5: it is not attention over 8 tokens, with one more token: up to"),
        (another_scale, (4, 9), "layer 4: it is not attention over all tokens, with a padded prompt: up to"),
        (no_padding, (4, 9), "layer 9: layer 4, which reads the same cache, stays unfused"),
        (
            the_last_row_s_padding,
            (4, 5, 6, 7, 8, 9),
            "layer 5: it is not attention over 8 tokens, with a padded prompt",
        ),
        (keys_swapped, (4, 9), "a Concat of its past and the new rows is expected"),
        (no_append, (4, 9), "comes from TensorScatter node '.*'; a Concat of its past and the new rows is expected"),
        (not_a_number, (4, 9), "layer 4: it is not attention over all tokens, with a padded prompt: up to nan"),
        (
            padding_of_new_tokens_alone,
            (4, 5, 6, 7, 8, 9),
            "layer 5: it is not attention over 8 tokens, with (one more|.* most of them past)",
        ),
        (clipped(0), (4, 9), "layer 4: it is not attention over all tokens, with the oldest key in view"),
        (clipped(1), (4, 9), "layer 4: it is not attention over all tokens, with the newest key in view"),
        (another_way, (7,), r"Softplus node '.*' is met where a value \[batch, tokens, 64\] is expected"),
    ],
)
def test_what_is_not_causal_attention_stays_with_the_reason(
    damage: Callable[[ModelProto], None], layers: tuple[int, ...], sentence: str, exports: dict[str, Export]
) -> None:
    model = decoder(exports, "tiny-e2b")
    damage(model.proto)
    after, (outcome,) = fused(model, FuseAttention())
    assert re.search(sentence, said(outcome)), said(outcome)
    unfused = [i for i, core in enumerate(attentions(after.graph)) if core.operator == "Softmax"]
    assert tuple(unfused) == layers
    with pytest.raises(PassError, match=f"layer {layers[0]}'s attention is unfused"):
        fused(after, DropAttentionBias())


def between(proto: ModelProto, reader: str, index: int, *nodes: NodeProto, **constants: object) -> None:
    """Put nodes before one that reads the output of the last of them then; `X` is what it has read."""
    place = next(i for i, node in enumerate(proto.graph.node) if node.name == reader)
    node = proto.graph.node[place]
    for new in nodes:
        new.input[:] = [node.input[index] if name == "X" else name for name in new.input]
    node.input[index] = nodes[-1].output[0]
    proto.graph.initializer.extend(from_array(np.array(value), name) for name, value in constants.items())
    held = [*map(copied, proto.graph.node[:place]), *nodes, *map(copied, proto.graph.node[place:])]
    del proto.graph.node[:]
    proto.graph.node.extend(held)


def test_a_cache_of_other_rows_that_attend_to_the_same_stays(exports: dict[str, Export]) -> None:
    """New keys twice as large, and queries half: what is past has other keys then."""
    model, root = decoder(exports, "tiny-e2b"), "/model/layers.4/attn/manual"
    between(model.proto, f"{root}/k_concat/Concat", 1, make_node("Mul", ["X", "two"], ["more"]), two=np.float32(2))
    between(model.proto, f"{root}/MatMul", 0, make_node("Mul", ["X", "half"], ["less"]), half=np.float32(0.5))
    _, (outcome,) = fused(model, FuseAttention())
    assert re.search("layer 4: it is not .*present.4.key, with|layer 4: it is not attention", said(outcome)), said(
        outcome
    )


def the_last(proto: ModelProto, layer: int, tokens: int) -> None:
    """A full layer sees so many tokens alone."""
    between(
        proto, f"/model/layers.{layer}/attn/manual/scores/Where", 0,
        make_node("Sub", ["/model/shared_dims/past_length/Sub/output_0", "less"], ["diagonal"]),
        make_node("Trilu", ["X", "diagonal"], ["seen"], upper=1),
        less=np.int64(tokens - 1),
    )  # fmt: skip


def favoured(proto: ModelProto, layer: int, first: int) -> None:
    """The scores of all tokens from one on are larger by 0.5."""
    between(
        proto, f"/model/layers.{layer}/attn/manual/scores/Where", 1,
        make_node("Shape", ["attention_mask"], ["all"], start=1, end=2), make_node("Squeeze", ["all"], ["end"]),
        make_node("Range", ["nought", "end", "one"], ["places"]), make_node("Less", ["places", "first"], ["early"]),
        make_node("Where", ["early", "no", "half"], ["bias"]), make_node("Add", ["X", "bias"], ["biased"]),
        nought=0, one=1, first=first, no=np.float32(0), half=np.float32(0.5),
    )  # fmt: skip


def capped(proto: ModelProto, layer: int, cap: float) -> None:
    between(
        proto, f"/model/layers.{layer}/attn/manual/scores/Where", 1, make_node("Div", ["X", "cap"], ["small"]),
        make_node("Tanh", ["small"], ["bent"]), make_node("Mul", ["bent", "cap"], ["capped"]), cap=np.float16(cap),
    )  # fmt: skip


@pytest.mark.parametrize(("harm", "number"), [(the_last, 100), (the_last, 1000), (the_last, 4000), (favoured, 100)])
def test_what_begins_after_many_tokens_stays(
    harm: Callable[[ModelProto, int, int], None], number: int, exports: dict[str, Export]
) -> None:
    model = decoder(exports, "tiny-31b")
    harm(model.proto, 5, number)
    _, (outcome,) = fused(model, FuseAttention())
    assert "skipped layer 5: it is not attention over all tokens, with" in said(outcome), said(outcome)


def test_so_many_tokens_that_they_cannot_be_tried_are_told(exports: dict[str, Export]) -> None:
    model = decoder(exports, "tiny-31b")
    assert model.architecture is not None
    model.architecture = replace(model.architecture, context_length=2**24)
    the_last(model.proto, 5, 5_000_000)
    _, (outcome,) = fused(model, FuseAttention())
    assert "skipped layer 5: its constants mention 4,999,999 tokens" in said(outcome), said(outcome)


@pytest.mark.parametrize("harm", [lambda p: capped(p, 5, 50), lambda p: constant(p, find(p, SCALE), 1, 1.01)])
def test_float16_hides_no_scale(harm: Callable[[ModelProto], None], exports: dict[str, Export]) -> None:
    export = exports["tiny-e4b"]
    model = Model.open(export.pair("q4f16").decoder, export.architecture)
    harm(model.proto)
    _, (outcome,) = fused(model, FuseAttention())
    assert "skipped layer 5: it is not attention over all tokens, with" in said(outcome), said(outcome)


SCALE = "/model/layers.5/attn/manual/scores/Mul"


def test_layers_of_one_form_are_tried_once(exports: dict[str, Export], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Subgraph] = []  # held, so that no other one gets its id
    run = Subgraph.run
    monkeypatch.setattr(Subgraph, "run", lambda self, *given: runs.append(self) or run(self, *given))
    _, (outcome,) = fused(decoder(exports, "tiny-e4b"), FuseAttention())
    assert (
        "changed layer 5, 11" in said(outcome) and len(set(map(id, runs))) == 3
    )  # KV source layers, and two kinds of KV-shared layers


def test_a_layer_of_the_same_form_with_another_window_is_tried(exports: dict[str, Export]) -> None:
    model = decoder(exports, "tiny-e2b")
    layers = model.require_architecture().layers
    search = UnfusedSearch(model.proto, model.require_architecture().attention_heads, 256)
    found = {index: search.find(attention_nodes(model.graph)[index], layers[index]) for index in (5, 6)}
    search.prove(found[5], layers[5])
    search.prove(found[6], layers[6])
    with pytest.raises(ModelError, match="it is not attention over 7 tokens"):
        search.prove(found[6], replace(layers[6], window=7))


def test_a_graph_without_a_mask_is_refused(exports: dict[str, Export]) -> None:
    model = decoder(exports, "tiny-e2b")
    rename(model.graph, {"attention_mask": "mask"})
    with pytest.raises(PassError, match="the graph takes no attention_mask"):
        fused(model, FuseAttention())


# drop-attention-bias


def test_a_bias_that_hides_more_than_padding_stays(exports: dict[str, Export]) -> None:
    model, _ = fused(decoder(exports, "tiny-e2b"), FuseAttention())
    constant(model.proto, find(model.proto, "/model/gqa_attention_bias/Sub"), 0, 2.0)
    after, (outcome,) = fused(model, DropAttentionBias())
    assert not outcome.changed and "is no mask of padding alone" in said(outcome)
    assert sum(len(node.input) == 11 for node in after.graph.node) == 8


def window_in_the_bias(proto: ModelProto, window: int) -> None:
    """Fused nodes see all tokens, but for what their bias hides: those before a window."""
    gqa = [node for node in proto.graph.node if node.op_type == "GroupQueryAttention"]
    total, past = "/model/shared_dims/attention_mask/Gather_1/output_0", "/model/shared_dims/past_length/Sub/output_0"
    early = find(proto, past.removesuffix("/output_0"))
    proto.graph.node.remove(early)
    between(
        proto, gqa[0].name, 10, early,
        make_node("Range", ["nought", total, "one"], ["keys"]), make_node("Range", [past, total, "one"], ["queries"]),
        make_node("Unsqueeze", ["queries", "one_axis"], ["column"]), make_node("Sub", ["column", "keys"], ["distance"]),
        make_node("Less", ["distance", "window"], ["near"]), make_node("Where", ["near", "X", "lowest"], ["sliding"]),
        nought=0, one=1, one_axis=[1], window=window, lowest=np.float32(-1e9),
    )  # fmt: skip
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[10] = "sliding"
            next(attribute for attribute in node.attribute if attribute.name == "local_window_size").i = -1


@pytest.mark.parametrize("window", [8, 1000, 3999])
def test_a_window_that_lives_in_the_bias_stays(window: int, exports: dict[str, Export]) -> None:
    model = decoder(exports, "tiny-31b")
    window_in_the_bias(model.proto, window)
    after, (_, dropped) = fused(model)
    assert "skipped 5 attention nodes: sliding is no mask of padding alone" in said(dropped), said(dropped)
    _, (sliced,) = apply(after, [SliceCaches()])
    assert not sliced.changed


def test_each_node_is_told_by_its_own_bias(exports: dict[str, Export]) -> None:
    """Two others: one is the same under another name, one hides a key that is no padding."""
    model, _ = fused(decoder(exports, "tiny-e2b"), FuseAttention())
    one, other = (f"/model/layers.{layer}/attn/GroupQueryAttention" for layer in (0, 1))
    between(model.proto, one, BIAS, make_node("Identity", ["X"], ["twin"]))
    between(model.proto, other, BIAS, make_node("Sub", ["X", "much"], ["less"]), much=np.float32(1e9))
    after, (outcome,) = fused(model, DropAttentionBias())
    assert "skipped 1 attention nodes: less is no mask of padding alone" in said(outcome), said(outcome)
    nodes = [node for node in after.graph.node if node.op_type == "GroupQueryAttention"]
    assert [node.name for node in nodes if len(node.input) > BIAS and node.input[BIAS]] == [other]


def test_what_stays_unrolled_is_told_with_its_reason_and_not_sent_in_a_circle(exports: dict[str, Export]) -> None:
    model = decoder(exports, "tiny-31b")
    with pytest.raises(PassError) as plain:
        apply(model, [DropAttentionBias()])
    assert plain.value.hint == "run fuse-attention first"
    the_last(model.proto, 5, 1000)
    with pytest.raises(PassError, match="fuse-attention leaves it, because it is not attention over all") as stuck:
        fused(model)
    assert "fuse-attention" not in (stuck.value.hint or "")


def test_lengths_of_another_kind_stay(exports: dict[str, Export]) -> None:
    model, _ = fused(decoder(exports, "tiny-e2b"), FuseAttention())
    constant(model.proto, find(model.proto, "/model/attn_mask_reformat/attn_mask_subgraph/Sub"), 1, 2)
    _, (outcome,) = fused(model, DropAttentionBias())
    assert "are neither the mask's length nor its rows'" in said(outcome)


# slice-caches


FUSED = (FuseAttention(), DropAttentionBias())


def sliced(model: Model, *before: Pass, step: SliceCaches | None = None) -> tuple[Model, Outcome]:
    after, outcomes = apply(model, [*(before or FUSED), step or SliceCaches()])
    return after, outcomes[-1]


def test_windowed_layers_read_the_rows_in_view(exports: dict[str, Export], folders: dict[str, Path]) -> None:
    """One slice for a KV source layer and its KV-shared layers; 40 tokens on, it still has the window's 8 rows."""
    cut = [f"/model/layers.{layer}/attn/cache/key/Slice/output_0" for layer in range(4)]
    graph = OpenGraph(folders["tiny-e2b"] / "model.onnx", Settings(), cut)
    cache = graph.empty_cache(1)
    before: np.ndarray = np.zeros((1, 0), np.int64)
    for tokens, rows in ((40, 40), (1, 8), (3, 10), (1, 8)):
        feed = next(prompt_feeds([list(range(4, 4 + tokens))], before=before))
        outputs, cache = graph.run({"input_ids": feed.ids, **graph.steering(feed, 1)}, cache)
        assert {host(outputs[name]).shape for name in cut} == {(1, 1, rows, 16)}
        before = feed.mask


def test_float16_is_read_as_float32_and_converted_once_for_a_cache(exports: dict[str, Export]) -> None:
    export = exports["tiny-e4b"]
    model, outcome = sliced(Model.open(export.pair("q4f16").decoder, export.architecture))
    assert outcome.operators["ScatterND"] == 2 * len(model.require_architecture().kv_sources)
    types = declared_types(model.graph)
    fused = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert {types[node.input[place]].dtype for node in fused for place in (0, 3)} == {"FLOAT"}
    assert len({node.input[3] for node in fused}) == len(model.require_architecture().kv_sources)
    assert types["present.0.key"].dtype == "FLOAT16"


def undeclared(model: Model, gone: Callable[[str], bool]) -> Model:
    """The same without value_info of the values that are to go."""
    held = [copied(value) for value in model.graph.value_info if not gone(value.name)]
    del model.graph.value_info[:]
    model.graph.value_info.extend(held)
    return model


@pytest.mark.parametrize(("name", "precision"), [("tiny-e4b", "q4f16"), ("tiny-e2b", "fp32")])
def test_attention_without_value_info_is_sliced_in_its_caches_dtype(
    name: str, precision: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    export = exports[name]
    pair = export.pair(precision)
    source = undeclared(Model.open(pair.decoder, export.architecture), lambda name: "/attn/GroupQuery" in name)
    after, _ = apply(source, fast(pair.embed))
    after.save(tmp_path / "model.onnx")
    OpenGraph(tmp_path / "model.onnx", Settings())


def test_attention_that_is_not_declared_stays_with_the_reason(exports: dict[str, Export]) -> None:
    model = undeclared(decoder(exports, "tiny-e2b"), lambda name: True)
    with pytest.raises(PassError, match=r"fuse-attention leaves it, because .* has no declared type"):
        fused(model)


def test_a_second_slicing_finds_nothing_to_do(exports: dict[str, Export]) -> None:
    model, first = sliced(decoder(exports, "tiny-e2b"))
    assert "skipped layer 4, 9: it sees all rows, in float32" in said(first)
    _, (again,) = apply(model, [SliceCaches()])
    assert not again.changed and "its cache is sliced already" in said(again)


def turning(model: Model, layer: int = 0) -> None:
    """A layer's attention rotates by itself; of the others none does."""
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    for index, node in enumerate(nodes):
        next(attribute for attribute in node.attribute if attribute.name == "do_rotary").i = int(index == layer)


def test_what_cannot_be_sliced_stays_with_the_reason(exports: dict[str, Export]) -> None:
    _, outcome = sliced(decoder(exports, "tiny-31b"), FuseAttention())
    assert not outcome.changed and "drop-attention-bias comes first" in said(outcome)
    _, outcome = sliced(decoder(exports, "tiny-e2b"), FuseAttention())
    assert "skipped layer 0, 1, 2, 3, 5, 6, 7, 8: its lengths are not the mask's alone" in said(outcome)
    model, _ = fused(decoder(exports, "tiny-e2b"))
    turning(model)
    _, (outcome,) = apply(model, [SliceCaches()])
    assert "skipped layer 0: it rotates by itself" in said(outcome) and "changed layer 1" in said(outcome)
    turning(model, 5)
    _, (outcome,) = apply(model, [SliceCaches()])
    assert "skipped layer 3, 5, 6, 7, 8: it rotates by itself" in said(outcome) and "changed layer 0" in said(outcome)


def test_older_runtimes_get_presents_of_slices_by_name(exports: dict[str, Export]) -> None:
    for version, outputs in (("1.31", 1), ("1.27", 3)):
        (step,) = parse(f"slice-caches{{onnxruntime={version}}}")
        assert isinstance(step, SliceCaches)
        model, _ = sliced(decoder(exports, "tiny-e2b"), step=step)
        reading = [n for n in model.graph.node if n.op_type == "GroupQueryAttention" and "/Slice/" in n.input[3]]
        assert len(reading) == 8 and {len(node.output) for node in reading} == {outputs}


def test_caches_in_place_need_a_shared_buffer(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["tiny-e2b"], tmp_path / "out"))
    config = json.loads((folder / "genai_config.json").read_text())
    config["search"]["past_present_share_buffer"] = False
    (folder / "genai_config.json").write_text(json.dumps(config))
    failed = [gate for gate in structure_gates(open_genai_folder(folder)) if not gate.passed]
    assert [gate.detail for gate in failed] == [
        "past_present_share_buffer is not true, but the graph updates its caches in place"
    ]


def test_cuda_keeps_whole_caches_for_its_own_operator() -> None:
    assert "slice-caches" in recipe_text(fast(Path("e.onnx"))) and "slice-caches" not in recipe_text(
        fast(Path("e.onnx"), "cuda")
    )


# The command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kv-layout", "aliased"], "an alias is a copy of one each step"),
        (["--target", "genai-0.12"], "which genai-0.12 cannot allocate"),
    ],
)
def test_command_refuses_what_fast_cannot_meet(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["repack", str(TINY), str(tmp_path / "out"), "--preset", "fast", *arguments])
    assert isinstance(done.exception, RequestError) and sentence in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_command_writes_the_form_that_suits_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["repack", str(TINY), "--precision", "q4", "--preset", "fast", "--ep", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "--no-validate", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    monkeypatch.setattr("surgery.runtime.installing.version", lambda name: "1.28.0")
    done = CliRunner().invoke(app, [*arguments, "--no-validate", str(tmp_path / "old")])
    assert done.exit_code == 0, done.output
    recipes = {name: json.loads((tmp_path / name / "manifest.json").read_text())["recipe"] for name in ("new", "old")}
    assert "1.27" not in recipes["new"] and recipes["old"].count("{onnxruntime=1.27}") == 2
    done = CliRunner().invoke(app, [*arguments, "--onnxruntime", "1.31", str(tmp_path / "bad")])
    assert isinstance(done.exception, RequestError) and "crashes onnxruntime 1.28.0" in str(done.exception)
