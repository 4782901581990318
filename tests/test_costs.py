"""What a small file may cost: the forms of tests/adversarial.py, in CPU time, so that a busy machine changes nothing."""

from __future__ import annotations

from pathlib import Path

import adversarial
import pytest
import small
from exhaustive import some
from limits import cpu_limit
from onnx import ModelProto, TensorProto

from passes import MovePadding
from passes.base import apply
from surgery.attention.kv_wiring import attention_nodes, attentions
from surgery.attention.unfused import UnfusedSearch
from surgery.compare import compare, open_subject
from surgery.compare.formats import FORMATS
from surgery.errors import ModelError, PassError, WeightError
from surgery.folder.inspection import inspect_path
from surgery.graph.model import Model
from surgery.graph.wire import HIGHEST_RANK, LONGEST_NAME, MOST_ENTRIES

SECONDS = 7
"""Of CPU time; each of these forms took 10 and more, and takes 1 now."""
QUADRATIC = {
    "softmaxes behind masks": 1400,
    "softmaxes of nothing behind masks": 1400,
    "attention behind identities": 1400,
    "unfused attention behind transposes": 1400,
    "caches": 1000,
    "layer table": 1400,
    "long names of caches": 70,
}


@pytest.mark.parametrize("form", some(QUADRATIC, 3))
def test_a_form_that_took_the_square_of_its_size(form: str, tmp_path: Path) -> None:
    path = adversarial.write(tmp_path, form, QUADRATIC[form])
    (tmp_path / "plain.onnx").write_bytes(small.decoder().SerializeToString())
    with cpu_limit(SECONDS):
        inspect_path(path).to_dict()
        found = compare(open_subject(tmp_path / "plain.onnx"), open_subject(path))
        for write in FORMATS.values():
            write(found)


@pytest.mark.parametrize("form", some(adversarial.FORMS, 4))
def test_every_form_is_looked_at_or_refused_in_a_second_or_two(form: str, tmp_path: Path) -> None:
    path = adversarial.write(tmp_path, form, 300)
    (tmp_path / "plain.onnx").write_bytes(small.decoder().SerializeToString())
    with cpu_limit(5):
        try:
            inspect_path(path).to_dict()
            found = compare(open_subject(tmp_path / "plain.onnx"), open_subject(path), weights_by="digest")
        except (ModelError, WeightError) as error:
            assert str(path) in str(error) and ("at most" in str(error) or "overlaps" in str(error))
        else:
            for write in FORMATS.values():
                assert write(found)


def test_attention_is_found_in_one_walk_whatever_it_stands_behind() -> None:
    proto = small.decoder()
    adversarial.FORMS["softmaxes behind masks"](proto, 50)
    found = attentions(proto.graph)
    assert len(found) == 54 and {core.value.present for core in found[4:] if core.value} == {"present.1.value"}


def empty_nodes(count: int) -> bytes:
    """A model of nodes of two bytes each."""
    graph = b"\x0a\x00" * count
    size, left = b"", len(graph)
    while left > 127:
        size, left = size + bytes([left & 127 | 128]), left >> 7
    return b"\x08\x08\x3a" + size + bytes([left]) + graph


def test_ten_million_nodes_of_two_bytes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """protobuf would make 1.6 GB of these 20 MB."""
    (tmp_path / "a.onnx").write_bytes(empty_nodes(10_000_000))
    with cpu_limit(10), pytest.raises(ModelError, match="lists more than 1,000,000 nodes, names"):
        Model.open(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(empty_nodes(MOST_ENTRIES // 100))
    assert len(Model.open(tmp_path / "a.onnx").graph.node) == MOST_ENTRIES // 100


@pytest.mark.parametrize(
    "start", [b"\x0b\x0c", b"\x0b\x0a\x00\x0c", b"\x0e\x00"], ids=["group", "full group", "type 6"]
)
def test_what_the_walk_cannot_follow_does_not_hide_the_rest(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(start + empty_nodes(10_000_000))
    with cpu_limit(5), pytest.raises(ModelError, match="is not an ONNX model, or is cut short"):
        Model.open(tmp_path / "a.onnx")


def test_a_number_of_a_million_bytes_is_not_added_up(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08" + b"\x80" * 1_000_000 + b"\x01")
    with cpu_limit(5), pytest.raises(ModelError, match="is not an ONNX model, or is cut short"):
        Model.open(tmp_path / "a.onnx")


@pytest.mark.parametrize("length, refused", [(LONGEST_NAME, False), (LONGEST_NAME + 1, True), (5000, True)])
def test_names_have_an_end(length: int, refused: bool, tmp_path: Path) -> None:
    proto = small.decoder()
    proto.graph.node[0].name = "n" * length
    proto.doc_string = "d" * 100_000
    proto.metadata_props.add(key="k", value="v" * 100_000)
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    if refused:
        with pytest.raises(ModelError, match=f"has a name of {length:,} bytes, b'nnn.*; at most 4,096 are read"):
            Model.open(tmp_path / "a.onnx")
    else:
        assert Model.open(tmp_path / "a.onnx").proto == proto


@pytest.mark.parametrize("where", ["value", "tensor"])
def test_ranks_have_an_end(where: str, tmp_path: Path) -> None:
    for rank in (HIGHEST_RANK, HIGHEST_RANK + 1):
        proto = small.decoder()
        if where == "value":
            adversarial.FORMS["dimensions"](proto, rank)
        else:
            proto.graph.initializer.add(name="wide", data_type=TensorProto.FLOAT, dims=[1] * rank, raw_data=bytes(4))
        (tmp_path / f"{rank}.onnx").write_bytes(proto.SerializeToString())
    Model.open(tmp_path / f"{HIGHEST_RANK}.onnx")
    with pytest.raises(ModelError, match="has 65 dimensions; at most 64 are expected"):
        Model.open(tmp_path / f"{HIGHEST_RANK + 1}.onnx")


@pytest.mark.parametrize("field", ["doc_string", "domain", "producer_name", "metadata_props"])
def test_text_that_is_none_is_one_sentence_wherever_it_stands(field: str, tmp_path: Path) -> None:
    proto = small.decoder()
    if field == "metadata_props":
        proto.metadata_props.add(key="k", value="damage")
    else:
        setattr(proto, field, "damage")
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString().replace(b"damage", b"dama\xffe"))
    with pytest.raises(ModelError, match=r"is damaged: the (name|text) b'dama\\xffe' is not UTF-8"):
        Model.open(tmp_path / "a.onnx")


def test_a_ring_of_operators_that_move_data_comes_to_an_end() -> None:
    """An attention that reads a ring: whoever follows it back never arrives."""
    proto = ModelProto()
    proto.CopyFrom(small.decoder())
    adversarial.FORMS["ring"](proto, 3)
    core = next(core for core in attention_nodes(proto.graph) if core.node.name == "round")
    with cpu_limit(5), pytest.raises(ModelError, match="more than 32 operators behind where a present is expected"):
        UnfusedSearch(proto, small.HEADS, 128).find(core, small.arch().layers[1])


@pytest.mark.parametrize(
    "form", some(["unfused attention behind transposes", "attention behind identities", "caches"], 3)
)
def test_passes_that_rewire_take_steps_as_there_are_readers(form: str, tmp_path: Path) -> None:
    """One value with thousands of readers; it took 6 seconds of the first form."""
    path = adversarial.write(tmp_path, form, 1600)
    with cpu_limit(3):
        try:
            apply(Model.open(path, small.arch()), [MovePadding()])
        except PassError as error:
            assert str(error)
