"""Pages as people see them: in a real browser, wide and narrow, light and dark, printed, and without scripts."""

import base64
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from browser import Browser
from hostile import HOSTILE_FOLDER, HOSTILE_NAME, HOSTILE_TEXT, Compared
from signbit.report.beside import FILE

# Boxes of what is written in the chart that is shown, as [left, top, right, bottom].
_LABELS = """[...document.querySelectorAll(".chart")].filter((chart) => chart.getClientRects().length).map((chart) =>
    [...chart.querySelectorAll("text")].map((text) => {
        const box = text.getBoundingClientRect();
        return [box.left, box.top, box.right, box.bottom, text.textContent];
    }))"""


def channel(value: float) -> float:
    return value / 12.92 if value <= 0.03928 else float(((value + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Of two CSS colours, as WCAG computes it."""
    lights = []
    for colour in (one, other):
        red, green, blue = (channel(int(part) / 255) for part in re.findall(r"\d+", colour)[:3])
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def assert_sound(browser: Browser, page: Path) -> None:
    """It fetched nothing, complained of nothing and let nothing run."""
    asked = [told["request"]["url"] for told in browser.told("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert not browser.told("Log.entryAdded")
    assert not browser.told("Runtime.exceptionThrown")
    assert browser.evaluate("typeof hacked") == "undefined"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 700, 400, 320])
def test_every_page_fits(
    compared: Compared, packed_dir: Callable[..., Path], browser: Browser, width: int, dark: bool
) -> None:
    for page in (compared.page, packed_dir("llama") / FILE):
        browser.open(page, width=width, dark=dark)
        assert_sound(browser, page)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        colours = browser.evaluate(
            """["body", "header p", "summary", "pre"].map((at) => getComputedStyle(document.querySelector(at)).color)"""
        )
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (contrast(ground, "rgb(0, 0, 0)") < 1.5) == dark
        assert all(contrast(colour, ground) > 4.5 for colour in colours)
        assert len(browser.screenshot()) > 10_000


@pytest.mark.parametrize("width", [1200, 400])
def test_names_in_pictures_do_not_overlap(compared: Compared, browser: Browser, width: int) -> None:
    browser.open(compared.page, width=width)
    charts = browser.evaluate(_LABELS)
    assert len(charts) == 3  # perplexity, KL, accuracy: of each the wide or the narrow one
    for labels in charts:
        assert len(labels) > 8
        for i, (left, top, right, bottom, text) in enumerate(labels):
            assert left >= 0 and right <= width, text
            for other in labels[:i]:
                wide = min(right, other[2]) - max(left, other[0])
                high = min(bottom, other[3]) - max(top, other[1])
                assert wide <= 0 or high <= 3, f"{text!r} lies over {other[4]!r}"


def test_hostile_strings_are_shown_as_they_are(compared: Compared, browser: Browser) -> None:
    browser.open(compared.page)
    shown = browser.evaluate("document.body.textContent")
    for text in (HOSTILE_NAME, HOSTILE_FOLDER, HOSTILE_TEXT.split("\x00")[0]):
        assert text in shown
    assert (
        browser.evaluate("document.querySelectorAll('img, script:not(body > script:last-child), svg svg').length") == 0
    )
    assert browser.evaluate("document.title").count(HOSTILE_NAME) == 1
    assert "49" not in browser.evaluate("document.querySelector('blockquote').textContent")


def test_tables_sort(compared: Compared, browser: Browser) -> None:
    browser.open(compared.page)
    column = "[...document.querySelectorAll('.cards tbody tr')].map((row) => row.cells[1].dataset.value)"
    heading = "document.querySelectorAll('.cards thead th')[1]"
    browser.evaluate(f"{heading}.querySelector('button').click()")
    bits = browser.evaluate(column)
    assert bits[-1] == ""  # what is not known comes last
    assert bits[:-1] == sorted(bits[:-1], key=float)
    assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == "ascending"
    browser.evaluate(f"{heading}.querySelector('button').click()")
    assert browser.evaluate(column) == [*reversed(bits[:-1]), ""]
    browser.evaluate("document.querySelectorAll('.cards thead th')[0].querySelector('button').click()")
    assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") is None


def test_without_scripts_nothing_is_missing(compared: Compared, browser: Browser) -> None:
    browser.open(compared.page, scripts=False)
    assert_sound(browser, compared.page)
    assert browser.evaluate("document.querySelectorAll('button').length") == 0
    rows = browser.evaluate("[...document.querySelectorAll('.cards tbody tr')].map((row) => row.cells.length)")
    assert len(rows) == len(compared.models)
    assert len(set(rows)) == 1


def test_it_can_be_read_aloud(compared: Compared, browser: Browser) -> None:
    """Headings of tables say what they head, and pictures what they show."""
    browser.open(compared.page)
    for wrong in (
        "thead th:not([scope]), tbody th:not([scope])",
        "svg:not([aria-label]):not([aria-hidden])",
        "html:not([lang])",
    ):
        assert browser.evaluate(f"document.querySelectorAll({wrong!r}).length") == 0, wrong
    assert browser.evaluate("document.querySelectorAll('h1').length") == 1


def test_it_prints(compared: Compared, browser: Browser) -> None:
    browser.open(compared.page, dark=True)
    printed = base64.b64decode(browser.send("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF-")
    assert len(printed) > 20_000
