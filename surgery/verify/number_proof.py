"""The numbers of a folder, held against its source's or a recording's: every position of every prompt.

source              its two graphs answer, and are freed: never are both sides in memory
merged              the folder's own graphs, fed the source's tokens
comparison          gates of each number and of the whole
as published        where products have an accuracy level: the other passes in the source's own arithmetic
accuracy level      and what the level changes by itself
bisection           the first node that makes something else, where that is asked for and logits differ
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from passes.base import LOSSY, Pass
from passes.int8_prefill import SIDE, Int8Prefill
from passes.set_accuracy_level import SetAccuracyLevel
from surgery.attention.sequence_lengths import Padding, padding_of
from surgery.errors import ModelError, SurgeryError
from surgery.folder.opened import OpenedFolder
from surgery.graph.model import Model
from surgery.runtime.sessions import MergedModel, OpenGraph, Runner, Settings, versions
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import GraphPair
from surgery.verify.accuracy import LevelOfFolder
from surgery.verify.agreement import CaseResult, agreement_of, coarsest
from surgery.verify.bisect import find_divergence
from surgery.verify.gates import accuracy_gates, number_gates, parity_gates
from surgery.verify.golden import Golden, graph_digests, save_golden
from surgery.verify.int8_by_kind import errors_by_kind
from surgery.verify.parity import KindError, Parity, parity
from surgery.verify.prompts import Case
from surgery.verify.recording import Recording, record
from surgery.verify.report import Gate
from surgery.verify.request import Request
from surgery.verify.stages import Stages
from surgery.verify.thresholds import (
    RESUMMED,
    ROUNDED,
    Thresholds,
    default_thresholds,
    numerics_of,
    regrouped_at_least,
)
from surgery.verify.vocabulary_proof import inside_gate
from surgery.verify.whole_numbers import tokens_in_int8

Shown = Literal["both sides", "as published", "level"]
"""What a comparison shows: the passes but the accuracy level, which both sides have or none; the same in the source's own
arithmetic; the level."""


@dataclass(frozen=True, slots=True)
class RuntimeBounds:
    """How far the runtime may be from the source: `logits` in their own unit; `alone` and `padded` by how much the source
    may prefer its own token to the runtime's, halved, of a row alone and in a padded batch."""

    logits: float = 0.0
    alone: float = 0.0
    padded: float = 0.0


@dataclass
class NumberProof:
    """The comparison of one folder under way: what it was asked, and what it has found so far."""

    folder: OpenedFolder
    source: GraphPair | None
    golden: Golden | None
    request: Request
    settings: Settings
    stages: Stages
    gates: list[Gate] = field(default_factory=list)
    results: tuple[CaseResult, ...] = ()
    parity: Parity | None = None
    thresholds: Thresholds | None = None
    level: LevelOfFolder | None = None
    level_parity: Parity | None = None
    costly: tuple[str, ...] = ()
    kinds: tuple[KindError, ...] = ()
    _rounds: bool = False
    _accuracy: Thresholds | None = None

    def prove(self, cases: Sequence[Case]) -> Recording | None:
        """Record the source, free it, record the folder on the source's tokens, compare.

        Returns the answers that the runtime is held to, None where nothing was compared or could not be.
        """
        if self.source is not None and self.request.save_golden is None:
            self.level = LevelOfFolder.of(self.folder.root, self.source, self._source_settings())
        reference = self._reference(cases)
        if reference is None and (self.source is not None or self.request.save_golden is None):
            return None
        path = self.folder.model.path
        name = "graphs of the folder run" if self.folder.others else "merged graph runs"
        with self.stages.stage("merged"):
            padding = padding_of(self.folder.model.graph)
            decoder = self.level.on_both_sides(self.folder.model) if self.level is not None else None
            ours = self._record(name, lambda: runner(self.folder, self.settings, decoder), cases, reference, padding)
        if ours is None:
            return reference
        if reference is None:
            self._save(ours, [path], self.settings)
            return None
        with self.stages.stage("comparison"):
            self._compare(reference, ours)
        if self.request.by_kind and self.settings.provider == "cpu":
            with self.stages.stage("int8 by kind"):
                self._measure_kinds(decoder or self.folder.model, reference, padding)
        if self.level is not None:
            if self.level.slow and (self.level.kept or not self._exact):
                with self.stages.stage("as published"):
                    reference = self._published(self.level, cases, padding) or reference
            if not self.level.kept:
                with self.stages.stage("accuracy level"):
                    self._measure_level(self.level, cases, reference, padding)
        if self.request.bisect and self.parity and self.parity.max_abs > self._held().logits:
            with self.stages.stage("bisection"):
                self._bisect(path, cases)
        return reference

    def slow_decoder(self) -> Model | None:
        """The source's decoder with the proof's accuracy level, where it is too slow as published."""
        return self.level.source() if self.level is not None and self.level.slow else None

    def runtime_bounds(self) -> RuntimeBounds:
        """What the runtime is held to: what the numbers are, and where activations are rounded no more than the same prompts
        have come to in the numbers."""
        by_level = self.level is not None and not self.level.slow
        held, found = (self._accuracy, self.level_parity) if by_level else (self.thresholds, self.parity)
        if held is None or found is None:
            return RuntimeBounds(held.logits if held else 0.0)
        if not held.near:
            return RuntimeBounds(held.logits, held.logits, held.regrouped)
        together = max(found.max_abs, found.regrouped_max_abs)
        return RuntimeBounds(held.logits, min(held.logits, found.max_abs), min(held.regrouped, together))

    def _reference(self, cases: Sequence[Case]) -> Recording | None:
        """What the folder is compared with: a golden recording, or the source's, which may be stored."""
        if self.golden is not None:
            assert self.request.golden is not None
            return self.golden.answers_to(cases, self.request.length, self.request.golden)
        if self.source is None:
            return None
        pair, settings = self.source, self._source_settings()
        with self.stages.stage("source"):
            decoder, opened = self.slow_decoder(), list[TwoGraphModel]()

            def source() -> TwoGraphModel:
                opened.append(TwoGraphModel.open(pair, settings, decoder))
                return opened[0]

            theirs = self._record("source runs", source, cases, None, "none")
            if pair.kept is not None and opened:
                self.gates.append(inside_gate(pair.kept, opened[0].inside))
        if theirs is not None and self.request.save_golden is not None:
            self._save(theirs, [pair.embed, pair.decoder], settings)
        return theirs

    def _source_settings(self) -> Settings:
        return Settings(self.request.source_provider or self.settings.provider)

    def _save(self, recording: Recording, graphs: Sequence[Path], settings: Settings) -> None:
        assert self.request.save_golden is not None
        name = " and ".join(path.name for path in graphs)
        golden = Golden(
            recording, name, graph_digests(graphs), self.request.length, settings.to_dict(), dict(versions())
        )
        save_golden(golden, self.request.save_golden)

    def _held(self) -> Thresholds:
        assert self.thresholds is not None  # a comparison sets them
        return self.thresholds

    def _compare(self, reference: Recording, ours: Recording) -> None:
        self._rounds = rounds_activations(self.folder.model)
        self.thresholds = self._thresholds(coarsest(reference, ours), "both sides")
        held = self.thresholds
        try:
            found = agreement_of(reference, ours, self.folder.kv_sources, held.logits, held.regrouped, held.near)
        except ModelError as error:
            self.gates.append(Gate("numbers", "logits can be compared", False, detail=str(error)))
            return
        self.results, self.parity = found.cases, parity(found)
        self.gates.extend(number_gates(found, held))
        many = tokens_in_int8(self.folder.root)
        if many is None:
            self.gates.extend(parity_gates(found, held))
            return
        self.gates.extend(self._of_few(reference, ours, many))
        in_int8 = [
            result for answer, result in zip(ours.answers, found.cases, strict=True) if answer.case.run_tokens >= many
        ]
        self.gates.extend(parity_gates(replace(found, cases=tuple(in_int8)) if in_int8 else found, held))

    def _of_few(self, reference: Recording, ours: Recording, many: int) -> list[Gate]:
        """The cases that no product in int8 has to do with: they are held to what the other passes do."""
        chosen = [index for index, answer in enumerate(ours.answers) if answer.case.run_tokens < many]
        if not chosen:
            return []
        theirs, taken = (Recording(tuple(side.answers[index] for index in chosen)) for side in (reference, ours))
        held = self._thresholds(coarsest(theirs, taken), "both sides", Int8Prefill)
        found = agreement_of(theirs, taken, self.folder.kv_sources, held.logits, held.regrouped, held.near)
        gates = [gate for gate in number_gates(found, held) if gate.option]
        return [replace(gate, name=f"{gate.name}, in runs of fewer than {many} tokens") for gate in gates]

    def _thresholds(self, dtype: str, shown: Shown, *but: type[Pass]) -> Thresholds:
        theirs = self._source_settings().provider if self.golden is None else self.golden.settings.get("provider")
        if shown != "level" and self.level is not None:
            but = *but, SetAccuracyLevel
        found = numerics_of(self.folder.root, *but)
        found += [LOSSY] if theirs != self.settings.provider else []
        if self._rounds:
            found.append(regrouped_at_least(ROUNDED, found))
        elif shown == "both sides" and self.level is not None and self.level.slow:
            found.append(regrouped_at_least(RESUMMED, found))
        return default_thresholds(dtype, found).with_values(self.request.thresholds)

    @property
    def _exact(self) -> bool:
        """Whether each pass but the one that sets the level keeps every number."""
        return all(each.kind == "exact" for each in numerics_of(self.folder.root, SetAccuracyLevel))

    def _published(self, level: LevelOfFolder, cases: Sequence[Case], padding: Padding) -> Recording | None:
        """The other passes in the arithmetic of a slow source, on few prompts. What the source answers, if the folder's
        runtime is to be held to that."""
        few, told = level.few([case for case in cases if not case.heavy] or cases), self.stages.told("as published")
        steps = self.request.steps if level.kept else 0
        decoder = level.as_published(self.folder.model)
        try:
            theirs = record(level.opened(), few, steps=steps, progress=told)
            gc.collect()
            ours = record(runner(self.folder, self.settings, decoder), few, steps=steps, follow=theirs, progress=told,
                          padding=padding)  # fmt: skip
            held = self._thresholds(coarsest(theirs, ours), "as published")
            found = agreement_of(theirs, ours, self.folder.kv_sources, held.logits, held.regrouped, held.near)
        except ModelError as error:
            self.gates.append(Gate("accuracy", "products as published", False, detail=str(error)))
            return None
        how = "too slow for more; the level is on both sides above"
        self.gates.append(Gate("accuracy", "products as published", True, detail=f"{len(few)} prompts: {how}"))
        gates = [*number_gates(found, held), *parity_gates(found, held)]
        self.gates += [replace(gate, section="accuracy", name=f"{gate.name}, as published") for gate in gates]
        return theirs if level.kept else None

    def _measure_level(
        self, level: LevelOfFolder, cases: Sequence[Case], reference: Recording, padding: Padding
    ) -> None:
        """What the accuracy level changes: the folder as it is, or a sample of a slow source; both as published."""
        light = [case for case in cases if not case.heavy]
        told = self.stages.told("accuracy level")
        try:
            if level.slow:
                told("source as published")
                sample = level.sample(light or cases)
                found = level.effect(sample)
                where = f"{len(sample.logits)} positions of {sample.case.name!r}"
                how = f"set on both sides above; alone, on {where}, against the source as published, which is too slow for more"
            else:
                chosen = [index for index, case in enumerate(cases) if not case.heavy]
                theirs = Recording(tuple(reference.answers[index] for index in chosen))
                taken = record(runner(self.folder, self.settings), light, steps=self.request.steps, follow=theirs, progress=told,
                               padding=padding)  # fmt: skip
                near = self._thresholds(coarsest(theirs, taken), "level").near
                found = agreement_of(theirs, taken, self.folder.kv_sources, near=near)
                how = f"taken off on both sides above; alone, on {len(light)} cases, against the source as published"
            self.level_parity = parity(found)
            self._accuracy = self._thresholds(found.dtype, "level")
            gates = accuracy_gates(found, self._accuracy, level.step.level, how)
            if self.request.costly and not all(gate.passed for gate in gates):
                told("products that cost too much")
                self.costly = level.costly_kinds(sample if level.slow else level.sample(light or cases), self._accuracy)
        except SurgeryError as error:
            gates = [Gate("accuracy", "accuracy level can be measured", False, detail=str(error))]
        self.gates.extend(gates)

    def _measure_kinds(self, decoder: Model, reference: Recording, padding: Padding) -> None:
        """What int8 changes in one kind of products alone; of a slow source what prompts in int8 change."""
        told = self.stages.told("int8 by kind")

        def answers(form: Model, theirs: Recording) -> Recording:
            cases = [answer.case for answer in theirs.answers]
            gc.collect()
            return record(runner(self.folder, self.settings, form), cases, steps=self.request.steps, follow=theirs,
                          progress=told, padding=padding)  # fmt: skip

        step = self.level.step if self.level is not None and not self.level.slow else None
        try:
            many = tokens_in_int8(self.folder.root)
            self.kinds = tuple(errors_by_kind(decoder, step, many, reference, answers))
        except SurgeryError as error:
            self.gates.append(Gate("accuracy", "int8 can be measured by kind", False, detail=str(error)))

    def _bisect(self, path: Path, cases: Sequence[Case]) -> None:
        """One gate that fails, because the logits' did; it says where."""
        assert self.source is not None
        worst = max(self.results, key=lambda result: result.max_abs)
        case = next(case for case in cases if case.name == worst.name)
        try:
            settings = self._source_settings()
            found = find_divergence(
                self.source, path, case, settings, steps=self.request.steps, tolerance=self._held().logits
            )
        except ModelError as error:
            self.gates.append(Gate("numbers", "values inside the graphs", False, detail=str(error)))
            return
        nowhere = "no value differs without ONNX Runtime's optimizations: they, or the provider, make the difference"
        detail = str(found) if found else nowhere
        self.gates.append(
            Gate("numbers", "values inside the graphs", False, self._held().logits, found.max_abs if found else 0.0,
                 detail, "first |difference|")
        )  # fmt: skip

    def _record(
        self,
        name: str,
        runner: Callable[[], Runner],
        cases: Sequence[Case],
        follow: Recording | None,
        padding: Padding,
    ) -> Recording | None:
        told = self.stages.told(name, len(cases))
        try:
            recording = record(runner(), cases, steps=self.request.steps, follow=follow, progress=told, padding=padding)
        except ModelError as error:
            self.gates.append(Gate("numbers", name, False, detail=str(error)))
            return None
        finally:
            gc.collect()
        self.gates.append(Gate("numbers", name, True, detail=f"{len(cases)} cases"))
        return recording


def rounds_activations(model: Model) -> bool:
    """Whether activations are rounded to whole numbers on the way: by the graph, or as ONNX Runtime runs it. What a pass
    rounds is in its own bounds.

    Of codes behind DequantizeLinear that a MatMul reads, ONNX Runtime 1.31 makes a MatMulNBits that multiplies in int8.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    spread = {
        name
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
        for name in node.output
    }
    return any(
        (node.op_type in ("QuantizeLinear", "Round") and SIDE not in node.name)
        or (node.op_type == "MatMul" and not spread.isdisjoint(node.input))
        for node in model.graph.node
    )


def runner(folder: OpenedFolder, settings: Settings, decoder: Model | None = None) -> Runner:
    """The folder's own graphs: one, or the embeddings and the decoder, fed as for a prompt of text. `decoder` takes the
    place of the folder's."""
    path = decoder or folder.model.path
    if not folder.others:
        return MergedModel(path, settings)
    embed = OpenGraph(folder.others["embedding"].path, settings)
    nothing = np.zeros((0, folder.hidden_size), np.float32)
    features = {f"{modality}_features": nothing for modality in folder.media}
    return TwoGraphModel(embed, OpenGraph(path, settings), also=features)
