"""What tests have in common is known by its content: another byte anywhere is other work."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import once
import pytest
from places import TINY

from passes import MergeEmbeddings, RenameIO
from passes.base import apply
from surgery.graph.model import Model
from surgery.runtime.sessions import OpenGraph, Settings
from surgery.source.export import open_export


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the committed graphs in q4: the embeddings, and the decoder."""
    found = open_export(TINY).pair("q4")
    for path in (found.embed, found.decoder):
        for name in (path.name, f"{path.name}_data"):
            shutil.copyfile(path.with_name(name), tmp_path / name)
    return tmp_path / found.embed.name, tmp_path / found.decoder.name


def flip(file: Path) -> None:
    """Another byte, in place, of as many as before."""
    with file.open("r+b") as stream:
        first = stream.read(1)[0]
        stream.seek(0)
        stream.write(bytes([first ^ 1]))


def session(graph: Path | Model) -> object:
    return OpenGraph(graph, Settings())._session


def test_a_session_is_of_the_graph_and_its_data(pair: tuple[Path, Path]) -> None:
    embed, _ = pair
    first = session(embed)
    assert session(embed) is first and session(Model.open(embed)) is not first
    ids = {"input_ids": np.arange(100)[None]}
    before = first.run(None, ids)[0]  # type: ignore[attr-defined]
    flip(embed.with_name(f"{embed.name}_data"))
    second = session(embed)
    assert second is not first
    assert not np.array_equal(second.run(None, ids)[0], before)  # type: ignore[attr-defined]
    assert np.array_equal(first.run(None, ids)[0], before), "it maps files of its own"  # type: ignore[attr-defined]


def test_a_pass_is_of_the_graph_its_options_and_their_files(pair: tuple[Path, Path]) -> None:
    embed, path = pair
    decoder = Model.open(path)
    seconds = []
    for step in (MergeEmbeddings(embed), MergeEmbeddings(embed), RenameIO(), MergeEmbeddings(embed)):
        if len(seconds) == 3:
            flip(embed.with_name(f"{embed.name}_data"))
        model, (outcome,) = apply(decoder, [step])
        seconds.append(outcome.seconds)
        model.graph.node[0].name = "mine"
    assert seconds[0] == seconds[1] != seconds[3], "it was taken once, and then done anew"
    assert apply(decoder, [RenameIO()])[0].graph.node[0].name != "mine"


def test_a_test_that_patches_gets_nothing_of_others(monkeypatch: pytest.MonkeyPatch, pair: tuple[Path, Path]) -> None:
    assert session(pair[0]) is not session(pair[0])
    with once.work_in_common():
        assert session(pair[0]) is session(pair[0])
