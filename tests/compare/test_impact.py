"""What a change means for whoever runs the model, what it costs, and the formats of a review."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import command_line
import pytest
from folders import repack
from places import TINY

from passes.presets import fast
from surgery.compare import Comparison, compare, open_subject
from surgery.compare.change_picture import change_picture
from surgery.compare.commits import Reviewed, review_markdown
from surgery.compare.comparison import FieldChange, FileChange, Numbers
from surgery.compare.impact import Impact, cost_cells, impact_of, speed_notes
from surgery.compare.review_formats import FORMATS, Judged
from surgery.errors import RequestError
from surgery.graph.model import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(TINY, tmp_path_factory.mktemp("compatible") / "out").folder


@pytest.fixture(scope="module")
def to_fast(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    quick = repack(TINY, tmp_path_factory.mktemp("fast") / "out", "q4", lambda embed: fast(embed, "cpu", "1.31"))
    return compare(open_subject(folder), open_subject(quick.folder))


def changed(folder: Path, change: str) -> Comparison:
    """The folder's graph against itself with one change."""
    model = Model.open(folder / "model.onnx")
    after = model.copy()
    graph = after.proto.graph
    if change == "input type":
        graph.input[0].type.tensor_type.elem_type = 6
    elif change == "output name":
        name = graph.output[0].name
        for node in graph.node:
            node.output[:] = ["scores" if value == name else value for value in node.output]
        graph.output[0].name = "scores"
    elif change == "more outputs":
        graph.output.add(name=graph.node[0].output[0])
    elif change == "attribute":
        next(node for node in graph.node if node.op_type == "Softmax").attribute[0].i = 1
    elif change == "node names":
        for node in graph.node:
            node.name = f"{node.name}_"
    return compare(open_subject(model), open_subject(after))


@pytest.mark.parametrize(
    ("change", "level", "why"),
    [
        ("input type", "breaking", "1 input retyped"),
        ("output name", "breaking", "1 output renamed"),
        ("more outputs", "compatible", ""),
        ("attribute", "numerics", "nodes differ, and by how much was not measured"),
        ("node names", "compatible", ""),
        ("nothing", "same", ""),
    ],
)
def test_what_a_change_means(folder: Path, change: str, level: str, why: str) -> None:
    found = changed(folder, change)
    assert (impact_of(found).level, "; ".join(impact_of(found).why)) == (level, why), found.verdict
    aspects = found.differing
    assert impact_of(replace(found, ignored=aspects)).level == "same", "what is ignored means nothing"


def test_a_proof_says_by_how_much(folder: Path) -> None:
    found = changed(folder, "attribute")
    numbers = Numbers("a proof", True, False, "42 of 42 gates passed; max |difference| 0.001", ())
    assert str(impact_of(replace(found, numbers=numbers))) == f"Numbers changed: {numbers.summary}"
    assert str(impact_of(replace(found, numbers=replace(numbers, passed=False)))).startswith(
        "Numbers changed: the proof FAILS"
    )
    assert impact_of(replace(found, numbers=replace(numbers, exact=True))).level == "compatible"


def test_files_and_settings_mean_something_and_papers_do_not(folder: Path) -> None:
    same = changed(folder, "nothing")
    for name, level in (("README.md", "compatible"), ("tokenizer.json", "numerics")):
        files = (FileChange(name, 1, 2, False, "side"),)
        assert impact_of(replace(same, weights=replace(same.weights, files=files))).level == level
    config = (FieldChange("changed", "search.top_k", "1", "2"),)
    assert impact_of(replace(same, config=config)).level == "numerics"


def test_policies() -> None:
    fails = {level: [Impact(level).fails(policy) for policy in ("breaking", "numerics", "any")] for level in (  # type: ignore[arg-type]
        "same", "compatible", "numerics", "breaking")}  # fmt: skip
    assert fails == {
        "same": [False, False, False],
        "compatible": [False, False, True],
        "numerics": [False, True, True],
        "breaking": [True, True, True],
    }


def test_another_producer_is_no_change_of_the_interface(to_fast: Comparison) -> None:
    """The caches come out of other operators, under the same names with the same types."""
    kept = {f"present.{layer}.{kind}" for layer in range(5) for kind in ("key", "value")}
    assert not kept & {(change.after or change.before).name for change in to_fast.interface}  # type: ignore[union-attr]
    assert all(change.verb == "removed" for change in to_fast.interface)


def test_costs_and_reasons_of_speed(to_fast: Comparison, folder: Path) -> None:
    assert to_fast.before.costs is not None and to_fast.after.costs is not None
    tables = Model.open(folder / "model.onnx")
    assert (
        0
        < to_fast.before.costs.reads
        < to_fast.before.weight_bytes
        < sum(path.stat().st_size for path in folder.iterdir())
    ), f"of the tables in {tables.path} a token reads a row"
    assert (to_fast.before.costs.cache, to_fast.after.costs.cache) == (1536, 768), "as repack says"
    reads, at_8k, at_128k, _, runtimes = cost_cells(to_fast)
    assert (at_8k, at_128k) == ("12.6 MB → 6.29 MB", "201 MB → 101 MB") and "→" not in reads
    assert runtimes == "genai 0.14 → genai 0.14, onnxruntime 1.31"
    notes = dict(speed_notes(to_fast))
    assert notes["attention of 6 layers"].startswith("Softmax -> GroupQueryAttention: fused")
    assert "KV cache for each token" in notes and "in place" in notes["KV caches"]
    assert "it needs onnxruntime 1.31" in impact_of(to_fast).why


# The formats of a review


@pytest.fixture(scope="module")
def found(to_fast: Comparison, folder: Path) -> list[Reviewed]:
    gone, new = Reviewed("old,a:b.onnx", None), Reviewed(None, "new.onnx")
    odd = Reviewed("x.onnx", "x.onnx", problem="x.onnx is not an ONNX model::error::\n%")
    return [Reviewed("m", "m", to_fast), Reviewed("n", "n", changed(folder, "node names")), gone, new, odd]


def test_the_first_line_is_the_verdict_and_a_table_has_a_row_for_each(found: list[Reviewed]) -> None:
    lines = review_markdown(found).splitlines()
    assert lines[0] == "## ONNX models: Breaking: 3 models differ, 1 is new, 1 is gone"
    assert lines[2].startswith("| model |") and lines[4].startswith("| `m` | Breaking |")
    assert lines[5].startswith("| `n` | Compatible |")
    assert review_markdown([]).startswith("## ONNX models: no model differs")


def test_a_review_as_json_junit_and_annotations(found: list[Reviewed]) -> None:
    judged = Judged(found, lambda one: one.impact.fails("breaking"))
    told = json.loads(FORMATS["json"](judged))
    assert told["impact"] == "breaking" and [one["impact"] for one in told["models"]] == [
        "breaking", "compatible", "breaking", "compatible", "breaking",
    ]  # fmt: skip
    suite = ElementTree.fromstring(FORMATS["junit"](judged).partition("\n")[2])
    assert [(test.get("name"), [child.tag for child in test]) for test in suite] == [
        ("m", ["failure"]),
        ("n", ["system-out"]),
        ("old,a:b.onnx", ["failure"]),
        ("new.onnx", ["system-out"]),
        ("x.onnx", ["error"]),
    ]
    lines = FORMATS["github"](judged).splitlines()
    assert lines[0].startswith("::error file=m,title=ONNX model::m: Breaking: 10 inputs removed")
    assert lines[1].startswith("::notice file=n,") and lines[2].startswith("::error file=old%2Ca%3Ab.onnx,")
    assert len(lines) == len(found) and lines[4].endswith("::error::\\n%25")
    page = FORMATS["html"](judged)
    assert "<h1>ONNX models: Breaking: 3 models differ, 1 is new, 1 is gone</h1>" in page
    assert "<table" not in page.partition("<iframe")[0], "which a phone is too narrow for"
    assert page.count("<iframe sandbox='allow-scripts'") == 2 and "model::error" in page


def test_review_writes_files_and_exits_by_policy(repository: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return command_line.run("review", "HEAD^", *words, cwd=repository, GITHUB_ACTIONS="true")

    names = ("r.md", "r.xml", "r.json", "r.svg")
    done = run(*(f"--output={name}" for name in names), "--policy", "breaking")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert done.stderr.splitlines() == [f"wrote      {name}" for name in names]
    assert ElementTree.parse(repository / "r.svg").getroot().get("width") == "328"
    assert json.loads((repository / "r.json").read_text())["impact"] == "numerics"
    done = run("--format", "github", "--policy", "numerics")
    assert done.returncode == 1 and done.stdout.startswith("::error file=models/"), "commands, where they are asked for"
    done = run("--output", "r.pdf")
    assert done.returncode == 2 and "'.pdf'; .md, .json, .html, .xml, .svg is expected" in done.stderr


def test_a_suffix_that_is_none() -> None:
    from surgery.compare.formats import SUFFIXES, known_suffix

    with pytest.raises(RequestError, match=r"\.md, \.json, \.html, \.svg"):
        known_suffix(Path("x.txt"), SUFFIXES)


def test_the_picture_fits_a_phone_and_is_plain_svg(to_fast: Comparison, found: list[Reviewed]) -> None:
    hostile = "</text><script>alert(1)</script>\x1b" * 9
    groups = to_fast.nodes.groups
    odd = replace(groups[0], by=(hostile,), changes=tuple(replace(one, operator=hostile) for one in groups[0].changes))
    many = replace(to_fast, nodes=replace(to_fast.nodes, groups=(odd, *groups * 4)))
    one = [change_picture(each) for each in (to_fast, many, replace(to_fast, layers=to_fast.layers * 6))]
    several = [FORMATS["svg"](Judged(models, lambda _: True)) for models in (found, found * 9, [])]
    for text in one + several:
        root = ElementTree.fromstring(text)
        assert root.get("width") == "328" and "<script" not in text and "href" not in text and "\x1b" not in text
        words = [one for one in root.iter() if one.tag.endswith("}text")]
        assert all(int(one.get("font-size", 0)) >= 12 for one in words)
        ends = [float(one.get("x", 0)) + 7.23 * len(one.text or "") for one in words]
        assert max(ends) <= 328, "each text ends where the picture does"
        bottoms = [float(one.get("y", 0)) + float(one.get("height", 0)) for one in root.iter() if one.get("y")]
        assert max(bottoms) <= float(root.get("height", 0))
    told = [one.text or "" for one in ElementTree.fromstring(one[0]).iter()]
    assert {"Breaking", "Layers: 6 of 10 changed", "+ 4 GroupQueryAtt…", "12.6 MB", "6.29 MB"} <= {*told}
    assert change_picture(to_fast) == one[0]
    told = [one.text or "" for one in ElementTree.fromstring(several[0]).iter()]
    assert {"m", "new.onnx", "x.onnx"} <= {*told} and told.count("Breaking") == 3
    assert "and 25 more models" in several[1] and "no model differs" in several[2]
