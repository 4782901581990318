"""Work that many tests have in common is done once: a pass on a graph, a session of a graph, a folder in GenAI, and what
these give.

All are functions of files and options alone, and what is kept is found by the content of all of them: the graph, its
data files, the files that an option names. A graph of which one byte is another is passed and opened anew; so is what
raised an error, what a link leads to, and everything in a test that patches (tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from onnx import ModelProto

import passes.base
from passes.base import Outcome, Pass
from passes.registry import BUILT_IN
from surgery.errors import SurgeryError
from surgery.graph.changes import Snapshot
from surgery.graph.external_data import external_field, is_external, tensors
from surgery.graph.model import Model
from surgery.runtime import sessions
from surgery.runtime.genai import GenAI
from surgery.runtime.sessions import OpenGraph, Settings

SESSIONS, STEPS, MODELS = 48, 400, 8
"""How many are kept; a session of a tiny graph takes about 5 MB, the graph behind a pass a quarter of one."""
RESULTS = 128 * 2**20
"""Bytes of what runs gave that are kept."""
LARGEST = 64 * 2**20
"""Bytes of a file of which the content is looked at."""
SETTLED = 2.0
"""Seconds after which a file's times tell that it is as it was: a clock's step is some milliseconds."""

Place = tuple[Any, str]
"""A module or a class, and the name of a function in it."""
_APPLY: Place = (passes.base, "_apply_one")
_RUNTIMES: Sequence[Place] = (
    (sessions, "_open"), (OpenGraph, "_bound_run"), (GenAI, "_opened"), (GenAI, "generate"), (GenAI, "ends_with"),
)  # fmt: skip
_REAL = {(place, name): getattr(place, name) for place, name in (_APPLY, *_RUNTIMES)}
_apply_one, _open, _bound_run, _genai_opened, _generate, _ends_with = _REAL.values()
_steps: OrderedDict[str, tuple[Model, Outcome, Snapshot]] = OrderedDict()
_sessions: OrderedDict[str, Any] = OrderedDict()
_runs: OrderedDict[str, tuple[Sequence[Any], int]] = OrderedDict()
_models: OrderedDict[str, tuple[Any, tempfile.TemporaryDirectory[str]]] = OrderedDict()
_answers: dict[str, Any] = {}
_kept_bytes = [0]
_made: dict[int, str] = {}
"""Number of a kept output of a run -> what it is known by."""
_digests: dict[tuple[int, ...], str] = {}


class _NotKept(Exception):
    """There is something in it that is not known by its content."""


@contextlib.contextmanager
def work_in_common() -> Iterator[None]:
    """Take what is known from an earlier time, and keep what is made."""
    taken = (_applied, _opened, _ran, _loaded, _generated, _ended)
    with _in_place(dict(zip(_REAL, taken, strict=True))):
        yield


@contextlib.contextmanager
def passes_in_common() -> Iterator[None]:
    """The passes alone: where others are forked from the process that keeps them."""
    with _in_place({**_REAL, _APPLY: _applied}):
        yield


@contextlib.contextmanager
def work_anew() -> Iterator[None]:
    """Do everything again, as the program does."""
    with _in_place(_REAL):
        yield


@contextlib.contextmanager
def _in_place(functions: Mapping[Place, Any]) -> Iterator[None]:
    before = {place: getattr(*place) for place in functions}
    try:
        for (where, name), function in functions.items():
            setattr(where, name, function)
        yield
    finally:
        for (where, name), function in before.items():
            setattr(where, name, function)


def _applied(model: Model, step: Pass, before: Snapshot) -> tuple[Outcome, Snapshot]:
    """In place of passes.base._apply_one."""
    try:
        key = _key(type(step), _options(step), _of_model(model), model.path, model.architecture, sorted(model.folders))
    except (_NotKept, OSError, SurgeryError):
        return _apply_one(model, step, before)
    if key not in _steps:
        outcome, after = _apply_one(model, step, before)
        _keep(_steps, key, (model.copy(), outcome, after), STEPS)
        return outcome, after
    _steps.move_to_end(key)
    made, outcome, after = _steps[key]
    model.proto.CopyFrom(made.proto)
    model.weight_files, model.converted = dict(made.weight_files), dict(made.converted)
    return outcome, after


def _opened(graph: Path | Model, settings: Settings, exposed: Sequence[str]) -> Any:
    """In place of surgery.runtime.sessions._open."""
    try:
        if settings.provider != "cpu":
            raise _NotKept
        content = _of_model(graph) if isinstance(graph, Model) else _of_file(graph)
        key = _key(isinstance(graph, Model), content, settings, list(exposed))
        if key not in _sessions:
            with tempfile.TemporaryDirectory() as place:
                made = _open(_copied(graph, Path(place)), settings, exposed)
                made.content = key
                _keep(_sessions, key, made, SESSIONS)
    except (_NotKept, OSError, SurgeryError):
        return _open(graph, settings, exposed)
    _sessions.move_to_end(key)
    return _sessions[key]


def _ran(graph: OpenGraph, feeds: Mapping[str, Any]) -> Sequence[Any]:
    """In place of OpenGraph._bound_run."""
    content = getattr(graph._session, "content", None)
    if content is None:
        return _bound_run(graph, feeds)
    key = _key(content, graph._outputs, sorted((name, _of_value(value)) for name, value in feeds.items()))
    if key in _runs:
        _runs.move_to_end(key)
        found, checked = _runs[key]
        assert _checksum(found) == checked, "somebody wrote into what a run gave"
        return found
    found = _bound_run(graph, feeds)
    _runs[key] = found, _checksum(found)
    _made.update({id(value): f"{key} {number}" for number, value in enumerate(found)})
    _kept_bytes[0] += _bytes(found)
    while _kept_bytes[0] > RESULTS:
        gone, _ = _runs.popitem(last=False)[1]
        _kept_bytes[0] -= _bytes(gone)
        for value in gone:
            del _made[id(value)]
    return found


def _bytes(values: Sequence[Any]) -> int:
    return sum(value.tensor_size_in_bytes() for value in values)


def _checksum(values: Sequence[Any]) -> int:
    """Whose memory is that of every array which is made of them."""
    found = 0
    for value in values:
        found = zlib.crc32(np.ascontiguousarray(value.numpy()).data, found)
    return found


def _of_value(value: Any) -> str:
    if known := _made.get(id(value)):
        return known
    array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy())
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.data).hexdigest()}"


def _loaded(genai: GenAI) -> Any:
    """In place of GenAI._opened."""
    vars(genai).pop("content", None)
    try:
        if genai._provider != "cpu":
            raise _NotKept
        content = _of_folder(genai._folder)
        if content not in _models:
            _keep(_models, content, _loaded_copy(genai), MODELS)
    except (_NotKept, OSError, SurgeryError):
        return _genai_opened(genai)
    _models.move_to_end(content)
    vars(genai)["content"] = content
    return _models[content][0]


def _loaded_copy(genai: GenAI) -> tuple[Any, tempfile.TemporaryDirectory[str]]:
    """The model, and the files of its own that it reads its tokenizer from."""
    folder, place = genai._folder, tempfile.TemporaryDirectory()
    try:
        for file in folder.iterdir():
            shutil.copyfile(file, Path(place.name) / file.name)
        genai._folder = Path(place.name)
        return _genai_opened(genai), place
    finally:
        genai._folder = folder


def _of_folder(folder: Path) -> str:
    """All files of a folder that has no folders."""
    return _key([(file.name, _digest(file)) for file in sorted(folder.iterdir())])


def _generated(genai: GenAI, rows: Sequence[Sequence[int]], pad: int, steps: int, **options: Any) -> list[list[int]]:
    """In place of GenAI.generate."""
    asked = (list(map(list, rows)), pad, steps, sorted(options.items()))
    found = _answered(genai, asked, lambda: _generate(genai, rows, pad, steps, **options))
    return [list(row) for row in found]


def _ended(genai: GenAI, first: int, token: int) -> bool:
    """In place of GenAI.ends_with."""
    return bool(_answered(genai, (first, token), lambda: _ends_with(genai, first, token)))


def _answered(genai: GenAI, asked: object, answer: Callable[[], Any]) -> Any:
    content = getattr(genai, "content", None)
    if content is None:
        return answer()
    key = _key(content, asked)
    if key not in _answers:
        _answers[key] = answer()
    return _answers[key]


def _copied(graph: Path | Model, place: Path) -> Path | Model:
    """The same in files of its own: a session maps its data files, and sees what a test does to them later."""
    if isinstance(graph, Path):
        for name in (graph.name, *_LOCATIONS[hashlib.sha256(graph.read_bytes()).hexdigest()]):
            shutil.copyfile(graph.parent / name, place / name)
        return place / graph.name
    if graph.converted or any(len(PurePosixPath(location).parts) != 1 for location in graph.weight_files):
        raise _NotKept
    for location, file in graph.weight_files.items():
        shutil.copyfile(file, place / location)
    copied = graph.copy()
    copied.path, copied.folders = place / graph.path.name, frozenset({place})
    copied.weight_files = {location: place / location for location in graph.weight_files}
    return copied


def _keep(kept: OrderedDict[str, Any], key: str, value: Any, most: int) -> None:
    kept[key] = value
    if len(kept) > most:
        kept.popitem(last=False)


def _key(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(repr, parts)).encode(errors="surrogatepass")).hexdigest()


def _options(step: Pass) -> list[str]:
    """The options of a pass of this project, each by its content."""
    if step.name not in BUILT_IN or not type(step).__module__.startswith("passes."):
        raise _NotKept
    return [_option(getattr(step, field.name)) for field in dataclasses.fields(step)]


def _option(value: object) -> str:
    if isinstance(value, Model):
        return _of_model(value)
    if isinstance(value, Path):
        return f"{value} {_of_file(value) if value.suffix == '.onnx' else _digest(value)}"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    raise _NotKept


def _of_model(model: Model) -> str:
    """A graph in memory, where its weights are, and what they hold."""
    files = [(file, _digest(file)) for file in model.source_files()]
    return _key(model.fingerprint(), files)


def _of_file(path: Path) -> str:
    """A graph's file, and the data files beside it."""
    _digest(path)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest not in _LOCATIONS:
        proto = ModelProto()
        try:
            proto.ParseFromString(data)
        except Exception:
            raise _NotKept from None
        found = {external_field(tensor, "location") or "" for tensor in tensors(proto) if is_external(tensor)}
        _LOCATIONS[digest] = sorted(found)
    if any(len(PurePosixPath(location).parts) != 1 for location in _LOCATIONS[digest]):
        raise _NotKept
    return _key(digest, [(location, _digest(path.parent / location)) for location in _LOCATIONS[digest]])


_LOCATIONS: dict[str, Sequence[str]] = {}
"""Digest of a graph -> the locations of its external data."""


def _digest(file: Path) -> str:
    """Of the content of a regular file; what its times told once is not read again."""
    found = os.lstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
        raise _NotKept
    times = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if times not in _digests:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED:
            return digest
        _digests[times] = digest
    return _digests[times]
