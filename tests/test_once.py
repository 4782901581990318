"""What tests have in common is known by its content: another byte anywhere is other work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import once
import pytest
from folders import repack
from places import TINY

from passes import MergeEmbeddings, RenameIO
from passes.base import apply
from surgery.errors import ModelError
from surgery.graph.model import Model
from surgery.runtime.genai import GenAI
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
    monkeypatch.setenv("NAME", "a setting is no patch")
    assert session(pair[0]) is session(pair[0])
    monkeypatch.setattr("surgery.version.VERSION", "0")
    assert session(pair[0]) is not session(pair[0])
    with once.work_in_common():
        assert session(pair[0]) is session(pair[0])


def test_a_run_is_of_the_session_and_what_it_is_fed(pair: tuple[Path, Path]) -> None:
    embed, _ = pair

    def run(*ids: int) -> dict[str, Any]:
        return OpenGraph(embed, Settings()).run({"input_ids": np.array([ids])}, {})[0]

    first, again, other = run(5, 6), run(5, 6), run(5, 7)
    assert all(first[name] is again[name] is not other[name] for name in first)
    assert not np.array_equal(first["inputs_embeds"].numpy(), other["inputs_embeds"].numpy())
    flip(embed.with_name(f"{embed.name}_data"))
    assert run(5, 6)["inputs_embeds"] is not first["inputs_embeds"]


def test_who_writes_into_what_a_run_gave_is_told(pair: tuple[Path, Path]) -> None:
    given = {"input_ids": np.array([[7, 8]])}
    first = OpenGraph(pair[0], Settings()).run(given, {})[0]["inputs_embeds"]
    held = first.numpy()
    held += 1
    with pytest.raises(ModelError, match="somebody wrote into what a run gave"):
        OpenGraph(pair[0], Settings()).run(given, {})
    held -= 1


def test_tokens_of_genai_are_of_every_file_of_a_folder(tmp_path: Path) -> None:
    folder = repack(TINY, tmp_path / "out", "fp32").folder
    first, again = GenAI(folder, "cpu"), GenAI(folder, "cpu")
    assert first._model is again._model and again.tokenizer().encode("hello") is not None
    tokens = first.generate([[2, 9, 33]], 0, 8)
    assert again.generate([[2, 9, 33]], 0, 8) == tokens != again.generate([[2, 9, 34]], 0, 8)
    assert first.ends_with(5, 1) and not first.ends_with(5, 5)
    config = folder / "genai_config.json"
    config.write_text(config.read_text().replace('"eos_token_id": [', f'"eos_token_id": [{tokens[0][2]},'))
    other = GenAI(folder, "cpu")
    assert other._model is not first._model
    assert other.generate([[2, 9, 33]], 0, 8) == [tokens[0][: tokens[0].index(tokens[0][2])]]
