"""Which node of one graph is which of another: found in levels, from certain to likely, in near-linear time.

    1  equal cones: what leads to the node is the same down to the inputs and the weights; between twins, what follows
       from them decides, then their names
    2  equal cones but for the content of weights
    3  equal output name and operator, where names are evidence: most of the nodes found so far have kept theirs;
       then equal output name and an operator that is a form of the other one
    4  equal forward cones: what follows from the node is the same up to the outputs
    5  equal neighbours: the one unmatched node of its kind that makes, or that reads, what a matched one reads or makes
    6  equal order: the longest common subsequence of what is left between two matched nodes

A structure is a number that equal structures share, so that no level compares two nodes with each other. Level 6 is
quadratic, and therefore works on short runs only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.compare.numbered_graph import MISSING, Label, NumberedGraph, Port, Stored, inline_content, node_place

Keys = tuple[Sequence[Hashable], Sequence[Hashable]]
"""Of each side, a key per node; None for a node that a level does not speak of."""

Pairs = list[tuple[int, int]]
"""Positions in BEFORE and in AFTER."""

LONGEST_RUN = 200
"""Nodes of a run on which level 6 works: a longer one would cost more than it tells."""

SMALL = 8
"""Elements of an inline vector that is a constant of the graph's structure, an axis or a shape say, not a weight."""

TRUST = 0.5
"""Share of nodes found by structure alone that must have kept their names, for names to be evidence."""


@dataclass
class Alignment:
    """What is what: by position for nodes, by number for values. Each map is one to one."""

    nodes: dict[int, int] = field(default_factory=dict)
    values: dict[int, int] = field(default_factory=dict)
    inputs: list[tuple[Port, Port]] = field(default_factory=list)
    outputs: list[tuple[Port, Port]] = field(default_factory=list)
    stored: dict[int, int] = field(default_factory=dict)
    """Initializers, by position in `Scope.stored`."""


def align(
    before: NumberedGraph, after: NumberedGraph, labels: tuple[Label, Label], outer: Mapping[int, int] | None = None
) -> Alignment:
    """Align two scopes. `labels` are of the tensors of each; `outer` maps the values that a body captures."""
    return _Aligner(before, after, labels, dict(outer or {})).run()


class _Aligner:
    def __init__(
        self, before: NumberedGraph, after: NumberedGraph, labels: tuple[Label, Label], outer: dict[int, int]
    ) -> None:
        self.scopes = (before, after)
        self.labels = labels
        self.found: dict[int, int] = {}
        self.back: dict[int, int] = {}
        self.outer = outer
        self.interned: dict[Hashable, int] = {}
        self.inputs = _ports(before.inputs, after.inputs)
        self.outputs = _ports(before.outputs, after.outputs)
        self.bodies = tuple([_body_keys(scope) for scope in self.scopes])
        self.makers = tuple([makers(scope) for scope in self.scopes])
        self.readers = tuple([_readers(scope) for scope in self.scopes])
        self.places = _places(before, after)

    def run(self) -> Alignment:
        strict, loose, forward = self._backward(strict=True), self._backward(strict=False), self._forward()
        by_structure: Pairs = []
        for cones in (strict, loose):
            by_structure += self._level(_both(cones, forward))
            by_structure += self._level(cones)
        trusted = self._kept_names(by_structure) and self._kept_names(self._alone(forward))
        if trusted:
            self._by_name()
            self._by_kin()
        self._level(forward, whole=True)
        certain = set(self.found)
        self._spread()
        if not trusted:
            self._by_name(attributes=True)
        self._runs()
        self._spread()
        if trusted:
            self._forget_strangers(certain)
        return self._result()

    # ---- levels 1 and 2

    def _intern(self, key: Hashable) -> int:
        return self.interned.setdefault(key, len(self.interned))

    def _backward(self, strict: bool) -> tuple[list[int], list[int]]:
        return self._cones(0, strict), self._cones(1, strict)

    def _cones(self, side: int, strict: bool) -> list[int]:
        """One number per node: its operator, its attributes, and the numbers of what it reads."""
        scope = self.scopes[side]
        numbers: dict[int, int] = {MISSING: MISSING}
        for index, pair in enumerate(self.inputs):
            numbers[pair[side].value] = self._intern(("input", index))
        for pair_index, pair_of_values in enumerate(self.outer.items()):
            numbers[pair_of_values[side]] = self._intern(("outer", pair_index))
        for stored in scope.stored:
            if stored.value not in numbers:
                numbers[stored.value] = self._intern(_kind(stored, self.labels[side] if strict else None))
        cones = []
        for at, item in enumerate(scope.items):
            reads = tuple([numbers.get(value, -2 - side) for value in item.inputs])
            inner = self.bodies[side].get(at, ())
            if inner:
                inner = (inner, tuple([numbers.get(value, -2 - side) for value in item.outer.values()]))
            number = self._intern((item.operator, item.attributes, reads, inner))
            cones.append(number)
            for index, value in enumerate(item.outputs):
                if value != MISSING:
                    numbers[value] = self._intern((number, index))
        return cones

    def _grouped(self, keys: Keys) -> Iterator[tuple[list[int], list[int]]]:
        """The unmatched nodes of each key that both graphs have."""
        grouped: tuple[dict[Hashable, list[int]], ...] = (defaultdict(list), defaultdict(list))
        for side, taken in enumerate((self.found, self.back)):
            for at, key in enumerate(keys[side]):
                if at not in taken and key is not None:
                    grouped[side][self.places[side][at], key].append(at)
        return ((ours, grouped[1][value]) for value, ours in grouped[0].items() if value in grouped[1])

    def _alone(self, keys: Keys) -> Pairs:
        """Pairs of unmatched nodes that are the only ones of their key in their graphs."""
        return [(ours[0], theirs[0]) for ours, theirs in self._grouped(keys) if len(ours) == len(theirs) == 1]

    def _level(self, keys: Keys, *, whole: bool = False) -> Pairs:
        """Match the unmatched nodes of equal keys: those of equal names first, the others in order.

        `whole`: only where both graphs have as many nodes of a key. Returns the pairs that were alone with theirs.
        """
        alone = []
        for ours, theirs in self._grouped(keys):
            if len(ours) == len(theirs) == 1:
                self._match(ours[0], theirs[0])
                alone.append((ours[0], theirs[0]))
            elif len(ours) == len(theirs) or not whole:
                self._twins(ours, theirs)
        return alone

    def _twins(self, ours: list[int], theirs: list[int]) -> None:
        by_name = {self._name(1, at): at for at in reversed(theirs)}
        for at in ours:
            other = by_name.get(self._name(0, at))
            if other is not None and other not in self.back:
                self._match(at, other)
        left = [at for at in theirs if at not in self.back]
        for at, other in zip([at for at in ours if at not in self.found], left, strict=False):
            self._match(at, other)

    def _name(self, side: int, at: int) -> str:
        item = self.scopes[side].items[at]
        return next((self.scopes[side].names[value] for value in item.outputs if value != MISSING), item.proto.name)

    def _match(self, ours: int, theirs: int) -> None:
        self.found[ours] = theirs
        self.back[theirs] = ours

    # ---- level 3

    def _kept_names(self, pairs: Pairs) -> bool:
        """Whether names are evidence, going by nodes that are the same by structure alone."""
        kept = sum(self._name(0, ours) == self._name(1, theirs) for ours, theirs in pairs)
        return not pairs or kept >= TRUST * len(pairs)

    def _by_name(self, attributes: bool = False) -> None:
        """By the name of the first output, then by the node's own; the operator must be the same."""
        outputs: tuple[list[Hashable], list[Hashable]] = ([], [])
        own: tuple[list[Hashable], list[Hashable]] = ([], [])
        for side, scope in enumerate(self.scopes):
            for at, item in enumerate(scope.items):
                kind = (item.operator, item.attributes if attributes else ())
                outputs[side].append((self._name(side, at), kind))
                own[side].append((item.proto.name, kind) if item.proto.name else None)
        self._level(outputs, whole=True)
        self._level(own, whole=True)

    def _by_kin(self) -> None:
        """By the name of the first output, where one operator is a form of the other: MatMul and MatMulNBits."""
        names = [[self._name(side, at) for at in range(len(scope.items))] for side, scope in enumerate(self.scopes)]
        for ours, theirs in self._alone((names[0], names[1])):
            one, other = (scope.items[at].proto.op_type for scope, at in zip(self.scopes, (ours, theirs), strict=True))
            if one in other or other in one:
                self._match(ours, theirs)

    # ---- level 4

    def _forward(self) -> tuple[list[int], list[int]]:
        return self._followers(0), self._followers(1)

    def _followers(self, side: int) -> list[int]:
        """One number per node: its operator, its attributes, its weights, and who reads what it makes, and where."""
        scope, readers = self.scopes[side], self.readers[side]
        ends: dict[int, list[int]] = defaultdict(list)
        for index, pair in enumerate(self.outputs):
            ends[pair[side].value].append(index)
        kinds = {stored.value: self._intern(_kind(stored, None)) for stored in scope.stored}
        numbers = [MISSING] * len(scope.items)
        for at in range(len(scope.items) - 1, -1, -1):
            item = scope.items[at]
            uses = []
            for value in item.outputs:
                read = sorted([(numbers[reader], slot) for reader, slot in readers.get(value, ())])
                uses.append((tuple(read), tuple(ends.get(value, ()))))
            weights = tuple([kinds.get(value, MISSING) for value in item.inputs])
            numbers[at] = self._intern(("forward", item.operator, item.attributes, weights, tuple(uses)))
        return numbers

    # ---- level 5

    def _spread(self) -> None:
        """From matched nodes to their neighbours, as long as that finds any: equal attributes first."""
        for attributes in (True, False):
            pending = sorted(self.found.items())
            while pending:
                pending = [pair for ours, theirs in pending for pair in self._neighbours(ours, theirs, attributes)]

    def _neighbours(self, ours: int, theirs: int, attributes: bool) -> Iterable[tuple[int, int]]:
        a, b = self.scopes[0].items[ours], self.scopes[1].items[theirs]
        for one, other in zip(a.inputs, b.inputs, strict=False):
            maker, twin = self.makers[0].get(one), self.makers[1].get(other)
            if maker is None or twin is None or maker in self.found or twin in self.back:
                continue
            if self._alike(maker, twin, attributes):
                self._match(maker, twin)
                yield maker, twin
        for one, other in zip(a.outputs, b.outputs, strict=False):
            yield from self._sole_readers(one, other, attributes)

    def _sole_readers(self, one: int, other: int, attributes: bool) -> Iterable[tuple[int, int]]:
        sides = (self._unmatched_readers(0, one, attributes), self._unmatched_readers(1, other, attributes))
        for key, ours in sides[0].items():
            theirs = sides[1].get(key, [])
            if len(ours) == len(theirs) == 1 and ours[0] not in self.found and theirs[0] not in self.back:
                self._match(ours[0], theirs[0])
                yield ours[0], theirs[0]

    def _unmatched_readers(self, side: int, value: int, attributes: bool) -> dict[Hashable, list[int]]:
        taken = self.back if side else self.found
        found: dict[Hashable, list[int]] = {}
        for at, slot in self.readers[side].get(value, ()):
            if at not in taken:
                item = self.scopes[side].items[at]
                kind = item.operator, item.attributes if attributes else (), slot, self.places[side][at]
                found.setdefault(kind, []).append(at)
        return found

    def _alike(self, ours: int, theirs: int, attributes: bool) -> bool:
        a, b = self.scopes[0].items[ours], self.scopes[1].items[theirs]
        here = a.operator == b.operator and self.places[0][ours] == self.places[1][theirs]
        return here and (not attributes or a.attributes == b.attributes)

    # ---- level 6

    def _runs(self) -> None:
        """Match what stands between the same two matched nodes, by the longest common subsequence of operators."""
        behind: dict[int, list[int]] = defaultdict(list)
        last = -1
        for at in range(len(self.scopes[1].items)):
            if at in self.back:
                last = at
            else:
                behind[last].append(at)
        runs: list[tuple[list[int], list[int]]] = []
        run: list[int] = []
        last = -1
        for at in range(len(self.scopes[0].items) + 1):
            if at in self.found or at == len(self.scopes[0].items):
                if run and last in behind:
                    runs.append((run, behind[last]))
                last, run = self.found.get(at, -1), []
            else:
                run.append(at)
        for ours, theirs in runs:
            if len(ours) <= LONGEST_RUN and len(theirs) <= LONGEST_RUN:
                for one, other in longest_common(self._kinds(0, ours), self._kinds(1, theirs)):
                    self._match(ours[one], theirs[other])

    def _kinds(self, side: int, run: list[int]) -> list[Hashable]:
        items = [(self.scopes[side].items[at], self.places[side][at]) for at in run]
        return [(item.operator, item.attributes, here) for item, here in items]

    def _forget_strangers(self, certain: Collection[int]) -> None:
        """Where names are evidence: take back what levels 5 and 6 found, if neither a name nor an input speaks for
        it."""
        values = dict(self.outer)
        values.update((one.value, other.value) for one, other in self.inputs)
        kept = {stored.value: stored.tensor.name for stored in self.scopes[1].stored}
        names = {stored.value: stored.tensor.name for stored in self.scopes[0].stored}
        for ours, theirs in sorted(self.found.items()):
            a, b = self.scopes[0].items[ours], self.scopes[1].items[theirs]
            reads = [pair for pair in zip(a.inputs, b.inputs, strict=False) if MISSING not in pair]
            same = any(
                values.get(one) == other or (one in names and names[one] == kept.get(other)) for one, other in reads
            )
            if ours not in certain and reads and not same and not self._share_a_name(ours, theirs):
                del self.found[ours], self.back[theirs]
                continue
            values.update(pair for pair in zip(a.outputs, b.outputs, strict=False) if MISSING not in pair)

    def _share_a_name(self, ours: int, theirs: int) -> bool:
        a, b = self.scopes[0].items[ours].proto.name, self.scopes[1].items[theirs].proto.name
        return self._name(0, ours) == self._name(1, theirs) or bool(a and a == b)

    # ---- values

    def _result(self) -> Alignment:
        before, after = self.scopes
        values = dict(self.outer)
        for ours, theirs in self.found.items():
            for one, other in zip(before.items[ours].outputs, after.items[theirs].outputs, strict=False):
                if one != MISSING and other != MISSING:
                    values[one] = other
        inputs = [pair for pair in self.inputs if self._is_input(pair)]
        values.update((one.value, other.value) for one, other in inputs)
        stored = self._stored()
        values.update((before.stored[one].value, after.stored[other].value) for one, other in stored.items())
        outputs = [pair for pair in self.outputs if _same_port(pair) or values.get(pair[0].value) == pair[1].value]
        return Alignment(dict(sorted(self.found.items())), values, inputs, outputs, stored)

    def _is_input(self, pair: tuple[Port, Port]) -> bool:
        """An input under another name is the same one if a node that reads it is the same, at the same place."""
        if _same_port(pair):
            return True
        uses = [set(self.readers[side].get(pair[side].value, ())) for side in (0, 1)]
        return any((self.found.get(at), slot) in uses[1] for at, slot in uses[0]) or not (uses[0] or uses[1])

    def _stored(self) -> dict[int, int]:
        """Initializers: by name where the same nodes read them, by who reads them, by name, by content."""
        before, after = self.scopes
        place = tuple([{stored.value: index for index, stored in enumerate(scope.stored)} for scope in self.scopes])
        votes: dict[tuple[int, int], int] = defaultdict(int)
        for ours, theirs in self.found.items():
            for one, other in zip(before.items[ours].inputs, after.items[theirs].inputs, strict=False):
                if one in place[0] and other in place[1]:
                    votes[place[0][one], place[1][other]] += 1
        found: dict[int, int] = {}
        taken: set[int] = set()

        def take(one: int, other: int) -> None:
            if one not in found and other not in taken:
                found[one] = other
                taken.add(other)

        ordered = sorted(votes, key=lambda pair: (-votes[pair], pair))
        for one, other in ordered:
            if before.stored[one].tensor.name == after.stored[other].tensor.name:
                take(one, other)
        for one, other in ordered:
            if self._equal(before.stored[one], after.stored[other]):
                take(one, other)
        self._unmatched(found, take, lambda side, stored: stored.tensor.name)
        self._unmatched(found, take, lambda side, stored: _kind(stored, self.labels[side]))
        return dict(sorted(found.items()))

    def _equal(self, one: Stored, other: Stored) -> bool:
        """Whether two tensors hold the same, as far as that is known: content that nobody knows is no objection."""
        labels = self.labels[0](one), self.labels[1](other)
        return _kind(one, None) == _kind(other, None) and (None in labels or labels[0] == labels[1])

    def _unmatched(
        self, found: dict[int, int], take: Callable[[int, int], None], key: Callable[[int, Stored], Hashable]
    ) -> None:
        taken = set(found.values())
        theirs: dict[Hashable, list[int]] = defaultdict(list)
        for index in range(len(self.scopes[1].stored) - 1, -1, -1):
            if index not in taken:
                theirs[key(1, self.scopes[1].stored[index])].append(index)
        for index, stored in enumerate(self.scopes[0].stored):
            if index not in found and (waiting := theirs.get(key(0, stored))):
                take(index, waiting.pop())


def _kind(stored: Stored, label: Label | None) -> Hashable:
    """A tensor as a leaf: dtype and shape, and its content where `label` knows it or where it is a small constant."""
    tensor = stored.tensor
    content = label(stored) if label is not None else None
    if content is None and len(tensor.dims) <= 1 and tensor.data_location != 1 and sum(tensor.dims) <= SMALL:
        content = inline_content(tensor)
    return "weight", tensor.data_type, tuple(tensor.dims), content


def _both(one: Keys, other: Keys) -> Keys:
    return list(zip(one[0], other[0], strict=True)), list(zip(one[1], other[1], strict=True))


def _same_port(pair: tuple[Port, Port]) -> bool:
    return pair[0].name == pair[1].name or pair[0].declaration is None


def _ports(before: list[Port], after: list[Port]) -> list[tuple[Port, Port]]:
    """Inputs or outputs that may be the same: by name, then, of one type, in order. Of bodies, by position."""
    by_name = {port.name: port for port in after}
    pairs = [(port, by_name[port.name]) for port in before if port.name in by_name]
    known = {port.name for port, _ in pairs}
    waiting: dict[str, list[Port]] = defaultdict(list)
    for port in reversed(after):
        if port.name not in known:
            waiting[port.type].append(port)
    for port in before:
        if port.name not in known and waiting[port.type]:
            pairs.append((port, waiting[port.type].pop()))
    return pairs


def _places(before: NumberedGraph, after: NumberedGraph) -> tuple[list[str], list[str]]:
    """The graph of each node, where both sides have it; of a graph that was merged into another, that one."""
    found = [[node_place(item.role, scope.main) for item in scope.items] for scope in (before, after)]
    both = set(found[0]) & set(found[1])
    ours, theirs = ([here if here in both else "main" for here in side] for side in found)
    return ours, theirs


def makers(scope: NumberedGraph) -> dict[int, int]:
    """Value, by number -> position of the node that makes it."""
    return {value: at for at, item in enumerate(scope.items) for value in item.outputs if value != MISSING}


def _readers(scope: NumberedGraph) -> dict[int, list[tuple[int, int]]]:
    """Value -> (node, input index) of each reader; a body's reading counts as input -1."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for at, item in enumerate(scope.items):
        for slot, value in enumerate(item.inputs):
            if value != MISSING:
                found[value].append((at, slot))
        for value in item.outer.values():
            found[value].append((at, MISSING))
    return found


def _body_keys(scope: NumberedGraph) -> dict[int, Hashable]:
    """Position -> the bodies of a node, as bytes: names inside count, so that renamed ones are left to later levels."""
    return {
        at: tuple([(name, body.SerializeToString(deterministic=True)) for name, body in item.bodies])
        for at, item in enumerate(scope.items)
        if item.bodies
    }


def longest_common(one: Sequence[Hashable], other: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Positions of a longest common subsequence of two short lists, by dynamic programming."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i in range(len(one) - 1, -1, -1):
        row, below = lengths[i], lengths[i + 1]
        for j in range(len(other) - 1, -1, -1):
            row[j] = below[j + 1] + 1 if one[i] == other[j] else max(below[j], row[j + 1])
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
    return found
