"""The command line as a user meets it: what goes to stdout and stderr, exit codes, and sentences for mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from places import ROOT, TINY
from signing import sign


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repacked") / "out"
    done = run("repack", str(TINY), str(out), "--precision", "q4f16", "--ep", "cpu")
    assert done.returncode == 0, done.stderr
    return out


def test_repack_talks_on_stderr_and_answers_on_stdout(tmp_path: Path) -> None:
    done = run("repack", str(TINY), "out", "--ep", "cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["precision"] == "q4" and answer["proof"]["passed"] is True
    assert answer["passes"][0]["pass"] == "merge-embeddings"
    assert "precision  q4: the best of fp32, fp16, q4, q4f16, quantized for cpu" in done.stderr


def test_repack_says_what_each_layout_costs(tmp_path: Path) -> None:
    done = run("repack", str(TINY), "out", "--kv-layout", "unique", "--no-validate", "--ep", "cpu", "-v", cwd=tmp_path)
    assert "  KV caches aliased: 10 pairs, 1.54 kB per token" in done.stdout
    assert "* KV caches unique: 5 pairs, 768 bytes per token" in done.stdout


def test_two_explicit_files_are_repacked(tmp_path: Path) -> None:
    graphs = TINY / "onnx"
    embed, decoder = graphs / "embed_tokens_fp16.onnx", graphs / "decoder_model_merged_fp16.onnx"
    given = ("--embed", str(embed), "--decoder", str(decoder))
    done = run("repack", str(TINY), "out", *given, "--ep", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.onnx_data").is_file()


def test_validate_finds_the_source_precision_and_passes(folder: Path) -> None:
    done = run("validate", str(folder), "--against", str(TINY), "--ep", "cpu", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"max \|difference\| 0, at most 0: \d+ cases", done.stdout)


def test_validate_fails_with_exit_code_one(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    data = bytearray((broken / "model.onnx_data_1").read_bytes())
    data[:64] = bytes(64)
    (broken / "model.onnx_data_1").write_bytes(data)
    for wrong in ("files are what was written", "logits"):
        done = run("validate", str(broken), "--against", str(TINY), "--ep", "cpu", "--quick", "--json")
        assert done.returncode == 1
        assert wrong in {gate["name"] for gate in json.loads(done.stdout)["gates"] if not gate["passed"]}
        sign(broken)


def test_a_failing_proof_keeps_the_folder_from_appearing(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    done = run("repack", str(source), "out", "--ep", "cpu", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAIL" in done.stdout and "a gate failed, so the folder was not written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("what", ["export", "folder", "file"])
def test_inspect_shows_layers_and_bytes(what: str, folder: Path) -> None:
    path = {"export": TINY, "folder": folder, "file": folder / "model.onnx"}[what]
    shown = run("inspect", str(path))
    assert shown.returncode == 0, shown.stderr
    assert "reads 3's" in shown.stdout and "External data" in shown.stdout
    assert json.loads(run("inspect", str(path), "--json").stdout)


def test_apply_runs_single_passes(tmp_path: Path) -> None:
    source = TINY / "onnx" / "decoder_model_merged_q4.onnx"
    done = run("apply", "fold-logits-to-keep{keep=all},annotate-head-sizes", str(source), "out.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "- num_logits_to_keep" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.onnx_data"]


def test_generate_takes_two_graphs_too() -> None:
    done = run("generate", str(TINY), "hello", "--new-tokens", "5", "--precision", "fp16")
    assert done.returncode == 0 and done.stdout.strip()
    names = "embed_tokens_fp16.onnx and decoder_model_merged_fp16.onnx"
    assert done.stderr.startswith(f"runs       {TINY} in two sessions of onnxruntime: {names}\ntook       ")


DECODER = str(TINY / "onnx" / "decoder_model_merged_q4.onnx")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("repack", "nowhere", "out"), "nowhere does not exist"),
        (("repack", str(TINY), "out", "--precision", "q4f61"), "did you mean 'q4f16'?"),
        (("repack", str(TINY), "."), "exists"),
        (("repack", str(TINY), "out", "--embed", "x.onnx"), "--embed and --decoder belong together"),
        (("repack", str(ROOT / "tests"), "out"), "has no .onnx file"),
        (("validate", "nowhere"), "nowhere has no genai_config.json"),
        (("inspect", "nowhere"), "nowhere does not exist"),
        (("apply", "rename-oi", "a.onnx", "b.onnx"), "no pass is named 'rename-oi' (did you mean 'rename-io'?)"),
        (("apply", "rename-io", "a.onnx", "b.onnx"), "a.onnx does not exist"),
        (("apply", "merge-embeddings", "a.onnx", "b.onnx"), "merge-embeddings needs the option embed=VALUE"),
        (("generate", "nowhere", "hello"), "nowhere does not exist"),
        (("apply", 'merge-embeddings{embed="\\ud800"}', DECODER, "b.onnx"), r"error: '\ud800' is not Unicode"),
        (("apply", "rename-io", DECODER, "b\udcff.onnx"), r"error: '\udcff' is not Unicode"),
        (("generate", str(TINY), "\udcff"), r"error: '\udcff' is not Unicode"),
        (("inspect", "n" * 5000), "File name too long"),
        (("apply", "rename-io", DECODER, "n" * 5000), "File name too long"),
        (("generate", "n" * 5000, "hello"), "File name too long"),
        (("generate", str(ROOT / "tests"), "hello"), "has neither genai_config.json nor two graphs"),
    ],
    ids=lambda value: ascii(" ".join(value[:2]))[1:40] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_two(words: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path)
    told = done.stderr + done.stdout
    assert done.returncode == 2, told
    assert sentence in told and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_a_provider_that_is_not_here_is_one_sentence_and_the_way_round_it(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    refused = run("repack", str(TINY), "out", "--ep", "cuda", cwd=tmp_path)
    assert refused.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "has no CUDA provider" in refused.stderr and "--no-validate writes the folder unproven" in refused.stderr
    written = run("repack", str(TINY), "out", "--ep", "cuda", "--no-validate", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    settings = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert settings["provider_options"] == [{"cuda": {}}]


def test_usage_errors_are_exit_code_two() -> None:
    assert run("repack").returncode == 2
    assert run("--no-such-option").returncode == 2


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = "onnx", "onnxruntime", "onnx_graphsurgeon", "onnxruntime_genai", "huggingface_hub"
    code = f"import sys, cli; print(sorted(set(sys.modules) & set({heavy!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
