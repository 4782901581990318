"""The list of tokens that stay: a file with one id a line, new ids by their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import RequestError
from surgery.source.kept_tokens import KeptTokens


def test_a_list_is_read_as_it_is_written(tmp_path: Path) -> None:
    kept = KeptTokens.of([7, 0, 300, 7])
    text = kept.text({0: "<pad>", 7: "a\nb # c"}, ["said"])
    assert text == '# said\n0\t"<pad>"\n7\t"a\\nb # c"\n300\n'
    (tmp_path / "list").write_text(text)
    assert KeptTokens.read(tmp_path / "list") == kept
    assert [kept.new(token) for token in (0, 7, 300, 8)] == [0, 1, 2, None]
    assert [kept.below(bound) for bound in (0, 1, 8, 301)] == [0, 1, 2, 3]
    assert 300 in kept and 299 not in kept


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1\nx", "line 2: 'x' begins with no token id"),
        ("-1", "line 1: '-1' begins with no token id"),
        ("3\n4\n3\tagain", "line 3: token 3 stands in line 1 already"),
        ("# nothing\n\n", "names no token"),
        ("12345678901", "begins with no token id"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(RequestError, match=sentence):
        KeptTokens.read(tmp_path / "list")
    with pytest.raises(RequestError, match="does not exist"):
        KeptTokens.read(tmp_path / "other")
