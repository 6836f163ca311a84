"""The page as a file: what is kept of a weight, what is embedded, and that no text gets out of its place."""

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import WORDS, drawn, previous, text_record
from hypothesis import given
from hypothesis import strategies as st

from headway.probe.page import render, write_page
from headway.probe.record import Arrays, Head, Place, Record, Side, block_means

HOSTILE = (
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--<script>", "]]>", "&lt;b&gt;",
    "{{ 7 * 7 }}", "\u2028\u2029", "\u202eevil", "\ud800", "\x00\x1b", "'\"`${1}", "",
)  # fmt: skip


class Parts(HTMLParser):
    """Elements as a browser finds them, with the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        tag, attributes = self.found[-1] if self.found else ("", {})
        name = attributes.get("id") or tag
        self.texts[name] = self.texts.get(name, "") + data

    def unpacked(self, name: str) -> bytes:
        return zlib.decompress(base64.b64decode(self.texts[name]))


def one(weights: np.ndarray, **place: Any) -> Record:
    """One head of one layer, over as many tokens as it has columns."""
    tokens = tuple(f"t{i}" for i in range(weights.shape[1]))
    where = Place(stack="encoder", layer=0, slot="self", mixer="attention", heads=1, **place)
    return Record("one", "a model", [Side(name="text", tokens=tokens)], [where], [Head()], Arrays([weights[None]]))


def restored(page: Parts, head: int, shape: tuple[int, int]) -> np.ndarray:
    """The weights that the page can tell."""
    how = json.loads(page.texts["record"])["heads"][head]
    kind, most = (np.int8, 127) if how["signed"] else (np.uint8, 255)
    levels = np.frombuffer(page.unpacked(f"head-{head}"), kind).reshape(shape) / most
    return np.sign(levels) * levels**2 * how["scale"]


@given(st.integers(1, 40), st.integers(0, 2**31), st.floats(0.02, 3), st.booleans())
def test_a_weight_is_kept_to_within_one_step_of_the_largest(n: int, seed: int, shape: float, signed: bool) -> None:
    draw = np.random.default_rng(seed)
    weights = draw.gamma(shape, size=(n, n)) + 1e-12
    weights /= weights.sum(-1, keepdims=True)
    if signed:
        weights *= draw.choice([-1, 1], size=weights.shape)
    kept = restored(Parts(render(one(weights))), 0, (n, n))
    step = np.abs(weights).max() / (127 if (weights < 0).any() else 255)
    assert np.abs(kept - weights).max() <= step
    small = np.abs(weights) < step  # of these the error is smaller still
    assert np.abs(kept - weights)[small].max(initial=0) < 0.15 * step


def test_no_token_gets_out_of_its_place() -> None:
    words = (*WORDS, *HOSTILE)
    page = Parts(render(text_record(words, title=HOSTILE[0] + HOSTILE[1])))
    assert [tag for tag, _ in page.found if tag in ("img", "b", "object", "iframe")] == []
    scripts = [attributes for tag, attributes in page.found if tag == "script"]
    assert [s for s in scripts if "id" not in s] == [{}]  # the one that runs
    assert all(s["type"] in ("application/json", "text/plain") for s in scripts if "id" in s)
    assert json.loads(page.texts["record"])["sides"][0]["tokens"] == list(words)


def test_nothing_but_its_own_script_and_style_may_run_and_nothing_is_fetched() -> None:
    text = render(text_record())
    page = Parts(text)
    policy = next(a["content"] for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    for kind in ("script", "style"):
        inside = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        assert inside is not None
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()}'" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert not [a for _, a in page.found if {"src", "onclick", "onload", "style"} & a.keys()]
    assert not re.search(r"https?://", text)


def test_a_long_text_is_kept_as_means_and_largest_weights_and_never_asked_for_whole() -> None:
    n, asked = 1500, []
    weights = drawn(n, n)

    class Tiles(Arrays):
        def map(self, place: int, head: int) -> np.ndarray:
            raise AssertionError("asked for n x n")

        def blocks(self, place: int, head: int, size: int) -> np.ndarray:
            asked.append(size)
            return super().blocks(place, head, size)

    record = one(weights)
    page = Parts(render(Record(**{**vars(record), "maps": Tiles([weights[None]])})))
    how = json.loads(page.texts["record"])["heads"][0]
    assert asked == [how["size"]] == [6] and how["k"] == 8
    data, blocks = page.unpacked("head-0"), 250 * 250
    assert len(data) == blocks + n * 8 * 5
    at = np.frombuffer(data[blocks : blocks + n * 32], "<u4").reshape(n, 8)
    np.testing.assert_array_equal(at, np.argsort(-weights, 1, kind="stable")[:, :8])
    means = (np.frombuffer(data[:blocks], np.uint8).reshape(250, 250) / 255) ** 2 * how["ground"]
    assert np.abs(means - block_means(weights, 6)).max() <= how["ground"] / 255


def test_block_means_at_the_edge_are_over_what_is_there() -> None:
    assert block_means(np.array([[1.0, 3, 5], [1, 3, 9], [4, 4, 2]]), 2).tolist() == [[2, 7], [4, 2]]


def test_thumbnails_show_the_shape_of_a_map() -> None:
    for n in (3, 32, 100):
        page = Parts(render(one(previous(n))))
        thumb = np.frombuffer(page.unpacked("thumbs"), np.uint8).reshape(32, 32).astype(int)
        below, above = np.tril(thumb, -1).sum(), np.triu(thumb, 16).sum()
        assert thumb.max() == 255 and below > 0 and above == 0


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(wrong: float) -> None:
    weights = drawn(4, 4)
    weights[1, 2] = wrong
    with pytest.raises(ValueError, match=r"encoder layer 0 head 0: 1 weights are not finite"):
        render(one(weights))


def test_a_map_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a map of \(3, 4\) for 4 x 4 tokens"):
        render(one(drawn(3, 4)))


def test_a_record_of_nothing_is_refused() -> None:
    record = text_record()
    with pytest.raises(ValueError, match="nothing to show"):
        Record(**{**vars(record), "places": [], "heads": []})
    with pytest.raises(ValueError, match="2 heads are described, and the places have 9"):
        Record(**{**vars(record), "heads": record.heads[:2]})


def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    record = one(drawn(3, 3))
    record = Record(**{**vars(record), "heads": [Head(entropy=float("nan"), distance=1.0)]})
    write_page(record, tmp_path / "new" / "page.html")
    kept = json.loads(Parts((tmp_path / "new" / "page.html").read_text("utf-8")).texts["record"])["heads"][0]
    assert kept["entropy"] is None and kept["distance"] == 1.0


def test_a_chosen_theme_has_the_colours_of_all_our_pages() -> None:
    text = render(text_record())
    for theme, ground in (("light", "#f4f5f7"), ("dark", "#0e1115")):
        rule = re.search(rf":root\[data-theme={theme}\] \{{(.*?)\}}", text, re.S)
        assert rule is not None and f"--ground: {ground}" in rule[1] and f"color-scheme: {theme}" in rule[1]
