"""What a page shows of a real look, and the command that writes it."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readers
import torch
from PIL import Image
from shell import Headway
from tiny import ARCHITECTURES

from headway import look, models
from headway.commands.look import _json
from headway.probe import show
from headway.probe.record import Record, block_means, figures, largest
from headway.probe.show import record_of

UNUSUAL: dict[str, Any] = {
    "kind": "encoder",
    "width": 16,
    "vocab": 20,
    "stack": {
        "blocks": [{"mixer": {"name": "rnn", "bidirectional": True}}, {"mixer": {"name": "performer", "heads": 2}}]
    },
}


def photo(folder: Path) -> Path:
    file = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    return file


def slots(record: Record) -> list[tuple[str, int, str]]:
    return [(place.stack, place.layer, place.slot) for place in record.places]


def test_every_map_of_a_look_is_the_page_s(tmp_path: Path) -> None:
    model = readers.dual(tmp_path)
    found = look(model, "the cat lives in the red house", image=photo(tmp_path))
    record = record_of(found, "a photo")
    for number, place in enumerate(record.places):
        if place.slot != "self":
            continue
        for head in range(place.heads):
            theirs = found.map(place.layer, head, stack=place.stack).numpy()
            np.testing.assert_array_equal(record.maps.map(number, head), theirs)
            at, weights = record.maps.top(number, head, 2)
            np.testing.assert_allclose(weights, -np.sort(-theirs, 1)[:, :2], rtol=1e-6)
            np.testing.assert_allclose(np.take_along_axis(theirs, at, 1), weights, rtol=1e-6)
            parts = [[p.mean() for p in np.split(half, [2, 4], 1) if p.size] for half in np.split(theirs, [2, 4], 0)]
            np.testing.assert_allclose(
                record.maps.blocks(number, head, 2)[:2, :2], [row[:2] for row in parts[:2]], rtol=1e-5
            )


def test_two_towers_show_what_carries_their_similarity_and_the_picture_that_was_seen(tmp_path: Path) -> None:
    found = look(readers.dual(tmp_path), "the cat", image=photo(tmp_path))
    record = record_of(found, "a photo")
    assert slots(record)[-2:] == [("text", 0, "relevance"), ("image", 0, "relevance")]
    np.testing.assert_array_equal(record.maps.map(len(record.places) - 2, 0)[0], found.relevance()["text"].numpy())
    side = next(side for side in record.sides if side.name == "image")
    assert (
        side.grid == (2, 2)
        and side.skip == 1
        and side.tokens[1:] == tuple(f"patch {r},{c}" for r in (0, 1) for c in (0, 1))
    )
    assert side.picture is not None
    kept = Image.open(io.BytesIO(base64.b64decode(side.picture.split(",")[1])))
    assert np.array_equal(np.asarray(kept), np.asarray(Image.open(photo(tmp_path))))


def test_what_forms_no_weights_shows_what_it_implies_or_who_influences_whom() -> None:
    net = models.build(UNUSUAL).eval()
    found = look(net, torch.randint(0, 20, (1, 7)))
    record = record_of(found, "ids")
    assert slots(record) == [("stack", 0, "self"), ("stack", 1, "self")]
    influence, implied = record.places
    assert "Influence" in influence.note and "performer" in implied.note and not influence.share and not implied.share
    np.testing.assert_allclose(record.maps.map(0, 0), found.influence(0).map.numpy(), rtol=1e-5)
    np.testing.assert_allclose(record.maps.map(1, 1), found.implied(1, 1).map.numpy(), rtol=1e-5)
    assert [head.error for head in record.heads] == [None, found.implied(1, 0).error, found.implied(1, 1).error]
    whole = record.maps.map(1, 0)
    np.testing.assert_allclose(record.maps.blocks(1, 0, 7)[0, 0], whole.mean(), rtol=1e-5)
    assert np.abs(record.maps.top(1, 0, 1)[1][:, 0]).tolist() == pytest.approx(np.abs(whole).max(1).tolist())


def test_a_long_implied_map_is_walked_once_for_all_heads_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    net, heads, count = models.build(UNUSUAL).eval(), 2, 40
    found = look(net, torch.randint(0, 20, (1, count)))
    maps, place = [found.implied(1, head).map.numpy() for head in range(heads)], found.places[1]
    mixer, asked = found.seen[1].mixer, list[slice]()
    implied = mixer.implied
    monkeypatch.setattr(
        mixer, "implied", lambda *given, rows, **named: asked.append(rows) or implied(*given, rows=rows, **named)
    )
    monkeypatch.setattr(show, "WALK_BYTES", 4 * heads * count * 6)
    monkeypatch.setattr("headway.mixers.performer.weights", None)  # the softmax is nobody's business here
    told = show.Implied(found, place, heads, {})
    for head, expected in enumerate(maps):
        np.testing.assert_allclose(told.blocks(0, head, 16), block_means(expected, 16), rtol=1e-4, atol=1e-7)
        at, weights = told.top(0, head, 3)
        np.testing.assert_allclose(np.abs(weights), -np.sort(-np.abs(expected), 1)[:, :3], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(np.take_along_axis(expected, at, 1), weights, rtol=1e-4, atol=1e-7)
    assert [(rows.start, rows.stop) for rows in asked] == [(i, min(i + 6, count)) for i in range(0, count, 6)]


def test_padding_influences_nothing_and_is_on_the_page() -> None:
    net, valid = models.build(UNUSUAL).eval(), torch.tensor([[False, False, True, True, True, True], [True] * 6])
    found = look(net, torch.randint(0, 20, (2, 6)), valid=valid)
    shown = record_of(found, "ids").maps.map(0, 0)
    np.testing.assert_allclose(shown[2:, 2:], found.influence(0).map.numpy(), rtol=1e-5)
    assert shown.shape == (6, 6) and not shown[:2].any() and not shown[:, :2].any()


def test_the_largest_of_a_row_are_in_order_and_equal_ones_by_column() -> None:
    weights = np.random.default_rng(0).integers(-4, 5, (600, 30)).astype(np.float32)
    for k in (1, 7, 30):
        at, values = largest(weights, k)
        expected = np.sort(-np.abs(weights), 1)[:, :k]
        np.testing.assert_array_equal(-np.abs(values), expected)
        np.testing.assert_array_equal(np.take_along_axis(weights, at, 1), values)
        assert all(len(set(row)) == k for row in at.tolist())


def test_figures_that_are_no_numbers_are_one_line() -> None:
    with pytest.raises(ValueError, match="look: some figures are no numbers"):
        _json({"error": float("nan")})


def test_an_alignment_is_of_what_is_written() -> None:
    net = models.build({**ARCHITECTURES["transformer"], "source_vocab": 12, "target_vocab": 12}).eval()
    record = record_of(look(net, torch.randint(4, 12, (1, 6)), torch.randint(4, 12, (1, 4))), "ids")
    cross = next(place for place in record.places if place.slot == "cross")
    assert (record.sides[cross.rows].name, record.sides[cross.columns].name) == ("target", "source")
    assert ("decoder", 0, "rollout to source") in slots(record)


def test_figures_are_those_of_the_maps(tmp_path: Path) -> None:
    record = record_of(look(readers.dual(tmp_path), "the cat", image=photo(tmp_path)), "a photo")
    told = json.loads(json.dumps(figures(record)))
    assert [len(place["heads"]) for place in told["places"]] == [place.heads for place in record.places]
    for number, place in enumerate(told["places"]):
        weights = record.maps.map(number, 0)
        for row, (at, kept) in enumerate(zip(place["heads"][0]["at"], place["heads"][0]["weights"], strict=True)):
            np.testing.assert_allclose(weights[row, at], kept, atol=1e-6)


# --- The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    kept: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in kept:
            kept[kind] = tmp_path_factory.mktemp(kind)
            if kind == "bert":
                readers.published(kept[kind], "BertModel")
            else:
                made = readers.vision() if kind == "vision" else readers.dual(kept[kind])
                made.save(kept[kind] / "model")
        return kept[kind]

    return make


def test_the_command_writes_a_page_and_figures(run: Headway, folders: Any, tmp_path: Path) -> None:
    page, numbers = tmp_path / "new" / "page.html", tmp_path / "look.json"
    end = run("look", folders("bert"), "the cat is in the house", "-o", page, "--json", numbers)
    assert end.code == 0, end.err
    assert f"Page: {page}" in end.out and f"Figures: {numbers}" in end.out
    assert "the cat is in the house" in page.read_text("utf-8")
    told = json.loads(numbers.read_text("utf-8"))
    assert told["sides"][0]["tokens"] == ["[CLS]", "the", "cat", "is", "in", "the", "house", "[SEP]"]
    long = "the red house and " * 9
    assert run("look", folders("bert"), long, "--json", numbers).code == 0
    assert json.loads(numbers.read_text("utf-8"))["title"] == long[:159] + "…"


def test_a_second_text_and_pictures_are_looked_at(run: Headway, folders: Any, tmp_path: Path) -> None:
    picture = photo(tmp_path)
    pair = run("look", folders("bert"), "the cat", "--with", "a dog", "--json", tmp_path / "pair.json")
    assert pair.code == 0 and "Page" not in pair.out
    assert json.loads((tmp_path / "pair.json").read_text())["sides"][0]["tokens"].count("[SEP]") == 2
    seen = run("look", folders("vision"), "--image", picture, "-o", tmp_path / "seen.html")
    assert seen.code == 0, seen.err
    both = run("look", folders("dual"), "the cat", "--image", picture, "-o", tmp_path / "both.html")
    assert both.code == 0, both.err
    for name in ("seen", "both"):
        assert "data:image/png;base64," in (tmp_path / f"{name}.html").read_text()


def test_what_cannot_be_looked_at_is_one_line(run: Headway, folders: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for arguments, said in (
        ([folders("bert")], "nothing to look at: give a text"),
        ([folders("bert"), "   "], "the text is empty"),
        ([folders("vision"), "the cat"], "reads pictures alone: give --image FILE and no text"),
        ([folders("bert"), "the cat", "--image", photo(tmp_path)], "image= is what a model of two towers sees"),
        ([folders("bert"), "the cat " * 60], "40"),
        ([folders("bert"), "the cat", "--json", page], "name two files"),
    ):
        end = run("look", *arguments, "-o", page)
        assert end.code == 1 and said in end.err and end.err.count("\n") == 1, end.err
        assert not page.exists()
