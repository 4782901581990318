"""Every command, on input of which one file is not what it seems: what a damaged download or a hostile author would send.

`Ground` is a place with all that the commands take: an export, a larger one with encoders, GenAI folders, a git
repository. `attack(ground, number)` damages one file of it, runs one command, and puts the file back; the same number is
the same attack. Whatever the input, a command ends with 0, 1, or 2 and a sentence, in bounded time and memory, changes
nothing but its target, and starts nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import adversarial
import confined
import small
from mutation import mutated_file, mutated_json, mutated_model, mutated_text, odd_neighbour
from places import TINY
from repositories import commit, git

from passes.registry import BUILT_IN

DECODER, EMBED = "onnx/decoder_model_merged_q4.onnx", "onnx/embed_tokens_q4.onnx"
FORM_SIZE = 300
"""Of a form of tests/adversarial.py among the mutations; its growth is measured elsewhere."""

MOST_COMMITTED = 65 * 2**20
"""Bytes: more than a comparison reads where nobody chose."""


@dataclass(frozen=True)
class Command:
    """`words` may be drawn anew in each attack; `victim` is the part of the ground of which a file is damaged."""

    name: str
    victim: str
    words: Callable[[random.Random], Sequence[str]]
    weight: int


def _one_of(*choices: str) -> Callable[[random.Random], Sequence[str]]:
    return lambda rng: rng.choice(choices).split()


OPTIONS = {
    "merge-embeddings": "{embed=PART/EMBED}", "scatter-features": "{image=5,audio=6}", "mask-media-ids": "{image=5}",
    "fit-encoder": "{kind=image,hidden=16}",
}  # fmt: skip
"""What a pass is told, where it must be told something."""


def _apply(part: str) -> Callable[[random.Random], Sequence[str]]:
    """One pass, or several, on the decoder, or on the embedding graph that some are for."""
    written = [f"{name}{OPTIONS.get(name, '').replace('PART/EMBED', f'{part}/{EMBED}')}" for name in BUILT_IN]
    recipes = [*written, "fuse-attention,slice-caches", "drop-attention-bias,fuse-attention,slice-caches"]

    def words(rng: random.Random) -> Sequence[str]:
        recipe = rng.choice([rng.choice(recipes), ",".join(rng.sample(written, 3))])
        graph = rng.choice([DECODER, DECODER, DECODER, EMBED])
        options = rng.choice([[], [], ["--weights", "consolidate"], ["--weights", "link"], ["--json"]])
        return ["apply", recipe, f"{part}/{graph}", "out/model.onnx", *options]

    return words


COMMANDS = (
    Command("inspect", "source", _one_of("inspect source --json", "inspect source", f"inspect source/{DECODER} --json"), 8),
    Command("inspect", "folder", _one_of("inspect folder --json", "inspect folder"), 4),
    Command("inspect", "source", _one_of(f"inspect source/{DECODER} --ep cuda", "inspect source --ep cuda"), 2),
    Command("diff", "source", _one_of(*(f"diff plain source --format {form} --weights {by}" for form in ("md", "json", "html", "terminal") for by in ("auto", "digest")), "diff source source", f"diff plain/{DECODER} source/{DECODER}"), 8),
    Command("diff", "folder", _one_of("diff tiny folder --format md", "diff folder folder --format json", "diff pristine folder"), 2),
    Command("git", "source", _one_of(f"git-textconv source/{DECODER}", f"git-diff {DECODER} plain/{DECODER} 00 100644 source/{DECODER} 11 100644", f"git-diff source/{DECODER} /dev/null . . source/{DECODER} 11 100644"), 3),
    Command("apply", "source", _apply("source"), 12),
    Command("apply", "tiny", _apply("tiny"), 3),
    Command("repack", "source", _one_of("repack source out --no-validate", "repack source out --no-validate --preset fast", "repack source out --no-validate --kv-layout unique --weights consolidate", "repack source out --no-validate --weights link --json", "repack source out --dry-run", "repack source out --target genai-0.12 --no-validate"), 8),
    Command("repack", "source", _one_of("repack source out"), 2),
    Command("repack", "tiny", _one_of("repack tiny out --no-validate --modalities text,image,audio", "repack tiny out --dry-run --modalities text,image,audio --json", "repack tiny out --no-validate --preset fast"), 1),
    Command("strip", "source", _one_of("strip source out --no-validate", "strip source out --no-validate --weights link", "strip source out --dry-run"), 8),
    Command("strip", "source", _one_of("strip source out"), 2),
    Command("vocabulary", "tiny", _one_of("vocabulary tiny --corpus texts/corpus.txt -o out", "vocabulary tiny --corpus texts/corpus.txt -o out --keep-scripts latin,cjk --size 64 --json"), 3),
    Command("vocabulary", "texts", _one_of("vocabulary tiny --corpus texts/corpus.txt -o out", "repack tiny out --no-validate --vocabulary texts/tokens.txt", "strip tiny out --no-validate --vocabulary texts/tokens.txt"), 3),
    Command("vocabulary", "tiny", _one_of("repack tiny out --no-validate --vocabulary texts/tokens.txt", "strip tiny out --no-validate --vocabulary texts/tokens.txt"), 2),
    Command("review", "repository", _one_of("review HEAD~1 HEAD", "review HEAD~1 HEAD --format md"), 3),
    Command("validate", "folder", _one_of("validate folder --against tiny --quick --tokens 1", "validate folder --quick --tokens 1 --json"), 2),
    Command("generate", "folder", _one_of("generate folder hello --new-tokens 2", "generate folder hello --new-tokens 2 --sample --seed 1"), 2),
    Command("generate", "tiny", _one_of("generate tiny hello --new-tokens 2", "generate tiny hello --new-tokens 2 --seed 1"), 2),
    Command("bench", "folder", _one_of("bench folder --contexts 8 --new-tokens 2", "bench folder --against tiny --contexts 8 --new-tokens 2"), 2),
)  # fmt: skip


class Ground:
    """All that the commands take, below one folder; `restore` brings back what an attack damaged."""

    PARTS = ("source", "plain", "tiny", "texts", "folder", "pristine", "repository")

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scratch = root.with_name(f"{root.name}.scratch")
        self._kept = root.with_name(f"{root.name}.kept")
        for left in (root, self.scratch, self._kept):  # by an earlier run
            shutil.rmtree(left, ignore_errors=True)
        for part in ("source", "plain"):
            small.write_export(self._kept / part)
        _copy_tiny(self._kept / "tiny")
        (self._kept / "texts").mkdir()
        (self._kept / "texts" / "corpus.txt").write_text("the sky is blue, and the sea is deep\n" * 20)
        (self._kept / "texts" / "tokens.txt").write_text("".join(f'{index}\t"token"\n' for index in range(120)))
        self._repository(self._kept / "repository")
        shutil.copytree(self._kept, root, symlinks=True)
        ran = confined.run(["repack", "tiny", "folder", "--no-validate"], root, self.scratch, [root / "folder"])
        assert ran.code == 0, ran.err
        shutil.copytree(root / "folder", root / "pristine")
        for part in ("folder", "pristine"):
            shutil.copytree(root / part, self._kept / part)

    def _repository(self, folder: Path) -> None:
        small.write_export(folder)
        git(folder, "init", "-q", "-b", "main")
        for key, value in (("user.name", "n"), ("user.email", "n@example.org"), ("gc.auto", "0")):
            git(folder, "config", key, value)
        commit(folder, "first")

    def restore(self, part: str) -> None:
        for path in (self.root / part, self.root / "out"):
            remove(path)
        shutil.copytree(self._kept / part, self.root / part)

    def run(self, part: str, words: Sequence[str]) -> confined.Ran:
        """Run a command on the ground as it is; of the repository, on a new commit of it."""
        return confined.run(words, self._ready(part, words), self.scratch, [self.root / "out"])

    def rehearse(self) -> None:
        """Run each command once in this process, so that those that are forked from it need load nothing."""
        for command in COMMANDS:
            words = command.words(random.Random(0))
            confined.rehearse(words, self._ready(command.victim, words))
            self.restore(command.victim)

    def _ready(self, part: str, words: Sequence[str]) -> Path:
        """Make what a command expects to find. Returns where it runs."""
        if part == "repository":
            git(self.root / part, "add", "-A")
            git(self.root / part, "commit", "-q", "-m", "second", "--allow-empty")
        if words[0] == "apply":
            (self.root / "out").mkdir()
        return self.root / part if part == "repository" else self.root

    def state(self) -> dict[str, tuple[int, ...]]:
        """Everything below the root but the targets: kind and permissions, size, time, number."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            for name in [*folders, *files]:
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, self.root)
                if relative.split(os.sep)[0] == "out" or ".git" in relative.split(os.sep):
                    continue
                seen = os.lstat(path)
                times = () if os.path.isdir(path) else (seen.st_size, seen.st_mtime_ns)
                found[relative] = (seen.st_mode, seen.st_ino, *times)
        return found


def _copy_tiny(folder: Path) -> None:
    for path in (*TINY.glob("*"), *TINY.glob("onnx/*_q4.onnx*")):
        if path.is_file():
            target = folder / path.relative_to(TINY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Outcome:
    """What came of one attack. `faults` are by kind: `write outside`, `execution`, `defect`, `hang`."""

    number: int
    command: str
    words: str
    damage: str
    code: int
    seconds: float
    memory: int
    faults: Mapping[str, str]

    def __str__(self) -> str:
        told = "; ".join(f"{kind}: {what}" for kind, what in self.faults.items())
        return f"{self.number}: {self.words}, with {self.damage}: {told or self.code}"


def attack(ground: Ground, number: int, commands: Sequence[Command] = COMMANDS) -> Outcome:
    """Damage one file, run one command, judge, and put everything back."""
    rng = random.Random(number)
    command = rng.choices(commands, [each.weight for each in commands])[0]
    victim = ground.root / command.victim
    names = sorted(
        path.relative_to(victim).as_posix() for path in victim.rglob("*") if path.is_file() and ".git" not in path.parts
    )
    graphs = [name for name in names if name.endswith(".onnx")] or names
    name = rng.choice(graphs if rng.random() < 0.5 else names)
    damage = f"{command.victim}/{name}: {damaged(victim / name, rng)}"
    if command.victim == "folder" and rng.random() < 0.7:
        sign(victim, name)
    if command.victim == "repository":
        _make_committable(victim / name)
    words = command.words(rng)
    before = ground.state()
    try:
        ran = ground.run(command.victim, words)
        after = ground.state()
    finally:
        ground.restore(command.victim)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return Outcome(
        number, command.name, " ".join(words), damage, ran.code, ran.seconds, ran.memory, _faults(ran, changed)
    )


def _make_committable(path: Path) -> None:
    """Git takes no FIFO, and minutes for gigabytes."""
    if not os.path.isfile(path):
        remove(path)
    elif not path.is_symlink() and path.stat().st_size > MOST_COMMITTED:
        os.truncate(path, MOST_COMMITTED)


def sign(folder: Path, name: str) -> None:
    """Let manifest.json say of a damaged file what is there now, as its author would: what checks it is not all."""
    manifest, path = folder / "manifest.json", folder / name
    if path.is_file() and not path.is_symlink() and path.stat().st_size < confined.GIGABYTE and path != manifest:
        found = json.loads(manifest.read_text())
        data = path.read_bytes()
        found["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(found))


def _faults(ran: confined.Ran, changed: Sequence[str]) -> dict[str, str]:
    found = {
        "write outside": ", ".join([*changed, *ran.outside]),
        "execution": ", ".join(ran.started),
        "hang": f"{ran.seconds:.0f} s of CPU time" if ran.hung else "",
        "defect": "" if ran.hung else ran.defect,
    }
    return {kind: what[:300] for kind, what in found.items() if what}


def damaged(path: Path, rng: random.Random) -> str:
    """Damage a file by its kind. Returns what was done, in words."""
    kind = rng.random()
    if kind < 0.08:
        return mutated_file(path, rng) if kind < 0.06 else odd_neighbour(path, rng)
    if path.suffix == ".onnx" and kind < 0.15:
        form = rng.choice(list(adversarial.FORMS))
        adversarial.add(path, form, FORM_SIZE)
        return form
    data = path.read_bytes()
    if path.suffix == ".onnx":
        what, data = mutated_model(data, rng)
    elif path.suffix == ".json":
        what, data = mutated_json(json.loads(data), rng)
    else:
        what, data = mutated_text(data, rng)
    path.write_bytes(data)
    return what
