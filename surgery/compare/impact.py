"""What a change means for whoever runs the model: the first thing that a reviewer wants to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from surgery.choices import Policy
from surgery.compare.comparison import Comparison, SideSummary
from surgery.printing import size

Level = Literal["same", "compatible", "numerics", "breaking"]
LEVELS: tuple[Level, ...] = ("same", "compatible", "numerics", "breaking")
TITLES: dict[Level, str] = {
    "same": "Same",
    "compatible": "Compatible",
    "numerics": "Numbers changed",
    "breaking": "Breaking",
}
_LAYOUT = ("past", "present", "head_size", "kv_heads")
_PAPERS = (".md", ".txt", "LICENSE", "NOTICE")
"""Side files that say something, and change nothing that a model answers."""


@dataclass(frozen=True, slots=True)
class Impact:
    """`breaking`: callers or runtimes of before do not do any more. `numerics`: they do, and get other numbers, or
    nobody knows that they get the same. `compatible`: the same numbers. `why` is in words."""

    level: Level
    why: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{TITLES[self.level]}: {'; '.join(self.why)}" if self.why else TITLES[self.level]

    def fails(self, policy: Policy) -> bool:
        """Whether a policy forbids it."""
        least: Level = "compatible" if policy == "any" else policy
        return LEVELS.index(self.level) >= LEVELS.index(least)


def impact_of(found: Comparison) -> Impact:
    """What the differences that are not ignored come to."""
    if found.same:
        return Impact("same")
    if broken := tuple(_broken(found)):
        numbers = (f"numbers: {_measured(found, ())}",) if found.numbers is not None else ()
        return Impact("breaking", (*broken, *numbers))
    answers: list[str] = [aspect for aspect in ("nodes", "weights", "config") if aspect in found.differing]
    if "files" in found.differing and any(
        file.kind == "side" and not file.name.endswith(_PAPERS) for file in found.weights.files
    ):
        answers.append("files")
    if not answers or (found.numbers is not None and found.numbers.passed and found.numbers.exact):
        return Impact("compatible", (found.numbers.summary,) if found.numbers is not None else ())
    return Impact("numerics", (_measured(found, answers),))


def _measured(found: Comparison, answers: Sequence[str]) -> str:
    """By how much, as the proof says."""
    if found.numbers is None:
        return f"{', '.join(answers)} differ, and by how much was not measured"
    said = "" if found.numbers.passed else "the proof FAILS: "
    return f"{said}{found.numbers.summary}"


def _broken(found: Comparison) -> Iterator[str]:
    if found.before.kind == "pair" and found.after.kind != "pair" and "interface" in found.differing:
        yield "one graph with the inputs and outputs of onnxruntime-genai where there were two of another interface"
    if "interface" in found.differing:
        changes = [change for change in found.interface if change.kind != "dimension"]
        counts = Counter(
            (change.kind, _what(change.verb))
            for change in changes
            if not (change.verb == "added" and change.kind == "output") and not _type_stays(change)
        )
        for (kind, what), count in counts.items():
            yield f"{count} {kind}{'' if count == 1 else 's'} {what}"
    if "caches" in found.differing:
        layers = [layer for layer in found.layers if any(edit.what in _LAYOUT for edit in layer.edits)]
        lost = sum(layer.before is None or layer.after is None for layer in found.layers)
        if layers or lost:
            yield f"KV caches of {len(layers) + lost} of {len(found.layers)} layers laid out otherwise"
    if "metadata" in found.differing and any(change.key.endswith("gemma4_surgery.caches") for change in found.metadata):
        yield "KV caches updated in place on one side alone"
    yield from _raised(found.before, found.after)


def _what(verb: str) -> str:
    return {"added": "more that callers must give", "removed": "removed", "renamed": "renamed", "moved": "moved"}.get(
        verb, "retyped"
    )


def _type_stays(change: object) -> bool:
    """Whether an input or output has the name and the type that it had: it only comes from elsewhere."""
    before, after = getattr(change, "before", None), getattr(change, "after", None)
    return before is not None and before == after


def _raised(before: SideSummary, after: SideSummary) -> Iterator[str]:
    for name in ("genai", "onnxruntime"):
        old, new = (getattr(side.costs, name) if side.costs else None for side in (before, after))
        known = before.costs is not None and before.costs.genai is not None
        if new is not None and known and (old is None or _version(new) > _version(old)):
            runtime = "onnxruntime-genai" if name == "genai" else name
            yield f"it needs {runtime} {new}{f', not {old}' if old else ''}"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


# What it costs, and why it may be faster or slower

COST_HEADS = ("weights read a token", "KV cache at 8k", "KV cache at 128k", "download", "oldest runtimes")


def cost_cells(found: Comparison) -> tuple[str, ...]:
    """Each cost as one text, before and after where they differ; in the order of COST_HEADS."""
    sides = [_costs(side) for side in (found.before, found.after)]
    return tuple(old if old == new else f"{old or '?'} → {new or '?'}" for old, new in zip(*sides, strict=True))


def _costs(side: SideSummary) -> tuple[str, ...]:
    known = side.costs
    if known is None:
        return ("",) * len(COST_HEADS)
    caches = ["" if known.cache is None else size(known.cache * tokens) for tokens in (8192, 131072)]
    runtimes = [f"genai {known.genai}"] if known.genai else []
    runtimes += [f"onnxruntime {known.onnxruntime}"] if known.onnxruntime else []
    return size(known.reads), *caches, "" if known.download is None else size(known.download), ", ".join(runtimes)


def speed_notes(found: Comparison) -> tuple[tuple[str, str], ...]:
    """What the graphs say of speed: a subject and a change, for each thing that makes a run cheaper or dearer."""
    return tuple(_speed(found))


def _speed(found: Comparison) -> Iterator[tuple[str, str]]:
    kinds = Counter((e.before, e.after) for layer in found.layers for e in layer.edits if e.what == "operator")
    for (old, new), count in kinds.items():
        yield f"attention of {count} layers", f"{old} -> {new}" + _fused(old, new)
    for what, text in (("accuracy_level", "0 or 1 multiplies in float, 4 in int8"), ("bits", ""), ("block_size", "")):
        edits = Counter(
            (e.before, e.after)
            for node in found.nodes
            if node.operator.endswith("MatMulNBits")
            for e in node.edits
            if e.what == f"attribute {what}"
        )
        for (old, new), count in edits.items():
            yield (
                f"{what} of {count} quantized MatMuls",
                f"{old or 'none'} -> {new or 'none'}" + (f"; {text}" if text else ""),
            )
    if found.before.costs and found.after.costs:
        old_reads, new_reads = found.before.costs.reads, found.after.costs.reads
        if old_reads and abs(new_reads - old_reads) / old_reads > 0.01:
            yield (
                "weights read for each token",
                f"{size(old_reads)} -> {size(new_reads)} ({new_reads / old_reads - 1:+.0%})",
            )
        old_cache, new_cache = found.before.costs.cache, found.after.costs.cache
        if old_cache is not None and new_cache is not None and old_cache != new_cache:
            yield "KV cache for each token", f"{size(old_cache)} -> {size(new_cache)}"
    for change in found.metadata:
        if change.key.endswith("gemma4_surgery.caches"):
            yield "KV caches", "updated in place: no copy a token" if change.after else "copied for each token again"
    for value in found.interface:
        old_type, new_type = (side.type if side else "" for side in (value.before, value.after))
        if (
            value.kind == "output"
            and value.after
            and value.after.name == "logits"
            and old_type
            and old_type != new_type
        ):
            yield "logits", f"{old_type} -> {new_type}"
    old_nodes, new_nodes = found.before.nodes, found.after.nodes
    if old_nodes and abs(new_nodes - old_nodes) / old_nodes > 0.05:
        yield "nodes", f"{old_nodes:,} -> {new_nodes:,}, before the runtime fuses any"


def _fused(old: str | None, new: str | None) -> str:
    if old == "Softmax" and new != "Softmax":
        return ": fused, one operator in place of many"
    return ": unrolled, many operators in place of one" if new == "Softmax" and old != "Softmax" else ""
