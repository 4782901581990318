"""Opening, not editing and saving gives back the same model; broken files give one sentence."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
from killing import kills
from limits import cpu_limit
from onnx import ModelProto, TensorProto
from onnx.helper import make_node, make_tensor_value_info
from places import FIXTURES
from torture import FLOAT, TRAPS, body, external, if_node, model

from surgery.choices import WeightMode
from surgery.errors import FolderError, ModelError, SurgeryError, WeightError
from surgery.graph.definitions import check_definitions
from surgery.graph.external_data import BITS, byte_size, external_field, is_external, tensors
from surgery.graph.index import use_counts
from surgery.graph.model import Model
from surgery.graph.renaming import rename
from surgery.graph.scopes import captured, reads

BROKEN_ON_PURPOSE = {"nodes_in_an_invalid_order"}


def write(path: Path, proto: ModelProto, data: int | None = None) -> Path:
    path.write_bytes(proto.SerializeToString())
    if data is not None:
        (path.parent / "torture.data").write_bytes(bytes(data))
    return path


def parsed(path: Path) -> ModelProto:
    proto = ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def with_external(*tensors: TensorProto) -> ModelProto:
    return model([make_node("Add", ["x", tensors[0].name], ["y"])], initializers=tensors)


# Round trips


@pytest.mark.parametrize("name", TRAPS)
def test_open_and_save_is_identical(name: str, tmp_path: Path) -> None:
    original = TRAPS[name]()
    source = write(tmp_path / "a.onnx", original, data=64 * 1024)
    Model.open(source).save(tmp_path / "b.onnx")
    assert parsed(tmp_path / "b.onnx") == original
    (tmp_path / "out").mkdir()
    Model.open(source).save(tmp_path / "out" / "b.onnx")
    moved = parsed(tmp_path / "out" / "b.onnx")
    for tensor in filter(is_external, tensors(moved)):
        assert external_field(tensor, "location") == "b.onnx_data"
        for entry in tensor.external_data:
            entry.value = "torture.data" if entry.key == "location" else entry.value
    assert moved == original, "elsewhere, data files are called after the graph, and nothing else is another"


@pytest.mark.parametrize("name", TRAPS)
def test_a_view_without_an_edit_is_identical(name: str, tmp_path: Path) -> None:
    opened = Model.open(write(tmp_path / "a.onnx", TRAPS[name]()))
    before = opened.fingerprint()
    with opened.edited():
        pass
    assert opened.proto == TRAPS[name]()
    assert opened.fingerprint() == before


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_but_the_broken_one_has_a_sound_structure(name: str) -> None:
    if name in BROKEN_ON_PURPOSE:
        with pytest.raises(ModelError, match="which nothing before it defines"):
            check_definitions(TRAPS[name]())
    else:
        check_definitions(TRAPS[name]())


def test_there_are_committed_fixtures() -> None:
    assert list(FIXTURES.glob("*/onnx/*.onnx"))


@pytest.mark.parametrize(
    "path", sorted(FIXTURES.glob("*/onnx/*.onnx")), ids=lambda p: f"{p.parent.parent.name}/{p.name}"
)
def test_committed_fixtures_come_back_identical(path: Path, tmp_path: Path) -> None:
    assert_identical(path, tmp_path)


def test_real_files_come_back_identical(real_onnx: Path, tmp_path: Path) -> None:
    assert_identical(real_onnx, tmp_path)


def assert_identical(path: Path, tmp_path: Path) -> None:
    opened = Model.open(path)
    with opened.edited():
        pass
    assert opened.proto == parsed(path)
    assert opened.to_bytes() == path.read_bytes()
    if all(file.exists() for file in opened.weight_files.values()):
        opened.save(tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_fingerprint_sees_the_graph_and_where_its_weights_are(tmp_path: Path) -> None:
    opened = Model.open(write(tmp_path / "a.onnx", with_external(external("w", [4]))))
    twin = opened.copy()
    assert twin.fingerprint() == opened.fingerprint()
    twin.weight_files["torture.data"] = tmp_path / "elsewhere"
    assert twin.fingerprint() != opened.fingerprint()
    twin = opened.copy()
    twin.graph.node[0].doc_string = "new"
    assert twin.fingerprint() != opened.fingerprint()


# Files that are no models


def lfs_pointer() -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1864102912\n"


@pytest.mark.parametrize(
    "data", [b"", lfs_pointer(), b"<!DOCTYPE html>", b"\0" * 100, random.Random(0).randbytes(4096), b"\x08\x0a"]
)
def test_a_file_that_is_no_model_is_one_sentence(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=rf"model\.onnx \({len(data)} bytes\) (is not|holds no) "):
        Model.open(path)


def test_a_folder_and_a_missing_file_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder; an \.onnx file is expected"):
        Model.open(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        Model.open(tmp_path / "none.onnx")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot be read: Not a directory"):
        Model.open(tmp_path / "file" / "model.onnx")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = TRAPS["metadata_at_every_level"]().graph.SerializeToString()
    whole = TRAPS["metadata_at_every_level"]().SerializeToString()
    start = whole.index(data)
    for length in range(start, start + len(data)):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            Model.open(tmp_path / "cut.onnx")


def test_damaged_bytes_never_end_in_a_traceback(tmp_path: Path) -> None:
    """One byte changed at a time: the file opens, or a SurgeryError says why not."""
    rng = random.Random(1)
    path = tmp_path / "damaged.onnx"
    for name in (
        "metadata_at_every_level",
        "if_bodies_capture_an_outer_initializer",
        "external_checksum_and_odd_entries",
    ):
        whole = TRAPS[name]().SerializeToString()
        for _ in range(400):
            data = bytearray(whole)
            data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                opened = Model.open(path)
                check_definitions(opened.proto)
                with opened.edited():
                    pass
                opened.check_weights()
            except SurgeryError as error:
                assert str(error)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    data = TRAPS["plain"]().SerializeToString().replace(b"relu_y", b"\xff\xfelu_y")
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=r"is damaged: the name b'\\xff\\xfelu_y' is not UTF-8"):
        Model.open(tmp_path / "a.onnx")


# Weight references


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../w.data", "a/../../w.data", "a\\..\\w.data", "C:\\w.data", "C:w.data", "..", ".", "w\0.data"],
)
def test_a_location_that_leads_out_of_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    tensor = external("w", [4])
    tensor.external_data[0].value = location
    with pytest.raises(WeightError) as raised:
        Model.open(write(tmp_path / "a.onnx", with_external(tensor)))
    assert str(raised.value) == (
        f"{tmp_path / 'a.onnx'}: external data location {location!r} leads out of the model's folder; "
        "only relative paths without '..' are followed"
    )


def test_a_missing_location_is_refused(tmp_path: Path) -> None:
    tensor = external("w", [4])
    del tensor.external_data[:]
    with pytest.raises(WeightError, match="a tensor is stored externally but names no data file"):
        Model.open(write(tmp_path / "a.onnx", with_external(tensor)))


def test_the_last_of_two_locations_counts(tmp_path: Path) -> None:
    tensor = external("w", [4])
    tensor.external_data.add(key="location", value="../evil")
    with pytest.raises(WeightError, match="leads out"):
        Model.open(write(tmp_path / "a.onnx", with_external(tensor)))


def fields(tensor: TensorProto, **values: str) -> TensorProto:
    for entry in tensor.external_data:
        entry.value = values.get(entry.key, entry.value)
    return tensor


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"offset": "-4"}, "tensor 'w' in 'torture.data' has offset '-4'; a whole number >= 0 is expected"),
        ({"offset": "0x10"}, "tensor 'w' in 'torture.data' has offset '0x10'; a whole number >= 0 is expected"),
        ({"length": "1e3"}, "tensor 'w' in 'torture.data' has length '1e3'; a whole number >= 0 is expected"),
        ({"offset": "٣"}, "tensor 'w' in 'torture.data' has offset '٣'; a whole number >= 0 is expected"),
        (
            {"length": "12"},
            "tensor 'w' in 'torture.data' is FLOAT [4] = 16 bytes, but its external data says length 12",
        ),
    ],
)
def test_external_fields_that_contradict_the_tensor(values: dict[str, str], sentence: str, tmp_path: Path) -> None:
    tensor = fields(external("w", [4]), **values)
    with pytest.raises(WeightError) as raised:
        Model.open(write(tmp_path / "a.onnx", with_external(tensor), data=64)).check_weights()
    assert str(raised.value) == sentence


def test_an_offset_of_ten_thousand_digits_is_one_sentence(tmp_path: Path) -> None:
    tensor = fields(external("w", [4]), offset="9" * 10_000)
    with pytest.raises(WeightError, match=r"has offset '9{40}'; a whole number"):
        Model.open(write(tmp_path / "a.onnx", with_external(tensor), data=64)).check_weights()


def test_an_extent_past_the_end_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", with_external(external("w", [4], offset=8)), data=23)
    with pytest.raises(WeightError) as raised:
        Model.open(path).check_weights()
    assert str(raised.value) == (
        f"{tmp_path / 'torture.data'}: tensor 'w' needs bytes 8 to 24, but the file has 23 bytes"
    )
    (tmp_path / "torture.data").write_bytes(bytes(24))
    assert Model.open(path).check_weights() == 16


def test_extents_that_overlap_are_refused_and_shared_ones_are_not(tmp_path: Path) -> None:
    """N tensors of nearly the whole file make N files' worth of reading, or of writing, of a small download."""
    tied = [external("a", [4]), external("b", [2, 2]), external("c", [4], offset=16)]
    assert Model.open(write(tmp_path / "a.onnx", with_external(*tied), data=32)).check_weights() == 48
    with pytest.raises(WeightError, match="tensor 'd', bytes 4 to 20, overlaps others: all of them need 48 bytes, and"):
        Model.open(write(tmp_path / "a.onnx", with_external(*tied, external("d", [4], offset=4)))).check_weights()


def test_a_file_of_many_names_is_one_file(tmp_path: Path) -> None:
    """A link to the folder itself gives any number of them."""
    (tmp_path / "l").symlink_to(".")
    named = [fields(external(f"w{i}", [4]), location="l/" * i + "torture.data") for i in range(3)]
    write(tmp_path / "a.onnx", with_external(*named), data=16)
    assert Model.open(tmp_path / "a.onnx").check_weights() == 48
    other = fields(external("v", [3], offset=4), location="l/l/l/torture.data")
    with pytest.raises(WeightError, match="tensor 'v', bytes 4 to 16, overlaps others"):
        Model.open(write(tmp_path / "a.onnx", with_external(*named, other))).check_weights()


def test_a_missing_data_file_and_one_that_is_a_folder(tmp_path: Path) -> None:
    opened = Model.open(write(tmp_path / "a.onnx", with_external(external("w", [4]))))
    with pytest.raises(WeightError) as raised:
        opened.check_weights()
    assert (
        str(raised.value) == f"{tmp_path / 'torture.data'} is missing: tensor 'w' and perhaps others are stored in it"
    )
    (tmp_path / "torture.data").mkdir()
    with pytest.raises(WeightError, match="where tensor 'w' is stored, is not a regular file"):
        opened.check_weights()


def test_a_dtype_without_a_size_and_a_negative_shape(tmp_path: Path) -> None:
    text, unknown, negative = (external("w", [4]) for _ in range(3))
    text.data_type = TensorProto.STRING
    unknown.data_type = 77
    negative.dims[0] = -4
    for tensor, sentence in (
        (text, "has dtype STRING, which has no size on disk"),
        (unknown, "has dtype 77, which has no size on disk"),
        (negative, r"has a negative dimension in its shape \[-4\]"),
    ):
        with pytest.raises(WeightError, match=sentence):
            Model.open(write(tmp_path / "a.onnx", with_external(tensor), data=64)).check_weights()


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("UINT4", (3,), 2), ("INT4", (3, 3), 5), ("UINT2", (5,), 2), ("INT2", (4,), 1), ("FLOAT4E2M1", (1,), 1),
     ("FLOAT8E4M3FN", (3,), 3), ("BFLOAT16", (3,), 6), ("FLOAT", (), 4), ("FLOAT", (0, 7), 0),
     ("UINT8", (2**40, 2**40), 2**80)],
)  # fmt: skip
def test_byte_size_packs_what_is_smaller_than_a_byte(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert byte_size(dtype, shape) == size


@pytest.mark.parametrize("dtype", [dtype for dtype, bits in BITS.items() if bits < 8])
def test_length_of_a_sub_byte_tensor_counts_packed_bytes(dtype: str, tmp_path: Path) -> None:
    tensor = external("w", [5])
    tensor.data_type = TensorProto.DataType.Value(dtype)
    good = str(byte_size(dtype, [5]))
    path = write(tmp_path / "a.onnx", with_external(fields(tensor, length=good)), data=64)
    assert Model.open(path).check_weights() == int(good)
    write(path, with_external(fields(tensor, length="5")))
    with pytest.raises(WeightError, match=rf"is {dtype} \[5\] = {good} bytes, but its external data says length 5"):
        Model.open(path).check_weights()


def test_tensors_in_attributes_bodies_and_functions_are_references_too(tmp_path: Path) -> None:
    opened = Model.open(write(tmp_path / "a.onnx", TRAPS["external_tensor_attribute"](), data=64))
    assert [(ref.name, ref.length) for ref in opened.weight_references()] == [("inner", 64)]


# Saving


def pair(tmp_path: Path) -> Model:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.onnx", with_external(external("w", [1024])))
    (tmp_path / "in" / "torture.data").write_bytes(np.arange(1024, dtype=np.float32).tobytes())
    (tmp_path / "out").mkdir()
    return Model.open(tmp_path / "in" / "a.onnx")


def test_save_copies_weights(tmp_path: Path) -> None:
    pair(tmp_path).save(tmp_path / "out" / "b.onnx")
    data = tmp_path / "out" / "b.onnx_data"
    assert data.read_bytes() == (tmp_path / "in" / "torture.data").read_bytes()
    assert not data.samefile(tmp_path / "in" / "torture.data")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.onnx", "b.onnx_data"]


def test_save_links_weights_and_follows_a_symlink(tmp_path: Path) -> None:
    opened = pair(tmp_path)
    source = tmp_path / "in" / "torture.data"
    source.rename(tmp_path / "in" / "blob")
    source.symlink_to("blob")
    opened.save(tmp_path / "out" / "b.onnx", weights="link")
    target = tmp_path / "out" / "b.onnx_data"
    assert target.samefile(tmp_path / "in" / "blob") and not target.is_symlink()


def test_save_beside_its_own_weights_leaves_them_alone(tmp_path: Path) -> None:
    opened = pair(tmp_path)
    before = (tmp_path / "in" / "torture.data").stat()
    opened.save(tmp_path / "in" / "b.onnx")
    assert (tmp_path / "in" / "torture.data").stat().st_ino == before.st_ino


@pytest.mark.parametrize("name", ["b.onnx", "b.onnx_data"])
def test_save_overwrites_nothing_without_force(name: str, tmp_path: Path) -> None:
    opened = pair(tmp_path)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(FolderError, match=rf"{name} exists"):
        opened.save(tmp_path / "out" / "b.onnx")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"
    opened.save(tmp_path / "out" / "b.onnx", force=True)
    assert Model.open(tmp_path / "out" / "b.onnx").check_weights() == 4096


def test_force_does_not_write_through_a_link_to_the_source(tmp_path: Path) -> None:
    """What stands in the way may be a hard link to the source: writing to it would damage the source."""
    opened = pair(tmp_path)
    source = tmp_path / "in" / "torture.data"
    content = source.read_bytes()
    (tmp_path / "out" / "b.onnx_data").hardlink_to(source)
    opened.save(tmp_path / "out" / "b.onnx", force=True)
    assert source.read_bytes() == content
    assert Model.open(tmp_path / "out" / "b.onnx").check_weights() == 4096


def test_a_failed_save_leaves_no_part_files_and_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = pair(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surgery.graph.weight_writing._moved", full)
    with pytest.raises(FolderError, match=r"b\.onnx was not written: No space left on device"):
        opened.save(tmp_path / "out" / "b.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_save_leaves_no_part_files(tmp_path: Path) -> None:
    opened = pair(tmp_path)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.save(tmp_path / "out" / "b.onnx", progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_save_refuses_broken_weights_before_it_writes(tmp_path: Path) -> None:
    opened = pair(tmp_path)
    os.truncate(tmp_path / "in" / "torture.data", 4095)
    with pytest.raises(WeightError, match="needs bytes 0 to 4096, but the file has 4095 bytes"):
        opened.save(tmp_path / "out" / "b.onnx")
    assert list((tmp_path / "out").iterdir()) == []


def test_save_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"the folder .* does not exist"):
        pair(tmp_path).save(tmp_path / "none" / "b.onnx")


def test_save_refuses_to_overwrite_a_data_file_with_the_graph(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="is also a data file of this graph"):
        pair(tmp_path).save(tmp_path / "in" / "torture.data", force=True)


def test_a_file_that_is_named_in_two_ways_is_placed_once(tmp_path: Path) -> None:
    opened = pair(tmp_path)
    first = opened.graph.initializer[0]
    twin = opened.graph.initializer.add()
    twin.CopyFrom(fields(external("w2", list(first.dims)), location="./torture.data"))
    opened.weight_files["./torture.data"] = tmp_path / "in" / "." / "torture.data"
    placed = opened.save(tmp_path / "out" / "b.onnx")
    assert [entry.location for entry in placed] == ["b.onnx_data"]
    assert {ref.location for ref in Model.open(tmp_path / "out" / "b.onnx").weight_references()} == {"b.onnx_data"}


@pytest.mark.parametrize("location", [".git/hooks/pre-commit", "conftest.py", ".envrc", "Makefile", "sub/w.data"])
def test_a_graph_does_not_choose_what_is_written(location: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    write(tmp_path / "in" / "a.onnx", with_external(fields(external("w", [4]), location=location)))
    data = tmp_path / "in" / location
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_bytes(bytes(16))
    data.chmod(0o4755)
    (tmp_path / "out" / "Makefile").write_text("mine")
    Model.open(tmp_path / "in" / "a.onnx").save(tmp_path / "out" / "b.onnx", force=True)
    found = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert found == ["Makefile", "b.onnx", "b.onnx_data"] and (tmp_path / "out" / "Makefile").read_text() == "mine"
    for weights in ("copy", "link", "consolidate"):
        Model.open(tmp_path / "in" / "a.onnx").save(tmp_path / "out" / "b.onnx", weights=weights, force=True)  # type: ignore[arg-type]
        assert all(path.stat().st_mode & 0o7111 == 0 for path in (tmp_path / "out").iterdir())
        assert len(list((tmp_path / "out").glob("b.onnx_data*"))) == 1, "the old data file went with its graph"


def test_a_save_in_place_keeps_the_weights_that_it_reads(tmp_path: Path) -> None:
    opened = pair(tmp_path)
    opened.save(tmp_path / "in" / "a.onnx", force=True)
    opened.save(tmp_path / "in" / "a.onnx", weights="consolidate", force=True)
    Model.open(tmp_path / "in" / "a.onnx").save(tmp_path / "in" / "a.onnx", weights="consolidate", force=True)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == [
        "a.onnx",
        "a.onnx_data",
        "a.onnx_data_1",
        "torture.data",
    ]
    assert Model.open(tmp_path / "in" / "a.onnx").check_weights() == 4096


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("weights", ["copy", "consolidate"])
def test_a_killed_save_leaves_the_old_graph_with_its_weights_or_the_new_one(
    weights: WeightMode, tmp_path: Path
) -> None:
    opened, other, out = pair(tmp_path), tmp_path / "in" / "other.onnx", tmp_path / "out" / "b.onnx"
    proto = with_external(fields(external("w", [1024]), location="other.data"))
    proto.doc_string = "new"
    write(other, proto)
    (tmp_path / "in" / "other.data").write_bytes(bytes(4096))
    opened.save(out, weights=weights)
    held, killed = {"": np.arange(1024, dtype=np.float32).tobytes(), "new": bytes(4096)}, 0
    for _ in kills(lambda: Model.open(other).save(out, weights=weights, force=True)):
        found = Model.open(out)
        assert next(iter(found.weight_files.values())).read_bytes() == held[found.proto.doc_string]
        killed += 1
    assert killed > 3
    assert len(list((tmp_path / "out").iterdir())) == 2, "what killed runs left is gone"


@pytest.mark.parametrize("weights", ["copy", "link", "consolidate"])
def test_a_link_that_is_put_there_after_the_look_is_not_followed(weights: WeightMode, tmp_path: Path) -> None:
    opened = pair(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "in" / "torture.data").unlink()
    (tmp_path / "in" / "torture.data").symlink_to("../secret")
    with pytest.raises(FolderError, match=r"torture\.data: it is .*secret, outside of the folder"):
        opened.save(tmp_path / "out" / "b.onnx", weights=weights)
    assert list((tmp_path / "out").iterdir()) == []


def test_of_a_data_file_no_more_is_copied_than_is_used(tmp_path: Path) -> None:
    opened = pair(tmp_path)
    os.truncate(tmp_path / "in" / "torture.data", 20 * 10**9)
    told: list[int] = []
    opened.save(tmp_path / "out" / "b.onnx", progress=told.append)
    assert (tmp_path / "out" / "b.onnx_data").stat().st_size == sum(told) == 4096


def test_a_location_that_no_file_is_known_for(tmp_path: Path) -> None:
    opened = pair(tmp_path)
    opened.weight_files.clear()
    with pytest.raises(WeightError, match=r"no file is known for the external data location 'torture\.data'"):
        opened.save(tmp_path / "out" / "b.onnx")


def test_progress_adds_up_to_the_size(tmp_path: Path) -> None:
    moved: list[int] = []
    pair(tmp_path).save(tmp_path / "out" / "b.onnx", progress=moved.append)
    assert sum(moved) == 4096


def test_sixty_four_gigabytes_are_never_read(tmp_path: Path) -> None:
    """Open, check, edit, fingerprint and save with a link, in seconds and megabytes."""
    size = 64 * 2**30
    write(tmp_path / "a.onnx", with_external(external("w", [size // 4])))
    (tmp_path / "torture.data").touch()
    os.truncate(tmp_path / "torture.data", size)
    (tmp_path / "out").mkdir()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with cpu_limit(5):
        opened = Model.open(tmp_path / "a.onnx")
        assert opened.check_weights() == size
        with opened.edited() as view:
            view.nodes[0].attrs["note"] = "edited"
        opened.fingerprint()
        opened.save(tmp_path / "out" / "b.onnx", weights="link")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024  # KiB
    assert (tmp_path / "out" / "b.onnx_data").stat().st_size == size


# Scopes


def test_captured_values_count_as_read() -> None:
    graph = TRAPS["if_bodies_capture_an_outer_initializer"]().graph
    assert captured(graph.node[0]) == {"x", "w"}
    assert reads(graph.node[0]) == {"c", "x", "w"}
    assert use_counts(graph) == {"c": 1, "x": 1, "w": 1, "y": 1}


def test_a_value_that_a_body_hides_is_not_captured_and_one_read_before_is() -> None:
    shadowed = TRAPS["captured_name_is_shadowed_in_a_body"]().graph.node[0]
    assert captured(shadowed) == {"x", "w"}  # by the branch that does not hide it
    late = TRAPS["captured_value_is_shadowed_after_it_was_read"]().graph.node[1]
    assert captured(late) == {"h"}


def test_rename_follows_captures_and_stops_at_shadows() -> None:
    proto = TRAPS["captured_name_is_shadowed_in_a_body"]()
    rename(proto.graph, {"w": "weight"})
    hides, reads_it = proto.graph.node[0].attribute[0].g, proto.graph.node[0].attribute[1].g
    if hides.initializer:
        assert list(hides.node[0].input) == ["x", "w"]
        assert list(reads_it.node[0].input) == ["x", "weight"]
    else:
        assert list(reads_it.node[0].input) == ["x", "w"]
        assert list(hides.node[0].input) == ["x", "weight"]
    check_definitions(proto)


def test_rename_keeps_a_read_before_a_shadow_with_its_outer_value() -> None:
    proto = TRAPS["captured_value_is_shadowed_after_it_was_read"]()
    rename(proto.graph, {"h": "hidden"})
    bodies = {attribute.name: attribute.g for attribute in proto.graph.node[1].attribute}
    then = bodies["then_branch"]
    assert list(then.node[0].input) == ["hidden"] and list(then.node[1].output) == ["h"] == [then.output[0].name]
    check_definitions(proto)


def test_structure_refuses_second_definitions_and_unknown_reads() -> None:
    twice = model([make_node("Relu", ["x"], ["y"], name="one"), make_node("Abs", ["x"], ["y"], name="two")])
    with pytest.raises(ModelError, match="value 'y' is defined a second time by Abs node 'two'"):
        check_definitions(twice)
    nothing = model(outputs=[make_tensor_value_info("z", FLOAT, ["n"])])
    with pytest.raises(ModelError, match="graph output 'z' is defined by no node"):
        check_definitions(nothing)
    inner = model([if_node(body([make_node("Relu", ["ghost"], ["a"])], "a"), body([], "x"))])
    inner.graph.input.add().CopyFrom(make_tensor_value_info("c", TensorProto.BOOL, []))
    with pytest.raises(ModelError, match="reads 'ghost', which nothing before it defines"):
        check_definitions(inner)


def test_structure_is_linear_in_many_bodies() -> None:
    proto = TRAPS["two_thousand_ifs_around_two_thousand_values"]()
    with cpu_limit(2):
        check_definitions(proto)
        rename(proto.graph, {f"v{i}": f"w{i}" for i in range(2000)})


# In memory


def test_a_model_in_memory_is_a_copy_and_can_be_saved(tmp_path: Path) -> None:
    proto = model([make_node("Relu", ["x"], ["y"])])
    made = Model.from_proto(proto)
    made.graph.node[0].op_type = "Abs"
    made.save(tmp_path / "model.onnx")
    assert proto.graph.node[0].op_type == "Relu" and parsed(tmp_path / "model.onnx").graph.node[0].op_type == "Abs"


def test_the_external_data_of_a_model_in_memory_lies_beside_its_path(tmp_path: Path) -> None:
    (tmp_path / "torture.data").write_bytes(bytes(64))
    proto = with_external(external("w", [4]))
    made = Model.from_proto(proto, tmp_path / "never_written.onnx")
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out" / "model.onnx")
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == bytes(16)
    with pytest.raises(WeightError, match=r"refers to the data file 'torture\.data', which may be anywhere"):
        Model.from_proto(proto)
    with pytest.raises(WeightError, match="no file is known for the external data location") as raised:
        Model(proto, tmp_path / "never_written.onnx").save(tmp_path / "out" / "other.onnx")
    assert "from_proto(proto, path)" in (raised.value.hint or "")


@pytest.mark.parametrize("given", [ModelProto(), b"bytes", None])
def test_what_is_no_graph_in_memory_is_refused(given: object) -> None:
    with pytest.raises(ModelError, match="a ModelProto with a graph and an ir_version is expected"):
        Model.from_proto(given)  # type: ignore[arg-type]
