"""The laboratory's page in a browser: nothing is fetched, nothing is wider than the screen, everything has a name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from test_report import HOSTILE

from headway.compare.claims import FAILS, HOLDS, OPEN, PARTLY
from headway.compare.lab.page import write_lab_page


def record(name: str, section: str, verdict: str, title: str) -> dict[str, Any]:
    lines = [{"name": f"{title} {i}", "points": [[1, 1 + i], [10, 20 + i], [100, 300]]} for i in range(10)]
    dots = [{"name": one["name"], "points": one["points"][:1]} for one in lines] + lines[:1]
    plot = {"title": title, "sentence": title, "x": "n", "y": "t", "log_x": True, "log_y": True}
    rows = [[title, 1.5, None, 3] for _ in range(12)]
    return {
        "name": name, "section": section, "title": title, "said": title, "method": title, "rule": title,
        "verdict": verdict, "because": title, "failed": None, "seconds": 3.0, "command": "headway lab --only " + name,
        "notes": [title], "settings": {"trials": {"a": [1] * 50}}, "tables": [
            {"title": title, "columns": ["", "a", "b", "c"], "rows": rows, "spread": {"0,1": [1, 2]}}],
        "plots": [{**plot, "kind": "line", "lines": lines}, {**plot, "kind": "dots", "lines": dots}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    verdicts = (HOLDS, PARTLY, FAILS, OPEN)
    claims = [
        record(f"c{i}", "AABF"[i], v, (HOSTILE[0], "x" * 90, "A title", "word " * 40)[i])
        for i, v in enumerate(verdicts)
    ]
    results = {"created": "2026-01-01T00:00:00+00:00", "command": "headway lab " + "--mixer my.own " * 9,
               "hardware": {"cpu": "a processor", "device": "cpu"}, "versions": {"torch": "2"}, "threads": 1,
               "stopped": True, "claims": claims,
               "settings": {"quick": True, "device": "cpu", "seed": 0, "mixers": [], "tasks": []}}  # fmt: skip
    path = tmp_path_factory.mktemp("lab") / "lab.html"
    write_lab_page(results, path)
    return path


def opened(started: Any, file: Path, width: int, dark: bool = False) -> tuple[Any, list[str]]:
    page = started.new_context(
        viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
    ).new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("request", lambda request: heard.append(request.url))
    page.goto(file.as_uri())
    return page, heard


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_its_width_and_asks_for_nothing(started: Any, file: Path, width: int) -> None:
    page, heard = opened(started, file, width)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert heard == [file.as_uri()]


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_their_ground(started: Any, file: Path, dark: bool) -> None:
    page, _ = opened(started, file, 1280, dark)
    ratio = page.evaluate("""() => {
      const light = (text) => { const [r, g, b] = text.match(/[0-9.]+/g).map((v) => { v /= 255;
        return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const ground = (one) => { for (; one; one = one.parentElement) { 
        const found = getComputedStyle(one).backgroundColor;
        if (!/, 0\\)$/.test(found)) return light(found); } return 1; };
      const all = [...document.querySelectorAll(".badge, dt, dd, td, th, h1, h2, h3, .note, .legend li, figcaption p")];
      return Math.min(...all.map((one) => { const [a, b] = [light(getComputedStyle(one).color), ground(one)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })); }""")
    assert ratio >= 4.5


def test_every_claim_is_reached_by_keys(started: Any, file: Path) -> None:
    page, _ = opened(started, file, 1280)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.url.endswith("#c0")
    page.locator("#c2 summary").last.focus()
    page.keyboard.press("Enter")
    assert page.locator("#c2 details[open] pre").is_visible()


def test_every_picture_says_what_it_shows_and_verdicts_do_not_hang_on_colour(started: Any, file: Path) -> None:
    page, _ = opened(started, file, 1280)
    nameless = page.evaluate("[...document.querySelectorAll('svg[role=img]')].filter(one => !one.ariaLabel).length")
    assert nameless == 0 and page.locator("svg[role=img]").count() == 8
    words = page.locator(".index .badge").all_inner_texts()
    assert words == [HOLDS, PARTLY, FAILS, OPEN]
    signs = page.evaluate(
        "[...document.querySelectorAll('.index .badge')].map(o => getComputedStyle(o, '::before').content)"
    )
    assert len(set(signs)) == 4
