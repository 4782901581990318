"""What a comparison came to: a verdict and fixed sections in a fixed order, as data that every format draws.

    Verdict     one line
    Interface   graph inputs and outputs, and the names of their symbolic dimensions
    KV caches   layer by layer: which layer has a cache of its own, which shares one, and its sizes
    Metadata    opsets, producer, metadata, functions
    Nodes       grouped by the pass that made the change, and by layer
    Weights     tensors and data files, the largest change first
    Config      genai_config.json, key by key
    Numbers     what the last validation measured, if there was one

Every list is in an order that depends on the two models alone, and no time and no path of a machine is in it: the
same two models give the same report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from surgery.errors import RequestError, nearest

ChangeVerb = Literal["added", "removed", "changed", "renamed", "moved"]
"""`changed`: it computes or means something else. `renamed`: its name alone differs. `moved`: it is the same in
another graph."""

VERBS: tuple[ChangeVerb, ...] = get_args(ChangeVerb)

Aspect = Literal["interface", "caches", "metadata", "nodes", "weights", "names", "config", "files"]
"""In what two models can differ: by section, but that `names` are nodes and weights that were renamed and nothing
else. Numbers are evidence, not a difference."""

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)


def read_aspects(text: str) -> tuple[Aspect, ...]:
    """`interface,nodes` as aspects; `none` is none of them. Raises RequestError for an unknown one."""
    words = [word.strip() for word in text.split(",") if word.strip() and word.strip() != "none"]
    for word in words:
        if word not in ASPECTS:
            known = ", ".join(ASPECTS)
            raise RequestError(
                f"{word!r} is nothing that models differ in{nearest(word, list(ASPECTS))}; there are {known}"
            )
    return tuple(aspect for aspect in ASPECTS if aspect in words)


Method = Literal["reference", "digest"]
"""How weights were compared: by the digest of their file, offset and length, or by reading them."""


@dataclass(frozen=True, slots=True)
class Reason:
    """The pass that made a change. `text` is its finding about this very thing, empty where it has none."""

    by: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.by}: {self.text}" if self.text else self.by


@dataclass(frozen=True, slots=True)
class Edit:
    """One property of a thing, old and new as people read them; None where it is absent.

    `what` is for example `input 2`, `attribute axis`, `output 0`, `type of output 0`, `name`, `graph`.
    """

    what: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        return f"{self.what}: {_shown(self.before)} -> {_shown(self.after)}"


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """One graph of a side. `role` is `model`, or `embed_tokens` and `decoder` of a pair; `sha256` is the file's."""

    role: str
    file: str
    sha256: str
    nodes: int
    initializers: int
    functions: int


@dataclass(frozen=True, slots=True)
class Costs:
    """What a side costs. `reads` are bytes of weights that each token reads, `cache` is what it adds to the KV caches,
    `download` is all graphs and data files; the oldest runtimes are versions. What is not known is None."""

    reads: int
    cache: int | None
    download: int | None
    genai: str | None
    onnxruntime: str | None


@dataclass(frozen=True, slots=True)
class SideSummary:
    """One of the two that are compared. `label` names it; `weight_bytes` is what its tensors take, inline ones too.

    `data` is the SHA-256 of each data file, None where nothing but a claim is known of it.
    """

    label: str
    kind: Literal["file", "pair", "folder"]
    graphs: tuple[GraphSummary, ...]
    weight_bytes: int
    data: dict[str, str | None] = field(default_factory=dict)
    costs: Costs | None = None

    @property
    def nodes(self) -> int:
        """How many nodes its graphs have together."""
        return sum(graph.nodes for graph in self.graphs)


@dataclass(frozen=True, slots=True)
class InterfaceValue:
    """A graph input or output, and its declared type, e.g. `FLOAT [batch_size, 1, past_sequence_length, 16]`."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class InterfaceChange:
    """A graph input or output, or the name of a symbolic dimension, which stands for itself wherever it is used.

    `note` says what the two values do not, e.g. that it was an input of embed_tokens. A value whose type differs in
    the names of renamed dimensions alone is not listed.
    """

    verb: ChangeVerb
    kind: Literal["input", "output", "dimension"]
    before: InterfaceValue | None
    after: InterfaceValue | None
    note: str = ""
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerCache:
    """A layer's attention and its KV cache on one side; None for what is not known.

    `owner` is the layer whose cache it reads, its own index for a KV source layer. `past` and `present` are the names
    of the key cache that it reads, `alias` that of an output of its own that repeats it. `attention` is `sliding` or
    `full`; sizes are counts, `window` is tokens.
    """

    operator: str
    attention: str | None
    head_size: int | None
    kv_heads: int | None
    owner: int | None
    window: int | None
    past: str | None
    present: str | None
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One row of the picture of the layers; every layer has one, changed or not. None where a side lacks the layer."""

    index: int
    before: LayerCache | None
    after: LayerCache | None
    reasons: tuple[Reason, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether a side lacks the layer, or the two differ in it."""
        return self.before is None or self.after is None or bool(self.edits)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What differs, where both sides have the layer. What one side does not know is no difference."""
        if self.before is None or self.after is None:
            return ()
        names = ["operator", "past", "present", "alias"]
        names += [name for name in ("attention", "head_size", "kv_heads", "owner") if self._known(name)]
        names += ["window"] if self._known("attention") else []
        pairs = [(name, getattr(self.before, name), getattr(self.after, name)) for name in names]
        return tuple(Edit(name, _text(old), _text(new)) for name, old, new in pairs if old != new)

    def _known(self, name: str) -> bool:
        return getattr(self.before, name) is not None and getattr(self.after, name) is not None


@dataclass(frozen=True, slots=True)
class FieldChange:
    """A value under a key: an opset, a metadata entry, a key of genai_config.json."""

    verb: ChangeVerb
    key: str
    before: str | None
    after: str | None
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeChange:
    """One node. `before` and `after` are its names (of an unnamed node, its first output's); None where it is not.

    `graph` is the role of the graph it stands in, after where it is there; `scope` is empty, or the subgraph or
    function, e.g. `If '/gate' then_branch`. `layer` is read from the names, None outside of the layers.
    """

    verb: ChangeVerb
    operator: str
    before: str | None
    after: str | None
    graph: str
    scope: str
    layer: int | None
    edits: tuple[Edit, ...] = ()
    reasons: tuple[Reason, ...] = ()

    @property
    def name(self) -> str:
        """Its name in AFTER, or in BEFORE where it is gone."""
        return self.after if self.after is not None else self.before or ""


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Changes of the same passes in one place of the model, and in every layer that has the same ones.

    `by` is empty where no pass is known to have made them; `layers` is empty outside of the layers.
    """

    by: tuple[str, ...]
    layers: tuple[int, ...]
    changes: tuple[NodeChange, ...]

    @property
    def counts(self) -> dict[tuple[ChangeVerb, str], int]:
        """(verb, operator) -> nodes, in the order of VERBS, the commonest operators first."""
        found = Counter((change.verb, change.operator) for change in self.changes)
        ordered = sorted(found, key=lambda key: (VERBS.index(key[0]), -found[key], key[1]))
        return {key: found[key] for key in ordered}


@dataclass(frozen=True, slots=True)
class Nodes:
    """`unchanged` counts the nodes that are the same on both sides, names included."""

    groups: tuple[NodeGroup, ...]
    unchanged: int

    def __iter__(self) -> Iterator[NodeChange]:
        return (change for group in self.groups for change in group.changes)


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor on one side. `size` is in bytes; `file` is None for an inline one, and `offset` then is too."""

    name: str
    type: str
    size: int
    file: str | None
    offset: int | None


@dataclass(frozen=True, slots=True)
class WeightChange:
    """A tensor that is not the same on both sides. `delta` is in bytes."""

    verb: ChangeVerb
    before: Weight | None
    after: Weight | None
    reasons: tuple[Reason, ...] = ()

    @property
    def delta(self) -> int:
        """Bytes that AFTER has more."""
        return (self.after.size if self.after else 0) - (self.before.size if self.before else 0)


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file beside the graphs, old and new size in bytes; None where a side has none. `same` is None if unknown.

    `kind` is `data` for a file that holds weights, and `side` for any other: a tokenizer, a configuration. `old_name`
    is what it was called before, where that is something else.
    """

    name: str
    before: int | None
    after: int | None
    same: bool | None
    kind: Literal["data", "side"] = "data"
    old_name: str | None = None

    @property
    def title(self) -> str:
        """Its name, or both of them."""
        return f"{self.old_name} -> {self.name}" if self.old_name else self.name

    @property
    def delta(self) -> int:
        """Bytes that AFTER has more."""
        return (self.after or 0) - (self.before or 0)


@dataclass(frozen=True, slots=True)
class FewerTokens:
    """AFTER has `after` of BEFORE's tokens: `tensors` are those of which it has the rows of these tokens and no other
    difference, by a digest of the rows. `delta` is in bytes."""

    before: int
    after: int
    tensors: tuple[str, ...]
    delta: int


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors and files: every data file, and the side files that differ. `unchanged` counts tensors that are the same,
    `relocated` those of them in another place.

    `uncompared` counts the tensors of which nothing is known but dtype and shape, `why` says why, and `basis` says
    what equality was concluded from.
    """

    method: Method
    changes: tuple[WeightChange, ...]
    files: tuple[FileChange, ...]
    unchanged: int
    relocated: int
    uncompared: int
    basis: tuple[str, ...]
    why: tuple[str, ...]
    vocabulary: FewerTokens | None = None


@dataclass(frozen=True, slots=True)
class NumberGate:
    """One gate of a validation: what was measured against what, in words."""

    section: str
    name: str
    passed: bool
    reading: str


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a validation measured of AFTER. `exact` where every number equals the source's; `origin` says which run.

    `recorded` where the folder itself says so: it is its author's word, given for these very graphs and data.
    """

    origin: str
    passed: bool
    exact: bool
    summary: str
    gates: tuple[NumberGate, ...]
    recorded: bool = False

    @property
    def source(self) -> str:
        """`origin`, and whose word it is."""
        return f"recorded by the folder's author: {self.origin}" if self.recorded else self.origin


@dataclass(frozen=True, slots=True)
class PassFinding:
    """What a pass said of one thing, as in surgery.graph.changes.Finding."""

    verb: str
    subject: str
    reason: str


@dataclass(frozen=True, slots=True)
class PassRecord:
    """A pass that made AFTER: the operators that it added and removed, and its findings in its own words."""

    name: str
    operators: dict[str, int]
    findings: tuple[PassFinding, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models side by side. `layers` has every layer, changed or not; `passes` is empty where none is known.

    `ignored` names the aspects whose changes are shown, but do not count. Where BEFORE is not what AFTER was proven
    against, `proven` says what was, and how that went; empty where nothing is on record.
    """

    before: SideSummary
    after: SideSummary
    interface: tuple[InterfaceChange, ...]
    layers: tuple[LayerChange, ...]
    metadata: tuple[FieldChange, ...]
    nodes: Nodes
    weights: Weights
    config: tuple[FieldChange, ...]
    numbers: Numbers | None
    passes: tuple[PassRecord, ...]
    ignored: tuple[Aspect, ...] = ()
    proven: str = ""

    @property
    def differing(self) -> tuple[Aspect, ...]:
        """The aspects in which the two differ. Weights that were not compared count: nobody knows that they are
        equal."""
        found = {
            "interface": bool(self.interface),
            "caches": any(layer.changed for layer in self.layers),
            "metadata": bool(self.metadata),
            "nodes": any(change.verb != "renamed" for change in self.nodes),
            "weights": bool(self.weights.uncompared or self.weights.vocabulary)
            or any(change.verb != "renamed" for change in self.weights.changes),
            "names": any(change.verb == "renamed" for change in (*self.nodes, *self.weights.changes)),
            "config": bool(self.config),
            "files": any(file.kind == "side" for file in self.weights.files),
        }
        return tuple(aspect for aspect in ASPECTS if found[aspect] and aspect not in self.ignored)

    @property
    def same(self) -> bool:
        """Whether nothing that counts differs."""
        return not self.differing

    @property
    def computes_the_same(self) -> bool:
        """Whether all nodes and weights are known to be the same, but for names and places."""
        weights = self.weights.uncompared or any(change.verb != "renamed" for change in self.weights.changes)
        return not (self.interface or weights or any(change.verb != "renamed" for change in self.nodes))

    def fails(self, aspects: Collection[Aspect]) -> bool:
        """Whether the two differ in one of these aspects."""
        return any(aspect in aspects for aspect in self.differing)

    @property
    def verdict(self) -> str:
        """One line: `interface: 2 removed, 1 added · 13 nodes moved · 0 weights changed · numbers identical`."""
        parts = [f"interface: {tally(self.interface)}", *self._caches(), *self._metadata()]
        parts += [f"nodes: {tally(self.nodes)}", self._weights(), *self._config(), self._numbers()]
        return " · ".join(parts)

    def _caches(self) -> list[str]:
        changed = sum(layer.changed for layer in self.layers)
        return [f"KV caches: {changed} of {len(self.layers)} layers changed"] if changed else []

    def _metadata(self) -> list[str]:
        return [f"metadata: {tally(self.metadata)}"] if self.metadata else []

    def _config(self) -> list[str]:
        found = [f"config: {tally(self.config)}"] if self.config else []
        files = sum(file.kind == "side" for file in self.weights.files)
        return [*found, f"files: {files} differ"] if files else found

    def _weights(self) -> str:
        counts = Counter(change.verb for change in self.weights.changes)
        others = [f"{counts[verb]} {verb}" for verb in VERBS if counts[verb] and verb != "changed"]
        if self.weights.relocated:
            others.append(f"{self.weights.relocated} in another place")
        if self.weights.uncompared:
            others.append(f"{self.weights.uncompared} not compared")
        parts = [f"weights: {counts['changed']} changed", *others]
        if (fewer := self.weights.vocabulary) is not None:
            parts.insert(0, f"vocabulary: {fewer.before:,} -> {fewer.after:,}, rows equal")
            parts = [" · ".join(parts[:2]), *parts[2:]]
        return ", ".join(parts)

    def _numbers(self) -> str:
        if self.numbers is None and self.computes_the_same:
            return "numbers identical: graphs and weights are the same"
        if self.numbers is None:
            return "numbers not measured" + (f" between these two ({self.proven})" if self.proven else "")
        found = "FAIL" if not self.numbers.passed else "identical" if self.numbers.exact else "within tolerance"
        return f"numbers {found} by the author's record" if self.numbers.recorded else f"numbers {found}"


_Changed = InterfaceChange | FieldChange | NodeChange | WeightChange


def tally(changes: Iterable[_Changed]) -> str:
    """`2 removed, 1 added`, in the order of VERBS; `unchanged` where there is nothing."""
    counts = Counter(change.verb for change in changes)
    return ", ".join(f"{counts[verb]} {verb}" for verb in VERBS if counts[verb]) or "unchanged"


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _shown(value: str | None) -> str:
    return "(none)" if value is None else value
