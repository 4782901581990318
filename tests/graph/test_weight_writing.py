"""Where weights go: copied, linked or consolidated, with their digests, and the manifest that records them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from folders import repack
from onnx import TensorProto, helper, numpy_helper
from places import TINY

from passes.base import apply
from passes.split_per_layer_table import SplitPerLayerTable
from surgery.choices import WeightMode
from surgery.errors import SurgeryError
from surgery.folder.building import Repacked
from surgery.folder.manifest import blob_digest, faults
from surgery.graph.model import Model
from surgery.graph.weight_writing import ALIGNMENT
from surgery.source.export import open_export


def two_files(folder: Path) -> Model:
    """y = x + a + b + a', with a in one data file, b in another at the same place, and a' sharing a's bytes; b is used
    first, and bytes that nobody refers to follow it."""
    folder.mkdir()
    a, b = np.arange(5, dtype=np.float32), np.arange(5, dtype=np.float32) * 10
    (folder / "a.data").write_bytes(b"head" + a.tobytes())
    (folder / "b.data").write_bytes(b"head" + b.tobytes() + b"tail")
    nodes = [
        helper.make_node("Add", ["x", "b"], ["1"]),
        helper.make_node("Add", ["1", "a"], ["2"]),
        helper.make_node("Add", ["2", "again"], ["y"]),
    ]
    vector = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5]) for name in ("x", "y")]
    tensors = [external("a", "a.data", 4), external("again", "a.data", 4), external("b", "b.data", 4)]
    graph = helper.make_graph(nodes, "sum", vector[:1], vector[1:], tensors)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return Model.open(folder / "model.onnx")


def external(name: str, location: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[5], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", "20")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def sums(path: Path) -> list[float]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [float(value) for value in session.run(None, {"x": np.ones(5, np.float32)})[0]]


@pytest.mark.parametrize("placement", ["copy", "link", "consolidate"])
def test_placed_weights_are_the_weights(placement: WeightMode, tmp_path: Path) -> None:
    model = two_files(tmp_path / "in")
    (tmp_path / "out").mkdir()
    placed = model.save(tmp_path / "out" / "model.onnx", weights=placement)
    assert sums(tmp_path / "out" / "model.onnx") == sums(tmp_path / "in" / "model.onnx") == [1, 13, 25, 37, 49]
    for entry in placed:
        content = (tmp_path / "out" / entry.location).read_bytes()
        assert entry.size == len(content)
        assert entry.sha256 == (None if placement == "link" else hashlib.sha256(content).hexdigest())


def test_what_follows_the_last_weight_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    two_files(tmp_path / "in").save(tmp_path / "out" / "model.onnx", weights="copy")
    found = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*data*")}
    assert sorted(found.values()) == [24, 24], found


@pytest.mark.parametrize("placement", ["copy", "consolidate"])
def test_a_kernel_that_copies_a_part_goes_on_behind_it(
    placement: WeightMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.copy_file_range
    monkeypatch.setattr(
        "os.copy_file_range", lambda source, target, count, at: whole(source, target, min(count, 7), at)
    )
    (tmp_path / "out").mkdir()
    two_files(tmp_path / "in").save(tmp_path / "out" / "model.onnx", weights=placement)
    assert sums(tmp_path / "out" / "model.onnx") == [1, 13, 25, 37, 49]


@pytest.mark.parametrize("placement", ["copy", "consolidate"])
def test_a_source_that_ends_early_is_no_whole_copy(
    placement: WeightMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_files(tmp_path / "in")

    def shortened(*_: int) -> int:
        os.truncate(tmp_path / "in" / "b.data", 10)
        return 0

    monkeypatch.setattr("os.copy_file_range", shortened)
    (tmp_path / "out").mkdir()
    with pytest.raises((OSError, SurgeryError), match="bytes early; it changed while it was being read"):
        model.save(tmp_path / "out" / "model.onnx", weights=placement)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_is_one_to_the_file_that_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, link = two_files(tmp_path / "in"), os.link

    def late(source: str, target: Path, **options: bool) -> None:
        (tmp_path / "other").write_bytes(bytes(24))
        (tmp_path / "other").replace(source)
        link(source, target, **options)

    monkeypatch.setattr("os.link", late)
    (tmp_path / "out").mkdir()
    with pytest.raises((OSError, SurgeryError), match="changed while it was being read"):
        model.save(tmp_path / "out" / "model.onnx", weights="link")
    assert list((tmp_path / "out").iterdir()) == []


def test_consolidated_tensors_are_aligned_in_order_of_use_and_shared(tmp_path: Path) -> None:
    model = two_files(tmp_path / "in")
    before = model.fingerprint()
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out" / "model.onnx", weights="consolidate")
    assert model.fingerprint() == before, "the model that was saved still refers to its own files"
    references = {ref.name: ref for ref in Model.open(tmp_path / "out" / "model.onnx").weight_references()}
    assert {name: ref.offset for name, ref in references.items()} == {"b": 0, "a": ALIGNMENT, "again": ALIGNMENT}
    assert (tmp_path / "out" / "model.onnx_data").stat().st_size == ALIGNMENT + 20
    assert (
        onnx.load(tmp_path / "out" / "model.onnx").graph.initializer[2].raw_data
        == np.float32([0, 10, 20, 30, 40]).tobytes()
    )


def test_a_copy_that_cannot_be_made_in_the_kernel_is_made_through_a_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.copy_file_range", refused, raising=False)
    test_placed_weights_are_the_weights("copy", tmp_path)


def test_a_link_that_cannot_be_made_is_a_copy_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, follow_symlinks: bool) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refused)
    (tmp_path / "out").mkdir()
    placed = two_files(tmp_path / "in").save(tmp_path / "out" / "model.onnx", weights="link")
    assert {entry.how for entry in placed} == {"copied"} and all(entry.sha256 for entry in placed)


@pytest.mark.skipif(onnx.__version__ < "1.21", reason="onnx before 1.21 loads a linked data file")
def test_onnx_refuses_what_a_link_was_made_to(tmp_path: Path) -> None:
    """Why copying is the default: onnx 1.21 and later take a second hard link for an attack, in the source as well."""
    (tmp_path / "out").mkdir()
    two_files(tmp_path / "in").save(tmp_path / "out" / "model.onnx", weights="link")
    for folder in ("in", "out"):
        with pytest.raises(onnx.checker.ValidationError, match="multiple hard links"):
            onnx.load(tmp_path / folder / "model.onnx")
    assert sums(tmp_path / "out" / "model.onnx"), "ONNX Runtime does not mind"


@pytest.mark.parametrize("placement", ["copy", "consolidate"])
def test_the_digest_is_of_what_was_written_where_weights_are_written_side_by_side(
    placement: WeightMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables of all layers are cut in one go: the last bytes of the first one come after the first of the last.

    Whoever reads along sees bytes that are not there yet now and then, so it is tried often.
    """
    monkeypatch.setattr("surgery.graph.weight_conversion.CHUNK", 512)
    monkeypatch.setattr("surgery.graph.weight_writing.CHUNK", 512)
    model = Model.open(TINY / "onnx" / "embed_tokens_q4f16.onnx", open_export(TINY).architecture)
    split, _ = apply(model, [SplitPerLayerTable()])
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        for entry in split.save(folder / "split.onnx", weights=placement):
            assert entry.sha256 == hashlib.sha256((folder / entry.location).read_bytes()).hexdigest()


def repacked(target: Path, placement: WeightMode = "copy", source: Path = TINY) -> Repacked[None]:
    return repack(source, target, recipe_text="a recipe", weights=placement)


def test_the_manifest_names_every_file_and_its_source(tmp_path: Path) -> None:
    repacked(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert found["files"].keys() == names
    assert found["recipe"] == "a recipe" and found["source"]["precision"] == "q4"
    for folder, entries in ((tmp_path / "out", found["files"]), (TINY, found["source"]["files"])):
        for name, entry in entries.items():
            content = (folder / name).read_bytes()
            origin = {"from": entry["from"]} if "from" in entry else {}
            assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), **origin}
    origins = {name: entry["from"] for name, entry in found["files"].items() if "from" in entry}
    assert origins == {
        "model.onnx_data": "onnx/decoder_model_merged_q4.onnx_data",
        "model.onnx_data_1": "onnx/embed_tokens_q4.onnx_data",
    }
    assert list(faults(tmp_path / "out")) == []


@pytest.mark.parametrize("placement", ["copy", "link", "consolidate"])
def test_the_manifest_does_not_depend_on_place_or_time(source: Path, placement: WeightMode, tmp_path: Path) -> None:
    first = repacked(tmp_path / "one", placement, source)
    second = repacked(tmp_path / "another" / "place", placement, source)
    assert [entry.how for entry in first.placed] == [entry.how for entry in second.placed]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "another" / "place" / path.name).read_bytes()


@pytest.mark.parametrize(
    "damage, fault",
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "it is missing"),
        (lambda folder: (folder / "config.json").write_text("{}"), "it has 2 bytes, the manifest says"),
        (lambda folder: flip(folder / "model.onnx_data"), "its content is not what was written"),
    ],
    ids=["missing", "other size", "one byte"],
)
def test_the_manifest_finds_what_changed(damage: object, fault: str, tmp_path: Path) -> None:
    repacked(tmp_path / "out")
    damage(tmp_path / "out")  # type: ignore[operator]
    found = list(faults(tmp_path / "out"))
    assert len(found) == 1 and fault in found[0].fault


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def test_a_blob_of_the_hubs_cache_tells_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / digest).write_bytes(content)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "a.onnx_data").symlink_to(tmp_path / "blobs" / digest)
    assert blob_digest(tmp_path / "snapshots" / "a.onnx_data") is None, "of another's cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert blob_digest(tmp_path / "snapshots" / "a.onnx_data") == digest
    assert blob_digest(tmp_path / "blobs") is None


def test_the_runtime_loads_a_consolidated_folder(tmp_path: Path) -> None:
    import onnxruntime_genai as og

    repacked(tmp_path / "copied")
    repacked(tmp_path / "one", "consolidate")
    assert {path.name for path in (tmp_path / "one").glob("*data*")} == {"model.onnx_data"}
    generated = []
    for name in ("copied", "one"):
        model = og.Model(str(tmp_path / name))
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=20)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([2, 5, 9], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        generated.append(list(generator.get_sequence(0)))
    assert generated[0] == generated[1] and len(generated[0]) == 20


def test_weights_of_an_attribute_are_consolidated_too(tmp_path: Path) -> None:
    """A Constant node's tensor can be external as well; it comes after the initializers."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "c.data").write_bytes(np.ones(5, np.float32).tobytes())
    constant = helper.make_node("Constant", [], ["c"], value=external("c", "c.data", 0))
    vector = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5]) for name in ("x", "y")]
    nodes = [constant, helper.make_node("Add", ["x", "c"], ["y"])]
    inline = numpy_helper.from_array(np.zeros(1, np.float32), "unused")
    graph = helper.make_graph(nodes, "g", vector[:1], vector[1:], [inline])
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "out").mkdir()
    Model.open(folder / "model.onnx").save(tmp_path / "out" / "model.onnx", weights="consolidate")
    shutil.rmtree(folder)
    moved = Model.open(tmp_path / "out" / "model.onnx")
    assert moved.check_weights() == 20 and list(moved.weight_files) == ["model.onnx_data"]
