"""The order of the rooms: a module imports only from its own room and from those below it, for type checkers too."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

import surgery

ORDER = (
    "surgery.version", "surgery.choices", "surgery.errors", "surgery.printing", "surgery.files", "surgery.architecture",
    "surgery.graph", "surgery.source", "surgery.attention", "surgery.cuda", "passes", "surgery.folder",
    "surgery.runtime", "surgery.verify", "surgery.compare", "surgery.jobs", "surgery", "surgery.commands", "surgery.__main__",
)  # fmt: skip
"""From the ground up. `surgery` itself is the front door."""

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([*(ROOT / "surgery").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
}


def room(module: str) -> str:
    return "passes" if module.startswith("passes") else ".".join(module.split(".")[:2])


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from sorted(names & FILES.keys())
            if names - FILES.keys():
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    level = ORDER.index(room(module))
    upward = [name for name in imported(FILES[module]) if ORDER.index(room(name)) > level]
    assert not upward, f"{module} imports {', '.join(upward)}, which stands above it"


def test_no_two_modules_share_a_name() -> None:
    names = [path.stem for path in FILES.values() if path.stem != "__init__"]
    assert sorted(names) == sorted(set(names))


def test_no_public_name_means_two_things() -> None:
    """But that a command is named as the function of the front door that it calls."""
    meanings = defaultdict(list)
    for module, path in FILES.items():
        for item in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(item, ast.ClassDef | ast.FunctionDef) and not item.name.startswith("_"):
                meanings[item.name] += [] if room(module) == "surgery.commands" else [module]
    assert {name: modules for name, modules in meanings.items() if len(modules) > 1} == {}


def public(module: str) -> Iterator[tuple[str, object]]:
    """The functions and classes of a module, and the methods and properties of its classes, that are no one's own."""
    for name, thing in vars(importlib.import_module(module)).items():
        if not name.startswith("_") and getattr(thing, "__module__", None) == module:
            yield name, thing
            for inner in vars(thing) if inspect.isclass(thing) else ():
                member = getattr(thing, inner)
                if not inner.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                    yield f"{name}.{inner}", member


def test_what_is_public_is_described() -> None:
    """By a docstring of its own, or by that of the method which it fills in: a pass's `run` is told by Pass."""
    named = [(module, *found) for module in sorted(FILES.keys() - {"surgery.__main__"}) for found in public(module)]
    assert len(named) > 1000
    made = {name for _, name, thing in named if (inspect.getdoc(thing) or "").startswith(f"{name}(")}  # dataclass's own
    without = [(module, name) for module, name, thing in named if not inspect.getdoc(thing) or name in made]
    assert without == []


def test_no_module_hides_a_name_of_the_front_door() -> None:
    """`import surgery.diff` would replace the function `surgery.diff` by a module of that name."""
    below = {name.removeprefix("surgery.") for name in FILES if name.count(".") == 1}
    assert not below & set(surgery.__all__)
    assert sorted(surgery.__all__) == dir(surgery)
    assert all(getattr(surgery, name) is not None for name in surgery.__all__)
