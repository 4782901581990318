"""action.yml as GitHub runs it: its step's shell, with the variables that a runner sets, against GitHub's API."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import program
from github_server import GitHub, serve
from limits import FOR_EVER
from places import ROOT, TINY
from repositories import GRAPH, git

from surgery.version import VERSION

MARKER = "<!-- gemma4-surgery: report -->\n"


def action() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "action.yml").read_text())
    assert isinstance(found, dict)
    return found


def step(name: str) -> dict[str, Any]:
    return next(one for one in action()["runs"]["steps"] if one.get("name") == name)


@pytest.fixture
def github() -> Iterator[GitHub]:
    with serve(GitHub()) as server:
        yield server


@pytest.fixture
def runner(tmp_path: Path, github: GitHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a runner has, and its variables; our command is where it was installed, and not on PATH."""
    folder = tmp_path / "a runner's folder"
    tool = folder / "gemma4-surgery" / "bin"
    tool.mkdir(parents=True)
    (folder / "bin").mkdir()
    (tool / "python").symlink_to(sys.executable)
    command = tool / "gemma4-surgery"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(program())} "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin")
    monkeypatch.setenv("RUNNER_TEMP", str(folder))
    monkeypatch.setenv("GITHUB_OUTPUT", str(folder / "output"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary"))
    monkeypatch.setenv("GITHUB_REPOSITORY", github.repository)
    monkeypatch.setenv("GITHUB_API_URL", github.api)
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.example")
    return folder


def report(folder: Path, github: GitHub, *, fork: bool = False, **inputs: str) -> subprocess.CompletedProcess[str]:
    """Run the step that compares and comments, its expressions filled in from inputs and from a pull request's event."""
    one, defaults = step("Compare and comment"), action()["inputs"]
    values = {f"inputs.{name}": entry["default"] for name, entry in defaults.items()}
    values |= {f"inputs.{name.replace('_', '-')}": value for name, value in inputs.items()}
    if values["inputs.token"] == "${{ github.token }}":
        values["inputs.token"] = github.token
    values["github.event.pull_request.number"] = str(github.number)
    values["github.event.pull_request.head.repo.fork"] = str(fork).lower()
    given = {key: re.sub(r"\$\{\{ (.*?) \}\}", lambda m: values[m[1]], text) for key, text in one["env"].items()}
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in given.items())
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", exports + one["run"]]  # as `shell: bash` does
    return subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=False, timeout=FOR_EVER)


def test_the_action_is_a_composite_one_without_injection() -> None:
    found = action()
    assert found["runs"]["using"] == "composite"
    for one in found["runs"]["steps"]:
        assert "${{" not in one.get("run", ""), "an expression in a script runs whatever a branch is called"
        assert "uses" in one or one["shell"] == "bash"
    kept = step("Keep the page and the picture")
    assert all(f"outputs.{name} " in kept["with"]["path"] for name in ("report", "html", "picture"))
    assert all(entry["description"] and "default" in entry for entry in found["inputs"].values())
    used = set(re.findall(r"inputs\.([\w-]+)", str(step("Compare and comment")["env"])))
    assert used == set(found["inputs"])


def test_what_the_action_brings_along_is_pinned() -> None:
    """Another project's action by its commit, every package by the digest of its file."""
    for one in action()["runs"]["steps"]:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one.get("uses", "a/b@" + "0" * 40))
    install = step("Install gemma4-surgery")["run"]
    assert "--require-hashes" in install and "--no-deps --no-build-isolation" in install and '"$PYTHON" -I' in install
    lock = (ROOT / "action.lock").read_text()
    entries = re.split(r"\n(?=[a-z])", lock.partition("\n")[2])[1:]
    assert entries and all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    names = {entry.partition("==")[0] for entry in entries}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    assert {re.split(r"[>=<]", text)[0].replace("_", "-") for text in needed} <= names


def test_inputs_are_no_options(repository: Path, runner: Path, github: GitHub) -> None:
    done = report(repository, github, base="--help", comment="false")
    assert done.returncode == 2 and "--help is no commit" in done.stderr
    done = report(repository, github, before="--help", after="--version", comment="false")
    assert done.returncode == 2 and "--help does not exist" in done.stderr


def test_one_comment_is_created_and_then_updated(repository: Path, runner: Path, github: GitHub) -> None:
    done = report(repository, github)
    assert done.returncode == 0, done.stdout + done.stderr
    assert github.bodies[0].startswith(f"{MARKER}## ONNX models: Numbers changed: 1 model differs\n")
    assert "nodes: 1 added, 1 changed" in github.bodies[0]
    assert (runner / "summary").read_text() == github.bodies[0].removeprefix(MARKER)
    outputs = ["report=", "json=", "html=", "picture=", "differs=true", "verdict=numerics"]
    lines = (runner / "output").read_text().splitlines()
    assert [line.partition("/")[0] for line in lines] == outputs and str(runner) in lines[0]
    assert all(Path(line.partition("=")[2]).stat().st_size for line in lines[:4])
    git(repository, "revert", "--no-edit", "HEAD")
    git(repository, "reset", "-q", "--soft", "HEAD~2")
    git(repository, "commit", "-q", "--allow-empty", "-m", "nothing in the end")
    assert report(repository, github).returncode == 0
    assert github.bodies == [f"{MARKER}## ONNX models: no model differs\n"]


def test_no_comment_where_there_is_nothing_to_say(repository: Path, runner: Path, github: GitHub) -> None:
    done = report(repository, github, base="HEAD")
    assert done.returncode == 0 and github.bodies == [], done.stderr
    assert "no model differs" in (runner / "summary").read_text()


def test_the_result_of_the_job(repository: Path, runner: Path, github: GitHub) -> None:
    assert report(repository, github, fail_on="interface,nodes", comment="false").returncode == 1
    assert report(repository, github, fail_on="nodes", ignore="nodes", comment="false").returncode == 0
    missing = report(repository, github, base="HEAD^5")
    assert missing.returncode == 2 and "fetch-depth" in missing.stderr
    assert github.bodies == [], "what failed before there was a report makes no comment"


def test_two_models_that_are_named(repository: Path, runner: Path, github: GitHub) -> None:
    before = TINY / "onnx" / GRAPH
    done = report(repository, github, before=str(before), after=f"models/{GRAPH}", marker="named")
    assert done.returncode == 0, done.stderr
    assert github.bodies[0].startswith("<!-- gemma4-surgery: named -->\n###") and "nodes: 1 added" in github.bodies[0]


def test_two_models_that_are_the_same(repository: Path, runner: Path, github: GitHub) -> None:
    """Names with spaces, and no comment where there is nothing to say."""
    shutil.copytree(repository / "models", repository / "the models")
    done = report(repository, github, before=f"models/{GRAPH}", after=f"the models/{GRAPH}", policy="any")
    assert done.returncode == 0 and github.bodies == [], done.stderr
    assert (runner / "output").read_text().splitlines()[4:] == ["differs=false", "verdict=same"]


def test_the_job_keeps_its_path(runner: Path) -> None:
    scripts = "".join(one.get("run", "") for one in action()["runs"]["steps"])
    assert "GITHUB_PATH" not in scripts and "GITHUB_ENV" not in scripts
    python = next(one for one in action()["runs"]["steps"] if "setup-python" in one.get("uses", ""))
    assert python["with"]["update-environment"] is False and python["with"]["python-version"].count(".") == 2


def test_the_install_step_runs_the_python_that_it_was_given(tmp_path: Path) -> None:
    """With paths that have spaces; the stand-in for Python makes a pip that only says what it was asked."""
    temporary, place = tmp_path / "a b", tmp_path / "the action"
    place.mkdir()
    python, log = tmp_path / "python", tmp_path / "log"
    pip = f'#!/bin/sh\nprintf "%s|" "$@" >> "{log}"\n'
    python.write_text(
        f'#!/bin/sh\nmkdir -p "$4/bin" && printf %s {shlex.quote(pip)} > "$4/bin/pip" && chmod +x "$4/bin/pip"\n'
    )
    python.chmod(0o755)
    given = {
        "PYTHON": str(python),
        "RUNNER_TEMP": str(temporary),
        "GITHUB_ACTION_PATH": str(place),
        "PATH": "/usr/bin:/bin",
    }
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step("Install gemma4-surgery")["run"]]
    subprocess.run(shell, check=True, env=given, timeout=FOR_EVER)
    asked = log.read_text().split("|")
    assert f"{place}/action.lock" in asked and str(place) in asked and (temporary / "gemma4-surgery" / "bin").is_dir()


def test_graphs_come_from_the_lfs_store_of_this_repository(repository: Path, runner: Path, github: GitHub) -> None:
    """A stand-in for git-lfs: with its url on the command line, git-lfs does not ask .lfsconfig for one."""
    lfs = runner / "bin" / "git-lfs"
    lfs.write_text(f'#!/bin/sh\necho "$(git config lfs.url) $@" >> "{runner}/lfs"\n')
    lfs.chmod(0o755)
    (repository / ".lfsconfig").write_text("[lfs]\n\turl = https://example.org/\n")
    done = report(repository, github)
    assert done.returncode == 0, done.stderr
    asked = (runner / "lfs").read_text().splitlines()[-1]
    assert (
        asked
        == f"https://github.example/{github.repository}.git/info/lfs fetch --include=*.onnx --exclude= -- origin HEAD^1 HEAD"
    )


def test_a_fork_gets_a_warning_and_others_an_error(repository: Path, runner: Path, github: GitHub) -> None:
    github.faults["POST"] = (403, b'{"message": "Resource not accessible by integration"}', {})
    done = report(repository, github, fork=True)
    assert done.returncode == 0 and "::warning::a pull request from a fork" in done.stdout
    assert "nodes: 1 added" in (runner / "summary").read_text()
    done = report(repository, github)
    assert done.returncode == 2 and "pull-requests: write" in done.stderr


def test_the_documented_workflow_is_one() -> None:
    text = (ROOT / "docs" / "pull-requests.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert block
    workflow = yaml.safe_load(block[1])
    job = workflow["jobs"]["models"]
    assert workflow[True] == "pull_request", "YAML 1.1 reads the key `on` as true"
    assert job["permissions"]["pull-requests"] == "write"
    assert job["steps"][0]["with"]["fetch-depth"] == 2, "HEAD^1 is the target branch"
    assert set(job["steps"][1].get("with", {})) <= set(action()["inputs"])
    assert job["steps"][1]["uses"].endswith(f"@v{VERSION}"), "a release to pin, which publish.yml holds to the version"
