"""The model card: metadata that the Hub reads, provenance, licence; and its Python example is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from folders import planned
from huggingface_hub import ModelCard
from limits import cpu_limit
from places import ROOT, TINY

import fixtures
from passes.presets import compatible, fast
from passes.recipe import Recipe, recipe_text
from surgery.choices import Target
from surgery.files.safe_reading import sha256
from surgery.folder.building import build_folder
from surgery.folder.minimum_versions import minimum_versions
from surgery.folder.model_card import model_card, on_level, read_told
from surgery.folder.text_only import build_text_only
from surgery.graph.weight_writing import Placed
from surgery.source.export import Export, open_export

REPO, COMMIT = "onnx-community/gemma-4-E2B-it-ONNX", "9f4bef82" + "0" * 32
PLACED = [Placed("model.onnx_data", 12345, "copied", "ab" * 32), Placed("other.onnx_data", 7, "linked", None)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    export = replace(open_export(TINY), repo=REPO, revision=COMMIT)
    pair, out = export.pair("q4"), tmp_path_factory.mktemp("cards")
    recipe = compatible(pair.embed)
    build_folder(export, pair, recipe, out / "genai", recipe_text=recipe_text(recipe))
    build_text_only(export, pair, out / "two-graph")
    return {"genai": out / "genai", "two-graph": out / "two-graph"}


def of(export: Export, **changed: object) -> ModelCard:
    return ModelCard(model_card(export, export.pair("q4"), "genai", PLACED, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind, library", [("genai", "onnxruntime-genai"), ("two-graph", "transformers.js")])
def test_the_hub_reads_the_metadata(folders: dict[str, Path], kind: str, library: str) -> None:
    data = ModelCard.load(folders[kind] / "README.md").data
    assert (data.base_model, data.base_model_relation) == (REPO, "quantized")
    assert (data.library_name, data.pipeline_tag) == (library, "text-generation")
    assert data.tags == ["onnx", "gemma4", "gemma4-surgery"]


@pytest.mark.parametrize("kind", ["genai", "two-graph"])
def test_the_provenance_is_in_it(folders: dict[str, Path], kind: str) -> None:
    card = (folders[kind] / "README.md").read_text()
    for words in (f"| source | {REPO} |", f"| revision | {COMMIT} |", "| precision | q4 |", "| onnx "[2:]):
        assert words in card
    for data in folders[kind].rglob("*_data*"):
        assert (
            f"| `{data.relative_to(folders[kind]).as_posix()}` | {data.stat().st_size:,} | `{sha256(data)}` |" in card
        )
    assert ("| recipe | `merge-embeddings{embed=" in card) == (kind == "genai")
    assert "No weight was changed." in card


@pytest.mark.parametrize("kind", ["genai", "two-graph"])
def test_the_python_example_runs_in_the_folder(folders: dict[str, Path], kind: str) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (folders[kind] / "README.md").read_text(), re.S)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=folders[kind], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "made, target, multimodal, needs",
    [
        (compatible, "genai-0.14", False, "onnxruntime-genai 0.14 or later."),
        (compatible, "genai-0.12", False, "onnxruntime-genai 0.12 or later."),
        (compatible, "genai-0.14", True, "onnxruntime-genai 0.15 or later."),
        (fast, "genai-0.14", False, "onnxruntime-genai 0.14 and onnxruntime 1.31, or later versions of both."),
        (partial(fast, onnxruntime="1.27"), "genai-0.14", False, "onnxruntime 1.27, or later versions of both."),
        (partial(fast, provider="cuda"), "genai-0.14", False, "onnxruntime 1.31, or later versions of both."),
    ],
)
def test_the_oldest_runtimes_are_read_from_the_graph(
    made: Callable[[Path], Recipe], target: Target, multimodal: bool, needs: str
) -> None:
    model, _ = planned(TINY, "q4", made)
    assert str(minimum_versions(model, target, multimodal=multimodal)).endswith(needs)


def test_kv_heads_that_differ_need_a_newer_runtime(tmp_path: Path) -> None:
    fixtures.build("tiny-31b", "q4", tmp_path / "export")
    model, _ = planned(tmp_path / "export")
    assert minimum_versions(model, "genai-0.14", multimodal=False).genai == "0.15"


def test_tables_of_two_bits_need_a_newer_onnxruntime(tmp_path: Path) -> None:
    fixtures.build("tiny-e2b-qat", "q2f16", tmp_path / "export")
    model, _ = planned(tmp_path / "export", "q2f16")
    said = "onnxruntime-genai 0.14 and onnxruntime 1.27, or later versions of both."
    assert str(minimum_versions(model, "genai-0.14", multimodal=False)).endswith(said)


def test_the_card_says_which_runtimes(folders: dict[str, Path]) -> None:
    assert "It needs onnxruntime-genai 0.14 or later." in (folders["genai"] / "README.md").read_text()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("rename-io", ""),
        ("set-accuracy-level{level=1}", ""),
        ("rename-io,set-accuracy-level{products=slow}", " On the CPU its products of 2 or 8 bits multiply in int8"),
        ({"decoder_model_merged": "set-accuracy-level"}, " On the CPU its quantised products multiply in int8"),
    ],
)
def test_the_card_says_that_products_multiply_in_int8(recipe: str | dict[str, str], said: str) -> None:
    assert on_level(recipe).startswith(said) and bool(on_level(recipe)) is bool(said)


def test_the_csharp_example_calls_what_the_python_one_does(folders: dict[str, Path]) -> None:
    card = (folders["genai"] / "README.md").read_text()
    (example,) = re.findall(r"```csharp\n(.*?)```", card, re.S)
    calls = re.findall(
        r"\b(?:new )?(Model|Tokenizer|CreateStream|ApplyChatTemplate|Encode|GeneratorParams|Generator)\(", example
    )
    assert calls == [
        "Model",
        "Tokenizer",
        "CreateStream",
        "ApplyChatTemplate",
        "Encode",
        "GeneratorParams",
        "Generator",
    ]
    assert example.count("{") == example.count("}") and '"max_length", 256' in example


def test_it_is_the_manifest_s_and_does_not_depend_on_the_place(folders: dict[str, Path], tmp_path: Path) -> None:
    export = replace(open_export(Path(shutil.copytree(TINY, tmp_path / "elsewhere"))), repo=REPO, revision=COMMIT)
    build_text_only(export, export.pair("q4"), tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == (folders["two-graph"] / "README.md").read_bytes()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def source_with(tmp_path: Path, **files: str) -> Export:
    folder = Path(shutil.copytree(TINY, tmp_path / "source", ignore=shutil.ignore_patterns("*fp16*")))
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(content)
    return open_export(folder)


def test_the_source_s_own_card_tells_licence_and_origin(tmp_path: Path) -> None:
    told = "---\nlicense: gemma\nlicense_link: https://ai.google.dev/gemma/terms\nbase_model: google/gemma-4-E2B-it\n---\n# x\n"
    export = source_with(tmp_path, README_md=told)
    data = of(export).data
    assert (data.license, data.license_link) == ("gemma", "https://ai.google.dev/gemma/terms")
    assert data.base_model == "google/gemma-4-E2B-it", "of a local source"
    assert of(replace(export, repo=REPO)).data.base_model == REPO
    assert "The source's: gemma" in of(export).text


def test_a_licence_s_text_is_recognized_and_linked(tmp_path: Path) -> None:
    card = of(source_with(tmp_path, LICENSE_txt=(ROOT / "LICENSE").read_text()))
    assert card.data.license == "apache-2.0" and "apache-2.0, as the source's: [LICENSE.txt](LICENSE.txt)" in card.text
    (tmp_path / "source" / "LICENSE.txt").write_text("All rights reserved")
    card = of(open_export(tmp_path / "source"))
    assert card.data.license is None and "The source's: [LICENSE.txt](LICENSE.txt)" in card.text


@pytest.mark.parametrize(
    "content", ["---\n: [\n---\n", "---\n- a\n- b\n---\n", "no metadata", "---\nlicense: [1]\n---\n", ""]
)
def test_a_damaged_card_of_the_source_says_nothing(tmp_path: Path, content: str) -> None:
    card = of(source_with(tmp_path, README_md=content))
    assert card.data.license is None and card.data.base_model is None
    assert "The source names none." in card.text


def test_rewritten_weights_are_told_and_links_have_no_digest() -> None:
    card = of(open_export(TINY), rewritten=True).text
    assert "Some weights were rewritten" in card
    assert "| `other.onnx_data` | 7 | linked |" in card


def test_a_folder_of_images_and_sound_is_another_task() -> None:
    card = of(open_export(TINY), modalities=("image", "audio"), recipe={"text": "rename-io", "embedding": "x{y=z}"})
    assert card.data.pipeline_tag == "any-to-any" and "It takes text and image and audio." in card.text
    assert "| recipe of text | `rename-io` |" in card.text and "| recipe of embedding | `x{y=z}` |" in card.text
    assert of(open_export(TINY), modalities=("image",)).data.pipeline_tag == "image-text-to-text"


@pytest.mark.parametrize("key", ["license", "license_name", "license_link", "language", "base_model"])
def test_metadata_of_a_stranger_is_taken_in_its_own_form_alone(key: str, tmp_path: Path) -> None:
    """Not what turns the direction of a line, links to a script, or is a list of lists that doubles at each step."""
    bomb = "".join(f"a{step}: &a{step} [{', '.join([f'*a{step - 1}'] * 9)}]\n" for step in range(1, 12))
    export = source_with(tmp_path, README_md="")
    for evil in ('"a\\u202eb"', '"javascript:alert(1)"', '"@octocat"', '"a\\nb: c"', "*a11", "[[a]]", "{a: b}", "12"):
        (export.root / "README.md").write_text(f"---\na0: &a0 [x]\n{bomb}{key}: {evil}\n---\n")
        with cpu_limit(5):
            assert key not in read_told(export).metadata, evil


@pytest.mark.parametrize(
    "text", ["---\n" + "\n" * 400_000, "---\n" + "- a\n" * 200_000 + "---\n", "---\n" + "[" * 60_000]
)
def test_a_card_that_has_no_end_is_no_work(text: str, tmp_path: Path) -> None:
    export = source_with(tmp_path, README_md=text)
    with cpu_limit(5):
        assert read_told(export).metadata == {}


def test_what_a_stranger_wrote_is_text(tmp_path: Path) -> None:
    """A licence, a location and a revision that would be markup, a row of the table, a mention."""
    shutil.copytree(TINY, tmp_path / "source")
    evil = "x](y) | <img src=z> @octocat #1 `a` \\| b"
    (tmp_path / "source" / "README.md").write_text(f"---\nlicense: {json.dumps(evil)}\n---\n")
    export = replace(open_export(tmp_path / "source"), revision=evil)
    card = model_card(export, export.pair("q4"), "genai", [Placed(evil, 1, "copied", None)], recipe=evil)
    body = card.split("---\n", 2)[2]
    assert "<img" not in re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", body)
    assert not re.search(r"(?<!`)@octocat|#1", re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", body))
    rows = [line for line in body.splitlines() if line.startswith("| ") and "octocat" in line]
    assert len(rows) == 3
    for row in rows:
        cells = re.sub(r"\\.", "", row).count("|") - 1
        assert cells == (3 if "linked" in row else 2), row
