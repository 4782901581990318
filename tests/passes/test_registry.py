"""Passes of other packages are known by name; importing `passes` imports no pass, and no onnx."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import command_line
import pytest
from places import FIXTURES, ROOT

import passes
from passes.base import LOSSY, Finding, Pass
from passes.recipe import describe_pass, parse, recipe_text
from passes.registry import BUILT_IN, names, pass_class, register
from surgery.errors import RecipeError
from surgery.graph.model import Model
from surgery.verify.thresholds import passes_of

DECODER = FIXTURES / "tiny-e2b" / "onnx" / "decoder_model_merged_q4.onnx"

TEN_LINES = """
from passes import Finding, Pass

class Stamp(Pass):
    name = "stamp"
    summary = "the graph says who made it"

    def run(self, model):
        told = model.proto.producer_name == "stamped"
        model.proto.producer_name = "stamped"
        return [Finding("skipped" if told else "changed", "producer", "it is stamped")]
"""


def install(folder: Path, points: str, module: str = TEN_LINES, name: str = "stamps", *, by_pip: bool = False) -> Path:
    """Install a package into a folder: a wheel made by hand, so that no build tool has to be there. Without pip it is
    unpacked, which is all that pip does with it."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{name}.py", module)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/entry_points.txt", f"[gemma4_surgery.passes]\n{points}\n")
        file.writestr(f"{info}/RECORD", "")
    site = folder / "site"
    if not by_pip:
        zipfile.ZipFile(wheel).extractall(site)
        return site
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return site


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    def run(*words: str, fresh: bool = False) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path / 'site'}:{ROOT}"
        return command_line.run(*words, cwd=tmp_path, PYTHONPATH=path, HOME=str(tmp_path), COLUMNS="200", fresh=fresh)

    return run


def test_a_pass_of_an_installed_package_is_listed_and_applied(tmp_path: Path, command: Command) -> None:
    install(tmp_path, "stamp = stamps:Stamp", by_pip=True)
    listed = {entry["name"]: entry for entry in json.loads(command("passes", "--json", fresh=True).stdout)}
    assert listed["stamp"] == {
        "name": "stamp", "summary": "the graph says who made it", "numerics": "exact", "rewrites_weights": False,
        "options": [],
    }  # fmt: skip
    assert list(listed)[: len(BUILT_IN)] == list(BUILT_IN)
    ran = command("apply", "rename-io,stamp", str(DECODER), "out.onnx")
    assert ran.returncode == 0, ran.stderr
    assert "producer: it is stamped" in ran.stdout
    assert Model.open(tmp_path / "out.onnx").proto.producer_name == "stamped"


def test_a_folder_is_made_and_proven_with_a_pass_of_an_installed_package(tmp_path: Path, command: Command) -> None:
    """The pass says nothing of numbers, so the folder is held to equality; so it is where the package is gone."""
    site = install(tmp_path, "stamp = stamps:Stamp")
    recipe = "fold-logits-to-keep,rename-io,move-padding,expand-shared-kv,annotate-head-sizes,stamp"
    ran = command("repack", str(FIXTURES / "tiny-e2b"), "out", "--precision", "q4", "--ep", "cpu", "--recipe", recipe)
    assert ran.returncode == 0, ran.stderr
    assert Model.open(tmp_path / "out" / "model.onnx").proto.producer_name == "stamped"
    site.rename(tmp_path / "elsewhere")
    assert [step.name for step in passes_of(tmp_path / "out")][-1] == "annotate-head-sizes", "the last that is known"
    ran = command("validate", "out", "--against", str(FIXTURES / "tiny-e2b"), "--precision", "q4", "--quick")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ("stamp = nowhere:Stamp", "the pass 'stamp' of stamps 1.0 cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"),
        ("stamp = stamps:Pass", "the pass 'stamp' of stamps 1.0 has no method run(model)"),
        ("stamp = stamps:Finding", "the pass 'stamp' of stamps 1.0 is <class"),
        ("press = stamps:Stamp", "the pass 'press' of stamps 1.0 calls itself 'stamp'; both names have to be the same"),
    ],
)  # fmt: skip
def test_a_broken_package_is_named_and_harms_no_other_pass(
    points: str, sentence: str, tmp_path: Path, command: Command
) -> None:
    install(tmp_path, points)
    name = points.split()[0]
    ran = command("apply", name, str(DECODER), "out.onnx")
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False) and sentence in " ".join(ran.stderr.split())
    listed = command("passes")
    assert listed.returncode == 0 and "rename-io: " in listed.stdout and f"{name}: the pass '{name}'" in listed.stdout


def test_no_package_replaces_a_pass_of_ours(tmp_path: Path, command: Command) -> None:
    install(tmp_path, "rename-io = stamps:Stamp")
    listed = json.loads(command("passes", "--json").stdout)
    assert [entry["summary"] for entry in listed if entry["name"] == "rename-io"] == [pass_class("rename-io").summary]


def test_two_packages_with_one_name_are_both_named(tmp_path: Path, command: Command) -> None:
    install(tmp_path, "stamp = stamps:Stamp")
    install(tmp_path, "stamp = seals:Stamp", name="seals")
    ran = command("apply", "stamp", str(DECODER), "out.onnx")
    assert ran.returncode == 2 and "both have a pass named 'stamp'; uninstall one" in " ".join(ran.stderr.split())


# Registered in this process


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.registry._registered", {})


class Mark(Pass):
    name: ClassVar[str] = "mark"
    summary: ClassVar[str] = "a pass for tests"

    def run(self, model: Model) -> list[Finding]:
        return [Finding("skipped", "graph", "there is nothing to do")]


def test_a_registered_pass_is_known_and_may_be_defined_again(empty: None) -> None:
    with pytest.raises(RecipeError, match="no pass is named 'mark'"):
        parse("mark")
    assert register(register(Mark)) is Mark
    assert parse("rename-io,mark") == (passes.RenameIO(), Mark()) and recipe_text(parse("mark")) == "mark"
    assert names()[-1] == "mark" and describe_pass("mark")["summary"] == "a pass for tests"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": "rename-io"}, "another pass is named 'rename-io' already"),
        ({"name": "Mark It"}, "name is 'Mark It'; small letters, digits and hyphens are expected"),
        ({"name": None}, "name is None"),
        ({"summary": ""}, "summary is ''; one line that says what the pass does is expected"),
        ({"size": 1, "__annotations__": {"size": "int"}}, "has the option 'size', but is no dataclass"),
        ({"run": Pass.run}, r"has no method run\(model\)"),
    ],
)
def test_what_is_no_whole_pass_is_not_registered(fields: dict[str, object], sentence: str, empty: None) -> None:
    with pytest.raises(RecipeError, match=sentence):
        register(type(Pass)("Wrong", (Mark,), fields))
    with pytest.raises(RecipeError, match=r"a subclass of passes\.base\.Pass is expected"):
        register(object)  # type: ignore[type-var]


def test_each_pass_of_ours_is_the_class_that_the_list_says() -> None:
    for name in BUILT_IN:
        kind = pass_class(name)
        assert kind.name == name and issubclass(kind, Pass) and getattr(passes, kind.__name__) is kind
    with pytest.raises(AttributeError, match="no attribute 'Renameio'"):
        passes.Renameio  # noqa: B018
    assert passes.ToFp16.numerics == LOSSY


def test_importing_passes_is_light() -> None:
    code = "import sys, passes; print(sorted({'onnx', 'numpy', 'passes.to_fp16', 'passes.presets'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
