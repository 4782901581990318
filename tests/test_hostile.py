"""Damaged and hostile input: a SurgeryError in one printable line, or a sound result; nothing else, and nothing elsewhere.

Each case is one mutation of one file of an export (tests/mutation.py), by its number: the same number, the same case.
`pytest tests/test_hostile.py --mutations 10000` runs as many as there is time for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folders
import pytest
import small
from folders import digests, repack
from limits import TooLong, cpu_limit, memory_limit
from mutation import ESCAPE, mutated_json, mutated_model
from onnx import ModelProto, TensorProto
from places import ROOT, TINY

from passes.base import apply
from passes.presets import compatible
from surgery.choices import KVLayout
from surgery.errors import ArchitectureError, ExportError, ModelError, SurgeryError, WeightError
from surgery.folder.building import build_folder, plan
from surgery.folder.genai_config import genai_config
from surgery.folder.inspection import inspect
from surgery.folder.opened import open_genai_folder
from surgery.graph.definitions import check_definitions
from surgery.graph.model import Model
from surgery.source.export import open_export
from surgery.verify.structure import structure_gates

SECONDS = 5
"""Of CPU time: the longest that one case may take."""
MEMORY = 2 * 1024**3
"""Bytes of address space that a case may ask for, beyond what the process has."""
Way = Callable[[Path, random.Random], str]
"""What a case goes through; it returns what came of it, or raises SurgeryError."""
GRAPH, DATA = "onnx/decoder_model_merged_q4.onnx", "onnx/decoder_model_merged_q4.onnx_data"
LAYOUTS: tuple[KVLayout, ...] = ("aliased", "unique")


# A small export, and a place where everything outside of the target is watched


def externalised(proto: ModelProto, file: Path) -> ModelProto:
    """Move the larger initializers to a data file."""
    with file.open("wb") as writer:
        for tensor in proto.graph.initializer:
            if len(tensor.raw_data) < 256:
                continue
            offset, length = writer.tell(), writer.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", file.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    return proto


def write_export(folder: Path) -> Path:
    """An export of the smallest graphs, in the community's layout."""
    (folder / "onnx").mkdir(parents=True)
    for name, proto in (
        ("embed_tokens_q4.onnx", small.embed_tokens()),
        ("decoder_model_merged_q4.onnx", small.decoder()),
    ):
        data = folder / "onnx" / f"{name}_data"
        (folder / "onnx" / name).write_bytes(externalised(proto, data).SerializeToString())
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": small.CONFIG, **ids}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5], "do_sample": True, "top_k": 64}))
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(tmp_path / "source")


needs_limits = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux: memory is limited by address space"
)


# What each case goes through


def planned(folder: Path, rng: random.Random) -> str:
    """The passes and the configuration, in memory."""
    opened = open_export(folder)
    model, _ = folders.planned(opened, "q4", lambda embed: compatible(embed, rng.choice(LAYOUTS)))
    json.dumps(genai_config(model, opened), allow_nan=False)
    check_definitions(model.proto)
    return "sound"


def repacked(folder: Path, rng: random.Random) -> str:
    """The whole repack, its folder judged by the gates of the structure."""
    opened = open_export(folder)
    pair = opened.pair("q4")
    target = folder.parent / "out"
    weights: Any = rng.choice(["copy", "link", "consolidate"])
    recipe = compatible(pair.embed, rng.choice(LAYOUTS))
    try:
        build_folder(opened, pair, recipe, target, recipe_text="", weights=weights)
        gates = structure_gates(open_genai_folder(target))
        inspect(target).to_dict()
        for path in target.glob("*.json"):
            path.read_text(encoding="utf-8")
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return "sound" if all(gate.passed for gate in gates) else "refused by a gate"


def inspected(folder: Path, rng: random.Random) -> str:
    json.dumps(inspect(folder, "q4").to_dict())
    for name in ("embed_tokens_q4.onnx", "decoder_model_merged_q4.onnx"):
        inspect(folder / "onnx" / name).to_dict()
    return "sound"


def applied(folder: Path, rng: random.Random) -> str:
    """Each pass by itself, on the decoder as it is."""
    arch = small.arch()
    errors = 0
    for step in compatible(folder / "onnx" / "embed_tokens_q4.onnx"):
        model = Model.open(folder / "onnx" / "decoder_model_merged_q4.onnx", arch)
        try:
            changed, _ = apply(model, [step])
            check_definitions(changed.proto)
        except SurgeryError as error:
            assert_one_line(error)
            errors += 1
    return "refused by a pass" if errors else "sound"


WAYS: tuple[Way, ...] = (*[planned] * 5, repacked, inspected, applied)


def assert_one_line(error: SurgeryError) -> None:
    for text in (str(error), error.hint or "-"):
        assert text and text.isprintable() and len(text) < 20_000, ascii(text[:300])


@dataclass
class Trial:
    """Many cases on one export: what they came to, and the first case of each way to fail."""

    folder: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, data: bytes, label: str, rng: random.Random, ways: Sequence[Way] | None = None) -> None:
        path = self.folder / name
        kept = path.read_bytes()
        path.write_bytes(data)
        way = rng.choice(ways or WAYS)
        try:
            with cpu_limit(SECONDS):
                self.outcomes[way(self.folder, rng)] += 1
        except SurgeryError as error:
            self.outcomes["refused"] += 1
            with self._noting(label):
                assert_one_line(error)
        except (Exception, TooLong) as error:
            self._note(error, f"{label}, {way.__name__}")
        if path.read_bytes() != data:
            self.faults[f"{name} was changed"] = f"{label}, {way.__name__}"
        path.unlink()
        path.write_bytes(kept)
        found = sorted(entry.name for entry in self.folder.parent.iterdir())
        if found != [self.folder.name]:
            self.faults[f"files outside of the target: {found}"] = f"{label}, {way.__name__}"
            for other in set(found) - {self.folder.name}:
                shutil.rmtree(self.folder.parent / other)

    @contextlib.contextmanager
    def _noting(self, label: str) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            self._note(error, label)

    def _note(self, error: BaseException, label: str) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        self.faults.setdefault(f"{type(error).__name__} at {where}: {ascii(str(error))[:200]}", label)

    def verdict(self) -> None:
        assert not self.faults, "\n".join(f"{fault}  [{label}]" for fault, label in self.faults.items())
        assert 0 < self.outcomes["sound"] < self.outcomes.total(), self.outcomes


def cases(config: pytest.Config, share: float) -> int:
    return max(20, int(config.getoption("--mutations") * share))


@needs_limits
@pytest.mark.parametrize(
    "name, share",
    [("onnx/decoder_model_merged_q4.onnx", 0.5), ("onnx/embed_tokens_q4.onnx", 0.2)],
    ids=["decoder", "embed"],
)
def test_a_mutated_graph(name: str, share: float, export: Path, pytestconfig: pytest.Config) -> None:
    trial, whole, before = Trial(export), (export / name).read_bytes(), digests(export)
    with memory_limit(MEMORY):
        for number in range(cases(pytestconfig, share)):
            rng = random.Random(f"{name} {number}")
            kind, data = mutated_model(whole, rng)
            trial.run(name, data, f"{name} {number}: {kind}", rng)
    print(dict(trial.outcomes))
    trial.verdict()
    assert digests(export) == before


@needs_limits
@pytest.mark.parametrize(
    "name, share",
    [
        ("config.json", 0.15),
        ("generation_config.json", 0.07),
        ("tokenizer_config.json", 0.04),
        ("tokenizer.json", 0.02),
    ],
)
def test_mutated_json(name: str, share: float, export: Path, pytestconfig: pytest.Config) -> None:
    trial, value, before = Trial(export), json.loads((export / name).read_text()), digests(export)
    with memory_limit(MEMORY):
        for number in range(cases(pytestconfig, share)):
            rng = random.Random(f"{name} {number}")
            kind, data = mutated_json(value, rng)
            trial.run(name, data, f"{name} {number}: {kind}", rng, [repacked] if "tokenizer" in name else WAYS)
    print(dict(trial.outcomes))
    trial.verdict()
    assert digests(export) == before


@needs_limits
def test_the_committed_export_mutated(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """As large as exports of this kind are, with real quantised operators; slower by case, so fewer of them."""
    (tmp_path / "source" / "onnx").mkdir(parents=True)
    for path in (*TINY.glob("*"), *TINY.glob("onnx/*_q4.onnx*")):
        if path.is_file():
            shutil.copyfile(path, tmp_path / "source" / path.relative_to(TINY))
    trial = Trial(tmp_path / "source")
    name = "onnx/decoder_model_merged_q4.onnx"
    whole = (trial.folder / name).read_bytes()
    with memory_limit(MEMORY):
        for number in range(cases(pytestconfig, 0.02)):
            rng = random.Random(f"tiny {number}")
            kind, data = mutated_model(whole, rng)
            trial.run(name, data, f"tiny {number}: {kind}", rng)
    print(dict(trial.outcomes))
    trial.verdict()


def slice_bounds(proto: ModelProto) -> list[TensorProto]:
    (cut,) = [node for node in proto.graph.node if node.op_type == "Slice" and "logits" in node.name]
    return [tensor for tensor in proto.graph.initializer if tensor.name in cut.input[2:]]


def short_constant(proto: ModelProto) -> None:
    slice_bounds(proto)[0].raw_data = b""


def odd_constant(proto: ModelProto) -> None:
    slice_bounds(proto)[0].raw_data = b"\1\2\3"


def undefined_dtype(proto: ModelProto) -> None:
    proto.graph.initializer[0].data_type = TensorProto.UNDEFINED


def softmax_without_output(proto: ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "Softmax":
            del node.output[:]


def matmuls_with_one_operand(proto: ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "MatMul":
            del node.input[1:]


def default_for_the_mask(proto: ModelProto) -> None:
    proto.graph.initializer.add(name="attention_mask", data_type=TensorProto.INT64, raw_data=bytes(8))


def negation_without_output(proto: ModelProto) -> None:
    (negation,) = [node for node in proto.graph.node if node.op_type == "Neg"]
    del negation.output[:]


def negation_of_itself(proto: ModelProto) -> None:
    (negation,) = [node for node in proto.graph.node if node.op_type == "Neg"]
    negation.output[0] = negation.input[0]


def very_long_location(proto: ModelProto) -> None:
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "n" * 300


@pytest.mark.parametrize(
    "damage",
    [
        short_constant, odd_constant, undefined_dtype, softmax_without_output, matmuls_with_one_operand, default_for_the_mask,
        negation_without_output, negation_of_itself, very_long_location,
    ],
)  # fmt: skip
def test_what_mutations_have_found(damage: Callable[[ModelProto], None], export: Path) -> None:
    """Each of these once ended in another exception, or never."""
    proto = ModelProto.FromString((export / GRAPH).read_bytes())
    damage(proto)
    trial = Trial(export)
    for way in (planned, repacked, inspected, applied):
        trial.run(GRAPH, proto.SerializeToString(), damage.__name__, random.Random(1), [way])
    assert not trial.faults
    assert trial.outcomes.total() == 4


def test_a_symbolic_size_that_is_not_utf8(export: Path) -> None:
    damaged = (export / GRAPH).read_bytes().replace(b"batch_size", b"batch_siz\xff", 1)
    (export / GRAPH).write_bytes(damaged)
    refused(export, ModelError, "is not UTF-8")


# Files that are not what they seem


@pytest.fixture
def watched() -> Iterator[None]:
    with cpu_limit(SECONDS):
        yield


def refused(folder: Path, error: type[SurgeryError], sentence: str) -> None:
    """The whole repack is refused in these words, and nothing is left beside the source."""
    opened_before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(error, match=sentence) as caught:
        repack(folder, folder.parent / "out")
    assert_one_line(caught.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == opened_before


@pytest.mark.parametrize("to", ["../../secret", "/etc/hostname", "../../folder/../secret", "chain"])
def test_a_data_file_that_links_out_of_the_export_is_refused(to: str, export: Path) -> None:
    """Its bytes would be copied into the folder, and from there perhaps to the Hub."""
    (export.parent / "folder").mkdir()
    shutil.copyfile(export / DATA, export.parent / "secret")
    (export / "onnx" / "chain").symlink_to("../../secret")
    (export / DATA).unlink()
    (export / DATA).symlink_to(to)
    refused(export, WeightError, r"is a link to /.*, outside of ")


def test_a_folder_that_links_out_of_the_export_is_refused(export: Path) -> None:
    (export.parent / "elsewhere").mkdir()
    shutil.copyfile(export / DATA, export.parent / "elsewhere" / "w.data")
    (export / "onnx" / "sub").symlink_to("../../elsewhere")
    relocate(export / GRAPH, "sub/w.data")
    refused(export, WeightError, "outside of")


def relocate(graph: Path, location: str) -> None:
    proto = ModelProto.FromString(graph.read_bytes())
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    graph.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json", "chat_template.jinja"])
def test_a_side_file_that_links_out_of_the_export_is_refused(name: str, export: Path) -> None:
    (export / name).rename(export.parent / "secret")
    (export / name).symlink_to("../secret")
    refused(export, ExportError, "is a link to .*secret, outside of the export")


def test_a_link_within_the_export_is_followed(export: Path) -> None:
    (export / "blobs").mkdir()
    (export / DATA).rename(export / "blobs" / "weights")
    (export / DATA).symlink_to("../blobs/weights")
    repack(export, export.parent / "out")
    placed = export.parent / "out" / Path(DATA).name
    assert placed.read_bytes() == (export / "blobs" / "weights").read_bytes() and not placed.is_symlink()


def hub_cache(export: Path, root: Path) -> Path:
    """The export as the Hub's cache lays it out: a snapshot of links to blobs, by their SHA-256."""
    repo = root / "models--onnx-community--gemma"
    snapshot = repo / "snapshots" / "9f4bef82"
    (repo / "blobs").mkdir(parents=True)
    for path in [path for path in export.rglob("*") if path.is_file()]:
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(export)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("through_a_link", [False, True])
def test_the_cache_of_the_hub_is_an_export(through_a_link: bool, export: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(export, tmp_path / "hub")
    if through_a_link:
        (tmp_path / "gemma").symlink_to(snapshot)
    before = digests(tmp_path / "hub")
    repack(tmp_path / "gemma" if through_a_link else snapshot, tmp_path / "out")
    repack(export, tmp_path / "reference")
    found, wanted = digests(tmp_path / "out"), digests(tmp_path / "reference")
    assert found.pop("manifest.json") and wanted.pop("manifest.json") and found == wanted
    assert digests(tmp_path / "hub") == before


@pytest.mark.parametrize(
    "to", ["../../../../models--other/blobs/secret", "../../../../../secret", "../../../refs/secret"]
)
def test_a_link_out_of_the_hubs_blobs_is_refused(to: str, export: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(export, tmp_path / "hub")
    link = snapshot / DATA
    target = Path(os.path.normpath(link.parent / to))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(export / DATA, target)
    link.unlink()
    link.symlink_to(to)
    with pytest.raises(WeightError, match="outside of"):
        repack(snapshot, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path) -> None:
    os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends


def as_socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    before = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may have 107 characters
    server.bind(path.name)
    os.chdir(before)


KINDS: dict[str, Callable[[Path], None]] = {
    "fifo": as_fifo,
    "device": as_device,
    "socket": as_socket,
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name, error",
    [
        (DATA, WeightError), ("onnx/embed_tokens_q4.onnx_data", WeightError), (GRAPH, ModelError),
        ("onnx/embed_tokens_q4.onnx", ModelError), ("config.json", ArchitectureError), ("tokenizer.json", ExportError),
        ("tokenizer_config.json", ExportError),
    ],
)  # fmt: skip
def test_a_file_that_is_no_regular_file_is_refused_and_never_opened(
    name: str, error: type[SurgeryError], kind: str, export: Path, watched: None
) -> None:
    """Opening a FIFO would block for ever; reading /dev/zero would fill the memory."""
    if kind == "device" and os.geteuid() != 0:
        pytest.skip("needs root, to make a device")
    (export / name).unlink()
    KINDS[kind](export / name)
    refused(export, error, "regular file|is a folder|Is a directory|has no tokenizer")
    with contextlib.suppress(SurgeryError):
        inspect(export)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_an_optional_file_that_is_a_fifo_counts_as_absent(name: str, export: Path, watched: None) -> None:
    (export / name).unlink()
    os.mkfifo(export / name)
    repack(export, export.parent / "out")


@pytest.mark.parametrize(
    "location", ["tokenizer.json", "genai_config.json", "config.json", "./manifest.json", "model.onnx"]
)
@pytest.mark.parametrize("weights", ["copy", "link"])
def test_a_data_file_under_a_name_of_the_folder_damages_nothing(weights: str, location: str, export: Path) -> None:
    """Linked, the data file is the source's own: what is written over it would be written into the source."""
    shutil.copyfile(export / DATA, export / "onnx" / location)
    relocate(export / GRAPH, location)
    before = digests(export)
    with pytest.raises(SurgeryError) as caught:
        repack(export, export.parent / "out", weights=weights)
    assert Path(location).name in str(caught.value)
    assert digests(export) == before and not (export.parent / "out").exists()


# Sizes


def sparse(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as writer:
        writer.truncate(size)


@needs_limits
def test_a_graph_larger_than_protobuf_reads_is_not_read(export: Path, watched: None) -> None:
    sparse(export / GRAPH, 3 * 1024**3)
    with memory_limit(MEMORY):
        refused(export, ModelError, "cannot be read: it has 3,221,225,472 bytes, and at most 2,147,483,647 are read")


@needs_limits
@pytest.mark.parametrize("name, error", [("config.json", ArchitectureError), ("tokenizer_config.json", ExportError)])
def test_json_of_two_hundred_megabytes_is_not_read(
    name: str, error: type[SurgeryError], export: Path, watched: None
) -> None:
    sparse(export / name, 200 * 1000**2)
    with memory_limit(MEMORY):
        refused(export, error, r": it has 200,000,000 bytes, and at most 67,108,864 are read")


@pytest.mark.parametrize("size", [2 * 1024**3, 64 * 1024**3])
def test_a_data_file_larger_than_the_memory_is_not_read(size: int, export: Path, watched: None) -> None:
    os.truncate(export / DATA, size)
    opened = open_export(export)
    with memory_limit(MEMORY):
        plan(opened.pair("q4"), opened, compatible(opened.pair("q4").embed))
        inspect(export)


@pytest.mark.parametrize("depth", [101, 1000, 1_000_000])
@pytest.mark.parametrize("opened, closed", [("[", "]"), ('{"a":', "}")])
def test_json_nested_too_deeply_is_one_sentence(depth: int, opened: str, closed: str, export: Path) -> None:
    (export / "config.json").write_text(f'{{"deep": {opened * depth}0{closed * depth}}}')
    refused(
        export, ArchitectureError, "config.json is not JSON: (it is nested deeper than 100 levels|maximum recursion)"
    )


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(constant: str, export: Path) -> None:
    (export / "generation_config.json").write_text(f'{{"temperature": {constant}}}')
    refused(
        export, ArchitectureError, f"generation_config.json is not JSON: it holds {constant}, which JSON does not have"
    )


def test_half_a_surrogate_pair_is_one_sentence(export: Path) -> None:
    (export / "tokenizer_config.json").write_text('{"bos_token": "\\ud800"}')
    refused(export, ExportError, r"tokenizer_config.json would hold '\\ud800', which is not Unicode")


# Terminals


def test_names_with_terminal_escapes_are_shown_escaped(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from surgery.commands.rendering import show_inspection

    proto = ModelProto.FromString((export / GRAPH).read_bytes())
    proto.producer_name = proto.graph.input[0].name = proto.graph.node[0].op_type = ESCAPE
    proto.graph.initializer[-1].external_data[0].value = f"{ESCAPE}.data"
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = ESCAPE
    proto.metadata_props.add(key=ESCAPE, value=ESCAPE)
    (export / GRAPH).write_bytes(proto.SerializeToString())
    show_inspection(Console(), inspect(export / GRAPH))
    shown = capsys.readouterr().out
    assert shown.count("x1b[2J") >= 4
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_names_with_terminal_escapes_are_escaped_in_errors(export: Path) -> None:
    relocate(export / GRAPH, f"../{ESCAPE}\n")
    refused(export, WeightError, r"x1b\[2J")


def test_a_message_that_quotes_a_name_of_a_megabyte_is_cut() -> None:
    message = str(SurgeryError("the name " + "n" * 1_000_000 + " is not expected"))
    assert len(message) < 2100 and message.startswith("the name nnn") and message.endswith("nnn is not expected")
    assert str(SurgeryError("two\nlines\x1b\u202e")) == "two\\nlines\\x1b\\u202e"
