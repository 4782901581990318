"""Prompt files: what is read, what is refused with file and line, and what becomes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from surgery.errors import RequestError
from surgery.verify.prompt_file import Prompt, cases_of, read_prompts, shipped, shipped_texts
from surgery.verify.prompts import CLOSING, Case, Coverage, ModelTokens, Skipped, of_ids, within

REAL = ModelTokens(size=262144, context=131072, bos=2, pad=0, eos=(1,), image=258880, audio=258881, window=512, many=16)


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_json_lines_hold_texts_conversations_and_ids(tmp_path: Path) -> None:
    path = written(
        tmp_path / "p.jsonl",
        '{"text": "a b", "name": "one", "covers": "letters", "chunk": 2}',
        "",
        '{"messages": [{"role": "user", "content": "q"}], "batch": [[{"role": "user", "content": "longer"}]]}',
        '{"ids": [2, 7], "batch": [[5]]}',
    )
    one, two, three = read_prompts(path)
    assert one == Prompt("one", "letters", "text", ("a b",), 2)
    assert two == Prompt("line-3", "messages", "messages", ((("user", "q"),), (("user", "longer"),)))
    assert three.rows == ((2, 7), (5,))
    cases = list(cases_of((one, two, three), REAL, lambda text: [ord(c) for c in text], lambda found: [9, len(found)]))
    assert cases[0] == Case("one", "letters", ((2, 97, 32, 98),), chunk=2)
    assert [case.rows for case in cases[1:] if isinstance(case, Case)] == [((9, 1), (9, 1)), ((2, 7), (5,))]


def test_plain_text_is_one_text_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "p.txt", "first", "  ", '{"text": "not read as JSON"}\r')
    assert [(p.name, p.rows) for p in read_prompts(path)] == [
        ("line-1", ("first",)),
        ("line-3", ('{"text": "not read as JSON"}',)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txet": "a"}', r"'txet' is no field \(did you mean 'text'\?\); there are text, messages, ids, name"),
        ("{", "it is not JSON"),
        ("[" * 100000, "nested too deeply|it is not JSON"),
        ("[]", r"an object is expected, \[\] is found"),
        ("{}", "one of text, messages, ids is expected, 0 are found"),
        ('{"text": "a", "ids": [1]}', "2 are found"),
        ('{"text": 5}', "text is 5; a text is expected"),
        ('{"text": ""}', 'text is ""; a text is expected'),
        ('{"ids": []}', r"ids is \[\]; a list of whole numbers"),
        ('{"ids": [1, true]}', "a list of whole numbers"),
        ('{"messages": [{"role": "user"}]}', "an object of role and content"),
        ('{"messages": "hi"}', "a list of role and content"),
        ('{"text": "a", "chunk": 0}', "chunk is a number of tokens >= 1, 0 is found"),
        ('{"text": "a", "batch": "b"}', "batch is a list of further rows"),
        ('{"text": "a", "batch": [[1]]}', r"text is \[1\]"),
        ('{"text": "a", "name": 3}', "name is 3"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(line: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", '{"text": "fine"}', line)
    with pytest.raises(RequestError, match=message) as found:
        read_prompts(path)
    assert str(found.value).startswith(f"{path}, line 2: ") and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompt"), (b"\xff", "is not UTF-8: byte 0"), (b'{"ids":[1],"name":"x"}\n' * 2, "two prompts are")],
)
def test_a_bad_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_prompts(path)
    with pytest.raises(RequestError, match="does not exist"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(RequestError, match="cannot be read"):
        read_prompts(tmp_path)


def test_the_shipped_prompts_cover_what_one_prompt_does_not() -> None:
    prompts = shipped()
    assert len(prompts) >= 24
    assert {prompt.kind for prompt in prompts} == {"text", "messages"}
    assert any(prompt.chunk for prompt in prompts) and any(len(prompt.rows) > 1 for prompt in prompts)
    assert sum(any(ord(letter) > 0x250 for letter in text) for text in shipped_texts().values()) >= 8


def test_the_closing_cases_are_enough() -> None:
    """Length 1, the chat template, other scripts, past the window, chunks, placeholders and the highest ids."""
    found = [*of_ids(REAL), *cases_of(shipped(), REAL, lambda text: [len(text), 3], lambda messages: [2, 105])]
    assert within("full", found) == found
    cases = [case for case in within("closing", found) if isinstance(case, Case)]
    assert {case.name for case in cases} == CLOSING and len(cases) >= 12
    assert min(case.longest for case in cases) == 1
    assert any(case.chunk and case.longest > 512 for case in cases)
    assert any(max(case.rows[0]) == 262143 for case in cases) and any(258880 in case.rows[0] for case in cases)
    light = within("light", found)
    left = {case.name: case.reason for case in light if isinstance(case, Skipped)}
    assert left.keys() | CLOSING == {case.name for case in found}, "what is left out is listed"
    assert [name for name, reason in left.items() if "heavy" in reason] == ["past-the-window-in-chunks"]


@pytest.mark.parametrize("scope", ["light", "closing", "full"])
@pytest.mark.parametrize("window", [8, 512, 1024])
def test_every_proof_crosses_the_window_also_in_a_padded_batch(scope: Coverage, window: int) -> None:
    found = within(scope, list(of_ids(replace(REAL, window=window))))
    long = [case for case in found if isinstance(case, Case) and case.longest == window + 64]
    padded = [case for case in long if case.ragged]
    assert {len(case.rows) for case in long} == {1, 2} and padded
    for case in padded:
        assert min(case.lengths) < window < min(case.lengths) + case.steps(2), "the shorter row gets there"
        assert case.steps(2) + 1 >= 24


def test_without_a_tokenizer_ids_are_left() -> None:
    prompts = (*shipped(), Prompt("ids", "ids", "ids", ((5, 6),)))
    found = list(cases_of(prompts, REAL, None, None))
    assert [case.name for case in found if isinstance(case, Case)] == ["ids"]
    assert {case.reason for case in found if isinstance(case, Skipped)} == {
        "the folder has no tokenizer that works",
        "the folder has no tokenizer with a chat template that works",
    }
