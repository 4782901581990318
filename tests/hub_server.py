"""A server on loopback that speaks as much of the Hub's protocol as surgery.source.hub makes huggingface_hub use.

The listing with sizes and hashes; files with ETag, commit and Range, large ones redirected to another host;
who a token is of; a repository made, files uploaded, small ones in the commit and large ones beside it; and its faults:
a status with X-Error-Code, a body that is cut short, a wrong size in the listing.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from loopback import on_loopback

COMMIT = "c0ffee" + "0" * 34
LARGE = ("_data", "_data_1", "tokenizer.json")
"""Ends of the names of files that are stored as LFS objects."""


NOBODY = "http://127.0.0.1:9"
"""An endpoint where nothing answers."""


def reach_nobody_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test names its endpoint. Whatever forgets it, and huggingface_hub's own telemetry, reaches nobody."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOBODY)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", NOBODY + "/{repo_id}/resolve/{revision}/{filename}"
    )


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
    exists: bool = True
    private: bool = False
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded beside a commit, by its SHA-256."""
    messages: list[str] = field(default_factory=list)

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
        known = {"id": self.repo_id, "sha": self.commit, "private": self.private}
        return json.dumps({**known, "siblings": siblings}).encode()


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

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.log.append(f"{self.command} {path}")
        fault = next((answer for part, answer in hub.faults.items() if part in f"{self.command} {path}"), None)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault is not None:
            self._refuse(fault)
        elif path.startswith("/put/"):
            hub.objects[path.removeprefix("/put/")] = body
            self._send(200, {}, b"")
        elif path.startswith("/lfs/"):
            if "Authorization" in self.headers:
                hub.log.append(f"LEAK {path}")
            self._send_file(hub.name_of(path), {})
        elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._refuse(Answer(401, "GatedRepo"))
        elif self.command == "POST" or path == "/api/whoami-v2":
            self._write(path, body)
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        else:
            self._resolve(path)

    def _api(self, path: str) -> None:
        repo_id, _, revision = path.partition("/revision/")
        if repo_id != self.hub.repo_id or not self.hub.exists:
            self._refuse(Answer(404, "RepoNotFound"))
        elif revision not in ("", "main", self.hub.commit):
            self._refuse(Answer(404, "RevisionNotFound"))
        else:
            self._send(200, {"Content-Type": "application/json"}, self.hub.listing())

    def _write(self, path: str, body: bytes) -> None:
        """What an upload asks, in its order."""
        hub, asked = self.hub, json.loads(body.splitlines()[0]) if body else {}
        if path == "/api/whoami-v2":
            self._answer({"name": "somebody", "type": "user"})
        elif path == "/api/repos/create":
            if hub.exists:
                there = json.dumps({"error": "it exists", "url": f"{hub.endpoint}/{hub.repo_id}"}).encode()
                self._refuse(Answer(409, body=there))
                return
            hub.exists, hub.private = True, bool(asked.get("private")) or asked.get("visibility") == "private"
            hub.repo_id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self._answer({"url": f"{hub.endpoint}/{hub.repo_id}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif f"/{hub.repo_id}/preupload/" in path:
            modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in asked["files"]}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self._answer({"files": files})
        elif path == f"/{hub.repo_id}.git/info/lfs/objects/batch":
            self._answer({"transfer": "basic", "objects": [self._place(one) for one in asked["objects"]]})
        elif f"/{hub.repo_id}/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(Answer(404))

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid = wanted["oid"]
        if oid in self.hub.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/put/{oid}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.hub
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                hub.messages.append(value["summary"])
            elif line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
        url = f"{hub.endpoint}/{hub.repo_id}/commit/{hub.commit}"
        self._answer({"success": True, "commitOid": hub.commit, "commitUrl": url, "hookOutput": ""})

    def _answer(self, value: dict[str, Any]) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

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
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
