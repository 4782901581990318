"""Each rule over a folder's structure tells the one thing that it is there for: nothing is run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from folders import repack
from onnx import GraphProto, NodeProto
from onnx.helper import make_node

from passes.presets import fast
from surgery.folder.opened import OpenedFolder, open_genai_folder
from surgery.graph.metadata_props import set_property
from surgery.source.export import Export
from surgery.verify.structure import structure_gates

Fault = Callable[[OpenedFolder], OpenedFolder | None]
FILES, WEIGHTS, INTERFACE, CACHES, VOCABULARY, LOGITS, IDS, BUFFER, SIZES, WIRING, ALIASES = (
    "tokenizer files are there", "weights are where the graph says", "interface is what the configuration names",
    "caches have concrete sizes", "vocabulary is the logits' last axis", "logits have one row or all",
    "token ids are in the vocabulary", "shared buffer only where it can be", "layer table agrees with the caches",
    "layer table agrees with the wiring", "KV-shared layers' caches are their source layers'",
)  # fmt: skip


@pytest.fixture(scope="module")
def aliased(export: Export, tmp_path_factory: pytest.TempPathFactory) -> OpenedFolder:
    return open_genai_folder(repack(export, tmp_path_factory.mktemp("aliased") / "out").folder)


@pytest.fixture(scope="module")
def in_place(export: Export, tmp_path_factory: pytest.TempPathFactory) -> OpenedFolder:
    return open_genai_folder(repack(export, tmp_path_factory.mktemp("fast") / "out", preset=fast).folder)


def failed(folder: OpenedFolder, fault: Fault | None = None) -> set[str]:
    """The gates that fail with a fault, done to a copy."""
    mine = replace(folder, config=copy.deepcopy(folder.config), model=folder.model.copy())
    if fault is not None:
        mine = fault(mine) or mine
    return {gate.name for gate in structure_gates(mine) if not gate.passed}


def setting(**values: Any) -> Fault:
    """Other values of genai_config.json: model__vocab_size=5."""

    def change(folder: OpenedFolder) -> None:
        for place, value in values.items():
            *above, last = place.split("__")
            part: Any = folder.config
            for key in above:
                part = part[key]
            part[last] = value

    return change


def declared(graph: GraphProto, name: str) -> Any:
    """The dimensions of an input or output."""
    (value,) = [value for value in (*graph.input, *graph.output) if value.name == name]
    return value.type.tensor_type.shape.dim


def dimension(name: str, axis: int, size: int | str) -> Fault:
    def change(folder: OpenedFolder) -> None:
        dim = declared(folder.model.graph, name)[axis]
        if isinstance(size, int):
            dim.dim_value = size
        else:
            dim.dim_param = size

    return change


def node(graph: GraphProto, output: str) -> NodeProto:
    return next(node for node in graph.node if output in node.output)


def reading(output: str, name: str) -> Fault:
    """The node that gives `output` reads `name`."""

    def change(folder: OpenedFolder) -> None:
        node(folder.model.graph, output).input[0] = name

    return change


def through_a_sum(folder: OpenedFolder) -> None:
    """A KV-shared layer's present is not its source layer's, but twice that."""
    alias = node(folder.model.graph, "present.5.key")
    alias.op_type = "Add"
    alias.input.append(alias.input[0])


def another_window(folder: OpenedFolder) -> None:
    fused = next(node for node in folder.model.graph.node if node.op_type == "GroupQueryAttention")
    next(attribute for attribute in fused.attribute if attribute.name == "local_window_size").i = 9


def another_cache(folder: OpenedFolder) -> None:
    """The first layer's attention reads the second one's past."""
    fused = next(node for node in folder.model.graph.node if node.op_type == "GroupQueryAttention")
    fused.input[3] = fused.input[3].replace(".0.", ".1.")


def without(side: str, name: str) -> Fault:
    def change(folder: OpenedFolder) -> None:
        values = getattr(folder.model.graph, side)
        del values[[value.name for value in values].index(name)]

    return change


def with_input(folder: OpenedFolder) -> None:
    folder.model.graph.input.add().CopyFrom(folder.model.graph.input[0])
    folder.model.graph.input[-1].name = "another"


def layer(folder: OpenedFolder, index: int, **values: Any) -> OpenedFolder:
    layers = list(folder.layers or ())
    layers[index] = replace(layers[index], **values)
    return replace(folder, layers=tuple(layers))


def marked(folder: OpenedFolder) -> None:
    set_property(folder.model.proto, "gemma4_surgery.caches", "in place")


def ends_early(folder: OpenedFolder) -> None:
    tensor = next(tensor for tensor in folder.model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "offset").value = str(2**40)


def no_tokenizer(folder: OpenedFolder) -> OpenedFolder:
    return replace(folder, root=folder.root / "nowhere")


FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "files": (no_tokenizer, {FILES}),
    "weights": (ends_early, {WEIGHTS}),
    "logits of another name": (setting(model__decoder__outputs__logits="scores"), {INTERFACE, VOCABULARY, LOGITS}),
    "an input that nothing feeds": (with_input, {INTERFACE}),
    "a role that the graph does not take": (setting(model__decoder__inputs__position_ids="places"), {INTERFACE}),
    "a past without a present": (without("output", "present.4.value"), {CACHES}),
    "a past without numbers": (dimension("past_key_values.0.key", 3, "size"), {CACHES}),
    "a present without numbers": (dimension("present.0.key", 1, "heads"), {CACHES}),
    "vocabulary": (setting(model__vocab_size=127), {VOCABULARY}),
    "two rows": (dimension("logits", 1, 2), {LOGITS}),
    "an id beyond the vocabulary": (setting(model__pad_token_id=128), {IDS}),
    "no end": (setting(model__eos_token_id=None), {IDS}),
    "ids that are none": (setting(model__eos_token_id="1"), {IDS}),
    "a buffer that cannot be shared": (setting(search__past_present_share_buffer=True), {BUFFER}),
    "a buffer that has to be shared": (marked, {BUFFER}),
    "another size in the table": (lambda folder: layer(folder, 0, head_size=32), {SIZES}),
    "an owner that has no cache": (lambda folder: layer(folder, 5, kv_source=6), {SIZES, WIRING, ALIASES}),
    "no table": (lambda folder: replace(folder, layers=None), {SIZES, WIRING}),
    "a layer less in the table": (lambda folder: replace(folder, layers=(folder.layers or ())[:9]), {WIRING}),
    "a window": (another_window, {WIRING}),
    "another layer's cache": (another_cache, {WIRING}),
    "an alias of another layer": (reading("present.5.key", "present.0.key"), {ALIASES}),
    "an alias through a sum": (through_a_sum, {ALIASES}),
}


def test_what_is_sound_passes(aliased: OpenedFolder, in_place: OpenedFolder) -> None:
    assert failed(aliased) == failed(in_place) == set()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_gates_and_no_others(name: str, aliased: OpenedFolder) -> None:
    fault, gates = FAULTS[name]
    assert failed(aliased, fault) == gates


def test_an_owner_without_a_past(in_place: OpenedFolder) -> None:
    """Of a folder with the source layers' pairs alone."""
    assert failed(in_place, without("input", "past_key_values.0.key")) >= {SIZES}


def test_caches_in_place_need_a_shared_buffer(in_place: OpenedFolder) -> None:
    assert failed(in_place, setting(search__past_present_share_buffer=False)) == {BUFFER}


def test_a_node_more_on_a_cache_takes_the_shared_buffer_away(in_place: OpenedFolder) -> None:
    def sliced(folder: OpenedFolder) -> None:
        folder.model.graph.node.append(make_node("Slice", ["present.0.key", "a", "b"], ["c"]))

    assert failed(in_place, sliced) == {BUFFER}
