"""Every fault of a window that is of the published sizes fails the numbers of the shortest proof, in each precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from exhaustive import in_full
from folders import Preset, repack
from onnx import GraphProto, NodeProto
from onnx.numpy_helper import from_array, to_array
from windows import export_with

from passes.base import EXACT, REORDERED
from passes.presets import compatible, fast
from surgery.attention.sequence_lengths import Padding, padding_of
from surgery.graph.model import Model
from surgery.runtime.sessions import MergedModel, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export
from surgery.verify.agreement import agreement_of, coarsest
from surgery.verify.gates import number_gates
from surgery.verify.prompts import Case, ModelTokens, of_ids, within
from surgery.verify.recording import Recording, record
from surgery.verify.thresholds import default_thresholds

Fault = Callable[[GraphProto, int], None]
Made = tuple[str, str, int]
"""A fixture, its precision, and the window."""
E2B, LARGE = ("tiny-e2b", "q4f16", 512), ("tiny-31b", "q4f16", 1024)
STRICT = ("tiny-e4b", "fp32", 1024)
"""The largest, and held to the smallest tolerance: of faults that the others tell too, it tells a few."""


def cases(window: int) -> list[Case]:
    """What a light check has of ids alone, where it has to do with the window."""
    found = within("light", list(of_ids(ModelTokens(size=128, context=4 * window, bos=2, pad=0, window=window))))
    return [case for case in found if isinstance(case, Case) and case.past]


class Subject:
    """A folder with its source's answers, to be proven with one fault after the other."""

    def __init__(self, export: Export, precision: str, window: int, preset: Preset, folder: Path) -> None:
        self.path = repack(export, folder, precision, preset).folder / "model.onnx"
        self.window = window
        self._cases = cases(window)
        self._numerics = [EXACT if preset is compatible else REORDERED]
        self._layers = export.architecture.layers
        source = TwoGraphModel.open(export.pair(precision), Settings())
        self._source = record(source, self._cases, steps=2, padding="none")

    def failed(self, fault: Fault | None) -> set[str]:
        """The gates of the numbers that fail of the graph with a fault."""
        model = Model.open(self.path)
        if fault is not None:
            before = model.fingerprint()
            fault(model.graph, self.window)
            assert model.fingerprint() != before, "there is nothing to damage"
        damaged = self.path.with_name("damaged.onnx")
        damaged.write_bytes(model.to_bytes())
        ours = self._record(damaged, padding_of(model.graph))
        limits = default_thresholds(coarsest(self._source, ours), self._numerics)
        owners = {layer.index: layer.kv_source for layer in self._layers}
        found = agreement_of(self._source, ours, owners, limits.logits, limits.regrouped)
        return {gate.name for gate in number_gates(found, limits) if not gate.passed}

    def _record(self, path: Path, padding: Padding) -> Recording:
        return record(MergedModel(path, Settings()), self._cases, steps=2, follow=self._source, padding=padding)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Made], dict[Preset, Subject]]:
    presets: tuple[Preset, ...] = (compatible, fast)

    @cache
    def subjects_of(wanted: Made) -> dict[Preset, Subject]:
        name, precision, window = wanted
        root = tmp_path_factory.mktemp("windows")
        export = export_with(window, name, precision, root / "source")
        return {preset: Subject(export, precision, window, preset, root / preset.__name__) for preset in presets}

    return subjects_of


@pytest.fixture
def subjects(request: pytest.FixtureRequest, made: Callable[[Made], dict[Preset, Subject]]) -> dict[Preset, Subject]:
    return made(request.param)


def windows(graph: GraphProto) -> list[NodeProto]:
    """The fused attention of sliding layers."""
    return [node for node in graph.node for each in node.attribute if each.name == "local_window_size" and each.i > 0]


def set_window(node: NodeProto, size: int) -> None:
    next(each for each in node.attribute if each.name == "local_window_size").i = size


def constant(graph: GraphProto, node: NodeProto, index: int, value: int) -> None:
    """Give a node a constant of its own in place of an input."""
    old = next(each for each in graph.initializer if each.name == node.input[index])
    graph.initializer.append(from_array(np.full_like(to_array(old), value), f"{old.name}/damaged"))
    node.input[index] = f"{old.name}/damaged"


def one_less_everywhere(graph: GraphProto, window: int) -> None:
    for node in windows(graph):
        set_window(node, window - 1)


def one_more_everywhere(graph: GraphProto, window: int) -> None:
    for node in windows(graph):
        set_window(node, window + 1)


def first_layer_one_less(graph: GraphProto, window: int) -> None:
    set_window(windows(graph)[0], window - 1)


def first_layer_one_more(graph: GraphProto, window: int) -> None:
    set_window(windows(graph)[0], window + 1)


def last_layer_one_less(graph: GraphProto, window: int) -> None:
    set_window(windows(graph)[-1], window - 1)


def last_layer_one_more(graph: GraphProto, window: int) -> None:
    set_window(windows(graph)[-1], window + 1)


def no_window_in_a_layer(graph: GraphProto, window: int) -> None:
    set_window(windows(graph)[1], -1)


def longest_row_decides(graph: GraphProto, window: int) -> None:
    (least,) = (node for node in graph.node if node.op_type == "ReduceMin")
    least.op_type = "ReduceMax"


def rows_in_view_one_less(graph: GraphProto, window: int) -> None:
    made = {name: node for node in graph.node for name in node.output}
    (least,) = (node for node in graph.node if node.op_type == "ReduceMin")
    behind = {*least.output} | {
        name for node in graph.node if set(node.input) & set(least.output) for name in node.output
    }
    first = next(node for node in made.values() if node.op_type == "Sub" and behind & set(node.input))
    constant(graph, first, 1, window - 2)


def window_on_a_full_layer(graph: GraphProto, window: int) -> None:
    full = next(
        node for node in graph.node for each in node.attribute if each.name == "local_window_size" and each.i == -1
    )
    set_window(full, window)


def unfused_window_one_less(graph: GraphProto, window: int) -> None:
    node = next(node for node in graph.node if node.name.endswith("/mask/slide"))
    constant(graph, node, 1, window - 1)


def unfused_window_one_more(graph: GraphProto, window: int) -> None:
    node = next(node for node in graph.node if node.name.endswith("/mask/slide"))
    constant(graph, node, 1, window + 1)


def padding_where_it_was(graph: GraphProto, window: int) -> None:
    """Let nodes read what move-padding put in order before it did."""
    raw = {
        f"/model/padding/{name}/output_0": name
        for name in ("attention_mask", "position_ids", "inputs_embeds", "per_layer_inputs")
    }
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = raw.get(name, name)


EVERYWHERE: list[Fault] = [
    one_less_everywhere, one_more_everywhere, first_layer_one_less, first_layer_one_more, last_layer_one_less,
    last_layer_one_more, no_window_in_a_layer,
]  # fmt: skip
OF_FAST: list[Fault] = [longest_row_decides, rows_in_view_one_less, window_on_a_full_layer]
OF_COMPATIBLE: list[Fault] = [padding_where_it_was]
OF_BORROWERS: list[Fault] = [unfused_window_one_less, unfused_window_one_more]


FEW: list[Fault] = [first_layer_one_less, last_layer_one_more]


def of(pairs: list[tuple[Made, Fault]]) -> pytest.MarkDecorator:
    names = ["-".join(map(str, (*made, fault.__name__))) for made, fault in pairs]
    found = [pair if pair[0] is E2B else in_full(*pair) for pair in pairs]
    return pytest.mark.parametrize(("subjects", "fault"), found, indirect=["subjects"], ids=names)


@pytest.mark.parametrize("subjects", [E2B, in_full(LARGE), in_full(STRICT)], indirect=True, ids=["E2B", "31B", "E4B"])
def test_the_shortest_proof_crosses_the_window_and_passes_what_is_right(subjects: dict[Preset, Subject]) -> None:
    for subject in subjects.values():
        assert subject.failed(None) == set()


@of([(made, fault) for made in (E2B, LARGE) for fault in EVERYWHERE + OF_FAST] + [(STRICT, fault) for fault in FEW])
def test_a_fault_of_the_fast_preset_fails(fault: Fault, subjects: dict[Preset, Subject]) -> None:
    assert subjects[fast].failed(fault)


@of(
    [(made, fault) for made in (E2B, LARGE) for fault in EVERYWHERE + OF_COMPATIBLE]
    + [(E2B, fault) for fault in OF_BORROWERS]
    + [(STRICT, fault) for fault in (*FEW, unfused_window_one_more)]
)
def test_a_fault_of_the_compatible_preset_fails(fault: Fault, subjects: dict[Preset, Subject]) -> None:
    assert subjects[compatible].failed(fault)
