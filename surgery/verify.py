"""Proof that a folder is its source: structure, numbers against the source's graphs, and the real runtime.

The source pair, the merged graph and onnxruntime-genai are held one after the other, never together.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from surgery.comparison import CaseResult, Comparison, compare
from surgery.errors import ArchitectureError, ModelError, SurgeryError
from surgery.export import Pair
from surgery.gemma4 import read_config
from surgery.generation import (
    GenAI,
    check_generation,
    check_runs,
    check_tokenizer,
    converse,
    encode,
    has_chat_template,
    load_genai,
)
from surgery.manifest import faults
from surgery.prompts import Case, Skipped, Vocabulary, admissible, built_in
from surgery.recording import Recording, record
from surgery.report import Gate, Report
from surgery.runtime import MergedModel, Provider, Runner, Settings, SourcePair, load_onnxruntime, versions
from surgery.structure import Folder, check_structure, open_folder

REGROUPED = {"float32": 1e-3, "float16": 5e-2}
"""Tolerance, by dtype, of logits that one graph computed along with rows that the other left out: a padded
batch's prefill, and any prefill where the graph gives all logits. The product then has other dimensions, and
may add in another order. Logits go to 30 (the softcap), where float16 steps by 0.016."""
Progress = Callable[[str], None]


def validate(
    folder: Path,
    source: Pair | None,
    *,
    provider: Provider = "cpu",
    prompts: Sequence[Case] | None = None,
    steps: int = 8,
    light: bool = False,
    tolerance: float = 0.0,
    progress: Progress | None = None,
) -> Report:
    """Check a folder, against its source where one is given.

    `prompts` replaces the built-in cases; `light` leaves the heavy ones out. `tolerance` is the largest
    absolute difference of a logit or a cache value that passes; 0 asks for equality. `progress` is told each
    stage. Raises RuntimeMissing without onnxruntime or onnxruntime-genai; every other fault is a failed gate.
    """
    load_onnxruntime(provider)
    genai_version = str(load_genai(provider).__version__)
    run = _Run(folder, source, Settings(provider), steps, light, tolerance, progress or (lambda _: None))
    with run.stage("manifest"):
        run.gates.append(manifest_gate(folder))
    with run.stage("structure"):
        opened = run.structure()
    if opened is not None:
        run.prove(opened, prompts)
    settings = {**run.settings.to_dict(), "steps": steps, "light": light, "tolerance": tolerance}
    return Report(
        gates=tuple(run.gates),
        cases=run.results,
        skipped=tuple(run.skipped),
        seconds=run.seconds,
        versions={**versions(), "onnxruntime-genai": genai_version},
        settings=settings,
    )


@dataclass
class _Run:
    """One validation under way: what it was asked, and what it has found so far."""

    folder: Path
    source: Pair | None
    settings: Settings
    steps: int
    light: bool
    tolerance: float
    progress: Progress
    gates: list[Gate] = field(default_factory=list)
    results: tuple[CaseResult, ...] = ()
    skipped: list[Skipped] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started

    def told(self, stage: str) -> Progress:
        return lambda case: self.progress(f"{stage}: {case}")

    def structure(self) -> Folder | None:
        """The structure's gates; None where the folder cannot be read at all."""
        try:
            opened = open_folder(self.folder)
        except SurgeryError as error:
            self.gates.append(Gate("structure", "folder can be read", False, detail=str(error)))
            return None
        self.gates.append(Gate("structure", "folder can be read", True))
        self.gates.extend(check_structure(opened))
        return opened

    def prove(self, folder: Folder, prompts: Sequence[Case] | None) -> None:
        """The numbers, even of a folder with a wrong configuration; the runtime only of one that is sound."""
        sound = all(gate.passed for gate in self.gates if gate.section == "structure")
        try:
            vocabulary = _vocabulary(folder, self.source)
        except SurgeryError as error:
            self.gates.append(Gate("numbers", "prompts can be made", False, detail=str(error)))
            return
        with self.stage("tokenizer"):
            cases = self._cases(folder, vocabulary, prompts, sound)
        if not cases:
            reason = "; ".join(f"{case.name}: {case.reason}" for case in self.skipped[:3])
            self.gates.append(Gate("numbers", "prompts can be made", False, 1, 0, reason))
            return
        recorded = self._numbers(folder, cases) if self.source is not None else None
        if not sound:
            reason = "not run: the structure is at fault, and the runtime may crash on it"
            self.gates.append(Gate("runtime", "generation", False, detail=reason))
        elif not any(gate.section == "runtime" and not gate.passed for gate in self.gates):
            with self.stage("generation"):
                self._generation(vocabulary, cases, recorded)

    def _cases(self, folder: Folder, vocabulary: Vocabulary, prompts: Sequence[Case] | None, sound: bool) -> list[Case]:
        tokenizer = self._tokenizer(vocabulary) if sound else None
        if prompts is not None:
            cases, skipped = admissible(list(prompts), vocabulary, self.steps)
        else:
            template = tokenizer is not None and has_chat_template(folder.root)
            cases, skipped = built_in(
                vocabulary,
                (lambda text: encode(tokenizer, text)) if tokenizer is not None else None,
                (lambda message: converse(tokenizer, message)) if template else None,
                self.steps,
            )
        if self.light:
            skipped += [Skipped(case.name, "heavy, and a light check was asked for") for case in cases if case.heavy]
            cases = [case for case in cases if not case.heavy]
        self.skipped.extend(skipped)
        return cases

    def _tokenizer(self, vocabulary: Vocabulary) -> object | None:
        """The folder's tokenizer where its gates pass. The model that og.Tokenizer needs is freed again."""
        try:
            genai = GenAI(self.folder, self.settings.provider)
            self.gates.append(Gate("runtime", "og.Model loads the folder", True))
        except ModelError as error:
            self.gates.append(Gate("runtime", "og.Model loads the folder", False, detail=str(error)))
            return None
        try:
            tokenizer: object = genai.tokenizer()
        except ModelError as error:
            self.gates.append(Gate("runtime", "tokenizer gives text back", False, detail=str(error)))
            return None
        gates = check_tokenizer(tokenizer, self.folder, vocabulary.size)
        self.gates.extend(gates)
        return tokenizer if all(gate.passed for gate in gates) else None

    def _numbers(self, folder: Folder, cases: Sequence[Case]) -> Recording | None:
        """Record the source, free it, record the merged graph on the source's tokens, compare."""
        assert self.source is not None
        pair = self.source
        with self.stage("source"):
            theirs = self._record("source runs", lambda: SourcePair(pair, self.settings), cases, None)
        if theirs is None:
            return None
        path = folder.model.path
        with self.stage("merged"):
            ours = self._record("merged graph runs", lambda: MergedModel(path, self.settings), cases, theirs)
        if ours is None:
            return theirs
        with self.stage("comparison"):
            try:
                found = compare(theirs, ours, folder.owners, self.tolerance)
            except ModelError as error:
                self.gates.append(Gate("numbers", "logits can be compared", False, detail=str(error)))
                return theirs
            self.results = found.cases
            self.gates.extend(number_gates(found, self.tolerance))
        return theirs

    def _record(
        self, name: str, runner: Callable[[], Runner], cases: Sequence[Case], follow: Recording | None
    ) -> Recording | None:
        try:
            recording = record(runner(), cases, steps=self.steps, follow=follow, progress=self.told(name))
        except ModelError as error:
            self.gates.append(Gate("numbers", name, False, detail=str(error)))
            return None
        finally:
            gc.collect()
        self.gates.append(Gate("numbers", name, True, detail=f"{len(cases)} cases"))
        return recording

    def _generation(self, vocabulary: Vocabulary, cases: Sequence[Case], recorded: Recording | None) -> None:
        try:
            genai = GenAI(self.folder, self.settings.provider)
        except ModelError as error:
            self.gates.append(Gate("runtime", "og.Model loads the folder", False, detail=str(error)))
            return
        if recorded is None:
            self.gates.append(check_runs(genai, cases, self.steps, vocabulary.size))
        else:
            told = self.told("generation")
            self.gates.extend(check_generation(genai, recorded.answers, vocabulary.eos, self.tolerance, told))


def manifest_gate(folder: Path) -> Gate:
    """Whether every file of the folder is what was written. Reads all of them."""
    name = "files are what was written"
    try:
        found = list(faults(folder))
    except SurgeryError as error:
        return Gate("manifest", name, False, detail=str(error))
    detail = "; ".join(f"{fault.name}: {fault.fault}" for fault in found[:3])
    return Gate("manifest", name, not found, 0, len(found), detail)


def number_gates(found: Comparison, tolerance: float) -> list[Gate]:
    """The gates of a comparison; `found` of a failed one is the tolerance that would have passed it."""
    cases = found.cases
    broken = [case.name for case in cases if case.source_not_finite]
    strange = [case.name for case in cases if case.merged_not_finite]
    tokens = [case.name for case in cases if case.token_faults]
    aliases = [f"case {case.name}: {fault}" for case in cases for fault in case.alias_faults]
    regrouped = max(REGROUPED.get(found.dtype, 0.0), tolerance)
    worst = found.worst
    where = (
        f"worst at case {worst.case}, step {worst.step}, row {worst.row}, token id {worst.token_id}: "
        f"{worst.source:.6g} in the source, {worst.merged:.6g} here"
        if worst
        else f"{len(cases)} cases, {sum(case.steps for case in cases)} steps"
    )
    caches = [case.name for case in cases if case.cache_max_abs > tolerance]
    return [
        Gate("numbers", "source itself is finite", not broken, 0, len(broken), _listed(broken)),
        Gate("numbers", "finite where the source is", not strange, 0, len(strange), _listed(strange)),
        Gate("numbers", "logits", found.max_abs <= tolerance, tolerance, found.max_abs, where),
        Gate(
            "numbers",
            "logits computed in other groups",
            found.regrouped_max_abs <= regrouped,
            regrouped,
            found.regrouped_max_abs,
            "rows of a padded batch, which the source computes along with every other token's",
        ),
        Gate("numbers", "greedy tokens", not tokens, 0, sum(c.token_faults for c in cases), _listed(tokens)),
        Gate("numbers", "owners' caches", not caches, tolerance, found.cache_max_abs, _listed(caches)),
        Gate(
            "numbers",
            "borrowers' caches are their owners'",
            not aliases,
            0,
            len(aliases),
            "; ".join(aliases[:3]),
        ),
    ]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"cases {shown}{' and more' if len(names) > 5 else ''}" if names else ""


def _vocabulary(folder: Folder, source: Pair | None) -> Vocabulary:
    """Sizes and ids from the folder; placeholder ids, which a text config lacks, from the source's."""
    placeholders: dict[str, int] = {}
    for config in _configs(folder, source):
        for key in ("image_token_id", "audio_token_id"):
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                placeholders.setdefault(key, value)
    return Vocabulary(
        size=folder.vocab_size,
        context=folder.context_length,
        bos=next(iter(folder.token_ids("bos_token_id")), None),
        pad=next(iter(folder.token_ids("pad_token_id")), None),
        eos=folder.token_ids("eos_token_id"),
        image=placeholders.get("image_token_id"),
        audio=placeholders.get("audio_token_id"),
        window=folder.window,
    )


def _configs(folder: Folder, source: Pair | None) -> Iterator[dict[str, object]]:
    paths = [folder.root / "config.json"]
    if source is not None:
        paths += [source.embed.parent / "config.json", source.embed.parent.parent / "config.json"]
    for path in paths:
        try:
            yield read_config(path)
        except (ArchitectureError, OSError):
            continue
