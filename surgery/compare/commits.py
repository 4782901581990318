"""Every model that differs between two commits, compared: what a pull request does to the models of a repository.

A model is a GenAI folder (it has a genai_config.json) or an .onnx file outside of one. Both versions are taken out of
git by their hashes into a folder that is gone afterwards, so that the working copy is neither read nor touched; a data
file in Git LFS stays a pointer, and of one of more than QUICK_BYTES a pointer is made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.compare.comparing import compare
from surgery.compare.comparison import ASPECTS, Aspect, Comparison
from surgery.compare.git_objects import Repository, is_plain
from surgery.compare.impact import LEVELS, TITLES, Impact, impact_of
from surgery.compare.markdown import MOST, costs_table, markdown_head, to_markdown
from surgery.compare.provenance import JSON_FILE
from surgery.compare.subjects import Subject, open_subject
from surgery.compare.tensor_contents import QUICK_BYTES
from surgery.errors import ProcessEnded, SurgeryError, unforeseen
from surgery.files.json_values import typed
from surgery.folder.genai_config import CONFIG_FILE
from surgery.folder.manifest import NAME as MANIFEST_FILE
from surgery.graph.model import MAX_PROTO_BYTES
from surgery.printing import markdown_text
from surgery.runtime.own_process import Limits, Tell, run

WHICH = ("before", "after")
MOST_ENDS = 3
"""Processes that models may end: each may have been waited for."""
_OTHERS = "the models behind it"
_SECONDS = 120.0
"""For one model; 20,000 nodes take 5."""
ARCHITECTURE_FILE = "config.json"
_READ = (CONFIG_FILE, MANIFEST_FILE, ARCHITECTURE_FILE, JSON_FILE)
"""Files beside a graph whose content a comparison reads."""

_NEVER_DATA = {
    ".cfg",
    ".gitattributes",
    ".html",
    ".ini",
    ".jinja",
    ".json",
    ".md",
    ".py",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}
"""A graph's data file may have any name; with one of these suffixes it would be odd enough to be no such file."""


@dataclass(frozen=True, slots=True)
class Reviewed:
    """One model, by its paths in the two commits; None where a commit does not have it.

    `comparison` is there if both have it, unless `problem` says why they could not be compared.
    """

    before: str | None
    after: str | None
    comparison: Comparison | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """Its path; both where it was renamed."""
        if self.before and self.after and self.before != self.after:
            return f"{self.before} → {self.after}"
        return self.after or self.before or ""

    @property
    def state(self) -> str:
        """What there is to say where there is no comparison."""
        if self.problem is not None:
            return f"not compared: {self.problem}"
        return "new" if self.before is None else "gone"

    @property
    def impact(self) -> Impact:
        """What it means; a model that is gone, or that cannot be compared, may break whoever uses it."""
        if self.comparison is not None:
            return impact_of(self.comparison)
        if self.problem is None and self.before is None:
            return Impact("compatible", ("a new model",))
        return Impact("breaking", (self.state if self.problem is not None else "the model is gone",))

    def fails(self, aspects: Collection[Aspect]) -> bool:
        """Whether it differs in one of `aspects`. A model that is gone does in each, a new one in none of fewer than
        all."""
        if self.comparison is not None:
            return self.comparison.fails(aspects)
        return set(ASPECTS) <= set(aspects) if self.before is None else bool(aspects)


def review_commits(folder: Path, base: str, head: str = "HEAD", ignore: Collection[Aspect] = ()) -> list[Reviewed]:
    """The models of the repository that `folder` is in which differ between two commits, by path.

    A process of its own compares them. Where it ends with one, or is silent for too long, that model was not compared,
    and another process goes on behind it. Raises RepositoryError where there is no repository, or one of the commits
    is not in the clone; ProcessEnded where not even the list of models came.
    """
    limits, told, ends = Limits.of("cpu"), _Told(), 0
    while True:
        begun = told.begun
        try:
            run(_tell, folder, base, head, tuple(ignore), begun, answer=None, limits=limits, told=told)
            return told.found
        except ProcessEnded as error:
            ends += 1
            if told.begun == begun:
                raise
            told.found.append(Reviewed(*told.pair, problem=str(error)))
            if ends == MOST_ENDS:
                told.found.append(
                    Reviewed(_OTHERS, _OTHERS, problem=f"{ends} models ended the process that compared them")
                )
                return told.found


class _Told:
    """What the other process told: the pair of models that it begins with, by its number, and what came of it."""

    def __init__(self) -> None:
        self.begun = 0
        self.pair: tuple[str | None, str | None] = (None, None)
        self.found: list[Reviewed] = []

    def __call__(self, word: Any) -> None:
        if isinstance(word, list):
            self.pair = typed(tuple[str | None, str | None], word)
            self.begun += 1
        else:
            self.found.append(typed(Reviewed, word))


def _tell(tell: Tell, folder: Path, base: str, head: str, ignore: Collection[Aspect], first: int) -> None:
    tell(None, _SECONDS)
    for one in differing(folder, base, head, ignore, first):
        tell(one, _SECONDS)


def differing(
    folder: Path, base: str, head: str, ignore: Collection[Aspect] = (), first: int = 0
) -> Iterator[tuple[str | None, str | None] | Reviewed]:
    """What `review_commits` returns, in this very process; each pair of paths is told before the two are compared.

    `first` pairs are left out.
    """
    with tempfile.TemporaryDirectory(prefix="gemma4-surgery-") as own:
        repository = Repository.at(folder, Path(own))
        commits = repository.commit(base), repository.commit(head)
        before, after = _Tree.of(repository.tree(commits[0])), _Tree.of(repository.tree(commits[1]))
        changed: dict[tuple[tuple[str, ...], tuple[str, ...], bool], None] = {}
        for old, new in repository.changes(*commits):
            if all(path is None or is_plain(path) for path in (old, new)):
                changed[before.models(old), after.models(new), old != new] = None
            elif not first:
                yield Reviewed(old, new, problem="no file can have this name; whoever committed it made it by hand")
        pairs = dict.fromkeys(pair for models in changed for pair in _pairs(*models, before, after))
        for pair in sorted(pairs, key=lambda pair: pair[1] or pair[0] or "")[first:]:
            yield pair
            one = _reviewed(repository, (before, after), pair, ignore)
            if one.comparison is None or not one.comparison.same:
                yield one


@dataclass(frozen=True, slots=True)
class _Tree:
    """The files of a commit, path -> hash, and by folder the paths, and those of graphs."""

    files: dict[str, str]
    folders: dict[str, list[str]]
    graphs: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, files: dict[str, str]) -> _Tree:
        folders: dict[str, list[str]] = {}
        for path in files:
            folders.setdefault(str(PurePosixPath(path).parent), []).append(path)
        graphs = {folder: tuple(p for p in paths if p.endswith(".onnx")) for folder, paths in folders.items()}
        return cls(files, folders, graphs)

    def models(self, path: str | None) -> tuple[str, ...]:
        """The models that a file is of: its GenAI folder, itself, or the graphs whose data file it is or may be."""
        if path is None:
            return ()
        folder = str(PurePosixPath(path).parent)
        if _in(folder, CONFIG_FILE) in self.files:
            return (folder,)
        if path.endswith(".onnx"):
            return (path,)
        graph, found, _ = path.partition(".onnx")
        if found and f"{graph}.onnx" in self.files:
            return (f"{graph}.onnx",)
        if PurePosixPath(path).suffix in _NEVER_DATA:
            return ()
        return self.graphs.get(folder, ())

    def has(self, model: str) -> bool:
        return model in self.files or _in(model, CONFIG_FILE) in self.files


def _pairs(
    ours: tuple[str, ...], theirs: tuple[str, ...], renamed: bool, before: _Tree, after: _Tree
) -> Iterator[tuple[str | None, str | None]]:
    """The models that a changed file belongs to, as each commit has them."""
    if renamed and len(ours) == len(theirs) == 1:
        yield ours[0], theirs[0]
        return
    for model in dict.fromkeys((*ours, *theirs)):
        yield model if before.has(model) else None, model if after.has(model) else None


def _in(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _reviewed(
    repository: Repository,
    trees: tuple[_Tree, _Tree],
    pair: tuple[str | None, str | None],
    ignore: Collection[Aspect],
) -> Reviewed:
    if None in pair:
        return Reviewed(*pair)
    with tempfile.TemporaryDirectory(prefix="gemma4-surgery-") as scratch:
        taken = [
            _Taken(repository, tree, str(model), Path(scratch) / which, which)
            for which, tree, model in zip(WHICH, trees, pair, strict=True)
        ]
        try:
            return Reviewed(*pair, compare(taken[0].side(), taken[1].side(), ignore=ignore))
        except SurgeryError as error:
            problem = str(error)
        except Exception as error:  # the other models are shown in any case
            problem = str(unforeseen(error))
        return Reviewed(*pair, problem=taken[1].named(taken[0].named(problem)))


@dataclass(frozen=True, slots=True)
class _Taken:
    """One version of a model, taken out of git with what a comparison reads of the files beside it.

    target/model/...       the folder that the model is or lies in
    target/config.json     the architecture, from one folder up
    """

    repository: Repository
    tree: _Tree
    model: str
    target: Path
    which: str

    @property
    def whole(self) -> bool:
        return self.model not in self.tree.files

    @property
    def folder(self) -> PurePosixPath:
        return PurePosixPath(self.model) if self.whole else PurePosixPath(self.model).parent

    @property
    def root(self) -> Path:
        return self.target / "model"

    def side(self) -> Subject:
        self._take(str(self.folder.parent / ARCHITECTURE_FILE), self.target / ARCHITECTURE_FILE)
        for path in self._near():
            graph = path.endswith(".onnx")
            target = self.root / PurePosixPath(path).relative_to(self.folder)
            self._take(path, target, MAX_PROTO_BYTES if graph else QUICK_BYTES)
            if graph:
                self.repository.fetched(target, MAX_PROTO_BYTES)
        side = open_subject(
            self.root if self.whole else self.root / PurePosixPath(self.model).name,
            label=f"{self.model} ({self.which})",
        )
        for part in side.parts:
            for file in part.model.weight_files.values():
                self._take(str(self.folder / file.relative_to(self.root)), file)
        return side

    def _near(self) -> Iterator[str]:
        """The graph and what is read beside it; of a GenAI folder every file, and the graphs below."""
        if not self.whole:
            read = (_in(str(self.folder), name) for name in _READ)
            yield from (self.model, *(path for path in read if path in self.tree.files))
            return
        below = "" if self.folder == PurePosixPath() else f"{self.folder}/"
        for folder, paths in self.tree.folders.items():
            if folder == str(self.folder):
                yield from paths
            elif folder.startswith(below):
                yield from self.tree.graphs[folder]

    def _take(self, path: str, target: Path, most: int = QUICK_BYTES) -> None:
        """Take out a file that the commit has, and that is not there yet; a pointer to one that is longer."""
        if path in self.tree.files and not target.exists():
            self.repository.take_out(self.tree.files[path], target, most)

    def named(self, text: str) -> str:
        """A message with the paths of the repository in place of ours."""
        return text.replace(f"{self.root}/", "" if self.folder == PurePosixPath() else f"{self.folder}/")


def summary(found: Collection[Reviewed]) -> str:
    """`2 models differ, 1 is new`; what a person reads first."""
    if not found:
        return "no model differs"
    differ = sum(one.comparison is not None or one.problem is not None for one in found)
    new = sum(one.before is None for one in found)
    gone = sum(one.after is None for one in found)
    parts = [f"{differ} model{' differs' if differ == 1 else 's differ'}"] if differ else []
    parts += [f"{new} {'is' if new == 1 else 'are'} new"] if new else []
    parts += [f"{gone} {'is' if gone == 1 else 'are'} gone"] if gone else []
    return ", ".join(parts)


def worst(found: Collection[Reviewed]) -> Impact:
    """What all of them mean: the gravest."""
    impacts = [one.impact for one in found]
    return max(impacts, key=lambda impact: LEVELS.index(impact.level), default=Impact("same"))


def review_markdown(found: Collection[Reviewed], most: int = MOST) -> str:
    """All reports as one text of at most `most` characters; each gets its share, and a verdict alone where that is
    little."""
    meaning = f"{TITLES[worst(found).level]}: " if found else ""
    rows = costs_table([(one.name, one.comparison) for one in found if one.comparison is not None][:MOST_ROWS])
    head = f"## ONNX models: {meaning}{summary(found)}\n"
    if len(found) > 1 and len(rows) < most // 4:
        head += f"\n{rows}"
    blocks, left = [], most - len(head)
    for count, one in zip(range(len(found), 0, -1), found, strict=True):
        block = _block(one, left // count - 1)
        if len(block) >= left - LAST_LINE:
            blocks.append(f"*and {count} more, for which there is no room here*\n")
            break
        blocks.append(block)
        left -= len(block) + 1
    return "\n".join([head, *blocks])


MOST_ROWS = 40
"""Models in the table; the others have their own report below, or are counted."""

LAST_LINE = 80
"""Characters that are kept for the line which says how many models are left out."""


def _block(one: Reviewed, most: int) -> str:
    if one.comparison is None:
        return f"### {markdown_text(one.name)}: {markdown_text(one.state)}\n"
    try:
        report = to_markdown(one.comparison, most)
        if len(report) <= most:
            return report
        return markdown_head(one.comparison)
    except Exception as error:  # the other models are shown in any case
        return f"### {markdown_text(one.name)}: {markdown_text(str(unforeseen(error)))}\n"
