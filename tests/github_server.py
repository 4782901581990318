"""A server on loopback that answers as GitHub's API does for the comments of one pull request: pages of `per_page`,
a Link header to the next one, 404 where the number is unknown, 401 or 403 where the token does not suffice. The token
is one that a job gets: it may not ask for its user, and is told its name by the GraphQL API.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loopback import on_loopback

NAME = "github-actions[bot]"


@dataclass
class GitHub:
    """`bodies` has the comments in order; a number is an index plus 1000. `log` has every request: method and path.

    `authors` has those of comments that are not ours, by index. `page` is the most comments that a page has here, whatever is asked for. `faults` answers by a part of a request.
    """

    repository: str = "me/models"
    number: int = 7
    token: str = "secret"
    bodies: list[str] = field(default_factory=list)
    authors: dict[int, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    faults: dict[str, tuple[int, bytes, dict[str, str]]] = field(default_factory=dict)
    page: int = 2
    elsewhere: str | None = None
    api: str = ""

    def comment(self, index: int) -> dict[str, Any]:
        url = f"https://github.example/{self.repository}/pull/{self.number}#issuecomment-{index + 1000}"
        return {
            "id": index + 1000,
            "body": self.bodies[index],
            "html_url": url,
            "user": {"login": self.authors.get(index, NAME)},
        }


@contextlib.contextmanager
def serve(github: GitHub) -> Iterator[GitHub]:
    with on_loopback(_Handler, github=github) as url:
        github.api = f"{url}/api/v3"
        yield github


class _Handler(BaseHTTPRequestHandler):
    github: GitHub

    def do_GET(self) -> None:
        if self._refused():
            return
        github, parts = self.github, urlsplit(self.path)
        if parts.path == "/api/v3/user":
            return self._send(403, {"message": "Resource not accessible by integration"})
        if parts.path != self._comments:
            return self._send(404, {"message": "Not Found"})
        query = parse_qs(parts.query)
        size, page = min(int(query["per_page"][0]), github.page), int(query.get("page", ["1"])[0])
        shown = range((page - 1) * size, min(page * size, len(github.bodies)))
        link = {}
        if page * size < len(github.bodies):
            base = github.elsewhere or github.api.removesuffix("/api/v3")
            following = f"{base}{parts.path}?per_page={size}&page={page + 1}"
            link = {"Link": f'<{base}{parts.path}?page=1>; rel="first", <{following}>; rel="next"'}
        self._send(200, [github.comment(index) for index in shown], link)

    def do_POST(self) -> None:
        if self._refused():
            return
        if self.path == "/api/graphql":
            self.rfile.read(int(self.headers["Content-Length"]))
            return self._send(200, {"data": {"viewer": {"login": NAME}}})
        if self.path != self._comments:
            return self._send(404, {"message": "Not Found"})
        self.github.bodies.append(self._body())
        self._send(201, self.github.comment(len(self.github.bodies) - 1))

    def do_PATCH(self) -> None:
        if self._refused():
            return
        found = re.fullmatch(rf"/api/v3/repos/{self.github.repository}/issues/comments/(\d+)", self.path)
        index = int(found[1]) - 1000 if found else -1
        if not 0 <= index < len(self.github.bodies):
            return self._send(404, {"message": "Not Found"})
        self.github.bodies[index] = self._body()
        self._send(200, self.github.comment(index))

    def log_message(self, *_: object) -> None:
        pass

    @property
    def _comments(self) -> str:
        return f"/api/v3/repos/{self.github.repository}/issues/{self.github.number}/comments"

    def _body(self) -> str:
        value = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return str(value["body"])

    def _refused(self) -> bool:
        request = f"{self.command} {self.path}"
        self.github.log.append(request)
        for part, (status, body, headers) in self.github.faults.items():
            if part in request:
                self._answer(status, body, headers)
                return True
        if self.headers.get("Authorization") != f"Bearer {self.github.token}":
            self._send(401, {"message": "Bad credentials"})
            return True
        return False

    def _send(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), headers or {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
