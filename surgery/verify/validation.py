"""Proof that a folder is its source: structure, numbers against the source's graphs, and the real runtime.

The source pair, the merged graph and onnxruntime-genai are held one after the other, never together.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from passes.base import LOSSY
from passes.set_accuracy_level import SetAccuracyLevel
from surgery.architecture import read_config
from surgery.attention.sequence_lengths import Padding, padding_of
from surgery.choices import Provider
from surgery.cuda.prediction import predict
from surgery.errors import ArchitectureError, ModelError, RequestError, SurgeryError
from surgery.folder.manifest import faults
from surgery.folder.opened import OpenedFolder, open_genai_folder
from surgery.graph.model import Model
from surgery.runtime.genai import GenAI, Message, converse, encode, has_chat_template, load_genai, open_tokenizer
from surgery.runtime.sessions import MergedModel, OpenGraph, Runner, Settings, load_onnxruntime, versions
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import GraphPair
from surgery.source.kept_tokens import KeptTokens
from surgery.verify.accuracy import LevelOfFolder
from surgery.verify.agreement import CaseResult, agreement_of, coarsest
from surgery.verify.bisect import find_divergence
from surgery.verify.contained import TOKENIZER, numbered
from surgery.verify.execution_profile import profile_gates, profile_run
from surgery.verify.fp16_headroom import LayerPeak, measure_headroom
from surgery.verify.gates import accuracy_gates, activation_gates, number_gates, parity_gates
from surgery.verify.genai_proof import check_ends, check_generation, check_runs, check_tokenizer, comparable
from surgery.verify.golden import Golden, graph_digests, load_golden, refuse_existing_recording, save_golden
from surgery.verify.multimodal_proof import MultimodalProof
from surgery.verify.parity import Parity, parity
from surgery.verify.prompt_file import Prompt, cases_of, shipped
from surgery.verify.prompts import (
    CLOSING,
    GENERATED,
    Case,
    Coverage,
    ModelTokens,
    Skipped,
    admissible,
    of_ids,
    within,
    without_heavy,
)
from surgery.verify.recording import Recording, record
from surgery.verify.report import Gate, Report
from surgery.verify.source_files import files_beside, source_file_gates
from surgery.verify.structure import structure_gates
from surgery.verify.thresholds import (
    NEAR,
    RESUMMED,
    ROUNDED,
    Thresholds,
    default_thresholds,
    numerics_of,
    regrouped_at_least,
)
from surgery.verify.vocabulary_proof import inside_gate, vocabulary_gates

TOKENS: dict[Coverage, int] = {"full": 8, "closing": 3, "light": 3}
"""Greedy tokens that each prompt is continued by, unless a request says how many."""
MOST_TOKENS = 64
Progress = Callable[[str], None]
Shown = Literal["both sides", "as published", "level"]
"""What a comparison shows: the passes but the accuracy level, which both sides have or none; the same in the source's own
arithmetic; the level."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a validation is to cover. The default is all cases, the shipped prompts among them.

    tokens            length of the greedy continuations; TOKENS of the scope where it is None
    prompts           these in place of the shipped ones; the scope leaves none of them out but heavy ones
    cases             these and no others
    thresholds        what differs from the default ones, by name
    source_provider   where the source runs, if elsewhere than the folder
    golden            a recording to compare with, in place of a source
    save_golden       a file for what the source answers; for what the folder answers where there is no source
    watch             measure the residual stream, layer by layer
    costly            where an accuracy level changes too much, find the kinds of products that should not have it
    bisect            where logits differ, find the first node that makes something else than the source's
    files             where the source's configuration lies; beside its graphs where it is None
    corpus            texts that a vocabulary of fewer tokens is proven with, beside those that are shipped
    """

    scope: Coverage = "full"
    tokens: int | None = None
    prompts: Sequence[Prompt] | None = None
    cases: Sequence[Case] | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    source_provider: Provider | None = None
    golden: Path | None = None
    save_golden: Path | None = None
    watch: bool = False
    bisect: bool = False
    costly: bool = False
    files: Path | None = None
    corpus: Sequence[str] = ()

    @property
    def length(self) -> int:
        """Greedy tokens after each prompt."""
        return TOKENS[self.scope] if self.tokens is None else self.tokens

    def refuse_contradictions(self, source: GraphPair | None) -> None:
        """Raise RequestError for what cannot be had together, before anything runs."""
        if not 1 <= self.length <= MOST_TOKENS:
            raise RequestError(f"{self.length} tokens are asked for; 1 to {MOST_TOKENS} can be compared")
        if self.golden is not None and source is not None:
            raise RequestError("a golden recording and a source are given; a folder is compared with one of them")
        if self.golden is not None and self.save_golden is not None:
            raise RequestError("a golden recording is read or written, not both at once")
        if self.bisect and source is None:
            raise RequestError("a bisection runs the source's graphs too, and no source is given")
        if self.save_golden is not None:
            refuse_existing_recording(self.save_golden)
        if clash := {prompt.name for prompt in self.prompts or ()} & _names_of_ids():
            raise RequestError(f"a prompt is named {min(clash)!r}, as a built-in case is", hint="give it another name")

    def like(self, golden: Golden) -> Request:
        """The same with the prompts and the length that were recorded, where no others are asked for."""
        asked = self.prompts is not None or self.cases is not None
        recorded = tuple(answer.case for answer in golden.recording.answers)
        return replace(self, tokens=self.tokens or golden.tokens, cases=self.cases if asked else recorded)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order."""
        return {"scope": self.scope, "tokens": self.length}


def _names_of_ids() -> set[str]:
    return {case.name for case in of_ids(ModelTokens(size=16, context=16, window=8))}


def prove_folder(
    folder: Path,
    source: GraphPair | None,
    *,
    provider: Provider = "cpu",
    request: Request | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a folder, against its source or a golden recording where one is given. `progress` is told each stage.

    Raises RequestError for a request that cannot be met, RuntimeMissing without onnxruntime or onnxruntime-genai;
    every other fault is a failed gate.
    """
    request = request or Request()
    request.refuse_contradictions(source)
    golden = load_golden(request.golden) if request.golden is not None else None
    if golden is not None:
        request = request.like(golden)
    load_onnxruntime(provider)
    genai_version = str(load_genai(provider).__version__)
    run = _Run(folder, source, golden, request, Settings(provider), progress or (lambda _: None))
    with run.stage("manifest"):
        run.gates.append(manifest_gate(folder))
    with run.stage("structure"):
        opened = run.structure()
    if not all(gate.passed for gate in run.gates):
        run.gates.append(Gate("runtime", "generation", False, detail=_NOT_RUN))
    elif opened is not None:
        run.prove(opened)
    thresholds = {"thresholds": run.thresholds.to_dict()} if run.thresholds else {}
    return Report(
        gates=tuple(run.gates),
        cases=run.results,
        skipped=tuple(run.skipped),
        seconds=run.seconds,
        versions={**versions(), "onnxruntime-genai": genai_version},
        settings={**run.settings.to_dict(), **request.to_dict(), **thresholds},
        parity=run.parity,
        peaks=run.peaks,
        level=run.level_parity,
        costly=run.costly,
    )


@dataclass
class _Run:
    """One validation under way: what it was asked, and what it has found so far."""

    folder: Path
    source: GraphPair | None
    golden: Golden | None
    request: Request
    settings: Settings
    progress: Progress
    gates: list[Gate] = field(default_factory=list)
    results: tuple[CaseResult, ...] = ()
    parity: Parity | None = None
    peaks: tuple[LayerPeak, ...] = ()
    thresholds: Thresholds | None = None
    level: LevelOfFolder | None = None
    rounds: bool = False
    accuracy: Thresholds | None = None
    level_parity: Parity | None = None
    costly: tuple[str, ...] = ()
    skipped: list[Skipped] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Decode steps: the first token of a continuation comes from the prompt."""
        return self.request.length - 1

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started

    def told(self, stage: str, total: int = 0) -> Progress:
        return numbered(self.progress, stage, total)

    def structure(self) -> OpenedFolder | None:
        """The structure's gates; None where the folder cannot be read at all."""
        try:
            opened = open_genai_folder(self.folder)
        except SurgeryError as error:
            self.gates.append(Gate("structure", "folder can be read", False, detail=str(error)))
            return None
        if opened.others and (self.request.bisect or self.request.watch):
            raise RequestError(
                f"--bisect and --fp16-headroom look into one merged graph, and {self.folder} has {len(opened.others) + 1} graphs",
                hint="try them on the folder that repack writes for text alone",
            )
        self.gates.append(Gate("structure", "folder can be read", True))
        self.gates.extend(structure_gates(opened))
        if self.source is not None:
            made_for = self.settings.provider if self.request.scope == "closing" else None
            self.gates.extend(source_file_gates(opened, self.source, self.request.files, made_for))
        return opened

    def prove(self, folder: OpenedFolder) -> None:
        """The numbers and the runtime, of a folder that is what was written and whose structure is sound."""
        try:
            vocabulary = _vocabulary(folder, self.source)
        except SurgeryError as error:
            self.gates.append(Gate("numbers", "prompts can be made", False, detail=str(error)))
            return
        with self.stage(TOKENIZER):
            cases = self._cases(folder, vocabulary)
            if not all(gate.passed for gate in self.gates if gate.section == "vocabulary"):
                return
        if not cases:
            reason = "; ".join(f"{case.name}: {case.reason}" for case in self.skipped[:3])
            self.gates.append(Gate("numbers", "prompts can be made", False, 1, 0, reason))
            return
        reference = self._numbers(folder, cases)
        if self.request.watch:
            with self.stage("activations"):
                self._watch(folder, cases)
        if not any(gate.section == "runtime" and not gate.passed for gate in self.gates):
            if self.settings.provider == "cuda":
                with self.stage("placement"):
                    self._placement(folder)
            with self.stage("generation"):
                self._generation(folder, vocabulary, cases, reference)

    def _placement(self, folder: OpenedFolder) -> None:
        """Where each node ran on CUDA, from the session's own profile."""
        try:
            self.gates.extend(profile_gates(profile_run(folder.model.path, "cuda"), predict(folder.model)))
        except ModelError as error:
            self.gates.append(Gate("runtime", "nodes run on CUDA", False, detail=str(error)))

    def _cases(self, folder: OpenedFolder, vocabulary: ModelTokens) -> list[Case]:
        tokenizer = self._tokenizer(vocabulary)
        found: list[Case | Skipped]
        if self.request.cases is not None:
            found = list(self.request.cases)
        else:
            template = tokenizer is not None and has_chat_template(folder.root)
            found = self._asked_for(vocabulary, tokenizer, template)
        if folder.others:
            found = [Skipped(c.name, _WITH_FILES) if c.name in _PLACEHOLDERS else c for c in found]
        if all(value.name != "attention_mask" for value in folder.model.graph.input):
            found = [Skipped(c.name, _NO_MASK) if isinstance(c, Case) and c.ragged else c for c in found]
        cases, skipped = admissible(found, vocabulary, self.steps)
        self.skipped.extend(skipped)
        return cases

    def _asked_for(self, vocabulary: ModelTokens, tokenizer: object | None, template: bool) -> list[Case | Skipped]:
        def encoded(text: str) -> list[int]:
            return encode(tokenizer, text)

        def conversed(messages: Sequence[Message]) -> list[int]:
            return converse(tokenizer, messages)

        asked = self.request.prompts
        prompts = cases_of(
            shipped() if asked is None else asked,
            vocabulary,
            encoded if tokenizer is not None else None,
            conversed if template else None,
        )
        if asked is None:
            return within(self.request.scope, [*of_ids(vocabulary), *prompts])
        given = without_heavy(prompts) if self.request.scope == "light" else [*prompts]
        return [*within(self.request.scope, [*of_ids(vocabulary)]), *given]

    def _tokenizer(self, vocabulary: ModelTokens) -> object | None:
        """The folder's tokenizer where its gates pass."""
        try:
            tokenizer: object = open_tokenizer(self.folder, self.settings.provider)
        except ModelError as error:
            self.gates.append(Gate("runtime", "tokenizer gives text back", False, detail=str(error)))
            return None
        gates = check_tokenizer(tokenizer, self.folder, vocabulary.size)
        self.gates.extend(gates)
        if self.source is not None and self.source.kept is not None:
            root = self.request.files or files_beside(self.source)
            self.gates.extend(
                vocabulary_gates(self.folder, root, self.source.kept, self.request.corpus, tokenizer) if root else []
            )
        return tokenizer if all(gate.passed for gate in gates) else None

    def _numbers(self, folder: OpenedFolder, cases: Sequence[Case]) -> Recording | None:
        """Record the source, free it, record the merged graph on the source's tokens, compare."""
        if self.source is not None and self.request.save_golden is None:
            self.level = LevelOfFolder.of(self.folder, self.source, self._source_settings())
        reference = self._reference(cases)
        if reference is None and (self.source is not None or self.request.save_golden is None):
            return None
        path = folder.model.path
        name = "graphs of the folder run" if folder.others else "merged graph runs"
        with self.stage("merged"):
            padding = padding_of(folder.model.graph)
            decoder = self.level.on_both_sides(folder.model) if self.level is not None else None
            ours = self._record(name, lambda: runner(folder, self.settings, decoder), cases, reference, padding)
        if ours is None:
            return reference
        if reference is None:
            self._save(ours, [path], self.settings)
            return None
        with self.stage("comparison"):
            self._compare(folder, reference, ours)
        if self.level is not None:
            if self.level.slow and (self.level.kept or not self._exact):
                with self.stage("as published"):
                    reference = self._published(self.level, folder, cases, padding) or reference
            if not self.level.kept:
                with self.stage("accuracy level"):
                    self._accuracy(self.level, folder, cases, reference, padding)
        if self.request.bisect and self.parity and self.parity.max_abs > self._held().logits:
            with self.stage("bisection"):
                self._bisect(path, cases)
        return reference

    def _reference(self, cases: Sequence[Case]) -> Recording | None:
        """What the folder is compared with: a golden recording, or the source's, which may be stored."""
        if self.golden is not None:
            assert self.request.golden is not None
            return self.golden.answers_to(cases, self.request.length, self.request.golden)
        if self.source is None:
            return None
        pair, settings = self.source, self._source_settings()
        with self.stage("source"):
            decoder, opened = self._slow_decoder(), list[TwoGraphModel]()

            def source() -> TwoGraphModel:
                opened.append(TwoGraphModel.open(pair, settings, decoder))
                return opened[0]

            theirs = self._record("source runs", source, cases, None, "none")
            if pair.kept is not None and opened:
                self.gates.append(inside_gate(pair.kept, opened[0].inside))
        if theirs is not None and self.request.save_golden is not None:
            self._save(theirs, [pair.embed, pair.decoder], settings)
        return theirs

    def _slow_decoder(self) -> Model | None:
        """The source's decoder with the proof's accuracy level, where it is too slow as published."""
        return self.level.source() if self.level is not None and self.level.slow else None

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

    def _compare(self, folder: OpenedFolder, reference: Recording, ours: Recording) -> None:
        self.rounds = _rounds(folder.model)
        self.thresholds = self._thresholds(coarsest(reference, ours), "both sides")
        held = self.thresholds
        try:
            found = agreement_of(reference, ours, folder.kv_sources, held.logits, held.regrouped, held.near)
        except ModelError as error:
            self.gates.append(Gate("numbers", "logits can be compared", False, detail=str(error)))
            return
        self.results, self.parity = found.cases, parity(found)
        self.gates.extend(number_gates(found, held))
        self.gates.extend(parity_gates(found, held))

    def _thresholds(self, dtype: str, shown: Shown) -> Thresholds:
        theirs = self._source_settings().provider if self.golden is None else self.golden.settings.get("provider")
        found = numerics_of(self.folder, None if shown == "level" or self.level is None else SetAccuracyLevel)
        found += [LOSSY] if theirs != self.settings.provider else []
        if self.rounds:
            found.append(regrouped_at_least(ROUNDED, found))
        elif shown == "both sides" and self.level is not None and self.level.slow:
            found.append(regrouped_at_least(RESUMMED, found))
        return default_thresholds(dtype, found).with_values(self.request.thresholds)

    @property
    def _exact(self) -> bool:
        """Whether each pass but the one that sets the level keeps every number."""
        return all(each.kind == "exact" for each in numerics_of(self.folder, SetAccuracyLevel))

    def _published(
        self, level: LevelOfFolder, folder: OpenedFolder, cases: Sequence[Case], padding: Padding
    ) -> Recording | None:
        """The other passes in the arithmetic of a slow source, on few prompts. What the source answers, if the folder's
        runtime is to be held to that."""
        few, told = level.few([case for case in cases if not case.heavy] or cases), self.told("as published")
        steps = self.steps if level.kept else 0
        decoder = level.as_published(folder.model)
        try:
            theirs = record(level.opened(), few, steps=steps, progress=told)
            gc.collect()
            ours = record(runner(folder, self.settings, decoder), few, steps=steps, follow=theirs, progress=told,
                          padding=padding)  # fmt: skip
            held = self._thresholds(coarsest(theirs, ours), "as published")
            found = agreement_of(theirs, ours, folder.kv_sources, held.logits, held.regrouped, held.near)
        except ModelError as error:
            self.gates.append(Gate("accuracy", "products as published", False, detail=str(error)))
            return None
        how = "too slow for more; the level is on both sides above"
        self.gates.append(Gate("accuracy", "products as published", True, detail=f"{len(few)} prompts: {how}"))
        gates = [*number_gates(found, held), *parity_gates(found, held)]
        self.gates += [replace(gate, section="accuracy", name=f"{gate.name}, as published") for gate in gates]
        return theirs if level.kept else None

    def _accuracy(
        self, level: LevelOfFolder, folder: OpenedFolder, cases: Sequence[Case], reference: Recording, padding: Padding
    ) -> None:
        """What the accuracy level changes: the folder as it is, or a sample of a slow source; both as published."""
        light = [case for case in cases if not case.heavy]
        told = self.told("accuracy level")
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
                taken = record(runner(folder, self.settings), light, steps=self.steps, follow=theirs, progress=told,
                               padding=padding)  # fmt: skip
                found = agreement_of(theirs, taken, folder.kv_sources, near=NEAR)
                how = f"taken off on both sides above; alone, on {len(light)} cases, against the source as published"
            self.level_parity = parity(found)
            self.accuracy = self._thresholds(found.dtype, "level")
            gates = accuracy_gates(found, self.accuracy, level.step.level, how)
            if self.request.costly and not all(gate.passed for gate in gates):
                told("products that cost too much")
                self.costly = level.costly_kinds(sample if level.slow else level.sample(light or cases), self.accuracy)
        except SurgeryError as error:
            gates = [Gate("accuracy", "accuracy level can be measured", False, detail=str(error))]
        self.gates.extend(gates)

    def _bisect(self, path: Path, cases: Sequence[Case]) -> None:
        """One gate that fails, because the logits' did; it says where."""
        assert self.source is not None
        worst = max(self.results, key=lambda result: result.max_abs)
        case = next(case for case in cases if case.name == worst.name)
        try:
            settings = self._source_settings()
            found = find_divergence(self.source, path, case, settings, steps=self.steps, tolerance=self._held().logits)
        except ModelError as error:
            self.gates.append(Gate("numbers", "values inside the graphs", False, detail=str(error)))
            return
        nowhere = "no value differs without ONNX Runtime's optimizations: they, or the provider, make the difference"
        detail = str(found) if found else nowhere
        self.gates.append(
            Gate("numbers", "values inside the graphs", False, self._held().logits, found.max_abs if found else 0.0,
                 detail, "first |difference|")
        )  # fmt: skip

    def _watch(self, folder: OpenedFolder, cases: Sequence[Case]) -> None:
        name = "residual stream is found"
        try:
            self.peaks = measure_headroom(
                folder.model.path,
                cases,
                self.settings,
                progress=self.told("activations", sum(not case.past for case in cases)),
            )
        except ModelError as error:
            self.gates.append(Gate("activations", name, False, detail=str(error)))
            return
        thresholds = self.thresholds or default_thresholds("float16").with_values(self.request.thresholds)
        self.gates.append(Gate("activations", name, True, detail=f"{len(self.peaks) - 1} layers"))
        self.gates.extend(activation_gates(self.peaks, thresholds))

    def _record(
        self,
        name: str,
        runner: Callable[[], Runner],
        cases: Sequence[Case],
        follow: Recording | None,
        padding: Padding,
    ) -> Recording | None:
        told = self.told(name, len(cases))
        try:
            recording = record(runner(), cases, steps=self.steps, follow=follow, progress=told, padding=padding)
        except ModelError as error:
            self.gates.append(Gate("numbers", name, False, detail=str(error)))
            return None
        finally:
            gc.collect()
        self.gates.append(Gate("numbers", name, True, detail=f"{len(cases)} cases"))
        return recording

    def _generates(self, case: Case) -> bool:
        if self.request.scope == "full":
            return True
        return case.name in GENERATED or (case.name not in CLOSING and not case.heavy)

    def _generation(
        self, folder: OpenedFolder, vocabulary: ModelTokens, cases: Sequence[Case], reference: Recording | None
    ) -> None:
        name = "og.Model loads the folder"
        try:
            genai = GenAI(self.folder, self.settings.provider)
        except ModelError as error:
            self.gates.append(Gate("runtime", name, False, detail=str(error)))
            return
        self.gates.append(Gate("runtime", name, True))
        self.gates.append(check_ends(genai, vocabulary.eos, vocabulary.size))
        if reference is None:
            self.gates.append(check_runs(genai, cases, self.request.length, vocabulary.size))
            self._media(folder, genai, vocabulary, 0.0)
            return
        answers = [answer for answer in reference.answers if self._generates(answer.case)]
        held, found = self._runtime_bounds()
        tolerance, padded = _tolerances(held, found)
        told = self.told("generation", sum(comparable(answer.case) for answer in answers))
        self.gates.extend(check_generation(genai, answers, vocabulary.eos, tolerance, padded, told))
        self._media(folder, genai, vocabulary, held.logits if held is not None else 0.0)

    def _runtime_bounds(self) -> tuple[Thresholds | None, Parity | None]:
        """What the runtime is held to, and what the numbers of the same comparison came to."""
        if self.level is not None and not self.level.slow:
            return self.accuracy, self.level_parity
        return self.thresholds, self.parity

    def _media(self, folder: OpenedFolder, genai: GenAI, vocabulary: ModelTokens, tolerance: float) -> None:
        """Images and sound, where the folder takes them."""
        if not folder.others:
            return
        proof = MultimodalProof(
            self.folder, folder.media, self.settings, self.request.length, vocabulary.context, vocabulary.eos
        )
        with self.stage("media"):
            kept = self.level is not None and self.level.kept
            told, decoder = self.told("media"), None if kept else self._slow_decoder()
            self.gates.extend(proof.prove(genai, self.source, self.request.scope, tolerance, told, decoder))
        self.skipped.extend(proof.skipped)


def _tolerances(held: Thresholds | None, found: Parity | None) -> tuple[float, float]:
    """By how much the source may prefer its own token to the runtime's, halved: alone, and in a padded batch. Where
    activations are rounded, as far as the same prompts have come in the numbers, which is less than what they may."""
    if held is None or found is None:
        return 0.0, 0.0
    if not held.near:
        return held.logits, held.regrouped
    together = max(found.max_abs, found.regrouped_max_abs)
    return min(held.logits, found.max_abs), min(held.regrouped, together)


_NOT_RUN = "nothing was run: a file is not what was written, or the structure is at fault"
_PLACEHOLDERS = ("image-placeholder", "audio-placeholder")
_NO_MASK = "the graph takes no attention_mask: it reads a shorter row's padding like words"
_WITH_FILES = "here a placeholder stands for features: the media section has prompts with files"


def _rounds(model: Model) -> bool:
    """Whether a graph rounds activations to whole numbers on the way."""
    return any(node.op_type in ("QuantizeLinear", "Round") for node in model.graph.node)


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


def manifest_gate(folder: Path) -> Gate:
    """Whether every file of the folder is what was written. Reads all of them."""
    name = "files are what was written"
    try:
        found = list(faults(folder))
    except SurgeryError as error:
        return Gate("manifest", name, False, detail=str(error))
    detail = "; ".join(f"{fault.name}: {fault.fault}" for fault in found[:3])
    return Gate("manifest", name, not found, 0, len(found), detail)


def _vocabulary(folder: OpenedFolder, source: GraphPair | None) -> ModelTokens:
    """Sizes and ids from the folder; placeholder ids, which a text config lacks, from the source's."""
    placeholders: dict[str, int] = {}
    for config, kept in _configs(folder, source):
        for key in ("image_token_id", "audio_token_id"):
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and (kept is None or value in kept):
                placeholders.setdefault(key, value if kept is None else kept.ids.index(value))
    return ModelTokens(
        size=folder.vocab_size,
        context=folder.context_length,
        bos=next(iter(folder.token_ids("bos_token_id")), None),
        pad=next(iter(folder.token_ids("pad_token_id")), None),
        eos=folder.token_ids("eos_token_id"),
        image=placeholders.get("image_token_id"),
        audio=placeholders.get("audio_token_id"),
        window=folder.window,
    )


def _configs(folder: OpenedFolder, source: GraphPair | None) -> Iterator[tuple[dict[str, object], KeptTokens | None]]:
    """The folder's config.json and the source's, the latter with the tokens that stay of it."""
    paths: dict[Path, KeptTokens | None] = {folder.root / "config.json": None}
    if source is not None:
        paths |= dict.fromkeys([parent / "config.json" for parent in source.embed.parents[:2]], source.kept)
    for path, kept in paths.items():
        try:
            yield read_config(path), kept
        except (ArchitectureError, OSError):
            continue
