"""Weights are compared without being loaded: what is concluded from what, and what is said where nothing is known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adversarial
import numpy as np
import pytest
from command_line import run
from folders import repack
from huggingface_hub import constants
from onnx import ModelProto, TensorProto, save
from onnx.helper import make_graph, make_model, make_node, make_tensor_value_info
from onnx.numpy_helper import from_array
from places import TINY
from torture import TRAPS

from surgery.compare import Subject, compare, open_subject, tensor_contents
from surgery.compare.comparison import Weights
from surgery.compare.subjects import SubjectGraph
from surgery.compare.tensor_contents import WeightsBy
from surgery.errors import SurgeryError, WeightError
from surgery.files.digests import FileDigests, read_digests
from surgery.graph.model import Model

DATA = "decoder_model_merged_q4.onnx_data"
PLACED = "model.onnx_data"
"""What the folder calls it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(TINY, tmp_path_factory.mktemp("weights") / "out").folder


def compared(before: Path, after: Path, by: WeightsBy) -> Weights:
    return compare(open_subject(before, "q4"), open_subject(after, "q4"), weights_by=by).weights


def test_where_the_manifest_is_our_own_no_data_file_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    really = Path.open

    def watched(path: Path, *words: Any, **options: Any) -> Any:
        opened.append(path.name)
        return really(path, *words, **options)

    sides = open_subject(TINY, "q4"), open_subject(folder)
    monkeypatch.setattr(Path, "open", watched)
    found = compare(*sides, weights_by="reference", manifests="own").weights
    assert (found.unchanged, found.uncompared, found.method) == (345, 0, "reference")
    assert not [name for name in opened if name.endswith("_data")]
    assert found.basis == ("4 data files known by the SHA-256 in manifest.json",)


def test_what_a_folder_claims_of_its_data_is_no_equality(folder: Path) -> None:
    found = compare(open_subject(TINY, "q4"), open_subject(folder), weights_by="reference")
    assert found.weights.uncompared == 93 and "weights" in found.differing and found.numbers is None
    assert found.weights.why[0] == (
        "the digest of model.onnx_data_1 is claimed by the folder, not checked; --weights digest reads it"
    )
    assert found.weights.basis == ("4 data files claimed by the folder's manifest.json, not checked",)
    assert [file.same for file in found.weights.files if file.kind == "data"] == [None, None]


def test_every_byte_of_large_weights_flipped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest says what it said before, and the data is too large to be read unasked."""
    flipped = shutil.copytree(folder, tmp_path / "out")
    for data in flipped.glob("*_data*"):
        data.write_bytes(bytes(byte ^ 255 for byte in data.read_bytes()))
    monkeypatch.setattr(tensor_contents, "QUICK_BYTES", 1000)
    by_name = compare(open_subject(folder), open_subject(flipped))
    assert by_name.weights.method == "reference" and by_name.weights.uncompared == 93 and by_name.fails(["weights"])
    read = compare(open_subject(folder), open_subject(flipped), weights_by="digest")
    assert sum(change.verb == "changed" for change in read.weights.changes) == 93


def test_each_byte_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tensors and for the files as wholes, which numbers are bound to."""
    read: list[Path] = []
    really = tensor_contents.read_digests

    def counted(file: Path, *words: Any) -> FileDigests:
        read.append(file)
        return really(file, *words)

    monkeypatch.setattr(tensor_contents, "read_digests", counted)
    monkeypatch.setattr(tensor_contents, "sha256", None)
    monkeypatch.setattr(tensor_contents, "QUICK_BYTES", 0)
    found = compare(open_subject(TINY, "q4"), open_subject(folder), weights_by="digest")
    assert sorted(file.name for file in read) == [
        "decoder_model_merged_q4.onnx_data", "embed_tokens_q4.onnx_data", "model.onnx_data", "model.onnx_data_1"
    ]  # fmt: skip
    for name, digest in found.after.data.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_parts_of_a_file_have_digests_of_their_own(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3 * 2**20 + 5)
    (tmp_path / "a").write_bytes(data)
    parts = [
        (0, len(data)),
        (0, 10),
        (5, 10),
        (2**20 - 1, 2),
        (2**20, 2**20),
        (7, 2 * 2**20),
        (len(data) - 3, 3),
        (9, 0),
    ]
    found = read_digests(tmp_path / "a", [*parts, (len(data) - 3, 4)], 10)
    assert found.whole == hashlib.sha256(data).hexdigest() and set(found.parts) == set(parts)
    for (offset, length), digest in found.parts.items():
        part = data[offset : offset + length]
        assert digest == (part if length <= 10 else hashlib.sha256(part).hexdigest())


def test_a_diff_reads_no_extents_that_overlap(tmp_path: Path) -> None:
    path = adversarial.write(tmp_path, "overlapping weights", 50)
    with pytest.raises(WeightError, match="overlaps others"):
        compare(open_subject(path), open_subject(path), weights_by="digest")


def test_numbers_are_the_authors_and_of_these_very_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("repack", str(TINY), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    sides = open_subject(TINY, "q4"), open_subject(tmp_path / "out")
    found = compare(*sides)
    assert "numbers identical by the author's record" in found.verdict and found.numbers and found.numbers.recorded
    assert found.numbers.source.startswith("recorded by the folder's author: repack's closing proof")
    data = tmp_path / "out" / PLACED
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    other = compare(open_subject(TINY, "q4"), open_subject(tmp_path / "out"))
    assert other.numbers is None and other.passes == found.passes, "the passes made the graph, which is the same"
    monkeypatch.setattr(tensor_contents, "QUICK_BYTES", 1000)
    assert compare(open_subject(TINY, "q4"), open_subject(tmp_path / "out")).numbers is None


def test_a_side_file_that_the_manifest_leaves_out_is_compared(folder: Path, tmp_path: Path) -> None:
    quiet = shutil.copytree(folder, tmp_path / "out")
    manifest = json.loads((quiet / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (quiet / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(quiet, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    assert compare(open_subject(quiet), open_subject(tmp_path / "other")).differing == ("files",)


def test_without_a_digest_weights_are_not_compared_and_that_is_no_equality(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    found = compare(open_subject(TINY, "q4"), open_subject(tmp_path / "out"), weights_by="reference")
    assert found.weights.uncompared == 93 and not any(c.verb == "changed" for c in found.weights.changes)
    assert found.weights.why[0] == ("no digest of model.onnx_data_1 is known on both sides; --weights digest reads it")
    assert "93 not compared" in found.verdict and "weights" in found.differing


@pytest.mark.parametrize("by", ["auto", "digest"])
def test_read_in_portions_one_other_byte_is_one_changed_tensor(folder: Path, tmp_path: Path, by: WeightsBy) -> None:
    shutil.copytree(folder, tmp_path / "out")
    with (tmp_path / "out" / PLACED).open("r+b") as file:
        file.seek(20_000)
        byte = file.read(1)
        file.seek(20_000)
        file.write(bytes([byte[0] ^ 1]))
    (changed,) = [change for change in compared(folder, tmp_path / "out", by).changes if change.verb == "changed"]
    assert changed.before and changed.before.offset is not None
    assert changed.before.offset <= 20_000 < changed.before.offset + changed.before.size


def test_weights_in_another_place_are_the_same(folder: Path, tmp_path: Path) -> None:
    together = compared(folder, repack(TINY, tmp_path / "out", weights="consolidate").folder, "digest")
    assert (together.changes, together.uncompared, together.relocated) == ((), 0, 93)


def test_one_file_under_two_names_needs_no_digest(tmp_path: Path) -> None:
    source = shutil.copytree(TINY, tmp_path / "source")  # onnx loads no data file that has a second hard link
    linked = compared(source, repack(source, tmp_path / "out", weights="link").folder, "reference")
    assert linked.uncompared == 0
    assert linked.basis == ("4 data files shared: one file, which both sides refer to",)


def test_what_the_users_cache_names_by_its_digest_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that a folder calls a cache."""
    for name, content in (("one", "0" * 64), ("other", "0" * 64), ("third", "1" * 64)):
        snapshot = tmp_path / name / "models--a--b" / "snapshots" / "c" / "onnx"
        blobs = snapshot.parents[2] / "blobs"
        blobs.mkdir(parents=True)
        shutil.copytree(TINY / "onnx", snapshot, ignore=shutil.ignore_patterns("*_data"))
        shutil.copy(TINY / "config.json", snapshot.parent)
        for graph in ("embed_tokens_q4.onnx_data", DATA):
            shutil.copy(TINY / "onnx" / graph, blobs / content)
            (snapshot / graph).symlink_to(blobs / content)
    roots = {name: tmp_path / name / "models--a--b" / "snapshots" / "c" for name in ("one", "other", "third")}
    assert compared(roots["one"], roots["other"], "reference").uncompared == 93
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert compared(roots["one"], roots["other"], "reference").uncompared == 0
    assert compared(roots["one"], roots["third"], "reference").uncompared > 0


# ---- nothing goes unseen


def side(proto: ModelProto) -> Subject:
    path = Path("/nowhere/model.onnx")
    files = {entry.value: path.with_name(entry.value) for entry in _locations(proto)}
    return Subject("a", "file", (SubjectGraph("model", "model.onnx", Model(proto, path, files)),), path.parent)


def sums(**tensors: np.ndarray) -> ModelProto:
    """A chain of Adds, each with a tensor of its own."""
    names = ["x", *(f"y_{name}" for name in tensors)]
    nodes = [
        make_node("Add", [before, name], [f"y_{name}"], name) for before, name in zip(names, tensors, strict=False)
    ]
    values = [make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (names[0], names[-1])]
    weights = [from_array(array, name) for name, array in tensors.items()]
    return make_model(make_graph(nodes, "g", values[:1], values[1:], weights), ir_version=10)


ONE, TWO = np.zeros(4, np.float32), np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ({"a": ONE}, {"a": ONE}, []),
        ({"a": ONE}, {"a": TWO}, [("changed", "a", "a")]),
        ({"a": ONE}, {"a": ONE.reshape(2, 2)}, [("changed", "a", "a")]),
        ({"a": ONE}, {"a": ONE.view(np.int32)}, [("changed", "a", "a")]),
        ({"a": ONE}, {"b": ONE}, [("renamed", "a", "b")]),
        ({"a": ONE}, {"a": ONE, "b": TWO}, [("added", None, "b")]),
        ({"a": ONE, "b": TWO}, {"a": ONE}, [("removed", "b", None)]),
    ],
)
def test_each_change_of_a_tensor_alone(
    before: Any, after: Any, changes: list[tuple[str, str | None, str | None]]
) -> None:
    found = compare(side(sums(**before)), side(sums(**after))).weights.changes
    assert [(c.verb, c.before and c.before.name, c.after and c.after.name) for c in found] == changes


def test_a_data_file_of_one_side_alone_is_another_one(tmp_path: Path) -> None:
    """The tensor is the same, in a file of its own on one side."""
    proto = sums(a=ONE)
    (tmp_path / "one.onnx").write_bytes(proto.SerializeToString())
    save(proto, tmp_path / "two.onnx", save_as_external_data=True, location="w", size_threshold=0)
    found = compare(open_subject(tmp_path / "one.onnx"), open_subject(tmp_path / "two.onnx")).weights
    assert [(file.name, file.before, file.same) for file in found.files] == [
        ("w", None, False)
    ] and found.unchanged == 1


def _locations(message: Any) -> Iterator[Any]:
    for field, value in message.ListFields():
        for each in value if hasattr(value, "extend") else [value]:
            if field.name == "external_data" and each.key == "location":
                yield each
            elif hasattr(each, "ListFields"):
                yield from _locations(each)


SMALL_TRAPS = [name for name, build in TRAPS.items() if len(build().graph.node) < 100]


@pytest.mark.parametrize("name", SMALL_TRAPS)
def test_every_odd_model_is_the_same_as_itself_and_no_field_of_it_goes_unseen(name: str) -> None:
    proto = TRAPS[name]()
    assert compare(side(proto), side(proto)).same
    rng = random.Random(name)
    drops = list(_drops(proto, ()))
    for path in rng.sample(drops, min(5, len(drops))):
        twin = ModelProto()
        twin.CopyFrom(proto)
        *inner, last = path
        target: Any = twin
        for step in inner:
            target = target[step] if isinstance(step, int) else getattr(target, step)
        target.ClearField(last)
        with contextlib.suppress(SurgeryError):  # the field was what made it readable
            assert not compare(side(proto), side(twin)).same, path


def _drops(message: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Every field that is there, but for those that say where a tensor's content is."""
    for field, value in message.ListFields():
        if field.name in ("external_data", "segment"):
            continue
        yield (*path, field.name)
        if hasattr(value, "extend"):
            for index, each in enumerate(value):
                if hasattr(each, "ListFields"):
                    yield from _drops(each, (*path, field.name, index))
        elif hasattr(value, "ListFields"):
            yield from _drops(value, (*path, field.name))


def test_another_tokenizer_is_a_difference_of_folders(folder: Path, tmp_path: Path) -> None:
    assert compare(open_subject(folder), open_subject(folder)).same
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (tmp_path / "out" / "chat_template.jinja").unlink()
    found = compare(open_subject(folder), open_subject(tmp_path / "out"))
    assert found.differing == ("files",) and "files: 2 differ" in found.verdict
    assert [(file.name, file.after, file.same) for file in found.weights.files if file.kind == "side"] == [
        ("chat_template.jinja", None, False),
        ("tokenizer.json", 2, False),
    ]
