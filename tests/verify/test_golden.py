"""Golden recordings: two models are compared without being in memory together, and no file is taken on trust."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import repack

from passes.presets import compatible
from surgery.errors import RequestError
from surgery.runtime.sessions import MergedModel, Settings
from surgery.runtime.two_graphs import TwoGraphModel
from surgery.source.export import Export
from surgery.verify import Request, prove_folder
from surgery.verify.agreement import agreement_of
from surgery.verify.golden import Golden, load_golden, save_golden
from surgery.verify.prompts import Case
from surgery.verify.recording import Recording, record

SHORT = Case("short", "a short prompt", ((2, 10, 77, 31),))
RAGGED = Case("ragged", "a padded batch", ((2, 10, 77), (2, 9, 33, 61, 17, 40)))
CASES = [SHORT, RAGGED]
OWNERS = {**{layer: layer for layer in range(5)}, 5: 3, 6: 3, 7: 3, 8: 3, 9: 4}


@pytest.fixture(scope="module")
def folder(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(export, tmp_path_factory.mktemp("folder") / "out", "fp16").folder


@pytest.fixture(scope="module")
def recorded(export: Export) -> Recording:
    return record(TwoGraphModel.open(export.pair("fp16"), Settings()), CASES, steps=2)


@pytest.fixture
def stored(recorded: Recording, tmp_path: Path) -> Path:
    path = tmp_path / "golden.safetensors"
    golden = Golden(recorded, "tiny", {"tiny.onnx": "0" * 64}, 3, Settings().to_dict(), {"numpy": np.__version__})
    save_golden(golden, path)
    return path


def test_a_recording_survives_its_file(recorded: Recording, stored: Path, folder: Path) -> None:
    golden = load_golden(stored)
    assert [answer.case for answer in golden.recording.answers] == CASES
    assert (golden.model, golden.tokens, golden.settings["provider"]) == ("tiny", 3, "cpu")
    found = agreement_of(recorded, golden.recording, OWNERS)
    assert found.smallest_tolerance == found.regrouped_max_abs == 0 and found.dtype == "float16"
    merged = record(MergedModel(folder / "model.onnx", Settings()), CASES, steps=2, follow=golden.recording)
    assert agreement_of(golden.recording, merged, OWNERS).max_abs == 0
    assert [path.name for path in stored.parent.iterdir()] == ["golden.safetensors"]


def test_a_source_is_recorded_and_compared_with_later(folder: Path, export: Export, tmp_path: Path) -> None:
    path = tmp_path / "source.safetensors"
    kept = Request(cases=CASES, tokens=3, save_golden=path)
    assert prove_folder(folder, export.pair("fp16"), request=kept).passed
    report = prove_folder(folder, None, request=Request(cases=CASES, tokens=3, golden=path))
    assert report.passed, report.failed
    assert report.parity and report.parity.exact == 3 and report.parity.max_abs == 0
    assert set(load_golden(path).graphs) == {"embed_tokens_fp16.onnx", "decoder_model_merged_fp16.onnx"}


def test_without_a_source_the_folder_itself_is_recorded(folder: Path, export: Export, tmp_path: Path) -> None:
    path = tmp_path / "folder.safetensors"
    report = prove_folder(folder, None, request=Request(cases=CASES, tokens=3, save_golden=path))
    assert report.passed and report.parity is None and path.is_file()
    unique = repack(export, tmp_path / "out", "fp16", lambda embed: compatible(embed, "unique")).folder
    report = prove_folder(unique, None, request=Request(cases=CASES, tokens=3, golden=path))
    assert report.passed, report.failed


def test_another_model_fails(stored: Path, export: Export, tmp_path: Path) -> None:
    other = repack(export, tmp_path / "out", "q4f16").folder
    report = prove_folder(other, None, request=Request(cases=CASES, tokens=3, golden=stored))
    assert {"logits", "KV source layers' caches"} <= {gate.name for gate in report.failed}


def test_a_recording_of_another_provider_is_held_to_wider_thresholds(
    recorded: Recording, folder: Path, tmp_path: Path
) -> None:
    settings = {**Settings().to_dict(), "provider": "cuda"}
    save_golden(Golden(recorded, "tiny", {}, 3, settings, {}), tmp_path / "cuda.safetensors")
    report = prove_folder(folder, None, request=Request(cases=CASES, tokens=3, golden=tmp_path / "cuda.safetensors"))
    thresholds = report.settings["thresholds"]
    assert report.passed and thresholds["logits"] > 0 and thresholds["exact"] < 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(cases=CASES, tokens=4), "holds continuations of 3 tokens, 4 are asked for"),
        (Request(cases=[replace(SHORT, rows=((2, 10),)), RAGGED], tokens=3), "holds no answer to the prompt 'short'"),
        (Request(cases=[replace(SHORT, chunk=2), RAGGED], tokens=3), "holds no answer to the prompt 'short'"),
    ],
)
def test_other_prompts_are_refused(request_: Request, message: str, stored: Path, folder: Path) -> None:
    with pytest.raises(RequestError, match=message):
        prove_folder(folder, None, request=replace(request_, golden=stored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save_golden": "golden.safetensors"}, "golden.safetensors exists; a recording does not replace a file"),
        ({"save_golden": "absent/golden.safetensors"}, "the folder .*absent does not exist"),
        ({"golden": "absent.safetensors"}, "absent.safetensors is no file"),
        ({"golden": "golden.safetensors", "save_golden": "new.safetensors"}, "read or written, not both"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_runs(
    change: dict[str, str], message: str, stored: Path, folder: Path
) -> None:
    paths: dict[str, Any] = {key: stored.parent / name for key, name in change.items()}
    with pytest.raises(RequestError, match=message):
        prove_folder(folder, None, request=Request(**paths))


def test_golden_and_source_together_are_refused(stored: Path, folder: Path, export: Export) -> None:
    with pytest.raises(RequestError, match="compared with one of them"):
        prove_folder(folder, export.pair("fp16"), request=Request(golden=stored))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"{}", bytes(8), struct.pack("<Q", 2**62), struct.pack("<Q", 2) + b"[]"]
)
def test_what_is_no_recording_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="is not a golden recording: ") as found:
        load_golden(path)
    assert "\n" not in str(found.value)
    with pytest.raises(RequestError, match="is no file"):
        load_golden(tmp_path)


Header = dict[str, Any]
"""Name of an array -> its dtype, shape and place in the data; `__metadata__` -> texts."""


def rewritten(path: Path, change: Callable[[Header], object]) -> None:
    """The same data behind another header: its length in 8 bytes, then JSON."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])


def with_recording(change: Callable[[dict[str, Any]], object]) -> Callable[[Header], None]:
    def apply(header: Header) -> None:
        recording = json.loads(header["__metadata__"]["recording"])
        change(recording)
        header["__metadata__"]["recording"] = json.dumps(recording)

    return apply


def claiming(**claims: Any) -> Callable[[Header], None]:
    """The first step's logits claim to be something else."""
    return lambda header: header["0/step/0"].update(claims)


def recorded_as(text: str) -> Callable[[Header], None]:
    return lambda header: header["__metadata__"].update(recording=text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (claiming(shape=[1, 10**15]), "[Mm]ismatch|[Ii]nvalid|overflow"),
        (claiming(shape=[-2, -2]), "[Ii]nvalid"),
        (claiming(dtype="O"), "[Ii]nvalid|unknown"),
        (claiming(dtype="I16"), "0/step/0 is of type I16"),
        (lambda header: header["0/step/0"]["shape"].insert(0, 1), "1 rows of logits are expected"),
        (lambda header: header.update({"1/step/9": header.pop("1/step/2")}), "1/step/2"),
        (recorded_as("[" * 200_000), "nested too deeply|JSON|recursion"),
        (recorded_as("[]"), "its header is no object"),
        (recorded_as("x"), "not a golden recording"),
        (lambda header: header.pop("__metadata__"), "its header is no object"),
        (with_recording(lambda header: header.update(format=1)), "is a recording of format 1; 4 is known"),
        (with_recording(lambda header: header.update(answers=[])), "it holds no answer"),
        (with_recording(lambda header: header.update(answers=5)), "not a golden recording"),
        (with_recording(lambda header: header.update(tokens=2)), "has not 2 tokens"),
        (with_recording(lambda header: header.update(tokens="3")), "'3' is found where a whole number"),
        (with_recording(lambda header: header.update(prompts="0")), "its prompts are not those"),
        (with_recording(lambda header: header.update(versions=[])), "an object is expected"),
        (with_recording(lambda header: header["answers"][0]["case"].update(rows=[[]])), "a case has no tokens"),
        (with_recording(lambda header: header["answers"][0]["case"].update(rows=[[-1]])), "-1 is found"),
        (with_recording(lambda header: header["answers"][0].update(prefill=9)), "do not belong together"),
        (with_recording(lambda header: header["answers"][0]["caches"][0].update(slot="x")), "names no cache"),
        (
            with_recording(lambda header: header["answers"][0]["caches"][0].update(shape=[1])),
            "not what the header says",
        ),
    ],
)
def test_a_hostile_file_is_refused_in_one_sentence(
    change: Callable[[Header], object], message: str, stored: Path
) -> None:
    rewritten(stored, change)
    with pytest.raises(RequestError, match=message) as found:
        load_golden(stored)
    assert "\n" not in str(found.value) and str(stored) in str(found.value)


def test_a_file_that_is_cut_short_is_refused(stored: Path) -> None:
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(RequestError, match="is not a golden recording"):
        load_golden(stored)
