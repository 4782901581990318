"""What git keeps, as files: runs git, reads trees, takes one version of a folder out of the history.

Git LFS stores a pointer in place of a large file, three lines that hold the file's SHA-256 and size. A graph is fetched
through git's own filters, so that a pointer becomes the file where git-lfs is set up; data files stay pointers, whose
digest is all that a comparison needs.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import RepositoryError


@dataclass(frozen=True, slots=True)
class Repository:
    """A working copy; every command runs at `folder`, paths are relative to its top."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Repository:
        """The repository that a folder is in. Raises RepositoryError where it is in none."""
        found = run(folder, "rev-parse", "--show-toplevel")
        if found.returncode:
            raise RepositoryError(
                f"{folder.absolute()} is in no working copy: {found.stderr.strip().removeprefix('fatal: ')}"
            )
        return cls(Path(found.stdout.removesuffix("\n")))

    def commit(self, name: str) -> str:
        """The full hash of a commit. Raises RepositoryError where the clone does not have it."""
        found = run(self.folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if found.returncode:
            raise RepositoryError(
                f"{name} is no commit of this clone",
                hint="a clone that CI made may be cut short: fetch-depth: 2 for HEAD^1, 0 for every commit",
            )
        return found.stdout.strip()

    def tree(self, commit: str) -> dict[str, str]:
        """Path -> hash of every file of a commit; links and submodules are left out."""
        files = {}
        for entry in self._ask("ls-tree", "-r", "-z", commit).split("\0"):
            head, _, path = entry.partition("\t")
            if path and head.split()[0] in ("100644", "100755"):
                files[path] = head.split()[2]
        return files

    def changes(self, before: str, after: str) -> list[tuple[str | None, str | None]]:
        """(old path, new path) of every file that differs between two commits, renamed ones together."""
        words = self._ask("diff", "--name-status", "-z", "--find-renames", "--no-ext-diff", before, after).split("\0")
        found: list[tuple[str | None, str | None]] = []
        while len(words) > 1:
            status = words.pop(0)
            if status[0] in "RC":
                found.append((words.pop(0), words.pop(0)))
            else:
                path = words.pop(0)
                found.append((None if status == "A" else path, None if status == "D" else path))
        return found

    def take_out(self, commit: str, path: str, target: Path, *, filtered: bool) -> None:
        """Write one version of a file; `filtered` as a checkout would write it, otherwise as git keeps it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = "--filters" if filtered else "blob"
        with target.open("wb") as writer:
            done = subprocess.run(
                ["git", "cat-file", kind, f"{commit}:{path}"],
                cwd=self.folder, stdout=writer, stderr=subprocess.PIPE, text=True, errors="replace", check=False,
            )  # fmt: skip
        if done.returncode:
            raise RepositoryError(f"git cannot give {path} of {commit[:12]}: {done.stderr.strip()}")

    def _ask(self, *words: str) -> str:
        done = run(self.folder, *words)
        if done.returncode:
            raise RepositoryError(f"git {' '.join(words)} failed: {done.stderr.strip()}")
        return done.stdout


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run git. Raises RepositoryError where there is no git; its exit code is the caller's to read."""
    try:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, errors="surrogateescape", check=False
        )
    except FileNotFoundError:
        raise RepositoryError("git is not installed, or not on PATH") from None
