"""Which passes there are, by name: those of this package, those of other packages, and those registered in a script.

Another package names its passes in its pyproject.toml, and they are known wherever it is installed:

    [project.entry-points."gemma4_surgery.passes"]
    pin-batch = "their_package.pin_batch:PinBatch"
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from passes.base import Pass
from surgery.errors import RecipeError, nearest

GROUP = "gemma4_surgery.passes"
"""The group of entry points in which another package lists its passes."""

BUILT_IN = (
    "merge-embeddings", "fold-logits-to-keep", "rename-io", "move-padding", "expand-shared-kv", "annotate-head-sizes",
    "scatter-features", "mask-media-ids", "flatten-per-layer-inputs", "fit-encoder",
    "uniform-heads", "prune-vocabulary", "tie-lm-head", "set-accuracy-level", "lut-products", "int8-prefill", "to-fp16",
    "host-embeddings",
    "fuse-attention", "drop-attention-bias", "slice-caches", "split-per-layer-table", "fuse-per-layer-table",
)  # fmt: skip
"""The passes here; `some-pass` is the class SomePass in passes/some_pass.py. Those of the main recipe come first, in
its order; then those for images and sound, for older runtimes, for other devices and for speed."""

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

_registered: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=Pass)


def register(kind: type[P]) -> type[P]:
    """Make a pass known to recipes in this process: a decorator for a class in a script or a notebook.

    Returns the class. Raises RecipeError for what is no pass, and for a name that another pass has.
    """
    _check(kind, kind.__qualname__)
    known = _registered.get(kind.name)
    if kind.name in BUILT_IN or (known and known.__qualname__ != kind.__qualname__):
        raise RecipeError(f"{kind.__qualname__}: another pass is named {kind.name!r} already")
    _registered[kind.name] = kind
    return kind


def names() -> list[str]:
    """The names of all passes: this package's first, in the order of BUILT_IN. No pass is imported for it."""
    return list(dict.fromkeys([*BUILT_IN, *_registered, *sorted(point.name for point in _points())]))


def pass_class(name: str) -> type[Pass]:
    """The pass of a name, imported when it is asked for. One of this package is never replaced by another package's.

    Raises RecipeError for an unknown name, with the nearest known one, and for a pass that cannot be loaded.
    """
    if name in BUILT_IN:
        module = import_module(f"passes.{name.replace('-', '_')}")
        found: type[Pass] = next(kind for key, kind in vars(module).items() if key.lower() == name.replace("-", ""))
        return found
    if name in _registered:
        return _registered[name]
    points = [point for point in _points() if point.name == name]
    if not points:
        raise RecipeError(f"no pass is named {name!r}{nearest(name, names())}; there are {', '.join(names())}")
    if len(points) > 1:
        raise RecipeError(f"{' and '.join(map(_origin, points))} both have a pass named {name!r}; uninstall one")
    return _loaded(points[0])


def _points() -> set[EntryPoint]:
    return set(entry_points(group=GROUP))  # one that is found twice on sys.path is one


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _loaded(point: EntryPoint) -> type[Pass]:
    what = f"the pass {point.name!r} of {_origin(point)}"
    try:
        found = point.load()
    except Exception as error:  # whatever somebody else's module raises
        raise RecipeError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error
    _check(found, what)
    if found.name != point.name:
        raise RecipeError(f"{what} calls itself {found.name!r}; both names have to be the same")
    kind: type[Pass] = found
    return kind


def _check(kind: object, what: str) -> None:
    """Raise RecipeError unless a class is a whole pass."""
    if not isinstance(kind, type) or not issubclass(kind, Pass):
        raise RecipeError(f"{what} is {kind!r}; a subclass of passes.base.Pass is expected")
    if inspect.isabstract(kind):
        raise RecipeError(f"{what} has no method run(model)")
    name, summary = getattr(kind, "name", None), getattr(kind, "summary", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(f"{what}: name is {name!r}; small letters, digits and hyphens are expected")
    if not isinstance(summary, str) or not summary:
        raise RecipeError(f"{what}: summary is {summary!r}; one line that says what the pass does is expected")
    if "__dataclass_fields__" not in vars(kind):
        given = inspect.get_annotations(kind).items()
        if options := [option for option, hint in given if "ClassVar" not in str(hint)]:
            hint = "put @dataclass(frozen=True) above the class"
            raise RecipeError(f"{what} has the option {options[0]!r}, but is no dataclass", hint=hint)
