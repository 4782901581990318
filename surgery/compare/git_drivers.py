"""What git runs for an .onnx file: a report of two versions, or the text of one.

Git hands over one version as a file of its own making, `/tmp/git-blob-XXXXXX/model.onnx`, or as the one in the working
copy; the data files that a graph refers to lie beside the latter only. Whatever comes, there is an answer: a driver
that fails makes git stop with "fatal: external diff died".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.compare.comparing import compare
from surgery.compare.comparison import Comparison
from surgery.compare.graph_text import graph_text
from surgery.compare.subjects import MODEL, Subject, SubjectGraph
from surgery.errors import ModelError, RepositoryError, SurgeryError
from surgery.files.safe_reading import read_pointer
from surgery.folder.inspection import nearby_architecture
from surgery.graph.model import Model

WEIGHTS = "git hands over graphs without their data files: weights are compared by gemma4-surgery review BASE HEAD"

FETCHED = "git fetches the graph where git-lfs is set up: git lfs install"


@dataclass(frozen=True, slots=True)
class Versions:
    """A change as git describes it. `before` and `after` are files, None for a version that is not there."""

    old_path: str
    new_path: str
    before: Path | None
    after: Path | None

    @classmethod
    def parse(cls, words: Sequence[str]) -> Versions:
        """PATH OLD-FILE OLD-HEX OLD-MODE NEW-FILE NEW-HEX NEW-MODE [NEW-PATH HEADER], of gitdiff(1).

        A path that is not merged yet comes alone.
        """
        if len(words) == 1:
            raise RepositoryError(f"{words[0]} is not merged yet", hint="git shows it once it is resolved")
        if len(words) not in (7, 9):
            raise RepositoryError("git-diff is run by git, which gives it 7 or 9 words; git-setup configures that")
        path, old, _, _, new, *_ = words
        before, after = (None if file == os.devnull else Path(file) for file in (old, new))
        return cls(path, words[7] if len(words) == 9 else path, before, after)

    @property
    def heading(self) -> str:
        """The line that git begins with for every other file; tools that read diffs look for it."""
        return f"diff --git a/{self.old_path} b/{self.new_path}"


def compared(versions: Versions) -> Comparison | str:
    """The two versions side by side, or what there is to say where one of them cannot be read or is not there."""
    for path, file in ((versions.old_path, versions.before), (versions.new_path, versions.after)):
        if file is not None and (pointer := read_pointer(file)) is not None:
            return f"{path} is a Git LFS pointer to {pointer.size:,} bytes; {FETCHED}"
    try:
        if versions.before is None or versions.after is None:
            return _alone(versions)
        before = _side(versions.old_path, versions.before, versions.new_path)
        after = _side(versions.new_path, versions.after, versions.new_path)
        return compare(before, after, weights_by="reference")
    except SurgeryError as error:
        return _named(str(error), versions)


def _side(path: str, file: Path, beside: str) -> Subject:
    """A version as a side. Its architecture is the working copy's, for both: git's own file has nothing beside it."""
    arch = nearby_architecture(Path(beside))
    return Subject(path, "file", (SubjectGraph(MODEL, Path(path).name, Model.open(file, arch)),), file.parent, arch)


def _alone(versions: Versions) -> str:
    file, verb = (versions.after, "new") if versions.before is None else (versions.before, "deleted")
    if file is None:
        return "neither version is there"
    model = Model.open(file)
    counts = f"{len(model.graph.node):,} nodes, {len(model.graph.initializer):,} initializers"
    return f"{verb} graph: {counts}, {len(model.graph.input)} inputs, {len(model.graph.output)} outputs"


def _named(text: str, versions: Versions) -> str:
    """A message with the paths that the user knows in place of git's temporary files."""
    for path, file in ((versions.old_path, versions.before), (versions.new_path, versions.after)):
        text = text.replace(str(file), path) if file is not None else text
    return text


def graph_text_of(file: Path) -> str:
    """One version as text, a line for every thing; of what is no graph, a line that says so."""
    if (pointer := read_pointer(file)) is not None:
        return f"Git LFS pointer to {pointer.size} bytes, sha256 {pointer.sha256}; {FETCHED}\n"
    try:
        return graph_text(Model.open(file))
    except SurgeryError as error:
        return f"{str(error).replace(str(file), file.name)}\n"
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
