"""The report as people read it: every section always there, never too long, and no name can break out of it."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from onnx import ModelProto
from onnx.helper import make_node
from places import TINY
from rich.console import Console

from surgery.compare import Comparison, Subject, compare, open_subject
from surgery.compare.comparison import NodeGroup, Reason
from surgery.compare.markdown import to_markdown
from surgery.compare.sections import ranges, sections_of, signed
from surgery.compare.subjects import SubjectGraph
from surgery.compare.terminal import show_comparison
from surgery.graph.model import Model

ONNX = TINY / "onnx"
SECTIONS = [
    "Costs",
    "Speed",
    "Interface",
    "KV caches",
    "Opsets and metadata",
    "Nodes",
    "Weights and files",
    "genai_config.json",
    "Numbers",
]
HOSTILE = "`</summary><script>alert(1)</script> | @somebody \x1b[31m ``` \n # head"


def side(proto: ModelProto) -> Subject:
    files = {name: ONNX / name for name in ("decoder_model_merged_q4.onnx_data",)}
    return Subject("a", "file", (SubjectGraph("model", "a.onnx", Model(proto, Path("a.onnx"), files)),), ONNX)


def of_nodes(*nodes: object) -> ModelProto:
    proto = ModelProto(ir_version=10)
    proto.graph.node.extend(nodes)
    return proto


@pytest.fixture(scope="module")
def different() -> Comparison:
    return compare(
        open_subject(ONNX / "decoder_model_merged_q4.onnx"), open_subject(ONNX / "decoder_model_merged_fp16.onnx")
    )


def printed(comparison: Comparison, *, full: bool = False) -> str:
    console = Console(file=StringIO(), width=120, highlight=False)
    show_comparison(console, comparison, full=full)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_sections_stand_in_their_order_and_empty_ones_nowhere(different: Comparison) -> None:
    same = compare(side(of_nodes()), side(of_nodes()))
    for found in (same, different):
        assert [section.title for section in sections_of(found)] == SECTIONS
        held = [f"<b>{each.title}</b>" for each in sections_of(found) if each.rows and each.title != "Costs"]
        text = to_markdown(found)
        assert [title for title in held if title in text] == held
        places = [text.index(title) for title in held]
        assert places == sorted(places)
    assert printed(same).splitlines()[0] == "a -> a: same"
    assert "Interface  " not in printed(same) and "Interface" not in to_markdown(same)


def test_full_shows_every_node(different: Comparison) -> None:
    names = {change.name for change in different.nodes if change.verb == "added"}
    text = printed(different, full=True).replace("\n", "")
    assert names and all(name in text for name in names)


@pytest.mark.parametrize("most", [65_000, 20_000, 6_000])
def test_markdown_is_cut_by_whole_parts_and_says_so(different: Comparison, most: int) -> None:
    many = replace(different, nodes=replace(different.nodes, groups=different.nodes.groups * 4))
    text = to_markdown(many, most)
    assert len(text) <= most < len(to_markdown(many, 10**7))
    assert "cut: the report would be too long" in text
    assert text.count("<details>") == text.count("</details>")
    assert (
        all(each.title in text for each in sections_of(different) if each.rows and each.title != "Costs")
        and different.verdict.split(" · ")[0] in text
    )


def test_no_name_breaks_out_of_the_markdown() -> None:
    found = compare(side(of_nodes()), side(of_nodes(make_node("Abs", [], [HOSTILE], name=HOSTILE))))
    assert found.nodes.groups
    text = to_markdown(found)
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    assert "<script>" not in outside and "@somebody" not in outside and "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| + ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (4, 5) for row in rows), rows
    assert "\x1b" not in printed(found, full=True)


@pytest.mark.parametrize("evil", ["@octocat", "#1", "https://evil.example", "a\\\\| @octocat | b", "</details><i>"])
def test_no_operator_and_no_finding_is_a_mention_or_a_link(evil: str) -> None:
    """GitHub looks for mentions in what Markdown has become: a backslash before the @ does not hold it back."""
    found = compare(side(of_nodes()), side(of_nodes(make_node(evil, [], [evil], name=evil, domain=evil))))
    reason = Reason(evil, evil)
    groups = tuple(
        replace(group, by=(evil,), changes=tuple(replace(change, reasons=(reason,)) for change in group.changes))
        for group in found.nodes.groups
    )
    text = to_markdown(replace(found, nodes=replace(found.nodes, groups=groups)))
    cells = [cell for row in text.splitlines() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", row)]
    outside = [re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", cell) for cell in cells]
    assert evil in text.replace("\\|", "|") and not any(re.search(r"@octocat|#1|://evil|<i>", cell) for cell in outside)


def test_like_caches_share_a_row() -> None:
    found = compare(open_subject(ONNX / "decoder_model_merged_q4.onnx"), side(of_nodes()))
    rows = next(section for section in sections_of(found) if section.title == "Interface").rows
    caches = [row for row in rows if "key_values" in row.name]
    assert [(row.kind, row.name) for row in caches] == [("10 inputs", "past_key_values.{0-4}.{key,value}")]
    assert caches[0].change == "FLOAT [batch_size, 1, past_sequence_length, 16|32]"


def test_layers_with_the_same_changes_share_a_group() -> None:
    def half(proto: ModelProto) -> None:
        for node in proto.graph.node:
            if node.op_type == "Gelu":
                node.op_type = "Erf"

    before = Model.open(ONNX / "decoder_model_merged_q4.onnx").proto
    after = ModelProto()
    after.CopyFrom(before)
    half(after)
    groups: tuple[NodeGroup, ...] = compare(side(before), side(after)).nodes.groups
    assert [group.layers for group in groups if ("added", "Erf") in group.counts] == [tuple(range(10))]


def test_words() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert [signed(count) for count in (0, 1500, -8)] == ["±0 bytes", "+1.5 kB", "-8 bytes"]
    assert str(Reason("rename-io")) == "rename-io" and str(Reason("rename-io", "why")) == "rename-io: why"
