"""A headless browser for the tests of the page, and records of known maps to show in it."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.probe.page import write_page
from headway.probe.record import Arrays, Head, Place, Record, Side

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
WORDS = ("The", "cat", "sat", "on", "the", "mat", ".", "The", "dog", "sat", "too", ".")


MISSING = "no browser here: the page of headway look was not looked at in one (apt-get install chromium)"


def browser_path() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser of this machine, driven by Playwright; the test is skipped where there is none."""
    path = browser_path()
    if path is None:
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


class Opened:
    """A page in the browser, and whatever it complained about or asked the network for."""

    def __init__(self, browser: Any, file: Path, fragment: str = "", **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.file = file.as_uri()
        self.page.goto(self.file + fragment)
        self.page.wait_for_selector("#view[data-showing]")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def listed(self, number: int = 0) -> dict[int, str]:
        """Index and weight of what the details tell of a token, the first list or the second."""
        items = self.page.locator("#details ol").nth(number).locator("li")
        rows = items.evaluate_all(
            "items => items.map(item => [item.dataset.index, item.querySelector('b').textContent])"
        )
        return {int(index): weight for index, weight in rows}

    def hover(self, selector: str) -> None:
        self.page.hover(selector)
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def settle(self) -> None:
        """Until what was asked for is drawn: a head is unpacked, and two frames pass."""
        self.page.evaluate("async () => { await opening(state.index); for (let n = 0; n < 2; n++) "
                           "await new Promise(requestAnimationFrame); }")  # fmt: skip


# --- Known maps


def previous(n: int) -> np.ndarray:
    """Each token looks at the one before, the first at itself."""
    return np.eye(n, k=-1) + np.eye(n)[:, :1] * np.eye(n)[:1]


def drawn(*shape: int) -> np.ndarray:
    weights = np.random.default_rng(0).gamma(0.3, size=shape)
    return weights / weights.sum(-1, keepdims=True)


def text_record(words: tuple[str, ...] = WORDS, layers: int = 3, title: str = "The cat") -> Record:
    """Self-attention: head 0 looks at the token before, head 1 at everything alike, head 2 is drawn."""
    n = len(words)
    maps = [np.stack([previous(n), np.full((n, n), 1 / n), drawn(n, n)]) for _ in range(layers)]
    heads = [
        Head(pattern="previous token", score=1.0, entropy=0.0, distance=1.0),
        Head(entropy=2.5),
        Head(distance=4.0),
    ]
    places = [Place(stack="encoder", layer=i, slot="self", mixer="attention", heads=3) for i in range(layers)]
    return Record(title, "a model", [Side(name="text", tokens=words)], places, heads * layers, Arrays(maps),
                  {"previous token": "mean weight on the token before"})  # fmt: skip


def translation_record() -> Record:
    """An encoder-decoder of one layer: self-attention on both sides, and an alignment back to front."""
    source, target = tuple("abcd"), ("<s>", "D", "C", "B", "A")
    alignment = np.full((5, 4), 0.1) + 0.6 * np.eye(4)[[3, 3, 2, 1, 0]]
    sides = [Side(name="input", tokens=source), Side(name="output", tokens=target)]
    places = [
        Place(stack="encoder", layer=0, slot="self", mixer="attention", heads=1),
        Place(stack="decoder", layer=0, slot="self", mixer="attention", heads=1, rows=1, columns=1),
        Place(stack="decoder", layer=0, slot="cross", mixer="attention", heads=1, rows=1, columns=0),
    ]
    maps = [drawn(1, 4, 4), np.tril(np.ones((1, 5, 5))) / np.arange(1, 6)[:, None], alignment[None]]
    return Record("abcd", "a translator", sides, places, [Head()] * 3, Arrays(maps))


def picture_record() -> Record:
    """A class token and 3 x 4 patches of a picture, which the class token sees alike but for one."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    tokens = ("[CLS]", *(f"patch {r},{c}" for r in range(3) for c in range(4)))
    weights = np.full((13, 13), 1 / 13)
    weights[0] = 0.02
    weights[0, 6] = 0.76
    picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    side = Side(name="picture", tokens=tokens, grid=(3, 4), skip=1, picture=picture)
    place = Place(stack="vision", layer=0, slot="self", mixer="attention", heads=1)
    return Record("a picture", "a ViT", [side], [place], [Head()], Arrays([weights[None]]))


def written(record: Record, folder: Path) -> Path:
    write_page(record, folder / "page.html")
    return folder / "page.html"
