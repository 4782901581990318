"""The HTML report: one file, nothing pasted, and opened and clicked through in a browser.

The browser is Chromium with its driver, as Debian packages them. Where GEMMA4_SURGERY_BROWSER is `required`, as in
continuous integration, a machine without them fails; elsewhere these tests are skipped there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import comparisons
import pytest
from limits import cpu_limit
from places import ROOT

from surgery.compare.comparison import Comparison, NodeChange, NodeGroup, Nodes
from surgery.compare.html import html

SECTIONS = [
    "Interface", "KV caches", "Opsets and metadata", "Nodes", "Weights and files", "genai_config.json", "Numbers",
]  # fmt: skip
DESKTOP, NARROW = (1280, 900), (390, 844)


class Tags(HTMLParser):
    """Every element of a page, and the text of each h2."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", ["nothing", "repacked", "hostile"])
def test_the_page_asks_for_nothing(name: str) -> None:
    tags = Tags(html(getattr(comparisons, name)())).found
    links = {
        key: value for _, attrs in tags for key, value in attrs.items() if key in ("src", "href", "srcset", "data")
    }
    assert set(links) == {"href"}
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in tags)
    assert [tag for tag, _ in tags if tag in ("script", "style", "link", "img", "iframe", "b")].count("script") == 1
    assert not any(key.startswith("on") for _, attrs in tags for key in attrs)


def test_sections_stand_in_their_order_and_say_none() -> None:
    page = html(comparisons.nothing())
    assert re.findall(r"<section[^>]*aria-label=\"([^\"]+)\"", page) == SECTIONS
    for section in page.split("<section")[1:]:
        assert "(none)" in section or 'id="caches"' in section, section[:60]


def test_hostile_names_are_text() -> None:
    page = html(comparisons.hostile())
    assert "<script>document" not in page and "<img" not in page and "</style></script>" not in page
    assert "&lt;script&gt;document.title=&#39;owned&#39;&lt;/script&gt;" in page
    assert "\x1b" not in page and "\u202e" not in page and "\\x1b[2J" in page


def test_the_same_comparison_gives_the_same_bytes() -> None:
    code = "import comparisons, hashlib; from surgery.compare.html import html\n"
    code += "print(hashlib.sha256(html(comparisons.repacked()).encode()).hexdigest())"
    folder = ROOT / "tests"
    path = os.pathsep.join([str(folder.parent), str(folder)])
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def many_nodes(count: int) -> Comparison:
    changes = tuple(NodeChange("added", "Identity", None, f"/n{k}", "model", "", k % 35) for k in range(count))
    return replace(comparisons.repacked(), nodes=Nodes((NodeGroup((), tuple(range(35)), changes),), 0))


def test_twenty_thousand_changes_are_written_in_seconds() -> None:
    with cpu_limit(10):
        page = html(many_nodes(20_000))
    assert page.count("<tr data-verb=") == 20_000


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("GEMMA4_SURGERY_BROWSER") == "required":
            pytest.fail("chromium and chromedriver are required here, and not installed")
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for name in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


class Page:
    """One report in the browser; `run` evaluates JavaScript, selectors are CSS."""

    def __init__(self, browser: Any, file: Path, size: tuple[int, int], scheme: str) -> None:
        self.browser = browser
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # what the page before left, and the browser's own start
        browser.get(file.as_uri())

    def run(self, code: str, *values: object) -> Any:
        return self.browser.execute_script(code, *values)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def shown(self, selector: str) -> list[Any]:
        """The elements that are visible, asked for in one go."""
        code = "return [...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())"
        return list(self.run(code, selector))

    def count(self) -> str:
        return str(self.one("#shown").text)


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    def open_page(found: Comparison, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Page:
        (tmp_path / "report.html").write_text(html(found), encoding="utf-8")
        return Page(browser, tmp_path / "report.html", size, scheme)

    return open_page


def test_nodes_are_searched_and_filtered(opened: Any) -> None:
    page = opened(comparisons.repacked())
    assert page.count() == "232 nodes changed" and not page.shown("tr[data-verb]"), "groups are closed at first"
    search = page.one("#search")
    search.send_keys("alias LAYERS.19")
    assert page.count() == "2 of 232 changed nodes shown"
    assert [row.get_attribute("data-layer") for row in page.shown("tr[data-verb]")] == ["19", "19"]
    page.one("button[type=reset]").click()
    page.run("return new Promise((done) => setTimeout(done, 20))")
    assert page.count() == "232 nodes changed" and not page.shown("tr[data-verb]")
    page.one("input[value=renamed]").click()
    assert page.count() == "92 of 232 changed nodes shown"
    page.one("select[name=operator] option[value=Gather]").click()
    page.one("select[name=layer] option[value='7']").click()
    assert page.count() == "1 of 232 changed nodes shown"
    (row,) = page.shown("tr[data-verb]")
    assert "attribute axis 1 → 2" in row.text and "merge-embeddings: embed_tokens computes it now" in row.text
    page.one("select[name=by] option[value=expand-shared-kv]").click()
    assert page.count() == "0 of 232 changed nodes shown" and not page.shown("details.group")
    page.one("#search").send_keys("\n")
    assert page.run("return location.search") == "", "the form is never sent"


def test_a_layer_leads_to_its_row_and_to_its_nodes(opened: Any) -> None:
    page = opened(comparisons.repacked())
    assert not page.shown("#layer-19")
    links = page.browser.find_elements("css selector", ".picture a")
    assert len(links) == 70, "35 layers, before and after"
    title = page.run("return arguments[0].querySelector('title').textContent", links[35 + 19])
    assert title.startswith("layer 19, after: full attention by Softmax, reads layer 14's cache, head size 512")
    assert "changed alias: (none) -> present.19.key" in title
    page.run("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", links[35 + 19])
    (row,) = page.shown("#layer-19")
    assert "reads 14's" in row.text and "present.19.key" in row.text
    row.find_element("css selector", "button.jump").click()
    assert page.count() == "7 of 232 changed nodes shown"
    assert {found.get_attribute("data-layer") for found in page.shown("tr[data-verb]")} == {"19"}


def test_the_picture_shows_owners_borrowers_and_what_changed(opened: Any) -> None:
    page = opened(comparisons.repacked())
    counts = page.run("return ['kv-source', 'kv-shared'].map((k) => document.querySelectorAll(`rect.bar.${k}`).length)")
    assert counts == [30, 40]
    assert len(page.shown(".picture rect.shade")) == 20
    assert len(page.shown(".picture circle.source")) == 4, "two KV source layers that others read, before and after"
    tall = page.run(
        "return [...document.querySelectorAll('.picture .side:last-child rect.bar')].map((bar) => bar.height.baseVal.value)"
    )
    assert tall[3] < tall[4] == tall[34], "512 is taller than 256"
    same = opened(comparisons.nothing())
    assert len(same.browser.find_elements("css selector", ".picture a")) == 35 and not same.shown("rect.shade")


def test_what_is_folded_opens(opened: Any) -> None:
    page = opened(comparisons.repacked())
    for summary in page.browser.find_elements("css selector", "summary"):
        if summary.is_displayed() and summary.find_element("xpath", "..").get_attribute("open") is None:
            summary.click()
    assert not [s for s in page.shown("details:not([open]) > summary")]
    assert "present.22.value" in [code.text for code in page.shown("#interface code")]


@pytest.mark.parametrize("name", ["repacked", "hostile", "nothing"])
def test_nothing_is_run_fetched_or_complained_of(opened: Any, name: str) -> None:
    page = opened(getattr(comparisons, name)())
    assert page.browser.title.startswith("diff: ")
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.run("return document.scripts.length + document.images.length") == 1
    assert page.browser.get_log("browser") == []
    log = "".join(entry["message"] for entry in page.browser.get_log("performance"))
    assert set(re.findall(r'"url":"(\w+):', log)) <= {"file", "data", "chrome"}, (
        "chrome: is the browser's own first page"
    )


def test_a_script_that_got_in_would_not_run(opened: Any) -> None:
    page = opened(comparisons.nothing())
    page.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    )
    assert page.browser.title.startswith("diff: "), "the policy names the page's own script alone"
    assert "Content Security Policy" in page.browser.get_log("browser")[0]["message"]


def test_without_scripting_every_change_is_there(opened: Any) -> None:
    page = opened(comparisons.repacked())
    page.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.browser.refresh()
        assert not page.shown("#filter")
        for group in page.shown("details.group > summary"):
            group.click()
        assert len(page.shown("tr[data-verb]")) == 232
    finally:
        page.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


CONTRAST = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const over = (color, below) => {
  canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const behind = (element) => {
  if (!element) return [255, 255, 255];
  return over(getComputedStyle(element).backgroundColor, behind(element.parentElement));
};
const bars = (element) => element.matches("text.bar") ? element.parentElement.querySelector("rect.bar") : null;
const drawnOn = (svg, text) => [...svg.querySelectorAll("rect")].filter((rect) => {
  const at = (name, from) => Number(from.getAttribute(name) || 0), x = at("x", text), y = at("y", text) - 4;
  const inside = (low, size, value) => low <= value && value <= low + size;
  return rect.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING &&
    inside(at("x", rect), at("width", rect), x) && inside(at("y", rect), at("height", rect), y);
}).pop();
const found = [];
for (const element of document.querySelectorAll("body *")) {
  if (element.closest("script, title, desc, option, .skip") || !element.checkVisibility()) continue;
  if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  const svg = element.closest("svg"), style = getComputedStyle(element);
  const bar = svg && (svg.matches("[role=img]") ? drawnOn(svg, element) : bars(element));
  const below = bar ? over(getComputedStyle(bar).fill, behind(svg)) : behind(element);
  const [a, b] = [light(over(svg ? style.fill : style.color, below)), light(below)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(`${element.tagName}.${element.getAttribute("class")} ${ratio.toFixed(2)} ${element.textContent.slice(0, 30)}`);
}
return [...new Set(found)];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(opened: Any, scheme: str) -> None:
    page = opened(comparisons.repacked(), scheme=scheme)
    page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 384) == (scheme == "light")
    assert page.run(CONTRAST) == [], "WCAG 2.2 asks for 4.5:1"


def test_a_narrow_screen_scrolls_down_only(opened: Any) -> None:
    page = opened(comparisons.repacked(), NARROW)
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.run(wide) == 0
    page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.run(wide) == 0


def test_every_control_has_a_name(opened: Any) -> None:
    page = opened(comparisons.repacked())
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "link", "searchbox", "combobox", "checkbox", "region", "navigation", "search", "img"}
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if not n["ignored"]]
    assert [role for role, name in named if role in roles and not name.strip()] == []
    assert ("searchbox", "Search") in named and ("combobox", "Layer") in named
    assert page.run("return [...document.querySelectorAll('h1, h2, h3')].map((h) => h.tagName)")[0] == "H1"
