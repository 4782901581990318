"""surgery.graph.weight_conversion: the bytes do not depend on the size of the portions, nor on how much one call moves."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from exhaustive import in_full
from onnx import TensorProto
from places import TINY

from passes import FusePerLayerTable, MergeEmbeddings, SplitPerLayerTable, ToFp16
from passes.base import Pass, apply
from surgery.graph import weight_conversion
from surgery.graph.external_data import WeightReference, external_field
from surgery.graph.model import Model
from surgery.graph.weight_conversion import Columns, Conversion, NewFile, SourcePart, halved
from surgery.source.export import open_export

RECIPES: dict[str, tuple[Pass, ...]] = {
    "rounded": (ToFp16(),),
    "split": (SplitPerLayerTable(),),
    "rounded and split": (ToFp16(), SplitPerLayerTable()),
}
PORTIONS = {("rounded", "q4", 1), ("split", "quantized", 1291), ("rounded and split", "q4", 70001)}


def written(model: Model, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    model.save(folder / "model.onnx")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def converted(recipe: str, precision: str) -> Model:
    pair = open_export(TINY).pair(precision)
    model = Model.open(pair.decoder, open_export(TINY).architecture)
    return apply(model, [MergeEmbeddings(pair.embed), *RECIPES[recipe]])[0]


@pytest.mark.parametrize(
    ("recipe", "precision", "portion"),
    [each if each in PORTIONS else in_full(*each) for each in product(RECIPES, ("q4", "quantized"), (1, 1291, 70001))],
)
def test_every_boundary_of_a_portion_is_crossed(
    recipe: str, precision: str, portion: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a row, or an element, at a time to one and a rest; a call moves no more than 999 bytes."""
    model = converted(recipe, precision)
    whole = written(model, tmp_path / "whole")
    read, write = os.pread, os.pwrite
    monkeypatch.setattr(weight_conversion, "CHUNK", portion)
    monkeypatch.setattr(os, "pread", lambda file, size, at: read(file, min(size, 999), at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:999], at))
    assert written(model, tmp_path / "portions") == whole


def test_columns_are_put_side_by_side_in_portions_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("split", "q4")
    written(model, tmp_path / "split")
    split = Model.open(tmp_path / "split" / "model.onnx", model.architecture)
    fused, _ = apply(split, [FusePerLayerTable()])
    whole = written(fused, tmp_path / "whole")
    monkeypatch.setattr(weight_conversion, "CHUNK", 1291)
    assert written(fused, tmp_path / "portions") == whole


def test_numbers_are_rounded_to_the_nearest_of_float16_and_of_two_to_the_even_one() -> None:
    step = 2.0**-10
    given = np.array(
        [1 + 0.4 * step, 1 + 0.6 * step, 1 + 0.5 * step, 1 + 1.5 * step, -1 - 0.6 * step, 4e-8], np.float32
    )
    wanted = [1, 1 + step, 1, 1 + 2 * step, -1 - step, 2.0**-24]
    assert weight_conversion.halved(given, "w", clip=False).tolist() == wanted


def test_weights_have_one_place_where_they_are_the_same_bytes(tmp_path: Path) -> None:
    """Not by the place in their files alone, nor where one of the two is rounded."""
    one, other = (
        WeightReference("w", name, tmp_path / name, 0, 64, "FLOAT", (16,)) for name in ("one.data", "other.data")
    )
    kinds = [Conversion((SourcePart(source, Columns(1, 0, 1, 32)),)) for source in (one, one, other)]
    file, converted = NewFile("new.data"), dict[str, Conversion]()
    tensors = [TensorProto(name=name) for name in ("first", "again", "elsewhere", "rounded")]
    for tensor, made in zip(tensors, (*kinds, kinds[0].rounded()), strict=True):
        file.add(converted, tensor, made)
    assert [external_field(tensor, "offset") for tensor in tensors] == ["0", "0", "64", "128"]
    assert file.end == 160


def test_infinity_stays_infinity() -> None:
    values = np.array([-np.inf, 1, np.inf], np.float32)
    for clip in (False, True):
        assert halved(values, "mask", clip=clip).tolist() == [-np.inf, 1, np.inf]
