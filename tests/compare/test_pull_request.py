"""The sticky comment: created once, found again by its hidden line, and one sentence for every refusal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run
from github_server import GitHub, serve

from surgery.compare.pull_request import LONGEST, PullRequest, Site, post
from surgery.errors import RepositoryError

HERE = PullRequest("me/models", 7)


@pytest.fixture
def github() -> Iterator[GitHub]:
    with serve(GitHub(bodies=["hello", "<!-- gemma4-surgery: other -->\nold", "thanks"])) as server:
        yield server


def site(github: GitHub) -> Site:
    return Site(github.api, github.token)


def test_created_once_and_then_updated(github: GitHub) -> None:
    first = post(site(github), HERE, "one")
    second = post(site(github), HERE, "two")
    assert first and second and first.created and not second.created and first.url == second.url
    assert first.url == "https://github.example/me/models/pull/7#issuecomment-1003"
    assert github.bodies[3] == "<!-- gemma4-surgery: report -->\ntwo" and len(github.bodies) == 4
    asked = [line.split()[0] for line in github.log if "/issues/" in line]
    assert asked == ["GET", "GET", "POST", "GET", "GET", "PATCH"]


def test_a_strangers_comment_with_our_line_is_left_alone(github: GitHub) -> None:
    github.bodies.append("<!-- gemma4-surgery: report -->\nbuy my models")
    github.authors[3] = "stranger"
    posted = post(site(github), HERE, "one")
    assert posted and posted.created and github.bodies[3].endswith("buy my models") and len(github.bodies) == 5
    again = post(site(github), HERE, "two")
    assert again and not again.created and github.bodies[4].endswith("two")


def test_the_token_of_a_person(github: GitHub) -> None:
    github.bodies.append("<!-- gemma4-surgery: report -->\nold")
    github.authors[3] = "me"
    github.faults["GET /api/v3/user"] = (200, b'{"login": "me"}', {})
    posted = post(site(github), HERE, "new")
    assert posted and not posted.created and github.bodies[3].endswith("new")


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'{"data": []}', b'{"data": {"viewer": {"login": 7}}}', b"[" * 10**5])
def test_a_site_that_does_not_tell_who_we_are(github: GitHub, answer: bytes) -> None:
    github.bodies.append("<!-- gemma4-surgery: report -->\nold")
    github.faults["graphql"] = (200, answer, {})
    with pytest.raises(RepositoryError, match=r"does not tell whose token|is not JSON"):
        post(site(github), HERE, "one")


@pytest.mark.parametrize(
    "comment",
    [
        "7",
        '{"id": "x", "body": "<!-- gemma4-surgery: report -->"}',
        '{"body": [], "user": 3, "id": 1}',
        '{"user": {"login": []}}',
    ],
)
def test_comments_of_other_types_are_none_of_ours(github: GitHub, comment: str) -> None:
    github.faults["GET /api/v3/repos"] = (200, f"[{comment}, null]".encode(), {})
    posted = post(site(github), HERE, "one")
    assert posted and posted.created


def test_markers_keep_several_comments_apart(github: GitHub) -> None:
    updated, created = post(site(github), HERE, "new", "other"), post(site(github), HERE, "first", "third")
    assert updated and created and not updated.created and created.created
    assert github.bodies[1] == "<!-- gemma4-surgery: other -->\nnew"


def test_a_quoted_marker_is_not_ours(github: GitHub) -> None:
    github.bodies = ["> <!-- gemma4-surgery: report -->\nwhat is this?", "see\n<!-- gemma4-surgery: report -->"]
    assert post(site(github), HERE, "one", update_only=True) is None
    created = post(site(github), HERE, "one")
    assert created and created.created and len(github.bodies) == 3


@pytest.mark.parametrize(
    "part, status, body, sentence",
    [
        ("GET", 404, b'{"message": "Not Found"}', "cannot read the comments of me/models#7: HTTP 404, Not Found"),
        ("POST", 403, b'{"message": "Resource not accessible"}', "cannot write a comment on me/models#7: HTTP 403"),
        ("GET", 502, b"<html>", "cannot read the comments of me/models#7: HTTP 502"),
        ("GET", 301, b"", "HTTP 301"),
        ("GET", 200, b"<html>", "answered with something that is not JSON"),
        ("GET", 200, b'{"a": 1}', "answered with no list of comments"),
    ],
)
def test_a_refusal_is_one_sentence(github: GitHub, part: str, status: int, body: bytes, sentence: str) -> None:
    github.faults[part] = (status, body, {"Location": "http://127.0.0.1:9/"} if status == 301 else {})
    with pytest.raises(RepositoryError) as caught:
        post(site(github), HERE, "one")
    assert sentence in str(caught.value)
    assert status not in (403, 404) or caught.value.hint


def test_a_wrong_token_is_one_sentence(github: GitHub) -> None:
    with pytest.raises(RepositoryError, match="HTTP 401, Bad credentials"):
        post(Site(github.api, "wrong"), HERE, "one")


def test_the_token_stays_on_its_host(github: GitHub) -> None:
    github.elsewhere = "http://evil.example"
    with pytest.raises(RepositoryError, match=r"another host, http://evil\.example"):
        post(site(github), HERE, "one")


def test_an_endless_list_ends(github: GitHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.compare.pull_request.MOST_PAGES", 1)
    with pytest.raises(RepositoryError, match="more than 100 comments"):
        post(site(github), HERE, "one")


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(RepositoryError, match=r"http://127\.0\.0\.1:9 cannot be reached: .*refused"):
        post(Site("http://127.0.0.1:9", "t"), HERE, "one")


def test_a_comment_that_is_too_long_is_not_sent(github: GitHub) -> None:
    with pytest.raises(RepositoryError, match="GitHub takes 65,536"):
        post(site(github), HERE, "x" * LONGEST)
    assert not github.log


@pytest.mark.parametrize("text", ["me/models", "me/models#0", "#7", "me/../x#7", "a/b/c#7", "me/models#7x", "me/m#٣"])
def test_what_names_no_pull_request(text: str) -> None:
    with pytest.raises(RepositoryError, match="OWNER/REPO#NUMBER is expected"):
        PullRequest.parse(text)


def test_the_command(github: GitHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.md").write_text("the *report*")
    monkeypatch.setenv("GITHUB_API_URL", github.api + "/")
    monkeypatch.delenv("GH_TOKEN", raising=False)
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    refused = run("comment", "me/models#7", "report.md", cwd=tmp_path)
    assert refused.returncode == 2 and "GITHUB_TOKEN is not set" in refused.stderr
    monkeypatch.setenv("GITHUB_TOKEN", github.token)
    for verb in ("created", "updated"):
        done = run("comment", "me/models#7", "report.md", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{verb} https://github.example/me/models/pull/7#issuecomment-1003\n"
    assert github.bodies[3] == "<!-- gemma4-surgery: report -->\nthe *report*"
    missing = run("comment", "me/models#7", "nothing.md", cwd=tmp_path)
    assert missing.returncode == 2 and "nothing.md cannot be read" in missing.stderr
    unknown = run("comment", "me/models#8", "report.md", cwd=tmp_path)
    assert unknown.returncode == 2 and "HTTP 404" in unknown.stderr and "Traceback" not in unknown.stderr
