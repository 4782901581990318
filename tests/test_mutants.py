"""The faults of validation.mutants are of this code: each text is there, once, and what takes its place compiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import ROOT

from validation.mutants.faults import Fault, all_faults

FAULTS = all_faults()


def test_no_fault_is_stale() -> None:
    assert not [reason for fault in FAULTS if (reason := fault.stale(ROOT))]
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("gone", "x", "its text is found 0 times, and once is expected"),
        ("a", "x", "its text is found 2 times"),
        ("b = 1", "b = (", "was never closed"),
        ("b = 1", "b = 2", ""),
    ],
)
def test_a_stale_fault_says_why(old: str, new: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("a = a\nb = 1\n")
    (tmp_path / "t.py").write_text("")
    said = Fault("m.py", "a fault", old, new, ("t.py::test",)).stale(tmp_path)
    assert reason in said if reason else not said


def test_a_verdict_rests_on_the_test_that_told_it(tmp_path: Path) -> None:
    """Others may change or go; what it rests on may not. Where none told it, all of them count."""
    (tmp_path / "m.py").write_text("b = 1\n")
    fault = Fault("m.py", "a fault", "b = 1", "b = 2", ("t.py",))

    def digests(text: str) -> tuple[str, str]:
        (tmp_path / "t.py").write_text(text)
        return fault.digest(tmp_path, ["t.py::test_one[a case]"]), fault.digest(tmp_path, fault.tests)

    parts = {
        "c": ("import c\n", "import b as c\n"), "d": ("d = c\n", "d = -c\n"), "e": ("e = 1\n", "e = 2\n"),
        "f": ("@fixture\ndef f():\n    return d\n", "@fixture\ndef f():\n    return -d\n"),
        "one": ("def test_one(f):\n    assert f\n", ""), "two": ("def test_two():\n    assert e\n", ""),
    }  # fmt: skip
    told, alive = digests("".join(text for text, _ in parts.values()))
    for changed in parts:
        one, whole = digests("".join(texts[name == changed] for name, texts in parts.items()))
        assert (one == told) is (changed in ("e", "two")) and whole != alive, changed


def test_another_text_of_module_or_tests_is_another_digest(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("b = 1\n")
    (tmp_path / "t.py").write_text("")
    fault = Fault("m.py", "a fault", "b = 1", "b = 2", ("t.py",))
    found = [fault.digest(tmp_path, fault.tests)]
    for name in ("m.py", "t.py"):
        (tmp_path / name).write_text("c = 1\n")
        found.append(fault.digest(tmp_path, fault.tests))
    assert len(set(found)) == 3
    for text in ("# a comment\nc = 1\n", '"""A docstring."""\nc = (\n    1\n)\n'):
        (tmp_path / "t.py").write_text(text)
        assert fault.digest(tmp_path, fault.tests) == found[-1]
