"""A server on loopback that speaks as much of the Hub's protocol as surgery.hub makes huggingface_hub use.

The listing with sizes and hashes; files with ETag, commit and Range, large ones redirected to another host;
and its faults: a status with X-Error-Code, a body that is cut short, a wrong size in the listing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loopback import on_loopback

COMMIT = "c0ffee" + "0" * 34
LARGE = ("_data", "_data_1", "tokenizer.json")
"""Ends of the names of files that are stored as LFS objects."""


@dataclass(frozen=True)
class Answer:
    """A refusal: HTTP status, X-Error-Code and further headers."""

    status: int
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Hub:
    """One repository. `log` has every request that came, `faults` answers by a part of the path.

    `cuts` has, by file, the bytes after which the next connections are closed."""

    repo_id: str
    files: dict[str, bytes]
    commit: str = COMMIT
    token: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, Answer] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    endpoint: str = ""

    @classmethod
    def of(cls, folder: Path, repo_id: str) -> Hub:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return cls(repo_id, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def fetched(self) -> list[str]:
        """The names of the files whose bytes were asked for, in order."""
        gets = [line.removeprefix("GET ") for line in self.log if line.startswith("GET ")]
        return [self.name_of(path) for path in gets if not path.startswith("/api/")]

    def name_of(self, path: str) -> str:
        """The file that /owner/name/resolve/revision/FILE or /lfs/SHA256 stands for."""
        if path.startswith("/lfs/"):
            return next(name for name in self.files if self.sha256(name) == path.removeprefix("/lfs/"))
        return path.split("/", 5)[5]

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()

    def git_hash(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def listing(self) -> bytes:
        siblings = []
        for name, data in self.files.items():
            size = self.sizes.get(name, len(data))
            entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": self.git_hash(name)}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": self.sha256(name), "size": size, "pointerSize": 134}
            siblings.append(entry)
        return json.dumps({"id": self.repo_id, "sha": self.commit, "siblings": siblings}).encode()


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    with on_loopback(_Handler, hub=hub) as url:
        hub.endpoint = url
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append(f"{self.command} {path}")
        fault = next((answer for part, answer in hub.faults.items() if part in f"{self.command} {path}"), None)
        if fault is not None:
            self._refuse(fault)
        elif path.startswith("/lfs/"):
            if "Authorization" in self.headers:
                hub.log.append(f"LEAK {path}")
            self._send_file(hub.name_of(path), {})
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._refuse(Answer(401, "GatedRepo"))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        else:
            self._resolve(path)

    def _api(self, path: str) -> None:
        repo_id, _, revision = path.partition("/revision/")
        if repo_id != self.hub.repo_id:
            self._refuse(Answer(404, "RepoNotFound"))
        elif revision not in ("main", self.hub.commit):
            self._refuse(Answer(404, "RevisionNotFound"))
        else:
            self._send(200, {"Content-Type": "application/json"}, self.hub.listing())

    def _resolve(self, path: str) -> None:
        hub, (repo_id, _, rest) = self.hub, path.removeprefix("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if repo_id != hub.repo_id:
            self._refuse(Answer(404, "RepoNotFound"))
        elif name not in hub.files:
            self._refuse(Answer(404, "EntryNotFound", {"X-Repo-Commit": hub.commit}))
        elif name.endswith(LARGE):
            sha256, size = hub.sha256(name), str(len(hub.files[name]))
            # Another host, as the Hub's storage is: huggingface_hub follows redirects on one host at once.
            where = f"{hub.endpoint}/lfs/{sha256}".replace("127.0.0.1", "localhost")
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": size, "Location": where}
            self._send(302, {"X-Repo-Commit": hub.commit, "ETag": '"pointer"', **linked}, b"")
        else:
            self._send_file(name, {"X-Repo-Commit": hub.commit, "ETag": f'"{hub.git_hash(name)}"'})

    def _send_file(self, name: str, headers: Mapping[str, str]) -> None:
        data, status = self.hub.files[name], 200
        extra = {"Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            self.hub.log.append(f"Range {asked}")
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        self._send(status, {**headers, **extra}, data, cut=self._cut(name))

    def _cut(self, name: str) -> int | None:
        cuts = self.hub.cuts.get(name)
        return cuts.pop() if cuts and self.command == "GET" else None

    def _refuse(self, answer: Answer) -> None:
        code = {"X-Error-Code": answer.code} if answer.code else {}
        self._send(answer.status, {**code, **answer.headers}, answer.body)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, *, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
