"""The report as JSON: documented keys, and the same bytes for the same two models wherever they lie."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from places import ROOT, TINY

from surgery.compare import Comparison, compare, open_subject
from surgery.compare.report_json import to_dict, to_json


def fields_of(kind: Any) -> set[str]:
    """The names of every field below a dataclass."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        inner = (fields_of(hint) for hint in hints.values())
        return set(hints).union(*inner)
    return set().union(*(fields_of(each) for each in get_args(kind))) if get_origin(kind) else set()


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "diff-report.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("| `"))
    documented = {word for text in re.findall(r"`([^`]+)`", rows) for word in re.findall(r"\w+", text)}
    pair = to_dict(compare(open_subject(TINY, "q4"), open_subject(TINY, "q4")))
    assert fields_of(Comparison) <= documented, fields_of(Comparison) - documented
    assert set(pair) <= documented


def test_the_same_two_models_give_the_same_bytes_in_another_folder(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "moved")
    here, there = (
        to_json(compare(open_subject(root, "q4"), open_subject(root, "fp16"))) for root in (TINY, tmp_path / "moved")
    )
    assert here == there
    assert json.loads(here)["version"] == 1 and str(tmp_path) not in there
