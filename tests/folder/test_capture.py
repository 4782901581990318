"""CUDA graph capture: which folders switch it on, what a graph answers under it, and what the proof admits.

Without a GPU nothing is captured. What capture does to a graph's inputs is done on the CPU: buffers that stay, and a
mask as wide as the caches (validation.cuda.fixed_buffers).
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from folders import repack
from places import TINY

from passes import DropAttentionBias, ExpandSharedKV, FoldLogitsToKeep, HostEmbeddings
from passes.presets import compatible, fast
from passes.recipe import Recipe
from surgery.folder.building import plan
from surgery.folder.genai_config import genai_config
from surgery.folder.opened import open_genai_folder
from surgery.runtime import genai
from surgery.runtime.decoding import DecodeLoop
from surgery.runtime.genai import GenAI
from surgery.runtime.sessions import MergedModel, Settings
from surgery.source.export import open_export
from surgery.verify.configuration import SourceFiles, setting_faults
from surgery.verify.prompts import Case
from surgery.verify.recording import record
from validation.cuda.fixed_buffers import FixedBuffers

EXPORT = open_export(TINY)
PAIR = EXPORT.pair("q4f16")
QUICK = fast(PAIR.embed, "cuda")
ON, OFF = {"enable_cuda_graph": "1"}, {"enable_cuda_graph": "0"}
LONG = tuple(2 + 7 * n % 120 for n in range(48))
"""Longer than the window, which is 8 tokens."""
CASES = {
    "prompt": Case("prompt", "", ((2, 10, 77, 31),)),
    "one token": Case("one token", "", ((5,),)),
    "beyond the window": Case("beyond the window", "", (LONG,)),
    "in chunks": Case("in chunks", "", (LONG,), chunk=7),
}
STEPS, ROWS = 12, 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("capture") / "out"
    return repack(EXPORT, target, "q4f16", lambda embed: fast(embed, "cuda"), provider="cuda").folder


# What the graph answers


@pytest.mark.parametrize("name", CASES)
def test_fixed_buffers_and_a_wide_mask_change_no_number(name: str, folder: Path) -> None:
    plain = MergedModel(folder / "model.onnx", Settings("cpu"))
    fixed = FixedBuffers(folder / "model.onnx", "cpu", ROWS, caches=True)
    (wanted,) = record(plain, [CASES[name]], steps=STEPS).answers
    (found,) = record(fixed, [CASES[name]], steps=STEPS).answers
    for one, other in zip(wanted.steps, found.steps, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
    for slot, cache in wanted.caches.items():
        assert cache.digest == found.caches[slot].digest, slot


def test_a_row_that_is_taken_back_goes_on_as_it_would(folder: Path) -> None:
    loop = DecodeLoop(FixedBuffers(folder / "model.onnx", "cpu", ROWS), 1)
    (first,) = loop.prompt([LONG])
    for _ in range(5):
        first_again = loop.append(first.greedy())
    loop.begin(np.ones((1, len(LONG)), np.int64), {})  # what comes behind is still in the buffers
    np.testing.assert_array_equal(loop.append(first.greedy()).logits, _second(folder).logits)
    assert not np.array_equal(first_again.logits, _second(folder).logits)
    loop.begin(np.zeros((1, 0), np.int64), {})
    (again,) = loop.prompt([LONG])
    np.testing.assert_array_equal(again.logits, first.logits)


def _second(folder: Path) -> Any:
    loop = DecodeLoop(MergedModel(folder / "model.onnx", Settings("cpu")), 1)
    (first,) = loop.prompt([LONG])
    return loop.append(first.greedy())


# Which folders switch it on


RECIPES: dict[str, tuple[Recipe, dict[str, str]]] = {
    "fast": (QUICK, ON),
    "fast, every token": (tuple(FoldLogitsToKeep("all") if isinstance(s, FoldLogitsToKeep) else s for s in QUICK), ON),
    "compatible": (compatible(PAIR.embed), {}),
    "fast, tables on the host": ((*QUICK, HostEmbeddings()), {}),
    "fast, a bias as wide as the mask": (tuple(s for s in QUICK if not isinstance(s, DropAttentionBias)), {}),
    "fast, the embeddings apart": (QUICK[1:], {}),
    "fast, caches that are copied": ((*QUICK, ExpandSharedKV()), {}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_capture_is_on_where_it_is_foretold_to_work(name: str) -> None:
    recipe, options = RECIPES[name]
    model, _ = plan(PAIR, EXPORT, recipe)
    found = {provider: genai_config(model, EXPORT, provider)["model"]["decoder"] for provider in ("cpu", "cuda")}
    assert found["cuda"]["session_options"]["provider_options"] == [{"cuda": options}]
    assert found["cpu"]["session_options"]["provider_options"] == []
    shared = genai_config(model, EXPORT, "cuda")["search"]["past_present_share_buffer"]
    assert shared or not options, "GenAI captures over one buffer alone"


def test_older_runtimes_capture_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes of the caches."""
    monkeypatch.setattr("surgery.folder.genai_config._check_uniform", lambda model: None)
    model, _ = plan(PAIR, EXPORT, QUICK)
    found = genai_config(model, EXPORT, "cuda", "genai-0.12")["model"]["decoder"]["session_options"]
    assert found["provider_options"] == [{"cuda": {}}]


@pytest.mark.parametrize(("preset", "options", "admitted"), [
    ("fast", ON, True), ("fast", OFF, True), ("fast", {}, True), ("compatible", OFF, True), ("compatible", ON, False),
])  # fmt: skip
def test_the_proof_admits_capture_where_it_is_foretold_to_work(
    preset: str, options: dict[str, str], admitted: bool, folder: Path, tmp_path: Path
) -> None:
    if preset == "compatible":
        folder = repack(EXPORT, tmp_path / "out", "q4f16", provider="cuda").folder
    opened, source = open_genai_folder(folder), SourceFiles.read(EXPORT.root, PAIR)
    config = json.loads(json.dumps(opened.config))
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": options}]
    assert opened.config["model"]["decoder"]["session_options"]["provider_options"] == [
        {"cuda": ON if preset == "fast" else {}}
    ]
    opened.config.clear()
    opened.config.update(config)
    faults = list(setting_faults(opened, source, "cuda"))
    assert (not faults) is admitted, faults


def test_several_rows_are_run_without_capture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_options: list[tuple[str, ...]] = []

    class Config:
        def __init__(self, _: str) -> None:
            set_options.append(("opened",))

        def set_provider_option(self, *option: str) -> None:
            set_options.append(option)

        overlay = clear_providers = append_provider = lambda *_: None

    class Generator:
        def __init__(self, _: object, search: dict[str, Any]) -> None:
            self.rows: Any = None

        def append_tokens(self, rows: Any) -> None:
            self.rows = rows

        def is_done(self) -> bool:
            return True

        def get_sequence(self, row: int) -> list[int]:
            return [*self.rows[row], 7]

    class GeneratorParams(dict[str, Any]):
        def __init__(self, _: object) -> None:
            super().__init__()

        set_search_options = dict.update

    runtime = SimpleNamespace(Config=Config, Model=object, Generator=Generator, GeneratorParams=GeneratorParams)
    runtime.Model = lambda config: config
    monkeypatch.setattr(genai, "load_genai", lambda _: runtime)
    model = GenAI(folder, "cuda")
    assert model.generate([[2, 3]], 0, 1) == [[7]] and set_options == [("opened",)]
    assert model.generate([[2, 3], [4]], 0, 1) == [[7], [7]]
    assert set_options == [("opened",), ("opened",), ("cuda", "enable_cuda_graph", "0")]
