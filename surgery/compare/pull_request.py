"""One comment on a pull request that is created once and then kept up to date, found by its author and a hidden line.

    GET   {api}/user                                                who the token is of; where that is for people alone
    POST  {graphql}  {viewer{login}}                                the same, for the token that a job gets
    GET   {api}/repos/OWNER/REPO/issues/N/comments?per_page=100     page by page, as the Link header leads
    PATCH {api}/repos/OWNER/REPO/issues/comments/ID                 where one of ours is there
    POST  {api}/repos/OWNER/REPO/issues/N/comments                  where none is

https://docs.github.com/en/rest/issues/comments: a pull request is an issue, a body has at most 65,536 characters.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from surgery.errors import RepositoryError

LONGEST = 65_536
"""Characters of a comment's body, as GitHub counts them."""

MOST_PAGES = 100
"""Of 100 comments each: a server that leads in a circle must not keep us for ever."""

TIMEOUT = 30
"""Seconds for one request."""

MOST_BYTES = 64 * 2**20
"""Of one answer: a hundred comments have at most half of it."""

_MARKER_NAME = re.compile(r"[\w.-]{1,80}")


@dataclass(frozen=True, slots=True)
class PullRequest:
    """A pull request, as `OWNER/REPO#NUMBER` names it."""

    repository: str
    number: int

    @classmethod
    def parse(cls, text: str) -> PullRequest:
        """Raises RepositoryError for any other form."""
        found = re.fullmatch(r"([\w.-]+/[\w.-]+)#([1-9]\d{0,9})", text, re.ASCII)
        if found is None or ".." in text:
            raise RepositoryError(f"{text!r} names no pull request; OWNER/REPO#NUMBER is expected, e.g. me/models#7")
        return cls(found[1], int(found[2]))

    def __str__(self) -> str:
        return f"{self.repository}#{self.number}"


@dataclass(frozen=True, slots=True)
class Posted:
    """Where the comment is, and whether it is new."""

    url: str
    created: bool


@dataclass(frozen=True, slots=True)
class Site:
    """The API that comments go to, and the token that may write them."""

    api: str
    token: str

    @classmethod
    def from_environment(cls) -> Site:
        """GITHUB_API_URL and GITHUB_TOKEN (or GH_TOKEN), as an action's step has them. Raises RepositoryError."""
        token = os.environ.get("GITHUB_TOKEN") or os.environ.get("GH_TOKEN")
        if not token:
            raise RepositoryError(
                "GITHUB_TOKEN is not set, and a comment needs it",
                hint="in a workflow's step: env: GITHUB_TOKEN: ${{ github.token }}",
            )
        return cls((os.environ.get("GITHUB_API_URL") or "https://api.github.com").rstrip("/"), token)


def post(
    site: Site, pull_request: PullRequest, body: str, marker: str = "report", *, update_only: bool = False
) -> Posted | None:
    """Create the comment, or bring it up to date. `marker` tells apart several of ours on one pull request.

    With `update_only` None is returned, and nothing done, where there is none to bring up to date. Raises
    RepositoryError, in one sentence, for whatever the site or the network answers instead.
    """
    line = _marker_line(marker)
    body = f"{line}\n{body}"
    if len(body) > LONGEST:
        raise RepositoryError(
            f"the comment has {len(body):,} characters, GitHub takes {LONGEST:,}",
            hint="diff --format md cuts a report to size; write it with that",
        )
    client = _Client(site, pull_request)
    there = client.find(line)
    if there is None and update_only:
        return None
    if there is None:
        return Posted(client.send("POST", client.comments, body), True)
    url = f"{client.issues}/comments/{there}"
    return Posted(client.send("PATCH", url, body), False)


def _marker_line(marker: str) -> str:
    if not _MARKER_NAME.fullmatch(marker):
        raise RepositoryError(f"the marker is {marker!r}; up to 80 letters, digits, dots, dashes are expected")
    return f"<!-- gemma4-surgery: {marker} -->"


class _Client:
    def __init__(self, site: Site, pull_request: PullRequest) -> None:
        self._site = site
        self._pull_request = pull_request
        self._opener = build_opener(_NoRedirects)
        self.issues = f"{site.api}/repos/{pull_request.repository}/issues"
        self.comments = f"{self.issues}/{pull_request.number}/comments"

    def find(self, line: str) -> int | None:
        """The number of the first comment of ours that begins with our line: anybody may write the line."""
        author = None
        url: str | None = f"{self.comments}?per_page=100"
        for _ in range(MOST_PAGES):
            if url is None:
                return None
            answer, headers = self._request("GET", url, None)
            if not isinstance(answer, list):
                raise RepositoryError(f"{url} answered with no list of comments")
            for comment in answer:
                if _text(comment, "body").splitlines()[:1] == [line]:
                    author = author or self._author()
                    if _text(comment, "user", "login") == author and isinstance(comment.get("id"), int):
                        return int(comment["id"])
            url = self._next_page(headers)
        raise RepositoryError(f"{self._pull_request} has more than {MOST_PAGES * 100:,} comments")

    def _author(self) -> str:
        """The name under which the token writes. Raises RepositoryError where the site does not tell it."""
        try:
            answer, _ = self._request("GET", f"{self._site.api}/user", None)
            name = _text(answer, "login")
        except _Refused as refused:
            if refused.status not in (403, 404):
                raise
            # An app's token, such as a job has, may not ask that; it may ask for its own name in the other language.
            query = {"query": "{viewer{login}}"}
            answer, _ = self._request("POST", f"{self._site.api.removesuffix('/v3')}/graphql", query)
            name = _text(answer, "data", "viewer", "login")
        if not name:
            raise RepositoryError(f"{self._site.api} does not tell whose token GITHUB_TOKEN is")
        return name

    def send(self, method: str, url: str, body: str) -> str:
        """Write a comment; returns where it can be read."""
        answer, _ = self._request(method, url, {"body": body})
        return _text(answer, "html_url")

    def _next_page(self, headers: HTTPMessage) -> str | None:
        found = re.search(r'<([^>]+)>;\s*rel="next"', headers.get("Link", ""))
        if found is None:
            return None
        if urlsplit(found[1])[:2] != urlsplit(self._site.api)[:2]:  # the token is for this host alone
            raise RepositoryError(f"the next page of comments is said to be on another host, {found[1]}")
        return found[1]

    def _request(self, method: str, url: str, value: dict[str, str] | None) -> tuple[Any, HTTPMessage]:
        request = Request(url, None if value is None else json.dumps(value).encode(), method=method)
        request.add_header("Authorization", f"Bearer {self._site.token}")
        request.add_header("Accept", "application/vnd.github+json")
        request.add_header("X-GitHub-Api-Version", "2022-11-28")
        request.add_header("Content-Type", "application/json")
        request.add_header("User-Agent", "gemma4-surgery")
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                return json.loads(response.read(MOST_BYTES)), response.headers
        except HTTPError as error:
            raise self._refusal(method, error) from None
        except (URLError, HTTPException, OSError) as error:
            raise RepositoryError(f"{self._site.api} cannot be reached: {getattr(error, 'reason', error)}") from None
        except (ValueError, RecursionError):
            raise RepositoryError(f"{url} answered with something that is not JSON") from None

    def _refusal(self, method: str, error: HTTPError) -> _Refused:
        try:
            said = _text(json.loads(error.read(MOST_BYTES)), "message")
        except (ValueError, RecursionError, OSError, HTTPException):
            said = ""
        doing = "read the comments of" if method == "GET" else "write a comment on"
        message = f"cannot {doing} {self._pull_request}: HTTP {error.code}{f', {said}' if said else ''}"
        return _Refused(error.code, message)


class _Refused(RepositoryError):
    """The site's answer was no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message, hint=_HINTS.get(status))
        self.status = status


def _text(value: object, *keys: str) -> str:
    """A text inside of JSON that may be anything; empty where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


_HINTS = {
    401: "GITHUB_TOKEN is not valid, or has expired",
    403: "the job needs `permissions: pull-requests: write`; a pull request from a fork never has it",
    404: "check the repository and the number; a token that may not read a repository gets this answer, too",
}


class _NoRedirects(HTTPRedirectHandler):
    """A redirect would carry the token elsewhere; GitHub answers a renamed repository's requests with one."""

    def redirect_request(self, *_: object) -> None:
        return None
