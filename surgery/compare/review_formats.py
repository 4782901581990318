"""A review in the formats that are files: all models of it that differ, and what that comes to.

md       for a comment on a pull request          json     docs/diff-report.md
html     one page, a report for each model        junit    a test for each model, which fails where the policy does
github   annotations in the log of a workflow        svg      one picture, the models below one another
"""

from __future__ import annotations

import html as entities
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from surgery.compare.change_picture import pictures
from surgery.compare.commits import Reviewed, review_markdown, summary, worst
from surgery.compare.comparison import Comparison
from surgery.compare.html import html
from surgery.compare.impact import TITLES, Impact
from surgery.compare.report_json import VERSION, to_dict
from surgery.errors import printable
from surgery.printing import json_text


@dataclass(frozen=True, slots=True)
class Judged:
    """A review, and for each model whether it fails."""

    found: Sequence[Reviewed]
    fails: Callable[[Reviewed], bool]

    @classmethod
    def one(cls, before: str, after: str, comparison: Comparison, fails: bool) -> Judged:
        """Two models that were compared, as a review of one."""
        return cls([Reviewed(before, after, comparison)], lambda _: fails)


def review_dict(found: Sequence[Reviewed]) -> dict[str, Any]:
    """Plain values for JSON, keys in a fixed order."""
    return {
        "version": VERSION,
        "impact": worst(found).level,
        "summary": summary(found),
        "models": [
            {
                "before": one.before,
                "after": one.after,
                "impact": one.impact.level,
                "why": list(one.impact.why),
                "problem": one.problem,
                "report": to_dict(one.comparison) if one.comparison is not None else None,
            }
            for one in found
        ],
    }


def review_html(found: Sequence[Reviewed]) -> str:
    """One page: the meaning, a list of the models, and the page of each below."""
    style = (
        "body{font:16px/1.4 system-ui,sans-serif;margin:1rem;overflow-wrap:anywhere}h1{font-size:1.5rem}"
        "h2{font-size:1.1rem}ul{padding-left:1.2rem}"
    )
    rows = "".join(
        f"<li><a href='#m{number}'>{_text(one.name)}</a>: <b>{TITLES[one.impact.level]}</b>"
        f"{_text(': ' * bool(one.impact.why) + '; '.join(one.impact.why))}</li>"
        for number, one in enumerate(found)
    )
    pages = "".join(
        f"<h2 id='m{number}'>{_text(one.name)}</h2>{_page(one.comparison) if one.comparison else _text(one.state)}"
        for number, one in enumerate(found)
    )
    meaning = f"{TITLES[worst(found).level]}: {summary(found)}" if found else summary(found)
    head = "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>ONNX models</title>"
    view = "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    return (
        f"{head}{view}<style>{style}</style></head><body><h1>ONNX models: {_text(meaning)}</h1>"
        f"<ul>{rows}</ul>{pages}</body></html>\n"
    )


def _page(comparison: Comparison) -> str:
    frame = "sandbox='allow-scripts' style='width:100%;height:90vh;border:1px solid #888'"
    return f"<iframe {frame} title='report' srcdoc=\"{_text(html(comparison))}\"></iframe>"


def review_svg(found: Sequence[Reviewed]) -> str:
    """One picture of a phone's width."""
    return pictures([(one.name, one.impact, one.comparison) for one in found], summary(found))


def _text(text: str) -> str:
    return entities.escape("\n".join(printable(line) for line in text.split("\n")))


def junit(judged: Judged) -> str:
    """A test suite of the kind that Jenkins, GitLab and others read."""
    suite = Element("testsuite", name="ONNX models", tests=str(len(judged.found)))
    suite.set("failures", str(sum(judged.fails(one) and one.problem is None for one in judged.found)))
    suite.set("errors", str(sum(one.problem is not None for one in judged.found)))
    for one in judged.found:
        test = SubElement(suite, "testcase", classname="gemma4-surgery.review", name=printable(one.name))
        told = printable(str(one.impact))
        if one.problem is not None:
            SubElement(test, "error", message=printable(one.state))
        elif judged.fails(one):
            SubElement(test, "failure", message=told).text = _verdict(one)
        else:
            SubElement(test, "system-out").text = f"{told}\n{_verdict(one)}"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(suite, encoding="unicode")}\n'


def _verdict(one: Reviewed) -> str:
    return printable(one.comparison.verdict if one.comparison is not None else one.state)


def github(judged: Judged) -> str:
    """A line for each model, which GitHub shows at the file in the pull request."""
    lines = []
    for one in judged.found:
        failing = judged.fails(one) or one.problem is not None
        kind = "error" if failing else "warning" if one.impact.level in ("breaking", "numerics") else "notice"
        path = _escaped(one.after or one.before or "").replace(":", "%3A").replace(",", "%2C")
        lines.append(f"::{kind} file={path},title=ONNX model::{_escaped(_annotation(one))}\n")
    return "".join(lines)


def _annotation(one: Reviewed) -> str:
    told: Impact | str = one.state if one.problem is not None else one.impact
    return f"{one.name}: {told}"


def _escaped(text: str) -> str:
    """As the runner takes the data of a command."""
    return printable(text).replace("%", "%25")


FORMATS: dict[str, Callable[[Judged], str]] = {
    "md": lambda judged: review_markdown(judged.found),
    "json": lambda judged: json_text(review_dict(judged.found)),
    "html": lambda judged: review_html(judged.found),
    "junit": junit,
    "github": github,
    "svg": lambda judged: review_svg(judged.found),
}
SUFFIXES = {".md": "md", ".json": "json", ".html": "html", ".xml": "junit", ".svg": "svg"}
"""Suffix of a file -> its format."""
