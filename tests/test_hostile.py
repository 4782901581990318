"""Damaged and hostile input: a SurgeryError in one printable line, or a sound result; nothing else, and nothing elsewhere.

Every command runs on damaged files, each a number: the same number, the same damage (tests/attacks.py).
`pytest -m exhaustive tests/test_hostile.py --mutations 10000` runs as many as there is time for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import command_line
import pytest
import small
from exhaustive import in_full
from folders import digests, repack
from limits import cpu_limit, memory_limit
from mutation import ESCAPE
from onnx import ModelProto, TensorProto
from places import ROOT
from typer.testing import CliRunner

from passes.base import apply
from passes.presets import compatible
from surgery.commands.app import app
from surgery.errors import ArchitectureError, ExportError, ModelError, SurgeryError, WeightError, unforeseen
from surgery.folder.building import plan
from surgery.folder.inspection import inspect_path
from surgery.folder.text_only import build_text_only
from surgery.graph.model import Model
from surgery.source.export import Export, open_export

SECONDS = 5
"""Of CPU time: the longest that one case may take."""
MEMORY = 2 * 1024**3
"""Bytes of address space that a case may ask for, beyond what the process has."""
GRAPH, EMBED = "onnx/decoder_model_merged_q4.onnx", "onnx/embed_tokens_q4.onnx"
DATA = f"{GRAPH}_data"


# A small export, and a place where everything outside of the target is watched


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return small.write_export(tmp_path / "source")


needs_limits = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux: memory is limited by address space"
)


def assert_one_line(error: SurgeryError) -> None:
    for text in (str(error), error.hint or "-"):
        assert text and text.isprintable() and len(text) < 20_000, ascii(text[:300])


# Damaged files, whatever the command


@needs_limits
@pytest.mark.exhaustive
def test_damaged_inputs_of_every_command(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """A process of its own: it forks others, which must not have threads."""
    count = str(pytestconfig.getoption("--mutations"))
    command = [sys.executable, "-m", "validation.hostile", str(tmp_path), "inputs", "--inputs", count]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("inputs: 0 writes outside, 0 executions, 0 defects, 0 hangs\n"), done.stdout
    for command in (
        "inspect",
        "diff",
        "git",
        "apply",
        "repack",
        "strip",
        "review",
        "vocabulary",
        "validate",
        "generate",
        "bench",
    ):
        assert f"\n| {command} |" in done.stdout


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
    (export / GRAPH).write_bytes(proto.SerializeToString())
    before = digests(export)
    with cpu_limit(SECONDS), memory_limit(MEMORY):
        for way in (
            lambda: inspect_path(export, "q4"),
            lambda: inspect_path(export / GRAPH),
            lambda: repack(export, export.parent / "out"),
        ):
            with one_line():
                way()
        for step in compatible(export / EMBED):
            with one_line():
                apply(Model.open(export / GRAPH, small.arch()), [step])
    assert digests(export) == before


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Whatever is refused, is in one line."""
    try:
        yield
    except SurgeryError as error:
        assert_one_line(error)


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
    placed = export.parent / "out" / "model.onnx_data"
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
        inspect_path(export)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_an_optional_file_that_is_a_fifo_counts_as_absent(name: str, export: Path, watched: None) -> None:
    (export / name).unlink()
    os.mkfifo(export / name)
    repack(export, export.parent / "out")


@pytest.mark.parametrize(
    "location",
    ["tokenizer.json", "genai_config.json", "./manifest.json", "model.onnx", ".git/hooks/pre-commit", "a.py"],
)
@pytest.mark.parametrize("weights", ["copy", "link"])
def test_a_data_file_of_any_name_is_placed_under_the_graphs(weights: str, location: str, export: Path) -> None:
    """Linked, the data file is the source's own: what is written over it would be written into the source."""
    (export / "onnx" / location).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(export / DATA, export / "onnx" / location)
    (export / "onnx" / location).chmod(0o4755)
    relocate(export / GRAPH, location)
    before, out = digests(export), export.parent / "out"
    repack(export, out, weights=weights)
    assert digests(export) == before
    assert (out / "model.onnx_data").read_bytes() == (export / DATA).read_bytes()
    assert {path.name for path in out.iterdir() if path.suffix not in (".json", ".md", ".jinja")} == {
        "model.onnx", "model.onnx_data", "model.onnx_data_1"
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o7111 == 0 for path in out.iterdir() if path.is_file())


@pytest.mark.parametrize("name", ["chat_template.jinja", "LICENSE", "tokenizer.json"])
def test_a_side_file_is_not_copied_at_any_size(name: str, export: Path) -> None:
    sparse(export / name, 20 * 10**9)
    refused(
        export, SurgeryError, rf"{name} is no file of a model: it has 20,000,000,000 bytes, and at most [\d,]+ are read"
    )


def test_a_side_file_that_becomes_a_link_is_not_followed(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (export.parent / "secret").write_text("secret")
    (export / "LICENSE").write_text("the licence")
    found = Export.file

    def toggled(self: Export, name: str) -> Path | None:
        path = found(self, name)
        if name == "LICENSE" and not (export / name).is_symlink():
            (export / name).unlink()
            (export / name).symlink_to("../secret")
        return path

    monkeypatch.setattr(Export, "file", toggled)
    with pytest.raises(ExportError, match="LICENSE"):
        repack(export, export.parent / "out")
    assert not (export.parent / "out").exists()


def test_a_data_file_that_becomes_a_link_is_not_followed(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(export / DATA, export.parent / "secret")
    checked = Model.check_weights

    def toggled(self: Model) -> int:
        size = checked(self)
        (export / DATA).unlink()
        (export / DATA).symlink_to("../../secret")
        return size

    monkeypatch.setattr(Model, "check_weights", toggled)
    opened = open_export(export)
    for build in (
        lambda: repack(export, export.parent / "out"),
        lambda: build_text_only(opened, opened.pair("q4"), export.parent / "out"),
    ):
        (export / DATA).unlink()
        shutil.copyfile(export.parent / "secret", export / DATA)
        with pytest.raises(SurgeryError, match="outside of"):
            build()
    assert not (export.parent / "out").exists()


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
        inspect_path(export)


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
    refused(export, ArchitectureError, r"tokenizer_config.json is not JSON: it holds '\\ud800', half of a pair")


# Names

NAMED = (
    "inspect NAME", "inspect SRC --precision NAME", "diff NAME SRC", "diff SRC NAME", "diff SRC SRC --output NAME.md",
    "diff SRC SRC --check NAME.md", "diff SRC SRC --numbers NAME", "diff SRC SRC --precision NAME", "apply NAME SRC out.onnx",
    "apply rename-io NAME out.onnx", "apply rename-io GRAPH NAME", "apply merge-embeddings{embed=NAME} GRAPH out.onnx",
    "repack NAME out", "repack SRC NAME --no-validate", "repack SRC out --precision NAME", "strip NAME out",
    "strip SRC NAME --no-validate", "review NAME", "review HEAD NAME", "validate NAME", "validate SRC --against NAME",
    "generate NAME hello", "generate SRC NAME --new-tokens 1", "bench NAME", "comment NAME SRC", "git-textconv NAME",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [*("n" * 5000, "o/\udcff"), *map(in_full, ("\udcff", "o/" + "n" * 5000, "a\nb"))], ids=ascii
)
def test_a_name_that_no_file_has_is_one_sentence_of_every_command(
    name: str, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an argument of each kind: the command line is the user's, but scripts and pull requests fill it."""
    monkeypatch.chdir(export.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for line in NAMED:
        words = [
            {"SRC": str(export), "GRAPH": str(export / GRAPH)}.get(word, word.replace("NAME", name))
            for word in line.split()
        ]
        error = CliRunner().invoke(app, words).exception
        if error is not None and not isinstance(error, SystemExit):
            assert isinstance(error, Exception)
            said = error if isinstance(error, SurgeryError) else unforeseen(error)
            assert_one_line(said)
            assert "defect" not in str(said), line
        shutil.rmtree(export.parent / name, ignore_errors=True) if len(name) < 100 else None


# Terminals


@pytest.mark.parametrize(
    "line",
    ["inspect --NAME", "passes NAME", "NAME", "diff a b --format NAME", "diff a b c NAME", "bench a --contexts NAME"],
)
def test_a_command_line_that_is_wrong_is_quoted_in_printable_letters(line: str) -> None:
    for name in ("a\u202eb", "a\u2028::error::b", "a\n::error::b", "\u2066", "a\x9b2J"):
        done = command_line.run(*(word.replace("NAME", name) for word in line.split()))
        assert done.returncode == 2 and not done.stdout
        assert all(text.isprintable() for text in done.stderr.split("\n")), ascii(done.stderr)
        assert len(done.stderr.splitlines()) <= 4, done.stderr


def test_names_with_terminal_escapes_are_shown_escaped(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from surgery.commands.rendering import show_inspection

    proto = ModelProto.FromString((export / GRAPH).read_bytes())
    proto.producer_name = proto.graph.input[0].name = proto.graph.node[0].op_type = ESCAPE
    proto.graph.initializer[-1].external_data[0].value = f"{ESCAPE}.data"
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = ESCAPE
    proto.metadata_props.add(key=ESCAPE, value=ESCAPE)
    (export / GRAPH).write_bytes(proto.SerializeToString())
    show_inspection(Console(), inspect_path(export / GRAPH))
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
