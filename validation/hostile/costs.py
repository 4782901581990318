"""What small files cost: CPU seconds of every command on every form of tests/adversarial.py, as the form grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import adversarial
import attacks
from attacks import DECODER, Ground

COMMANDS = {
    "inspect": ("source", "inspect source"),
    "inspect --ep cuda": ("source", f"inspect source/{DECODER} --ep cuda --json"),
    "diff md": ("source", f"diff plain/{DECODER} source/{DECODER} --format md --weights digest"),
    "diff html": ("source", f"diff plain/{DECODER} source/{DECODER} --format html"),
    "diff with itself": ("source", "diff source source --format json --weights digest"),
    "apply exact passes": ("source", f"apply {{exact}} source/{DECODER} out/model.onnx"),
    "apply attention passes": ("source", f"apply {{attention}} source/{DECODER} out/model.onnx"),
    "apply other passes": ("source", f"apply {{other}} source/{DECODER} out/model.onnx"),
    "repack": ("source", "repack source out --no-validate"),
    "repack fast": ("source", "repack source out --no-validate --preset fast"),
    "repack consolidated": ("source", "repack source out --no-validate --weights consolidate"),
    "strip": ("source", "strip source out --no-validate"),
    "git diff": ("source", f"git-diff {DECODER} plain/{DECODER} 00 100644 source/{DECODER} 11 100644"),
    "git show": ("source", f"git-textconv source/{DECODER}"),
    "review": ("repository", "review HEAD~1 HEAD --format md"),
    "validate": ("folder", "validate folder --quick --tokens 1"),
    "generate": ("folder", "generate folder hello --new-tokens 2"),
    "bench": ("folder", "bench folder --contexts 8 --new-tokens 2"),
}
"""Name -> the part of the ground whose graph has the form, and the words."""
RECIPES = {
    "exact": "merge-embeddings{embed=plain/onnx/embed_tokens_q4.onnx},fold-logits-to-keep,rename-io,move-padding,"
    "expand-shared-kv,annotate-head-sizes",
    "attention": "fuse-attention,slice-caches",
    "other": "flatten-per-layer-inputs,uniform-heads,tie-lm-head,host-embeddings,split-per-layer-table,"
    "fuse-per-layer-table,lut-products,to-fp16",
}
GROWTH = (1, 4)
SLACK = 1.6
"""How much more than four times as much, four times as large a form may take: measured times are not exact."""
NOISE = 0.4
"""Seconds that count as nothing."""


@dataclass(frozen=True)
class Row:
    """CPU seconds of one command on one form at each size; `base` is what it takes without the form."""

    command: str
    form: str
    count: int
    base: float
    seconds: tuple[float, ...]
    memory: int
    faults: tuple[str, ...]

    @property
    def linear(self) -> bool:
        first, last = self.seconds[0] - self.base, self.seconds[-1] - self.base
        return last <= GROWTH[-1] * max(first, 0) * SLACK + NOISE

    @property
    def passed(self) -> bool:
        return self.linear and not self.faults

    def __str__(self) -> str:
        verdict = "; ".join(self.faults) or ("linear" if self.linear else "MORE THAN LINEAR")
        times = (f"{seconds:.2f}" for seconds in self.seconds)
        return f"| {' | '.join((self.command, self.form, f'{self.count:,}', *times, f'{self.memory / 1e6:.0f}', verdict))} |"


HEAD = f"| command | form | N | {' | '.join(f's at {factor} N' for factor in GROWTH)} | MB | |\n|{'---|' * (5 + len(GROWTH))}"


def rows(ground: Ground, commands: Sequence[str], forms: Sequence[str], count: int) -> Iterator[Row]:
    for command in commands:
        base, _, _ = _measured(ground, command, None, 0)
        for form in forms:
            found = [_measured(ground, command, form, count * factor) for factor in GROWTH]
            faults = tuple(dict.fromkeys(fault for _, _, fault in found if fault))
            yield Row(command, form, count, base, tuple(one[0] for one in found), max(one[1] for one in found), faults)


def _measured(ground: Ground, command: str, form: str | None, count: int) -> tuple[float, int, str]:
    part, words = COMMANDS[command]
    graph = ground.root / part / ("model.onnx" if part == "folder" else DECODER)
    try:
        if form is not None:
            adversarial.add(graph, form, count)
        if part == "folder":
            attacks.sign(ground.root / part, graph.name)
        ran = ground.run(part, words.format(**RECIPES).split())
        return ran.seconds, ran.memory, ran.defect
    finally:
        ground.restore(part)
