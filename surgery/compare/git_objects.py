"""What git keeps, as files: reads trees, takes one version of a folder out of the history.

A checkout may be anybody's, an unpacked archive for one, and its .git/config can name programs that git would run. So
the repository's own configuration serves to find the commits alone, with every transport forbidden; trees and blobs are
read through a git directory of our own, which has the repository's objects and no configuration, filter or hook.

Git LFS stores a pointer in place of a large file, three lines that hold the file's SHA-256 and size. Where the clone
has the file itself, below .git/lfs, a graph is read from there; data files stay pointers, whose digest is all that a
comparison needs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from surgery.errors import RepositoryError
from surgery.files.safe_reading import POINTER_HEAD, read_pointer, read_regular

MOST_BYTES = 4 * 2**30
"""A blob that says it is longer is not read: a megabyte of git's can stand for any size."""

MOST_ANSWER = 2**27
"""Bytes of names that git lists: a million files."""

_LONGEST_COMPLAINT = 2000

_SECONDS = 300
"""For git's answer to one question."""

_NO_TRANSPORT = {
    "GIT_ALLOW_PROTOCOL": "",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_TERMINAL_PROMPT": "0",
}
_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Repository:
    """The objects of a repository. `own` is our git directory, `folder` a place in the repository, to find commits
    from."""

    folder: Path
    common: Path
    own: Path

    @classmethod
    def at(cls, folder: Path, own: Path) -> Repository:
        """The repository that a folder is in, read through `own`, an empty folder.

        Raises RepositoryError where the folder is in none.
        """
        found = run_git(folder, "rev-parse", "--show-object-format", "--git-common-dir")
        if found.returncode:
            reason = found.stderr.strip().removeprefix("fatal: ")
            raise RepositoryError(f"{folder.absolute()} is in no git repository: {reason}")
        form, common = found.stdout.removesuffix("\n").split("\n", 1)
        for name in ("objects", "refs"):
            (own / name).mkdir()
        (own / "HEAD").write_text("ref: refs/heads/none\n")
        sha256 = "[extensions]\n\tobjectFormat = sha256\n" if form == "sha256" else ""
        (own / "config").write_text(f"[core]\n\trepositoryformatversion = {int(bool(sha256))}\n\tbare = true\n{sha256}")
        return cls(folder, (folder / common).absolute(), own)

    def commit(self, name: str) -> str:
        """The full hash of a commit. Raises RepositoryError where the clone does not have it."""
        words = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        found = run_git(self.folder, *words)
        if found.returncode:
            raise RepositoryError(
                f"{name} is no commit of this clone",
                hint="a clone that CI made may be cut short: fetch-depth: 2 for HEAD^1, 0 for every commit",
            )
        return found.stdout.strip()

    def tree(self, commit: str) -> dict[str, str]:
        """Path -> hash of every file of a commit; links and submodules are left out, and names that no file can
        have."""
        files = {}
        for entry in self._ask("ls-tree", "-r", "-z", commit).split("\0"):
            head, _, path = entry.partition("\t")
            if path and head.split()[0] in ("100644", "100755") and is_plain(path):
                files[path] = head.split()[2]
        return files

    def changes(self, before: str, after: str) -> list[tuple[str | None, str | None]]:
        """(old path, new path) of every file that differs between two commits, renamed ones together."""
        words = self._ask("diff-tree", "-r", "-z", "--name-status", "--find-renames", before, after).split("\0")
        found: list[tuple[str | None, str | None]] = []
        while len(words) > 1:
            status = words.pop(0)
            if status[0] in "RC":
                found.append((words.pop(0), words.pop(0)))
            else:
                path = words.pop(0)
                found.append((None if status == "A" else path, None if status == "D" else path))
        return found

    def take_out(self, blob: str, target: Path, most: int) -> None:
        """Write a blob to a new file; in place of one that is longer than `most` bytes, a Git LFS pointer to it.

        Raises RepositoryError for a blob that the clone does not have, or that cannot be written under this name.
        """
        pipe = subprocess.PIPE
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with (
                target.open("xb") as writer,
                subprocess.Popen(
                    ["git", "cat-file", "--batch"], cwd=self.own, env=self._environment(), stdin=pipe, stdout=pipe
                ) as git,
            ):
                try:
                    _copy(git, blob, writer, most)
                finally:
                    git.kill()
        except OSError as error:
            raise RepositoryError(f"{target.name} cannot be taken out of git: {error.strerror or error}") from None

    def fetched(self, target: Path, most: int) -> None:
        """Put the file that a pointer stands for in the pointer's place, if Git LFS has it in this clone."""
        if (pointer := read_pointer(target)) is None:
            return
        digest = pointer.sha256
        try:
            data = read_regular(self.common / "lfs" / "objects" / digest[:2] / digest[2:4] / digest, most)
        except OSError:
            return
        if hashlib.sha256(data).hexdigest() == digest:
            target.write_bytes(data)

    def _ask(self, *words: str) -> str:
        """Git's answer. A few objects can stand for any number of files: one that has no end is not read to it."""
        with (
            tempfile.TemporaryFile() as complaint,
            subprocess.Popen(
                ["git", *words], cwd=self.own, env=self._environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=complaint,
            ) as git,
        ):  # fmt: skip
            answer = cast(IO[bytes], git.stdout).read(MOST_ANSWER + 1)
            if len(answer) > MOST_ANSWER:
                git.kill()
                raise RepositoryError(
                    f"git {words[0]} lists more than {MOST_ANSWER:,} bytes of names; a repository of models has thousands"
                )
            if git.wait():
                complaint.seek(0)
                told = complaint.read(_LONGEST_COMPLAINT).decode("utf-8", "replace")
                raise RepositoryError(f"git {' '.join(words)} failed: {told.strip()}")
        return answer.decode("utf-8", "surrogateescape")

    def _environment(self) -> dict[str, str]:
        """Of our own git directory, the repository's objects, and nobody's configuration."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        ours = {"HOME": self.own, "XDG_CONFIG_HOME": self.own, "GIT_DIR": self.own, "GIT_CONFIG_NOSYSTEM": 1}
        ours["GIT_OBJECT_DIRECTORY"] = self.common / "objects"
        return {**kept, **_NO_TRANSPORT, **{name: str(value) for name, value in ours.items()}}


def is_plain(path: str) -> bool:
    """Whether a path of a tree leads where it seems to: git objects may hold names that no checkout would make."""
    odd = {"", ".", "..", ".git"}
    return not any(name.casefold() in odd or set(name) & set("\\:\0") for name in path.split("/"))


def run_git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run git in a repository that may be anybody's: nothing that its configuration names is run, and nothing fetched.

    Raises RepositoryError where there is no git, or no answer; its exit code is the caller's to read.
    """
    nothing = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    try:
        return subprocess.run(
            ["git", *nothing, *words], cwd=folder, env={**os.environ, **_NO_TRANSPORT}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="surrogateescape", check=False, timeout=_SECONDS,
        )  # fmt: skip
    except FileNotFoundError:
        raise RepositoryError("git is not installed, or not on PATH") from None
    except subprocess.TimeoutExpired:
        raise RepositoryError(f"git {words[0]} gave no answer in {_SECONDS} seconds") from None


def _copy(git: subprocess.Popen[bytes], blob: str, writer: IO[bytes], most: int) -> None:
    """The content of a blob, or the pointer to it, from `git cat-file --batch`: a line `HASH blob SIZE`, the bytes."""
    asked, given = cast(IO[bytes], git.stdin), cast(IO[bytes], git.stdout)
    asked.write(f"{blob}\n".encode())
    asked.close()
    head = given.readline().split()
    if len(head) != 3 or head[1] != b"blob":
        raise OSError(errno.ENOENT, f"the clone does not hold blob {blob}")
    left = size = int(head[2])
    if size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {MOST_BYTES:,} are read")
    digest = hashlib.sha256()
    while left:
        if not (chunk := given.read(min(_CHUNK, left))):
            raise OSError(errno.EIO, f"git cannot read blob {blob}")
        digest.update(chunk)
        left -= len(chunk)
        if size <= most:
            writer.write(chunk)
    if size > most:
        writer.write(f"{POINTER_HEAD}v1\noid sha256:{digest.hexdigest()}\nsize {size}\n".encode())
