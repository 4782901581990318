"""A recording on disk, to compare another model with later, on another machine or on another provider.

A safetensors file. Its metadata `recording` is JSON:

    {"format": 4, "model": "decoder_model_merged_q4.onnx", "graphs": {"decoder_model_merged_q4.onnx": SHA-256},
     "prompts": SHA-256 of all ids, "tokens": 8, "settings": {"provider": "cpu", ...}, "versions": {"numpy": ...},
     "answers": [{"case": ..., "prefill": 1, "computed_rows": [...], "caches": [...]}]}

and the others are `3/step/0`, the logits [B, V] of the fourth case's first step, and `3/cache/4.key`, the cache of
layer 4's keys after the last step. A reader takes nothing on trust: safetensors checks that the arrays are what the
file holds, and what the header says is held against them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from surgery.attention.kv_wiring import Slot, slot_of_name
from surgery.errors import RequestError
from surgery.files.atomic import staged_files
from surgery.files.safe_reading import sha256
from surgery.runtime.decoding import Step
from surgery.runtime.installing import needs
from surgery.runtime.sessions import Array
from surgery.verify.prompts import Case
from surgery.verify.recording import Answer, Recording, StoredCache

FORMAT = 4
_DTYPES = ("F16", "F32", "F64")
_FAULTS = (OSError, ValueError, KeyError, TypeError, IndexError)


@dataclass(frozen=True, slots=True)
class Golden:
    """What a model answered, and how: its graphs by SHA-256, the session's settings, the runtime's versions.

    `tokens` is the length of the greedy continuations.
    """

    recording: Recording
    model: str
    graphs: Mapping[str, str]
    tokens: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def answers_to(self, cases: Sequence[Case], tokens: int, path: Path) -> Recording:
        """The recorded answers to these prompts. Raises RequestError where one is missing, or of another length."""
        if tokens != self.tokens:
            raise RequestError(
                f"{path} holds continuations of {self.tokens} tokens, {tokens} are asked for",
                hint=f"leave out --tokens, or pass --tokens {self.tokens}",
            )
        recorded = {prompts_digest([answer.case]): answer for answer in self.recording.answers}
        answers = []
        for case in cases:
            if (answer := recorded.get(prompts_digest([case]))) is None:
                raise RequestError(
                    f"{path} holds no answer to the prompt {case.name!r}",
                    hint="leave out --prompts to take those that were recorded, or record it again with these",
                )
            answers.append(answer)
        return Recording(tuple(answers))


def prompts_digest(cases: Sequence[Case]) -> str:
    """SHA-256 of all that a model is fed; names and descriptions may change."""
    fed = [[case.rows, case.chunk, case.pad, case.past, case.window, case.tokens] for case in cases]
    return hashlib.sha256(json.dumps(fed, separators=(",", ":")).encode()).hexdigest()


def graph_digests(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> SHA-256 of each graph."""
    return {path.name: sha256(path) for path in paths}


def save_golden(golden: Golden, path: Path) -> None:
    """Write a new file; it appears whole or not at all. Raises RequestError where it exists, FolderError as writing
    fails."""
    with needs("safetensors"):
        from safetensors.numpy import save_file
    refuse_existing_recording(path)
    arrays: dict[str, Array] = {}
    for index, answer in enumerate(golden.recording.answers):
        for number, step in enumerate(answer.steps):
            arrays[f"{index}/step/{number}"] = step.logits
        for (layer, kind), cache in answer.caches.items():
            if cache.values is not None:
                arrays[f"{index}/cache/{layer}.{kind}"] = cache.values
    header = {
        "format": FORMAT,
        "model": golden.model,
        "graphs": dict(golden.graphs),
        "prompts": prompts_digest([answer.case for answer in golden.recording.answers]),
        "tokens": golden.tokens,
        "settings": dict(golden.settings),
        "versions": dict(golden.versions),
        "answers": [_description(answer) for answer in golden.recording.answers],
    }
    with staged_files(path) as folder:
        save_file(arrays, folder / path.name, metadata={"recording": json.dumps(header)})


def refuse_existing_recording(path: Path) -> None:
    """Raise RequestError where a golden file cannot be written: before models run for minutes, not after."""
    if path.exists():
        raise RequestError(f"{path} exists; a recording does not replace a file", hint="choose another name")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"the folder {path.parent} does not exist")


def load_golden(path: Path) -> Golden:
    """Read what `save_golden` wrote. Raises RequestError, one sentence, for anything else."""
    if not path.is_file():
        raise RequestError(f"{path} is no file; a golden recording is expected")
    with needs("safetensors"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="numpy") as file:
            return _golden(_Arrays(file), path)
    except RecursionError:
        _refuse(path, "its header is nested too deeply")
    except (SafetensorError, *_FAULTS) as error:
        _refuse(path, str(error) or type(error).__name__)


def _refuse(path: Path, why: str) -> NoReturn:
    raise RequestError(f"{path} is not a golden recording: {why}") from None


class _Arrays:
    """The arrays of a file, read one at a time."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = set(file.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def header(self) -> Any:
        return json.loads((self._file.metadata() or {}).get("recording", "null"))

    def read(self, name: str) -> Array:
        if (dtype := self._file.get_slice(name).get_dtype()) not in _DTYPES:
            raise ValueError(f"{name} is of type {dtype}")
        found: Array = self._file.get_tensor(name)
        return found


def _golden(arrays: _Arrays, path: Path) -> Golden:
    header = arrays.header()
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    if header.get("format") != FORMAT:
        raise RequestError(f"{path} is a recording of format {header.get('format')!r}; {FORMAT} is known")
    recording = Recording(tuple(_answer(arrays, i, each) for i, each in enumerate(header["answers"])))
    if not recording.answers:
        raise ValueError("it holds no answer")
    if header["prompts"] != prompts_digest([answer.case for answer in recording.answers]):
        raise ValueError("its prompts are not those that its header was made for")
    tokens = _whole(header["tokens"])
    if any(len(answer.steps) - answer.prefill != answer.case.steps(tokens - 1) for answer in recording.answers):
        raise ValueError(f"an answer has not {tokens} tokens")
    return Golden(
        recording, str(header["model"]), _texts(header["graphs"]), tokens, dict(header["settings"]),
        _texts(header["versions"]),
    )  # fmt: skip


def _description(answer: Answer) -> dict[str, Any]:
    caches = [
        {"slot": f"{layer}.{kind}", "shape": cache.shape, "dtype": cache.dtype, "digest": cache.digest}
        for (layer, kind), cache in answer.caches.items()
    ]
    rows = [step.computed_rows for step in answer.steps]
    return {"case": asdict(answer.case), "prefill": answer.prefill, "computed_rows": rows, "caches": caches}


def _answer(arrays: _Arrays, index: int, described: Mapping[str, Any]) -> Answer:
    case = _case(described["case"])
    steps = tuple(
        Step(_logits(arrays, f"{index}/step/{number}", len(case.rows)), _whole(rows))
        for number, rows in enumerate(described["computed_rows"])
    )
    prefill = _whole(described["prefill"])
    if not 1 <= prefill <= len(steps) or len({step.logits.shape for step in steps}) != 1:
        raise ValueError(f"the steps of {case.name!r} do not belong together")
    caches = dict(_cache(arrays, index, each) for each in described["caches"])
    return Answer(case, prefill, steps, caches)


def _case(fields: Mapping[str, Any]) -> Case:
    rows = tuple(tuple(_whole(token) for token in row) for row in fields["rows"])
    if not rows or not all(rows):
        raise ValueError("a case has no tokens")
    chunk = None if fields["chunk"] is None else max(1, _whole(fields["chunk"]))
    past, (pad, window, tokens) = fields["past"], (_whole(fields[name]) for name in ("pad", "window", "tokens"))
    if len(past) not in (0, len(rows)) or not all(map(_whole, past)):
        raise ValueError(f"a case has {len(rows)} rows and a past of {past!r}")
    name, covers, heavy = str(fields["name"]), str(fields["covers"]), bool(fields["heavy"])
    return Case(name, covers, rows, chunk, pad, heavy, tuple(past), window, tokens)


def _logits(arrays: _Arrays, name: str, rows: int) -> Array:
    found = arrays.read(name)
    if found.ndim != 2 or len(found) != rows or not found.shape[1] or found.dtype.kind != "f":
        raise ValueError(f"{name} is {found.dtype.name} {list(found.shape)}; {rows} rows of logits are expected")
    return found


def _cache(arrays: _Arrays, index: int, described: Mapping[str, Any]) -> tuple[Slot, StoredCache]:
    found = slot_of_name(described["slot"])
    if found is None:
        raise ValueError(f"{described['slot']!r} names no cache")
    shape = tuple(_whole(size) for size in described["shape"])
    dtype = np.dtype(str(described["dtype"]))
    name = f"{index}/cache/{described['slot']}"
    values = arrays.read(name) if name in arrays else None
    if values is not None and (values.shape, values.dtype) != (shape, dtype):
        raise ValueError(f"{name} is not what the header says")
    return found, StoredCache(shape, dtype.str, str(described["digest"]), values)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is found where a whole number is expected")
    return value


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is found where an object is expected")
    return {str(key): str(each) for key, each in value.items()}
