"""What a validation is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.choices import Provider
from surgery.errors import RequestError
from surgery.source.export import GraphPair
from surgery.verify.golden import Golden, refuse_existing_recording
from surgery.verify.prompt_file import Prompt
from surgery.verify.prompts import Case, Coverage, ModelTokens, of_ids

TOKENS: dict[Coverage, int] = {"full": 8, "closing": 3, "light": 3}
"""Greedy tokens that each prompt is continued by, unless a request says how many."""
MOST_TOKENS = 64


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
    by_kind           where the recipe has int8, show what it changes in one kind of products alone
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
    by_kind: bool = False
    bisect: bool = False
    costly: bool = False
    files: Path | None = None
    corpus: Sequence[str] = ()

    @property
    def length(self) -> int:
        """Greedy tokens after each prompt."""
        return TOKENS[self.scope] if self.tokens is None else self.tokens

    @property
    def steps(self) -> int:
        """Decode steps: the first token of a continuation comes from the prompt."""
        return self.length - 1

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
    return {case.name for case in of_ids(ModelTokens(size=16, context=16, window=8, many=2))}
