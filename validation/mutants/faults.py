"""Faults as data: a text of a module, what stands there instead, and the tests that should tell.

faults/MODULE.toml has the faults of one module:

    file = "passes/rename_io.py"                   # the module
    tests = ["tests/passes/test_rename_io.py"]     # what pytest runs, the likeliest to tell first
    proofs = ["repack[fast]"]                      # those of closing_proofs.py that the module has a part in

    [[fault]]
    what = "the present takes the name of the past"
    old = "the text, which the module has once"
    new = "what stands there instead"
    survives = "why nothing can tell"              # only where nothing can
    tests = ["tests/..."]                          # only where others should tell
"""

from __future__ import annotations

import ast
import hashlib
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FAULTS = Path(__file__).parent / "faults"
PROOFS = "validation/mutants/closing_proofs.py"


@dataclass(frozen=True, slots=True)
class Fault:
    """`old` in `file` becomes `new`; `tests` should tell, unless `survives` says why they cannot.

    `proofs` are those of jobs that the module has a part in: whether they tell it as well is counted beside.
    """

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""
    proofs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.file}: {self.what}"

    def applied(self, text: str) -> str:
        """The module with the fault. Raises ValueError where the fault is stale."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"its text is found {count} times, and once is expected")
        changed = text.replace(self.old, self.new)
        compile(changed, self.file, "exec")
        return changed

    def stale(self, root: Path) -> str:
        """Why the fault is none of this code; empty where it is one."""
        try:
            self.applied((root / self.file).read_text(encoding="utf-8"))
        except (ValueError, SyntaxError, OSError) as error:
            return f"{self.name}: {error}"
        missing = [name for name in (*self.tests, *self.proofs) if not (root / name.partition("::")[0]).is_file()]
        return f"{self.name}: {missing[0]} is not there" if missing else ""

    def digest(self, root: Path, tests: Iterable[str]) -> str:
        """Of the fault, the module and tests: what these say of the fault holds as long as they compute the same."""
        parts = [self.old, self.new, _code(root / self.file)]
        for name in tests:
            file, _, test = name.partition("::")
            parts += [name, _code(root / file, test.partition("[")[0])]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _code(path: Path, test: str = "") -> str:
    """What a module computes: its text without comments, docstrings and the breaks of its lines; of tests only `test`,
    where one is given, and what it rests on."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if test:
        tree.body = _rests_on(tree.body, test)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [entry for entry in body if not _is_text(entry)]
    return ast.dump(tree)


def _rests_on(body: Sequence[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements that give a name, or what these mention, fixtures too; those that give none are for all."""
    gives = {entry: _given(entry) for entry in body}
    found = {entry for entry in body if not gives[entry] or "autouse" in ast.dump(entry)}
    mentioned = {name}.union(*map(_mentioned, found))
    while new := {entry for entry in body if entry not in found and gives[entry] & mentioned}:
        found |= new
        mentioned.update(*map(_mentioned, new))
    return [entry for entry in body if entry in found]


def _given(entry: ast.stmt) -> set[str]:
    if isinstance(entry, ast.FunctionDef | ast.ClassDef):
        return {entry.name}
    if isinstance(entry, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in entry.names}
    return {node.id for node in ast.walk(entry) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _mentioned(entry: ast.stmt) -> set[str]:
    """Names, parameters and texts: a fixture may be asked for as any of these."""
    names = {node.id for node in ast.walk(entry) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(entry) if isinstance(node, ast.arg)}
    return names | {
        node.value for node in ast.walk(entry) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def _is_text(entry: ast.stmt) -> bool:
    return isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant) and isinstance(entry.value.value, str)


def all_faults(folder: Path = FAULTS) -> Sequence[Fault]:
    """Those of every module, in order."""
    return [fault for path in sorted(folder.glob("*.toml")) for fault in _of_module(path)]


def _of_module(path: Path) -> Iterator[Fault]:
    with path.open("rb") as file:
        content = tomllib.load(file)
    for entry in content["fault"]:
        yield Fault(
            content["file"],
            entry["what"],
            entry["old"],
            entry["new"],
            tuple(entry.get("tests", content["tests"])),
            entry.get("survives", ""),
            tuple(f"{PROOFS}::test_{name}" for name in content.get("proofs", ())),
        )
