"""The page in a browser: it shows what the numbers say, by mouse, by keys and by its address, at every width."""

import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import (
    MISSING,
    WORDS,
    Opened,
    browser,
    browser_path,
    picture_record,
    text_record,
    translation_record,
    written,
)
from test_look_page import HOSTILE

VIEWS = ("lines", "matrix", "text")
PIXELS = """() => {
  const ratio = view.canvas.width / view.canvas.clientWidth, at = (column) => Math.round(view.x(column) * ratio);
  const [from, to] = [at(2.5), at(6.5)], context = view.canvas.getContext("2d");
  const { data } = context.getImageData(from, view.y(3.3) * ratio, to - from + 1, 1);
  return [[...data.slice(0, 3)], [...data.slice(-4, -1)]];
}"""
NAMELESS = """() => {
  const kinds = "button, input, a, canvas:not([aria-hidden=true]), [role=gridcell], [role=grid], [role=listbox]";
  const named = (one) => one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim();
  const asked = [...document.querySelectorAll(kinds)].filter((one) => !one.matches("[role=gridcell] canvas"));
  return asked.filter((one) => !named(one)).map((one) => one.outerHTML.slice(0, 80));
}"""


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[Any]:
    if browser_path() is None:  # said aloud, for whoever does not ask why tests are skipped
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{MISSING}")
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    records = {
        "text": text_record(),
        "translation": translation_record(),
        "picture": picture_record(),
        "hostile": text_record((*WORDS, *HOSTILE), title=HOSTILE[0] + HOSTILE[1]),
        "long": text_record(tuple(f"word{i}" for i in range(1100)), layers=1, title="word " * 400),
    }
    return {name: written(record, tmp_path_factory.mktemp(name)) for name, record in records.items()}


def chosen(page: Any) -> dict[str, str]:
    """What the address says, once it is written."""
    page.wait_for_timeout(200)
    return dict(pair.split("=") for pair in page.evaluate("location.hash").lstrip("#").split("&"))


def test_a_token_under_the_mouse_shows_where_it_looks_and_who_looks_at_it(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["text"]) as tab:
        tab.hover("#token-0-4")  # of the head that looks at the token before
        assert tab.listed(0) == {3: "100%"} and tab.listed(1) == {5: "100%"}
        tab.hover("#token-0-0")
        assert tab.listed(0) == {0: "100%"} and tab.listed(1) == {0: "100%", 1: "100%"}
        tab.page.click("#cell-1")  # all alike
        tab.settle()
        tab.hover("#token-1-7")  # one that is looked at
        assert set(tab.listed(0).values()) == set(tab.listed(1).values()) == {"8.3%"}
        assert len(tab.listed(0)) == 8
        assert not tab.errors and tab.requests == [tab.file]


@pytest.mark.parametrize("view", VIEWS)
def test_weights_that_are_drawn_are_told_to_a_percent(started: Any, files: dict[str, Path], view: str) -> None:
    weights = text_record().maps.map(1, 2)
    with Opened(started, files["text"], f"#layer=1&head=2&view={view}&token=5") as tab:
        for index, told in tab.listed(0).items():
            assert abs(float(told.rstrip("%")) / 100 - weights[5, index]) < 0.006
        for index, told in tab.listed(1).items():
            assert abs(float(told.rstrip("%")) / 100 - weights[index, 5]) < 0.006
        assert sorted(tab.listed(0)) == sorted(weights[5].argsort()[-8:])


def test_shading_follows_the_weights(started: Any, files: dict[str, Path]) -> None:
    colours = "() => [...document.querySelectorAll('#view [role=option]')].map(option => option.style.background)"
    with Opened(started, files["text"], "#layer=0&head=0&view=text&token=4") as tab:
        shades = tab.page.evaluate(colours)
        assert shades[3] == tab.page.evaluate("palette().colour(255)").replace(" ", ", ")
        assert len(set(shades[:3] + shades[4:])) == 1
        tab.page.click("text=who looks at it")
        tab.settle()
        assert tab.page.evaluate(colours)[5] == shades[3]
        assert not tab.errors


def test_the_matrix_tells_the_weight_under_the_mouse_and_zooms(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["text"], "#layer=0&head=0&view=matrix") as tab:
        where = tab.page.evaluate("() => { const box = view.canvas.getBoundingClientRect(); "
                                  "return [box.left + view.x(2.5), box.top + view.y(3.5)]; }")  # fmt: skip
        tab.page.mouse.move(*where)
        tab.settle()
        assert tab.page.inner_text("#view output") == "on (3) → sat (2): 100%"
        assert tab.listed(0) == {2: "100%"}
        pixel = tab.page.evaluate(PIXELS)
        assert pixel == tab.page.evaluate("() => [palette().ramps[0][255], palette().ramps[0][0]]")
        before = tab.page.evaluate("view.size")
        tab.page.focus("#view canvas")
        tab.press("ArrowDown", "ArrowRight")
        assert tab.page.inner_text("#view output") == "the (4) → on (3): 100%"
        assert tab.page.inner_text("#status") == tab.page.inner_text("#view output")
        tab.page.set_viewport_size({"width": 390, "height": 800})
        tab.settle()
        tab.page.get_by_role("button", name="Larger").click()
        assert tab.page.evaluate("view.size") > tab.page.evaluate("view.fit")
        tab.page.get_by_role("button", name="The whole matrix").click()
        assert tab.page.evaluate("view.size") == tab.page.evaluate("view.fit") < before
        assert not tab.errors


def test_everything_can_be_reached_by_keys(started: Any, files: dict[str, Path]) -> None:
    role = "() => document.activeElement.getAttribute('role') ?? document.activeElement.id ?? ''"
    with Opened(started, files["text"]) as tab:
        order = []
        for _ in range(12):
            tab.page.keyboard.press("Tab")
            order.append(tab.page.evaluate(role))
        assert order[0] == "theme" and "gridcell" in order and "find" in order and "next" in order and "link" in order
        assert order.count("gridcell") == 1 and order.count("listbox") == 2
        assert order.index("gridcell") < order.index("find") < order.index("listbox")
        tab.page.focus("#cell-0")
        tab.press("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft")
        assert tab.page.inner_text("#headline") == "Layer 2, head 1"
        assert tab.page.get_attribute("[role=gridcell][aria-selected=true]", "id") == "cell-7"
        tab.page.focus("#view [role=listbox] >> nth=0")
        tab.press("ArrowDown", "ArrowDown", "End", "ArrowUp")
        assert tab.page.get_attribute("[role=listbox] >> nth=0", "aria-activedescendant") == "token-0-10"
        assert tab.page.get_attribute("#token-0-10", "aria-selected") == "true"
        assert tab.page.inner_text("#status").startswith("too (10) looks most at")
        assert chosen(tab.page) == {"layer": "2", "head": "1", "view": "lines", "token": "10"}
        tab.press("ArrowRight", "Home")
        assert chosen(tab.page)["end"] == "1" and chosen(tab.page)["token"] == "0"
        tab.press("Escape")
        assert "token" not in chosen(tab.page)
        tab.page.focus("input[value=lines]")
        tab.press("ArrowRight", "ArrowRight")
        assert chosen(tab.page)["view"] == "text"
        tab.page.focus("#view [role=listbox]")
        tab.press("ArrowRight", "ArrowRight", "ArrowRight")
        assert chosen(tab.page)["token"] == "2"
        assert not tab.errors


def test_every_control_has_a_name(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["text"], "#view=matrix") as tab:
        nameless = tab.page.evaluate(NAMELESS)
        assert nameless == []
        assert tab.page.get_attribute("#cell-3", "aria-label") == "layer 1, head 0, previous token 1.00"


@pytest.mark.parametrize("view", VIEWS)
def test_the_address_restores_what_was_seen(started: Any, files: dict[str, Path], view: str) -> None:
    fragment = f"#layer=2&head=2&view={view}&token=7"
    with Opened(started, files["text"], fragment) as tab:
        assert tab.page.inner_text("#headline") == "Layer 2, head 2"
        assert tab.page.is_checked(f"input[value={view}]")
        assert tab.page.inner_text("#details .chosen") == "The token 7"
        assert chosen(tab.page) == {"layer": "2", "head": "2", "view": view, "token": "7"}
        assert tab.page.get_attribute("#link", "href") == fragment
        tab.page.evaluate("location.hash = '#layer=0&head=1&view=text'")
        tab.page.wait_for_selector("text=Layer 0, head 1")
        assert tab.page.locator("#details .chosen").count() == 0


@pytest.mark.parametrize(
    "fragment", ["#layer=99&head=99&token=99", "#view=nonsense&token=-1", "#%%%", "#stack=no&layer=1"]
)
def test_an_address_that_names_nothing_shows_something(started: Any, files: dict[str, Path], fragment: str) -> None:
    with Opened(started, files["text"], fragment) as tab:
        assert tab.page.inner_text("#headline").startswith("Layer ")
        assert not tab.errors


def test_the_chosen_head_is_in_view_among_many(started: Any, tmp_path: Path) -> None:
    inside = """() => {
      const place = (name) => document.querySelector(name).getBoundingClientRect();
      const [cell, box] = [place("#cell-113"), place("#heads .scroll")];
      return cell.top >= box.top && cell.bottom <= box.bottom;
    }"""
    with Opened(started, written(text_record(layers=40), tmp_path), "#layer=37&head=2") as tab:
        assert tab.page.evaluate(inside)
        assert tab.page.evaluate("scrollY") == 0


def test_cross_attention_is_an_alignment_of_two_texts(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["translation"], "#stack=decoder&slot=cross&layer=0&view=lines") as tab:
        assert tab.page.inner_text("#headline") == "Decoder cross-attention layer 0, head 0"
        assert tab.page.inner_text("#lines-name") == "Alignment"
        assert tab.page.locator("#view [role=listbox] >> nth=0 >> [role=option]").all_inner_texts() == [
            "<s>",
            "D",
            "C",
            "B",
            "A",
        ]
        tab.hover("#token-0-2")
        assert tab.listed(0)[2] == "70%"
        tab.hover("#token-1-3")  # the last letter is looked at by the first two
        assert [tab.listed(0)[i] for i in (0, 1)] == ["70%", "70%"]
        tab.page.check("input[value=text]", force=True)
        tab.hover("#view h3 >> nth=0")
        tab.hover("#token-0-4")
        assert tab.listed(0)[0] == "70%"
        assert chosen(tab.page)["slot"] == "cross"
        assert not tab.errors


def test_a_picture_carries_the_weights_of_its_patches(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["picture"], "#view=text&token=0") as tab:
        assert tab.page.inner_text("#text-name") == "Picture"
        assert tab.page.evaluate("document.querySelector('.picture img').naturalWidth") == 64
        assert tab.page.evaluate("document.querySelectorAll('.patches [role=option]').length") == 12
        box, patch = (tab.page.locator(s).bounding_box() for s in (".picture", "#token-0-6"))
        assert abs((patch["x"] - box["x"]) / box["width"] - 1 / 4) < 0.01  # row 1, column 1
        assert abs((patch["y"] - box["y"]) / box["height"] - 1 / 3) < 0.01
        assert tab.listed(0)[6] == "76%"
        opacity = tab.page.evaluate("[6, 7].map(i => +$(`token-0-${i}`).style.background.match(/[\\d.]+(?=\\))/)[0])")
        assert opacity[0] > 0.8 > opacity[1]
        tab.hover("#token-0-7")
        assert tab.page.inner_text("#details .chosen").startswith("patch 1,2")
        assert not tab.errors and [url for url in tab.requests if not url.startswith("data:")] == [tab.file]


def test_hostile_text_is_shown_as_text(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["hostile"]) as tab:
        for view in VIEWS:
            tab.page.check(f"input[value={view}]", force=True)
            tab.settle()
        for name in ("weights", "summaries", "meaning"):
            tab.page.click(f"#{name} summary")
        assert tab.page.inner_text("#token-0-13") == HOSTILE[1]
        assert tab.page.locator("img, b:not(#details b)").count() == 0
        assert HOSTILE[0] in tab.page.inner_text("h1")
        assert not tab.errors and tab.requests == [tab.file]


def test_whatever_got_in_could_neither_run_nor_fetch(started: Any, files: dict[str, Path]) -> None:
    intruder = """(there) => {
      document.body.append(Object.assign(document.createElement("script"), { textContent: "window.ran = true" }));
      document.body.append(Object.assign(document.createElement("img"), { src: there + "x.png" }));
      return fetch(there).then(() => "sent", () => window.ran ?? "refused");
    }"""
    with socket.create_server(("localhost", 0)) as server, Opened(started, files["text"]) as tab:
        assert tab.page.evaluate(intruder, f"http://localhost:{server.getsockname()[1]}/") == "refused"
        assert sum("Content Security Policy" in error for error in tab.errors) >= 3
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.accept()


def test_tokens_are_found(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["text"], "#view=text") as tab:
        tab.page.fill("#find", "THE")
        assert tab.page.inner_text("#found") == "3 found"
        assert tab.page.evaluate("[...document.querySelectorAll('.match')].map(one => +one.dataset.index)") == [0, 4, 7]
        tab.press("Enter", "Enter")
        assert tab.page.inner_text("#found") == "2 of 3"
        assert chosen(tab.page)["token"] == "4"
        tab.page.fill("#find", "unicorn")
        assert tab.page.inner_text("#found") == "0 found"


def test_tables_say_the_same_in_words(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["text"]) as tab:
        tab.page.click("#weights summary")
        tab.page.wait_for_selector("#weights tbody tr >> nth=11")
        row = tab.page.locator("#weights tbody tr").nth(3)
        assert "on" in row.inner_text() and "100%" in row.inner_text() and "token 2" in row.inner_text()
        tab.page.click("#summaries summary")
        tab.page.wait_for_selector("#summaries tbody tr >> nth=8")
        tab.page.click("#summaries >> text=Score")
        assert "layer 0, head 0" in tab.page.locator("#summaries tbody tr").first.inner_text()
        tab.page.click("#summaries >> text=layer 1, head 2")
        tab.page.wait_for_selector("text=Layer 1, head 2")
        tab.page.click("#meaning summary")
        tab.page.wait_for_selector("#meaning dd")
        assert "mean weight on the token before" in tab.page.inner_text("#meaning")
        assert not tab.errors


@pytest.mark.parametrize("name", ["text", "translation", "picture", "hostile", "long"])
def test_no_width_makes_the_page_scroll_sideways(started: Any, files: dict[str, Path], name: str) -> None:
    with Opened(started, files[name]) as tab:
        for details in ("weights", "summaries", "meaning"):
            tab.page.click(f"#{details} summary")
        for view in VIEWS:
            tab.page.check(f"input[value={view}]", force=True)
            for width in (1280, 768, 390):
                tab.page.set_viewport_size({"width": width, "height": 844})
                tab.settle()
                assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert not tab.errors


def test_it_follows_the_systems_theme_and_a_chosen_one(started: Any, files: dict[str, Path]) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with Opened(started, files["text"], color_scheme="dark") as tab:
        dark = tab.page.evaluate(ground)
        assert dark == "rgb(14, 17, 21)" and tab.page.evaluate("isDark()")
        tab.page.click("#theme")
        light = tab.page.evaluate(ground)
        assert light == "rgb(244, 245, 247)" and not tab.page.evaluate("isDark()")
        tab.page.click("#theme")
        assert tab.page.evaluate(ground) == dark
        assert not tab.errors


def test_colours_grow_darker_step_by_step_and_stay_readable(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["text"]) as tab:
        for theme, sign in (("light", -1), ("dark", 1), ("picture", 1)):
            lights = tab.page.evaluate(f"palette('{theme}').ramps.map(one => one.map(luminance))")
            inks = tab.page.evaluate(f"palette('{theme}').ink")
            for ramp, ink in zip(lights, inks, strict=True):
                assert all(sign * (b - a) >= -1e-3 for a, b in pairwise(ramp))
                for light, word in zip(ramp, ink, strict=True):
                    low, high = sorted((light, 0.0 if word == "#000" else 1.0))
                    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_long_text_can_be_walked_through(started: Any, files: dict[str, Path]) -> None:
    with Opened(started, files["long"], "#view=lines&token=1000") as tab:
        assert tab.listed(0) == {999: "100%"} and tab.listed(1) == {1001: "100%"}
        assert tab.page.locator("#token-0-1000").is_visible()
        assert tab.page.locator("[role=option]").count() < 200  # only what is in view is in the document
        tab.page.check("input[value=matrix]", force=True)
        assert "Squares of 5 tokens are means" in tab.page.inner_text("#hint")
        tab.page.click("#weights summary")
        tab.page.get_by_role("button", name="On", exact=True).click()
        assert "tokens 100 to 199 of 1100" in tab.page.inner_text("#weights .turns")
        assert not tab.errors


def test_a_file_that_is_cut_short_says_so(started: Any, files: dict[str, Path], tmp_path: Path) -> None:
    text = files["text"].read_text("utf-8")
    cut = tmp_path / "cut.html"
    cut.write_text(text[: text.rindex("<script", 0, text.index('id="head-0"'))], "utf-8")
    page = started.new_page()
    page.goto(cut.as_uri())
    page.wait_for_selector("text=this file is cut short: head-0 is missing")
    page.close()
