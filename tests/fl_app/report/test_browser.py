"""The report in a real browser, chromium by playwright; skipped where either is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.audit import line_of
from helpers.reports import Pretence

from fl_app.audit.leakage_log import append_line
from fl_app.report.collect import collect
from fl_app.report.writing import write_report
from fl_app.runs.advice import AS_IT_IS, Advice, write_advice

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")

WIDTHS = (390, 1280)
PATIENCE = 120_000  # milliseconds: a loaded machine is no broken page
# Text whose contrast to what lies behind it is below WCAG's AA: 4.5, or 3 for large letters.
FAINT = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const faint = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest("script")) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if ((a + 0.05) / (b + 0.05) < (large ? 3 : 4.5)) faint.add(e.className + ": " + e.textContent);
  }
  return [...faint];
}"""
# What keeps a screen reader from saying what there is and where: the rules of axe-core by their
# names there, as far as the page can break them.
BROKEN = """() => {
  const all = (query) => [...document.querySelectorAll(query)];
  const name = (e) => (e.alt || e.ariaLabel || e.textContent.trim() ||
    [...(e.labels || [])].map((each) => each.textContent.trim()).join(""));
  const found = (rule, broken) => broken.map((e) => rule + ": " + e.outerHTML.slice(0, 80));
  const repeated = (values) => values.filter((v, i) => v && values.indexOf(v) !== i);
  const level = (e) => Number(e.tagName[1]);
  const heads = all("h1, h2, h3, h4, h5, h6");
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const outside = [];
  while (words.nextNode()) {
    const e = words.currentNode.parentElement;
    if (words.currentNode.data.trim() && !e.closest("header, main, nav, footer, script")) {
      outside.push(e);
    }
  }
  return [
    ...found("image-alt, label, link-name, button-name",
      all("img, svg, select, input, button, a, summary, [role=region], nav, th")
        .filter((e) => !name(e))),
    ...found("heading-order", heads.filter((e, i) => level(e) > (i ? level(heads[i - 1]) : 0) + 1)),
    ...found("empty-heading", heads.filter((e) => !name(e))),
    ...found("page-has-heading-one", all("h1").slice(1)),
    ...found("region", outside),
    ...found("landmark-one-main", all("main").slice(1)),
    ...found("th-has-data-cells", all("table").filter((e) => !e.querySelector("th"))),
    ...found("scope-attr-valid", all("th").filter((e) => !["col", "row"].includes(e.scope))),
    ...found("scrollable-region-focusable", all("body *").filter((e) => e.tabIndex < 0 &&
      e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === "auto")),
    ...found("list", all("ul > :not(li), ol > :not(li), dl > :not(dt):not(dd)")),
    ...repeated(all("[id]").map((e) => e.id)).map((id) => "duplicate-id: " + id),
    ...repeated(all("[role=region], nav").map((e) => e.ariaLabel))
      .map((label) => "landmark-unique: " + label),
    ...(document.documentElement.lang && document.title ? [] : ["html-has-lang, document-title"]),
  ];
}"""
# What has the focus and does not look so.
UNSEEN = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  return style.outlineStyle === "none" || !parseFloat(style.outlineWidth) ? [e.outerHTML] : [];
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Pretence(clients=3, rounds=2, attacks=("sme", "flow_matching")).write(
        tmp_path_factory.mktemp("runs")
    )
    evil = "<img src=x onerror=alert(1)>"
    append_line(run / "leakage.jsonl", line_of(status="failed", error=f"{evil} {'x' * 400}"))
    append_line(run / "leakage.jsonl", line_of(attack="dlg", diagnosis=["y" * 300], round=2))
    names = [AS_IT_IS, "secure aggregation", f"another {evil}", "y" * 300]
    tried = [Advice(n, leaked=9 - i, of=10, accuracy=0.4 - i / 99) for i, n in enumerate(names)]
    write_advice(run, {}, tried)
    return write_report(collect(run), run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # A container's root has no user namespaces for the sandbox; the page is our own.
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[tuple[Any, list[str]]]:
    """Yield the page, and what it says on the console, asks for or asks to be answered."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: said.append(request.url[:99]))
    page.goto(report.as_uri())
    yield page, said
    page.close()


def test_it_opens_without_an_error_or_a_request(opened: tuple[Any, list[str]]) -> None:
    page, said = opened
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    decoded = page.evaluate(
        """() => Promise.all(
          [...document.images].map((each) => each.decode().then(() => each.naturalWidth))
        )"""
    )
    assert len(decoded) > 20 and min(decoded) == 32
    asked = [words for words in said if not words.startswith("data:")]
    assert asked == [page.url]


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_can_be_read(opened: tuple[Any, list[str]], width: int) -> None:
    page, _ = opened
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(BROKEN) == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(FAINT) == []


def test_what_has_the_focus_shows_it(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        assert page.evaluate(UNSEEN) == []
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert reached >= {"A", "DIV", "SELECT", "INPUT", "BUTTON"}


def test_the_table_of_images_is_sorted_and_filtered(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    table, heads = page.locator("#images table"), page.locator("#images thead th")
    names = [name.strip() for name in heads.all_inner_texts()]

    def column(name: str) -> list[str]:
        cells = table.locator(f"tbody tr:visible td:nth-child({names.index(name) + 1})")
        return [text.strip() for text in cells.all_inner_texts()]

    def press(name: str) -> None:
        heads.nth(names.index(name)).locator("button").click()

    first = [float(text) for text in column("PSNR dB")]
    assert len(first) == 60
    press("PSNR dB")  # they were sorted so that the worst are first
    assert [float(text) for text in column("PSNR dB")] == sorted(first)
    press("PSNR dB")
    assert [float(text) for text in column("PSNR dB")] == sorted(first, reverse=True)
    press("attack")
    assert column("attack") == sorted(column("attack"))
    page.select_option("#images select[name=attack]", "sme")
    page.select_option("#images select[name=client]", "2")
    assert {*column("attack")} == {"sme"} and {*column("client")} == {"2"}
    page.check("#images input[name=identified]")
    assert {*column("identified")} == {"yes"}
    shown = f"{len(column('client'))} shown"
    assert page.locator("#images output").inner_text() == shown


def test_a_link_unfolds_what_it_leads_to(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    folded = page.locator("#updates details").nth(3)
    anchor = folded.get_attribute("id")
    assert not folded.evaluate("e => e.open")
    page.locator(f"#map a[href='#{anchor}']").click()
    page.wait_for_function("id => document.getElementById(id).open", arg=anchor)


def test_it_prints_and_the_first_screen_is_one_page(
    opened: tuple[Any, list[str]], tmp_path: Path
) -> None:
    page, _ = opened
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 710, "height": 1000})  # A4 without its margins, 96 dpi
    height = page.evaluate("document.querySelector('.first').getBoundingClientRect().bottom")
    assert height < (297 - 18) / 25.4 * 96
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
