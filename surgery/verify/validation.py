"""Proof that a folder is its source: structure, numbers against the source's graphs, and the real runtime.

The source pair, the merged graph and onnxruntime-genai are held one after the other, never together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from surgery.architecture import read_config
from surgery.choices import Provider
from surgery.cuda.prediction import predict
from surgery.errors import ArchitectureError, ModelError, RequestError, SurgeryError
from surgery.folder.manifest import faults
from surgery.folder.opened import OpenedFolder, open_genai_folder
from surgery.graph.model import Model
from surgery.runtime.genai import GenAI, Message, converse, encode, has_chat_template, load_genai, open_tokenizer
from surgery.runtime.sessions import Settings, load_onnxruntime, versions
from surgery.source.export import GraphPair
from surgery.source.kept_tokens import KeptTokens
from surgery.verify.execution_profile import profile_gates, profile_run
from surgery.verify.fp16_headroom import LayerPeak, measure_headroom
from surgery.verify.gates import activation_gates
from surgery.verify.genai_proof import check_ends, check_generation, check_runs, check_tokenizer, comparable
from surgery.verify.golden import Golden, load_golden
from surgery.verify.multimodal_proof import MultimodalProof
from surgery.verify.number_proof import NumberProof
from surgery.verify.prompt_file import cases_of, shipped
from surgery.verify.prompts import (
    CLOSING,
    GENERATED,
    Case,
    ModelTokens,
    Skipped,
    admissible,
    of_ids,
    within,
    without_heavy,
)
from surgery.verify.recording import Recording
from surgery.verify.report import Gate, Report
from surgery.verify.request import Request
from surgery.verify.source_files import files_beside, source_file_gates
from surgery.verify.stages import TOKENIZER, Progress, Stages
from surgery.verify.structure import structure_gates
from surgery.verify.thresholds import (
    Thresholds,
    default_thresholds,
)
from surgery.verify.vocabulary_proof import vocabulary_gates
from surgery.verify.whole_numbers import tokens_in_int8, whole_number_gate


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
    stages = Stages(progress or (lambda _: None))
    run = _Run(folder, source, golden, request, Settings(provider), stages)
    with stages.stage("manifest"):
        run.gates.append(manifest_gate(folder))
    with stages.stage("structure"):
        opened = run.structure()
    if not all(gate.passed for gate in run.gates):
        run.gates.append(Gate("runtime", "generation", False, detail=_NOT_RUN))
    elif opened is not None:
        run.prove(opened)
    return run.report(genai_version)


@dataclass
class _Run:
    """One validation under way: what it was asked, and what it has found so far."""

    folder: Path
    source: GraphPair | None
    golden: Golden | None
    request: Request
    settings: Settings
    stages: Stages
    gates: list[Gate] = field(default_factory=list)
    numbers: NumberProof | None = None
    peaks: tuple[LayerPeak, ...] = ()
    skipped: list[Skipped] = field(default_factory=list)

    def report(self, genai_version: str) -> Report:
        """What was found."""
        found = self.numbers
        held = {"thresholds": found.thresholds.to_dict()} if found is not None and found.thresholds else {}
        return Report(
            gates=tuple(self.gates),
            cases=found.results if found is not None else (),
            skipped=tuple(self.skipped),
            seconds=self.stages.seconds,
            versions={**versions(), "onnxruntime-genai": genai_version},
            settings={**self.settings.to_dict(), **self.request.to_dict(), **held},
            parity=found.parity if found is not None else None,
            peaks=self.peaks,
            level=found.level_parity if found is not None else None,
            costly=found.costly if found is not None else (),
            kinds=found.kinds if found is not None else (),
        )

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
        with self.stages.stage(TOKENIZER):
            cases = self._cases(folder, vocabulary)
            if not all(gate.passed for gate in self.gates if gate.section == "vocabulary"):
                return
        if not cases:
            reason = "; ".join(f"{case.name}: {case.reason}" for case in self.skipped[:3])
            self.gates.append(Gate("numbers", "prompts can be made", False, 1, 0, reason))
            return
        self.numbers = NumberProof(folder, self.source, self.golden, self.request, self.settings, self.stages)
        reference = self.numbers.prove(cases)
        self.gates.extend(self.numbers.gates)
        if vocabulary.many is not None and self.settings.provider == "cpu":
            with self.stages.stage("products in int8"):
                decoder = Model.open(self.source.decoder) if self.source is not None else None
                told = self.stages.told("products in int8")
                self.gates.append(whole_number_gate(folder.model, decoder, vocabulary.many, self.settings, told))
        if self.request.watch:
            with self.stages.stage("activations"):
                self._watch(folder, cases, self.numbers.thresholds)
        if not any(gate.section == "runtime" and not gate.passed for gate in self.gates):
            if self.settings.provider == "cuda":
                with self.stages.stage("placement"):
                    self._placement(folder)
            with self.stages.stage("generation"):
                self._generation(folder, vocabulary, cases, self.numbers, reference)

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
        cases, skipped = admissible(found, vocabulary, self.request.steps)
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

    def _watch(self, folder: OpenedFolder, cases: Sequence[Case], held: Thresholds | None) -> None:
        name = "residual stream is found"
        try:
            self.peaks = measure_headroom(
                folder.model.path,
                cases,
                self.settings,
                progress=self.stages.told("activations", sum(not case.past for case in cases)),
            )
        except ModelError as error:
            self.gates.append(Gate("activations", name, False, detail=str(error)))
            return
        thresholds = held or default_thresholds("float16").with_values(self.request.thresholds)
        self.gates.append(Gate("activations", name, True, detail=f"{len(self.peaks) - 1} layers"))
        self.gates.extend(activation_gates(self.peaks, thresholds))

    def _generates(self, case: Case) -> bool:
        if self.request.scope == "full":
            return True
        return case.name in GENERATED or (case.name not in CLOSING and not case.heavy)

    def _generation(
        self,
        folder: OpenedFolder,
        vocabulary: ModelTokens,
        cases: Sequence[Case],
        numbers: NumberProof,
        reference: Recording | None,
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
            self._media(folder, genai, vocabulary, numbers, 0.0)
            return
        answers = [answer for answer in reference.answers if self._generates(answer.case)]
        held = numbers.runtime_bounds()
        told = self.stages.told("generation", sum(comparable(answer.case) for answer in answers))
        self.gates.extend(check_generation(genai, answers, vocabulary.eos, held.alone, held.padded, told))
        self._media(folder, genai, vocabulary, numbers, held.logits)

    def _media(
        self, folder: OpenedFolder, genai: GenAI, vocabulary: ModelTokens, numbers: NumberProof, tolerance: float
    ) -> None:
        """Images and sound, where the folder takes them."""
        if not folder.others:
            return
        proof = MultimodalProof(
            self.folder, folder.media, self.settings, self.request.length, vocabulary.context, vocabulary.eos
        )
        with self.stages.stage("media"):
            kept = numbers.level is not None and numbers.level.kept
            told, decoder = self.stages.told("media"), None if kept else numbers.slow_decoder()
            self.gates.extend(proof.prove(genai, self.source, self.request.scope, tolerance, told, decoder))
        self.skipped.extend(proof.skipped)


_NOT_RUN = "nothing was run: a file is not what was written, or the structure is at fault"
_PLACEHOLDERS = ("image-placeholder", "audio-placeholder")
_NO_MASK = "the graph takes no attention_mask: it reads a shorter row's padding like words"
_WITH_FILES = "here a placeholder stands for features: the media section has prompts with files"


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
        many=tokens_in_int8(folder.root),
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
