"""What an untrusted GenAI folder may tell the runtime: nothing runs, loads or writes before it is known to be harmless."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from folders import repack
from places import TINY
from signing import sign

from surgery.errors import FolderError, SurgeryError
from surgery.folder.admission import admit
from surgery.runtime.benchmark import measure
from surgery.runtime.conversation import ChatSettings, Turn, open_conversation
from surgery.runtime.genai import GenAI, open_tokenizer
from surgery.verify import Request, prove_folder
from surgery.verify.prompts import Case

REQUEST = Request(cases=[Case("short", "a short prompt", ((2, 10, 77, 31),))], tokens=2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(TINY, tmp_path_factory.mktemp("sound") / "out").folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "place" / "out"))


def write_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    change(config)
    (folder / "genai_config.json").write_text(json.dumps(config))


def put(place: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *path, last = place.split("/")
        for part in path:
            config = config.setdefault(part, {})
        config[last] = value

    return change


def generated(folder: Path) -> list[str]:
    return [piece.text for piece in open_conversation(folder, ChatSettings(2)).answer(Turn("hello"))]


def measured(folder: Path) -> object:
    return measure(folder, None, contexts=[4], new_tokens=2)


def validated(folder: Path) -> None:
    sign(folder)
    report = prove_folder(folder, None, request=REQUEST)
    if not report.passed:
        assert {gate.section for gate in report.gates if gate.passed} <= {"manifest", "structure"}, "it ran"
        raise FolderError(str(report.failed))


WAYS = (
    generated,
    measured,
    validated,
    lambda folder: GenAI(folder, "cpu"),
    lambda folder: open_tokenizer(folder, "cpu"),
)
OPTIONS = "model/decoder/session_options"


@pytest.mark.parametrize("way", WAYS)
def test_a_sound_folder_is_admitted(way: Callable[[Path], object], folder: Path) -> None:
    assert admit(folder)["model"]["type"] == "gemma4_text"
    way(folder)


@pytest.mark.parametrize("way", WAYS)
def test_no_session_option_writes_a_file(way: Callable[[Path], object], folder: Path, tmp_path: Path) -> None:
    write_config(folder, put(f"{OPTIONS}/session.optimized_model_filepath", str(tmp_path / "written.onnx")))
    write_config(folder, put(f"{OPTIONS}/enable_profiling", str(tmp_path / "profile")))
    with pytest.raises(SurgeryError, match="optimized_model_filepath is not among the known settings"):
        way(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to make a library")
def test_no_library_is_loaded(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: a library that is loaded stays."""
    code = (
        f'#include <stdio.h>\n__attribute__((constructor)) void go(void) {{ fclose(fopen("{tmp_path}/ran", "w")); }}\n'
    )
    (tmp_path / "evil.c").write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "evil.so", tmp_path / "evil.c"], check=True)
    write_config(folder, put(f"{OPTIONS}/custom_ops_library", "evil.so"))
    sign(folder)
    for words in (("generate", folder, "hello"), ("validate", folder), ("bench", folder, "--contexts", "4")):
        done = run(*words)
        assert done.returncode in (1, 2) and "custom_ops_library is not among the known settings" in " ".join(
            (done.stdout + done.stderr).split()
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (f"{OPTIONS}/custom_ops_library", "evil.so"),
        (f"{OPTIONS}/enable_profiling", "/tmp/profile"),
        (f"{OPTIONS}/session.model_external_initializers_file_folder_path", "/etc"),
        (f"{OPTIONS}/session.unknown", "1"),
        (f"{OPTIONS}/ep.context_file_path", "x"),
        (f"{OPTIONS}/intra_op_num_threads", 10**6),
        (f"{OPTIONS}/intra_op_num_threads", -1),
        (f"{OPTIONS}/log_id", "\x1b[31m"),
        (f"{OPTIONS}/session.layer_assignment_settings", "gpu(=x)"),
        (f"{OPTIONS}/graph_optimization_level", {"a": 1}),
        (f"{OPTIONS}/provider_options", [{"QNN": {"backend_path": "evil.so"}}]),
        (f"{OPTIONS}/provider_options", [{"cuda": {"gpu_external_alloc": "1234"}}]),
        (f"{OPTIONS}/provider_options", [{"cuda": {"enable_cuda_graph": ["0"]}}]),
        (f"{OPTIONS}/provider_options", {"cuda": {}}),
        (OPTIONS, "evil.so"),
        ("model/decoder/run_options", {"gpu_graph_id": "1"}),
        ("model/decoder/pipeline", [{"x": {"filename": "y.onnx"}}]),
        ("model/decoder/sliding_window", {"window_size": 4}),
        ("model/decoder/filename", "/etc/model.onnx"),
        ("model/decoder/filename", "../out/model.onnx"),
        ("model/decoder/filename", "model.onnx\0/../../evil.onnx"),
        ("model/decoder/filename", ".hidden.onnx"),
        ("model/decoder/filename", "model.ort"),
        ("model/decoder/filename", ["model.onnx"]),
        ("model/decoder/inputs/past_key_names", "past_key_values.%d.%s"),
        ("model/decoder/inputs/past_key_names", "%n%d"),
        ("model/decoder/inputs/past_key_names", "%9999999d"),
        ("model/decoder/outputs/logits", "%s%s%s"),
        ("model/decoder/outputs/unknown", "logits"),
        ("model/vision/filename", "../x.onnx"),
        ("model/vision/config_filename", "../x.json"),
        ("model/vision/adapter_filename", "x.onnx"),
        ("model/vision/session_options/custom_ops_library", "evil.so"),
        ("model/speech/session_options/custom_ops_library", "evil.so"),
        ("model/embedding/session_options/custom_ops_library", "evil.so"),
        ("model/encoder/filename", "x.onnx"),
        ("model/draft/filename", "x.onnx"),
        ("model/tokenizer_dir", "/etc"),
        ("model/vocab_size", float(2**60)),
        ("search/unknown", 1),
        ("search/top_k", "9"),
        ("engine/dynamic_batching", {}),
        ("speculative/draft", "x.onnx"),
    ],
)
def test_what_is_not_known_is_refused(place: str, value: object, folder: Path) -> None:
    write_config(folder, put(place, value))
    with pytest.raises(FolderError, match="is not given to the runtime: genai_config.json: " + place.split("/")[0]):
        admit(folder)


def test_a_key_that_is_there_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    """Python takes the last one, the runtime does what each of them says: it wrote the file."""
    text = (folder / "genai_config.json").read_text()
    twice = f'"session_options": {{"session.optimized_model_filepath": "{tmp_path}/written.onnx"}}, "session_options"'
    (folder / "genai_config.json").write_text(text.replace('"session_options"', twice))
    with pytest.raises(FolderError, match="holds the key 'session_options' twice"):
        generated(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.mark.parametrize(
    "name", ["model.onnx", "tokenizer.json", "chat_template.jinja", "genai_config.json", "further"]
)
def test_a_link_that_leads_out_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(FolderError, match=f"{name} is a link that leads out of the folder"):
        admit(folder)


def test_a_folder_that_leads_out_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    shutil.copyfile(folder / "model.onnx", tmp_path / "outside" / "model.onnx")
    (folder / "onnx").symlink_to(tmp_path / "outside")
    write_config(folder, put("model/decoder/filename", "onnx/model.onnx"))
    with pytest.raises(FolderError, match="onnx is a link that leads out of the folder"):
        admit(folder)


def test_a_fifo_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(FolderError, match=r"tokenizer\.json is not a regular file"):
        generated(folder)


def test_a_tokenizer_that_is_told_where_to_look_is_refused(folder: Path) -> None:
    (folder / "tokenizer_module.json").write_text("{}")
    with pytest.raises(FolderError, match="leads the tokenizer to other files"):
        admit(folder)


@pytest.mark.parametrize(
    "operation",
    [
        {"name": "load", "type": "CustomOp"},
        {"name": "decode", "type": "DecodeImage", "attrs": {"path": "/etc/passwd"}},
        {"name": "decode", "type": "DecodeImage", "attrs": {"color_space": "/etc/passwd"}},
    ],
)
def test_a_processor_of_another_form_is_refused(operation: object, folder: Path) -> None:
    write_config(folder, put("model/vision/config_filename", "image_processor.json"))
    processor = {"processor": {"name": "x", "transforms": [{"operation": operation}]}}
    (folder / "image_processor.json").write_text(json.dumps(processor))
    with pytest.raises(FolderError, match=r"image_processor.json: processor.transforms\[0\].operation"):
        admit(folder)


def test_data_outside_is_refused_before_a_session(folder: Path) -> None:
    from surgery.graph.external_data import set_location, tensors
    from surgery.graph.model import Model

    model = Model.open(folder / "model.onnx")
    for tensor in tensors(model.proto):
        if tensor.external_data:
            set_location(tensor, "../../outside.onnx_data")
    (folder / "model.onnx").write_bytes(model.proto.SerializeToString())
    with pytest.raises(SurgeryError, match="leads out of the model's folder"):
        generated(folder)


def test_a_folder_that_is_not_what_was_written_is_not_run(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    report = prove_folder(folder, None, request=REQUEST)
    assert {gate.section for gate in report.gates if gate.passed} == {"structure"}
    assert [gate.name for gate in report.failed] == ["files are what was written", "generation"]
