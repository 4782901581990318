"""strip: two graphs of one precision, byte for byte the source's, for two-session loops and transformers.js."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command_line import run as command
from folders import digests
from onnx import ModelProto
from places import TINY
from signing import sign

import fixtures
from passes.presets import compatible
from surgery.errors import ExportError, FolderError, SurgeryError, WeightError
from surgery.folder.building import build_folder
from surgery.folder.manifest import faults
from surgery.folder.text_only import Stripped, build_text_only
from surgery.runtime.sampling import Sampling
from surgery.runtime.two_graphs import open_two_graphs
from surgery.source.export import open_export
from surgery.verify.source_files import two_graph_file_gate
from surgery.verify.two_graph_proof import validate_two_graphs

PRECISIONS = ("fp32", "fp16", "q4", "q4f16", "quantized")


def run(target: Path, precision: str = "q4", source: Path = TINY, **options: object) -> Stripped[object]:
    export = open_export(source)
    return build_text_only(export, export.pair(precision), target, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_two_graphs_are_the_source_s_byte_for_byte(precision: str, tmp_path: Path) -> None:
    result = run(tmp_path / "out", precision)
    pair = open_export(TINY).pair(precision)
    graphs = [pair.embed.name, pair.decoder.name]
    wanted = {f"onnx/{name}{tail}" for name in graphs for tail in ("", "_data")}
    found, theirs = digests(tmp_path / "out"), digests(TINY)
    assert {name for name in found if name.startswith("onnx/")} == wanted
    assert all(found[name] == theirs[name] for name in wanted)
    assert [file.location for file in result.placed] == [f"onnx/{name}_data" for name in graphs]
    assert not list(faults(tmp_path / "out"))


def test_the_configuration_is_what_transformers_js_looks_for(tmp_path: Path) -> None:
    """As modeling_auto.js, configs.js and session_config.js of 4.3.1 read it."""
    run(tmp_path / "out", "quantized")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gemma4" and config["architectures"] == ["Gemma4ForConditionalGeneration"]
    source = json.loads((TINY / "config.json").read_text())
    assert config["text_config"] == source["text_config"]
    promoted = {key: value for key, value in source["text_config"].items() if key not in source}
    assert promoted.items() <= config.items() and config["num_hidden_layers"] == 10
    assert not {"vision_config", "audio_config"} & config.keys()
    assert config["transformers.js_config"] == {
        "dtype": "q8",
        "kv_cache_dtype": {},
        "use_external_data_format": {"decoder_model_merged_quantized.onnx": 1, "embed_tokens_quantized.onnx": 1},
    }
    half = run(tmp_path / "half", "q4f16").folder
    assert json.loads((half / "config.json").read_text())["transformers.js_config"]["kv_cache_dtype"] == {
        "q4f16": "float16"
    }


def test_of_images_and_sound_nothing_is_left(tmp_path: Path) -> None:
    result = run(tmp_path / "out")
    names = " ".join(digests(tmp_path / "out"))
    assert not any(word in names for word in ("vision", "audio", "processor"))
    assert "processor_class" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "onnx/vision_encoder_q4.onnx" in result.left_out
    taken = {path.name for path in (tmp_path / "out").rglob("*")}
    assert set(result.left_out) == {name for name in digests(TINY) if Path(name).name not in taken}


def test_licences_are_handed_over(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE.txt").write_text("the licence\n")
    (source / "NOTICE").write_text("the notice\n")
    run(tmp_path / "out", source=source)
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "the licence\n"
    assert (tmp_path / "out" / "NOTICE").read_text() == "the notice\n"


def test_it_answers_through_surgery_pair_as_the_source_does(tmp_path: Path) -> None:
    run(tmp_path / "out")
    answers = [
        list(open_two_graphs(one, "q4").answer("hello", new_tokens=12, sampling=Sampling()))
        for one in (TINY, tmp_path / "out")
    ]
    assert answers[0] == answers[1] and "".join(answers[0])


def test_it_is_a_source_of_the_same_folder(tmp_path: Path) -> None:
    run(tmp_path / "stripped")
    made = []
    for name, source in (("one", TINY), ("two", tmp_path / "stripped")):
        export = open_export(source)
        pair = export.pair("q4")
        build_folder(export, pair, compatible(pair.embed), tmp_path / name)
        made.append(digests(tmp_path / name))
    assert made[0] == made[1]
    again = run(tmp_path / "again", source=tmp_path / "stripped")
    assert set(again.left_out) == set()
    assert digests(tmp_path / "again") == digests(tmp_path / "stripped")


def test_a_text_model_s_config_becomes_the_family_s(source: Path, tmp_path: Path) -> None:
    text = json.loads((TINY / "config.json").read_text())["text_config"]
    (source / "config.json").write_text(json.dumps({**text, "architectures": ["Gemma4ForCausalLM"]}))
    run(tmp_path / "out", source=source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["text_config"]["model_type"]) == ("gemma4", "gemma4_text")
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert open_export(tmp_path / "out").architecture == open_export(TINY).architecture


def test_no_shared_layers_are_left_unsaid(tmp_path: Path) -> None:
    fixtures.build("tiny-31b", "q4", tmp_path / "source")
    run(tmp_path / "out", source=tmp_path / "source")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "num_kv_shared_layers" not in {*config, *config["text_config"]}
    assert open_export(tmp_path / "out").architecture == open_export(tmp_path / "source").architecture


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    assert digests(run(tmp_path / "one").folder) == digests(run(tmp_path / "two").folder)


def test_links_share_the_source_s_bytes(source: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", source=source, weights="link")
    assert {file.how for file in result.placed} == {"linked"}
    assert (tmp_path / "out" / "onnx" / "embed_tokens_q4.onnx_data").stat().st_nlink == 2


def test_the_proof_sees_a_graph_that_is_not_the_source_s(tmp_path: Path) -> None:
    run(tmp_path / "out")
    pair = open_export(TINY).pair("q4")
    assert validate_two_graphs(tmp_path / "out", pair, scope="light").passed
    data = tmp_path / "out" / "onnx" / "decoder_model_merged_q4.onnx_data"
    damaged = bytearray(data.read_bytes())
    damaged[1000] ^= 0x11
    data.write_bytes(damaged)
    failed = [gate.name for gate in validate_two_graphs(tmp_path / "out", pair, scope="light").failed]
    assert failed == ["files are what was written", "folder answers"], "nothing runs"
    failed = [gate.name for gate in validate_two_graphs(sign(tmp_path / "out"), pair, scope="light").failed]
    assert "logits" in failed


def test_the_proof_sees_files_that_are_not_the_source_s(tmp_path: Path) -> None:
    run(tmp_path / "out")
    pair = open_export(TINY).pair("q4")
    assert two_graph_file_gate(tmp_path / "out", pair, TINY).passed
    for name, key, value in (
        ("config", "bos_token_id", 3),
        ("generation_config", "top_k", 1),
        ("tokenizer_config", "bos_token", "x"),
    ):
        path = tmp_path / "out" / f"{name}.json"
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), key: value}))
        gate = two_graph_file_gate(tmp_path / "out", pair, TINY)
        assert not gate.passed and name in gate.detail
        path.write_text(before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["text_config"]["sliding_window"] = 9
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert "text_config.sliding_window is 9; 8 is expected" in two_graph_file_gate(tmp_path / "out", pair, TINY).detail


def test_a_check_that_fails_keeps_the_folder_from_appearing(tmp_path: Path) -> None:
    def check(stage: Path) -> None:
        assert (stage / "onnx" / "embed_tokens_q4.onnx").is_file()
        raise FolderError("no")

    with pytest.raises(FolderError, match="no"):
        run(tmp_path / "out", check=check)
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(FolderError, match="exists"):
        run(out)
    with pytest.raises(FolderError, match=r"holds mine, and no manifest\.json of this program"):
        run(out, force=True)
    shutil.rmtree(out)
    run(out)
    run(out, "q4f16", force=True)
    assert list(open_export(out).pairs) == ["q4f16"]
    with pytest.raises(FolderError, match="holds the source"):
        run(out, "q4f16", source=out, force=True)


def test_a_source_without_tokenizer_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        run(tmp_path / "out", source=source)
    (source / "onnx" / "embed_tokens_q4.onnx_data").write_bytes(b"short")
    with pytest.raises(SurgeryError):
        run(tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()


def test_a_missing_data_file_is_one_sentence(tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    (source / "onnx" / "embed_tokens_q4.onnx_data").unlink()
    with pytest.raises(WeightError, match=r"embed_tokens_q4\.onnx_data is missing: tensor .* stored in it"):
        run(tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()


def relocated(source: Path, graph: str, location: str) -> Path:
    """The export with another name for the data file of a graph."""
    path = source / "onnx" / f"{graph}.onnx"
    proto = ModelProto.FromString(path.read_bytes())
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    path.write_bytes(proto.SerializeToString())
    target = source / "onnx" / location
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copyfile(source / "onnx" / f"{graph}.onnx_data", target)
    return target


@pytest.mark.parametrize(
    "location", ["conftest.py", ".envrc", "handler.py", ".git/hooks/pre-commit", "sub/w.data", ".x.data", "config.json"]
)
def test_a_name_that_is_none_of_a_data_file_is_refused(location: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    relocated(source, "decoder_model_merged_q4", location)
    with pytest.raises(WeightError, match=r"stores weights in .*; a name such as model\.onnx_data is expected"):
        run(tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["copy", "link"])
def test_data_files_get_the_mode_of_data(weights: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    for path in (source / "onnx").glob("*_data"):
        path.chmod(0o4755)
    run(tmp_path / "out", source=source, weights=weights)
    assert all(path.stat().st_mode & 0o7111 == 0 for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_two_graphs_may_share_a_data_file_and_no_more_of_it_is_copied_than_is_used(tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    data = relocated(source, "decoder_model_merged_q4", "shared.onnx_data")
    with data.open("r+b") as file:
        file.write((source / "onnx" / "embed_tokens_q4.onnx_data").read_bytes())
    relocated(source, "embed_tokens_q4", "shared.onnx_data")
    size = data.stat().st_size
    os.truncate(data, 20 * 10**9)
    result = run(tmp_path / "out", source=source)
    assert [(entry.location, entry.size) for entry in result.placed] == [("onnx/shared.onnx_data", size)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["files"]["onnx/shared.onnx_data"]["from"] == "onnx/shared.onnx_data"


def test_the_command_proves_and_answers_in_json(tmp_path: Path) -> None:
    done = command("strip", str(TINY), "out", "--precision", "q4f16", "--ep", "cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["precision"] == "q4f16" and found["proof"]["passed"] is True
    assert found["weights"][0]["file"] == "onnx/embed_tokens_q4f16.onnx_data"
    assert "precision  q4f16: as asked for" in done.stderr
    answered = command("generate", "out", "hello", "--new-tokens", "3", cwd=tmp_path)
    assert answered.returncode == 0 and "two sessions" in answered.stderr


def test_a_dry_run_lists_what_would_be_written(tmp_path: Path) -> None:
    done = command("strip", str(TINY), "out", "--ep", "cpu", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = {entry["file"]: entry["size"] for entry in json.loads(done.stdout)["writes"]}
    assert list(tmp_path.iterdir()) == []
    run(tmp_path / "out")
    written = {name: (tmp_path / "out" / name).stat().st_size for name in digests(tmp_path / "out")}
    assert listed.keys() == written.keys()
    assert {name: size for name, size in listed.items() if size is not None}.items() <= written.items()
    assert "would be written" in command("strip", str(TINY), "out", "--ep", "cpu", "--dry-run", cwd=tmp_path).stdout
