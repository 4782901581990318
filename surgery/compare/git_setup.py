"""Configuration that makes git show what changed in an .onnx file, where it says "Binary files differ" by itself.

Two drivers under one name, because git takes one or the other, by the command that is run (git 2.39):

    diff.gemma4-surgery.command    git diff; git show and git log -p with --ext-diff: the report of two graphs
    diff.gemma4-surgery.textconv   git show, git log -p, git diff --no-ext-diff, git blame: lines of one graph's text

and one line of attributes that names the driver for *.onnx. In a repository it goes into info/attributes, which
nobody else gets and which wins over a .gitattributes that calls the files `binary` or `diff=lfs`, as repositories on
the Hub do. For a user it goes into core.attributesFile, over which every .gitattributes wins.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from surgery.compare import git_objects as git
from surgery.errors import RepositoryError
from surgery.files.atomic import write_file

DRIVER = "gemma4-surgery"
PATTERN = "*.onnx"
ATTRIBUTE = f"{PATTERN} diff={DRIVER}"
REPORT_COMMAND, TEXT_COMMAND = "git-diff", "git-textconv"
"""Hidden commands of the command line that git runs."""

ConfigScope = Literal["local", "global"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that git now has, or had already: in which file, what, and whether that was written just now."""

    file: str
    text: str
    changed: bool


@dataclass(frozen=True, slots=True)
class Setup:
    """What was set up or taken away. `overruled_by` is the driver that .gitattributes names in place of ours."""

    settings: tuple[Setting, ...]
    overruled_by: str | None = None


def set_up(scope: ConfigScope, program: Sequence[str], folder: Path) -> Setup:
    """Configure git for the repository that `folder` is in, or for the user. `program` is how our command is run.

    A second call changes nothing. Raises RepositoryError outside of a repository, or where git is missing or refuses.
    """
    attributes = _attributes_file(scope, folder)
    settings = []
    for key, command in (("command", REPORT_COMMAND), ("textconv", TEXT_COMMAND)):
        settings.append(_set(scope, folder, f"diff.{DRIVER}.{key}", shlex.join([*program, command])))
    text = _read(attributes)
    missing = ATTRIBUTE not in text.splitlines()
    if missing:
        end = "" if not text or text.endswith("\n") else "\n"
        _write(attributes, f"{text}{end}{ATTRIBUTE}\n")
    settings.append(Setting(str(attributes), ATTRIBUTE, missing))
    return Setup(tuple(settings), _overruled(folder) if scope == "global" else None)


def take_away(scope: ConfigScope, folder: Path) -> Setup:
    """Remove what `set_up` wrote, and nothing else. Raises RepositoryError as `set_up` does."""
    attributes = _attributes_file(scope, folder)
    settings = []
    for key in ("command", "textconv"):
        name = f"diff.{DRIVER}.{key}"
        if there := _origin(scope, folder, name):
            _ask(folder, "config", f"--{scope}", "--unset-all", name)
            settings.append(Setting(there, name, True))
    lines = _read(attributes).splitlines(keepends=True)
    kept = [line for line in lines if line.strip() != ATTRIBUTE]
    if kept != lines:
        _write(attributes, "".join(kept))
        settings.append(Setting(str(attributes), ATTRIBUTE, True))
    return Setup(tuple(settings))


def _set(scope: ConfigScope, folder: Path, key: str, value: str) -> Setting:
    current = git.run_git(folder, "config", f"--{scope}", "--get-all", key).stdout.splitlines()
    if current != [value]:
        _ask(folder, "config", f"--{scope}", "--replace-all", key, value)
    return Setting(_origin(scope, folder, key), f"{key} = {value}", current != [value])


def _origin(scope: ConfigScope, folder: Path, key: str) -> str:
    """The file that holds a setting; empty where none does."""
    found = git.run_git(folder, "config", f"--{scope}", "--show-origin", "--get-all", key).stdout
    return found.partition("\t")[0].removeprefix("file:")


def _attributes_file(scope: ConfigScope, folder: Path) -> Path:
    """info/attributes of the repository, or the user's. Raises RepositoryError where there is no repository."""
    if scope == "local":
        found = git.run_git(folder, "rev-parse", "--git-path", "info/attributes")
        if found.returncode:
            raise RepositoryError(
                f"{folder.absolute()} is in no git repository",
                hint="run git-setup inside of the repository, or with --global for all repositories of yours",
            )
        attributes = folder / found.stdout.removesuffix("\n")
        for file in (attributes, attributes.parent, attributes.parent.with_name("config")):
            if file.is_symlink():
                raise RepositoryError(f"{file} is a link; a checkout of a stranger may lead it to any file of yours")
        return attributes
    named = git.run_git(folder, "config", "--global", "--type=path", "--get", "core.attributesFile").stdout.strip()
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(named) if named else Path(base) / "git" / "attributes"


def _overruled(folder: Path) -> str | None:
    """The driver that *.onnx files of this repository have in place of ours; None where it is ours, or no
    repository."""
    found = git.run_git(folder, "check-attr", "-z", "diff", "--", f"any{PATTERN.removeprefix('*')}")
    words = found.stdout.split("\0")
    return words[2] if found.returncode == 0 and len(words) > 2 and words[2] != DRIVER else None


def _read(file: Path) -> str:
    """The text of a file, every byte of it kept; empty where there is no file."""
    return file.read_bytes().decode("utf-8", "surrogateescape") if file.is_file() else ""


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise RepositoryError(f"{file} cannot be written: {error.strerror}") from None


def _ask(folder: Path, *words: str) -> None:
    done = git.run_git(folder, *words)
    if done.returncode:
        raise RepositoryError(f"git {' '.join(words)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
