"""What int8 products change, apart from everything else: the accuracy level in a proof.

A folder whose recipe sets the level differs from its source in two ways, and each is shown by itself.

    the other passes    with the source's own levels on both sides; or, where the source as published would dequantise whole
                        weights in each run (passes.set_accuracy_level says slow), with the level set on both sides, and
                        on two prompts as published, unless the numbers are equal anyway
    the level           the folder as it is against the source as published, on the light cases; or, where the source is
                        slow, one prompt and one token of it, every position of the prompt counted
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from passes.base import apply
from passes.set_accuracy_level import SetAccuracyLevel, kind_of, with_levels_of
from surgery.graph.model import Model
from surgery.runtime.decoding import Step, next_feed, prompt_feeds
from surgery.runtime.sessions import Array, Runner, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import GraphPair
from surgery.verify.agreement import Agreement, agreement_of
from surgery.verify.parity import Parity, parity
from surgery.verify.prompts import Case
from surgery.verify.recording import Answer, Recording
from surgery.verify.thresholds import NEAR, Thresholds, decoder_steps

LONGEST = 64
"""Tokens of the one prompt that a slow source reads: it takes them all in the time of one."""
MOST_SECONDS = 120.0
"""For the search of products that cost too much."""


@dataclass(frozen=True)
class LevelOfFolder:
    """The level that a folder's recipe sets, and the pair that it was made from.

    `kept`: the folder is as slow as its source; the level is set on both sides of its proof alone.
    """

    step: SetAccuracyLevel
    pair: GraphPair
    settings: Settings
    kept: bool = False

    @classmethod
    def of(cls, folder: Path, pair: GraphPair, settings: Settings) -> LevelOfFolder | None:
        """None where the recipe in the manifest sets no level and the source is not slow without, or where another
        provider than the CPU's runs: it has none."""
        if settings.provider != "cpu":
            return None
        if steps := decoder_steps(folder, SetAccuracyLevel):
            return cls(steps[-1], pair, settings)
        kept = cls(SetAccuracyLevel("4", "slow"), pair, settings, kept=True)
        return kept if kept.slow else None

    @property
    def slow(self) -> bool:
        """Whether the source as published is too slow to answer all cases."""
        return bool(SetAccuracyLevel("4", "slow").concerns(Model.open(self.pair.decoder)))

    def source(self, step: SetAccuracyLevel | None = None) -> Model:
        """The source's decoder, with the level of the folder, or as another step sets it."""
        return apply(Model.open(self.pair.decoder), [step or self.step])[0]

    def on_both_sides(self, decoder: Model) -> Model:
        """The folder's decoder as it is compared with the source on all cases."""
        if self.slow:
            return apply(decoder, [self.step])[0] if self.kept else decoder
        return self.as_published(decoder)

    def as_published(self, decoder: Model) -> Model:
        """The folder's decoder with the levels that the source's products have."""
        return with_levels_of(decoder, Model.open(self.pair.decoder))

    def few(self, cases: Sequence[Case]) -> list[Case]:
        """What a slow source can answer as published: a prompt of many positions, and one that is past the window."""
        past = [case for case in cases if len(case.rows) == 1 and case.past]
        return [self._longest(cases), *past[:1]]

    def _longest(self, cases: Sequence[Case]) -> Case:
        """The longest prompt that is not too long, cut where all are."""
        alone = [case for case in cases if len(case.rows) == 1 and case.chunk is None and not case.past]
        case = max(alone, key=lambda case: (case.longest <= LONGEST, case.longest), default=cases[0])
        return replace(case, rows=(case.rows[0][:LONGEST],))

    def opened(self, decoder: Model | None = None) -> Runner:
        """The source's two graphs as one model; `decoder` in the place of the source's, where given."""
        return TwoGraphModel.open(self.pair, self.settings, decoder)

    def sample(self, cases: Sequence[Case]) -> Sample:
        """What the source as published answers to a prompt that is not too long, and to one token after it."""
        case = self._longest(cases)
        following, logits = _positions(self.opened(), case.rows[0], None)
        return Sample(case, following, logits)

    def effect(self, sample: Sample, step: SetAccuracyLevel | None = None) -> Agreement:
        """How far the level moves the source from the sample."""
        _, logits = _positions(self.opened(self.source(step)), sample.case.rows[0], sample.following)
        theirs, ours = (
            Recording((Answer(sample.case, 1, (Step(found, len(found)),), {}),)) for found in (sample.logits, logits)
        )
        return agreement_of(theirs, ours, {}, near=NEAR)

    def costly_kinds(self, sample: Sample, thresholds: Thresholds) -> tuple[str, ...]:
        """The fewest kinds of products, those that move the logits most, without which the level keeps to the
        thresholds.

        Each kind is left out by itself, then the costliest ones together, one more at a time. Empty where that does not
        help, or takes longer than MOST_SECONDS.
        """
        until = time.monotonic() + MOST_SECONDS
        kinds = sorted({kind_of(node) for node in self.step.concerns(Model.open(self.pair.decoder))})
        left: dict[str, float] = {}
        for kind in kinds:
            if time.monotonic() > until:
                return ()
            left[kind] = parity(self.effect(sample, self._without([kind]))).kl
        chosen: list[str] = []
        for kind in sorted(kinds, key=lambda kind: left[kind])[:-1]:
            chosen.append(kind)
            if time.monotonic() > until:
                return ()
            if keeps_to(parity(self.effect(sample, self._without(chosen))), thresholds):
                return tuple(chosen)
        return ()

    def _without(self, kinds: Sequence[str]) -> SetAccuracyLevel:
        return replace(self.step, but=" ".join([*self.step.but.split(), *kinds]))


@dataclass(frozen=True)
class Sample:
    """A prompt, the token after it, and the logits at each position of both, [n, V]."""

    case: Case
    following: Array
    logits: Array


def keeps_to(found: Parity, thresholds: Thresholds) -> bool:
    """Whether what a level changes is within the thresholds."""
    return (
        found.error <= thresholds.error
        and found.mean_kl <= thresholds.mean_kl
        and max(found.max_abs, found.regrouped_max_abs) <= thresholds.logits
        and found.mean_abs <= thresholds.mean
        and found.kl <= thresholds.kl
        and found.cosine >= thresholds.cosine
        and found.top1 >= thresholds.top1
        and found.top10 >= thresholds.top10
        and found.first_rate >= thresholds.first
    )


def _positions(runner: Runner, prompt: Sequence[int], following: Array | None) -> tuple[Array, Array]:
    """The token after the prompt, greedy unless it is given, and the logits of all positions that the graph gives."""
    feed = next(iter(prompt_feeds([prompt], 0)))
    logits, cache = runner.step(feed, runner.start(1), 0)
    if following is None:
        following = np.argmax(logits[:, -1].astype(np.float32), axis=1)
    last, _ = runner.step(next_feed(feed.mask, following), cache, 1)
    return following, np.concatenate([logits[0], last[0]])
