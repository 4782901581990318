"""Folders that speculate: the tokens are those of the folder without, in fewer runs of the graph where a text repeats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import TINY

from surgery import RepackOptions, Report, repack
from surgery.errors import FolderError, RequestError
from surgery.folder.admission import admit
from surgery.folder.genai_config import CHUNK, SPECULATION
from surgery.folder.opened import open_genai_folder
from surgery.graph.model import Model
from surgery.runtime.genai import GenAI
from surgery.source.export import open_export
from surgery.verify.configuration import SourceFiles, setting_faults

FAST = {"preset": "fast", "precision": "fp32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """With speculation, and its proof; and without."""
    place = tmp_path_factory.mktemp("speculation")
    for speculative in (True, False):
        options = RepackOptions(**FAST, speculative=speculative, validate=speculative)  # type: ignore[arg-type]
        made = repack(TINY, place / str(speculative), options)
        assert not speculative or (isinstance(made.proof, Report) and made.proof.passed)
    return {speculative: place / str(speculative) for speculative in (True, False)}


def test_the_graph_and_the_configuration_suit_it(folders: dict[bool, Path]) -> None:
    config = admit(folders[True])
    assert config["speculative"] == SPECULATION and config["search"]["chunk_size"] == CHUNK
    assert "speculative" not in admit(folders[False])
    logits = next(value for value in Model.open(folders[True] / "model.onnx").graph.output if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[1].dim_param
    assert "onnxruntime-genai 0.18" in (folders[True] / "README.md").read_text()


def continued(genai: GenAI, ids: list[int], tokens: int) -> tuple[list[int], dict[str, Any]]:
    generator = genai.generator(do_sample=False, max_length=len(ids) + tokens)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]], generator.get_speculative_stats()


def test_its_tokens_are_those_without_in_fewer_runs(folders: dict[bool, Path]) -> None:
    with_it, without = (GenAI(folders[speculative], "cpu") for speculative in (True, False))
    made = runs = 0
    for seed in range(12):
        numbers = np.random.default_rng(seed)
        ids = [2, *(int(token) for token in numbers.integers(5, 120, 24))] * (1 + seed % 2)
        found, stats = continued(with_it, ids, 100)
        assert found == continued(without, ids, 100)[0]
        made += len(found)
        runs += stats["target_forward_passes"] + stats["standard_fallback_steps"]
    assert made > 2 * runs, "the small model says the same again and again"


def test_a_batch_is_run_without_it(folders: dict[bool, Path]) -> None:
    rows = [[2, 10, 77, 31], [2, 31, 77, 10]]
    batches = [GenAI(folder, "cpu").generate(rows, 0, 8) for folder in folders.values()]
    assert batches[0] == batches[1]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"preset": "compatible"}, "its caches have to be cut"),
        ({"recipe": "rename-io"}, "its caches have to be cut"),
        ({"modalities": ("image",)}, "GenAI speculates on text alone"),
        ({"provider": "cuda"}, "captured CUDA graphs"),
    ],
)
def test_what_does_not_go_with_it_is_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        RepackOptions(**{"preset": "fast", "speculative": True, **options})


def faults(folder: Path) -> list[str]:
    source = SourceFiles.read(TINY, open_export(TINY).pair("fp32"))
    return list(setting_faults(open_genai_folder(folder), source, "cpu"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("speculative", "max_draft_tokens", 16), ("speculative", "cooldown", False), ("search", "chunk_size", 512)],
)
def test_other_values_fail_the_proof(
    section: str, key: str, value: object, folders: dict[bool, Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folders[True], tmp_path / "copy"))
    config = json.loads((copied / "genai_config.json").read_text())
    config[section][key] = value
    (copied / "genai_config.json").write_text(json.dumps(config))
    assert any(fault.startswith(f"{section}.{key} is {value}") for fault in faults(copied))


def test_a_folder_whose_logits_are_of_the_last_token_must_not_say_so(folders: dict[bool, Path], tmp_path: Path) -> None:
    """GenAI would refuse the first turn: `pruned last-token-only logits are not supported`."""
    copied = Path(shutil.copytree(folders[False], tmp_path / "copy"))
    config = json.loads((copied / "genai_config.json").read_text())
    (copied / "genai_config.json").write_text(json.dumps({**config, "speculative": SPECULATION}))
    assert any(fault.startswith("speculative is {") for fault in faults(copied))


@pytest.mark.parametrize("settings", [{"library": "x.so"}, {"ngram_size": "4"}, {"cooldown": 3}])
def test_what_is_unknown_of_it_does_not_reach_the_runtime(
    settings: dict[str, object], folders: dict[bool, Path], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folders[True], tmp_path / "copy"))
    config = json.loads((copied / "genai_config.json").read_text())
    (copied / "genai_config.json").write_text(json.dumps({**config, "speculative": settings}))
    with pytest.raises(FolderError, match="speculative"):
        admit(copied)
