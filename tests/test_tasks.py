"""What the laboratory's tasks promise: rows from seeds, answers that follow from rows, chance as it is stated."""

import math
import random as plain
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.compare import tasks
from headway.compare.tasks import Batch, listops, pathfinder, sources

LENGTH = 64
SQUARE = 256


def drawn(name: str, rows: int = 40, length: int | None = None, seed: int = 0, **options: object) -> Batch:
    length = length or (SQUARE if name == "pathfinder" else LENGTH)
    return tasks.build({"name": name, **options}).batch(np.random.default_rng(seed), rows, length)


@pytest.mark.parametrize("name", tasks.names())
def test_rows_follow_from_the_seed_alone(name: str) -> None:
    one, again, other = drawn(name), drawn(name), drawn(name, seed=1)
    assert torch.equal(one.ids, again.ids) and torch.equal(one.targets, again.targets)
    assert not torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("name", tasks.names())
def test_ids_and_answers_lie_within_what_a_task_states(name: str) -> None:
    task, batch = tasks.build({"name": name}), drawn(name)
    assert int(batch.ids.min()) >= 0 and int(batch.ids.max()) < task.vocabulary
    assert int(batch.targets.min()) >= 0 and int(batch.targets.max()) < task.answers
    assert batch.counts.any(1).all(), "a row that asks nothing"
    assert batch.targets.shape[1] == (1 if task.pooled else batch.ids.shape[1])


@pytest.mark.parametrize("name", tasks.names())
def test_the_commonest_answer_is_right_no_more_often_than_chance(name: str) -> None:
    task, length = tasks.build({"name": name}), SQUARE if name == "pathfinder" else LENGTH
    batch = task.held_out().batch(np.random.default_rng(0), 200, length)
    targets = batch.targets[batch.counts]
    asked = len(batch.ids) if name == "prose" else len(targets)  # letters of a text are no independent draws
    assert float(targets.bincount().max()) / len(targets) <= task.chance(length) + 4 * math.sqrt(0.25 / asked)


def test_mqar_asks_each_key_once_for_the_value_that_followed_it() -> None:
    batch = drawn("mqar", pairs=6, symbols=8)
    for ids, targets, counts in zip(*(part.tolist() for part in batch[:3]), strict=True):
        known = dict(zip(ids[0:12:2], ids[1:12:2], strict=True))
        asked = [at for at, counted in enumerate(counts) if counted]
        assert sorted(ids[at] for at in asked) == sorted(known) and min(asked) >= 12
        assert all(targets[at] == known[ids[at]] for at in asked)
        assert len(set(known.values())) == len(known) == 6


def test_mqar_asks_early_more_often_than_late() -> None:
    places = drawn("mqar", rows=400).counts.nonzero()[:, 1].float()
    assert float(places.median()) < (8 + LENGTH) / 2


def test_copies_are_asked_in_order() -> None:
    for name in ("copying", "selective_copying"):
        batch = drawn(name, memorise=5)
        for ids, targets in zip(batch.ids, batch.targets, strict=True):
            assert targets[-5:].tolist() == ids[:-5][ids[:-5] > 1].tolist()


def test_selective_copying_scatters_what_is_to_be_copied() -> None:
    first = drawn("selective_copying").ids.gt(1).int().argmax(1)
    assert len(first.unique()) > 4


def test_induction_asks_what_followed_the_special_token() -> None:
    batch = drawn("induction")
    assert batch.counts.sum(1).eq(1).all() and batch.counts[:, -1].all() and batch.ids[:, -1].eq(0).all()
    for ids, target in zip(batch.ids.tolist(), batch.targets[:, -1].tolist(), strict=True):
        assert ids.count(0) == 2 and target == ids[ids.index(0) + 1]


def test_counts_go_round() -> None:
    batch = drawn("counting", modulo=3)
    assert torch.equal(batch.targets, batch.ids.cumsum(1) % 3)


def test_a_motif_stands_in_its_row() -> None:
    task, batch = tasks.build({"name": "motif"}), drawn("motif")
    for ids, label in zip(batch.ids.tolist(), batch.targets[:, 0].tolist(), strict=True):
        shape = task.shapes()[label].tolist()
        assert any(ids[at : at + len(shape)] == shape for at in range(len(ids)))


# ListOps: the published expressions, evaluated by another way


def value_of(words: list[str]) -> int:
    """An expression's value by Python's own arithmetic, from its published spelling."""
    word = words.pop(0)
    if word.isdigit():
        return int(word)
    numbers = []
    while words[0] != "]":
        numbers.append(value_of(words))
    words.pop(0)
    known = {"[MIN": min, "[MAX": max, "[MED": lambda n: int(np.median(n)), "[SM": lambda n: sum(n) % 10}
    return int(known[word](numbers))


def spelled(ids: list[int]) -> list[str]:
    words = ["", "]", *map(str, range(10)), *(f"[{name}" for name in listops.OPERATORS)]
    return [words[i] for i in ids if i != tasks.PAD]


def test_listops_answers_are_the_values_of_its_expressions() -> None:
    assert value_of(["[MAX", "2", "9", "[MIN", "4", "7", "]", "0", "]"]) == 9  # the paper's own example
    batch = drawn("listops", rows=60)
    for ids, answer in zip(batch.ids.tolist(), batch.targets[:, 0].tolist(), strict=True):
        words = spelled(ids)
        assert value_of(words) == answer and not words


def test_listops_fills_a_quarter_of_its_rows_or_more() -> None:
    batch = drawn("listops", rows=60)
    assert batch.valid is not None and batch.valid.sum(1).min() >= LENGTH // 4


def test_listops_nests_no_deeper_than_it_says() -> None:
    draw = plain.Random(0)
    for _ in range(20):
        words, deepest, depth = spelled(listops.Listops(depth=3).tree(draw, 8, 400)[0]), 0, 0
        for word in words:
            depth += word.startswith("[") - (word == "]")
            deepest = max(deepest, depth)
        assert deepest <= 2  # at depth 3 all is digits


def test_listops_at_the_published_size() -> None:
    batch = drawn("listops", rows=4, length=2000)
    assert batch.valid is not None and int(batch.valid.sum(1).min()) >= 500


# Pathfinder: curves found again by walking over their pixels


def pieces(pixels: np.ndarray, reach: int = 2) -> list[set[tuple[int, int]]]:
    """Sets of drawn pixels that hang together over gaps of `reach - 1`."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(pixels)}, []
    while left:
        waiting, piece = [left.pop()], set()
        while waiting:
            y, x = waiting.pop()
            piece.add((y, x))
            near = {(a, b) for a, b in left if max(abs(a - y), abs(b - x)) <= reach}
            left -= near
            waiting += near
        found.append(piece)
    return found


def test_dots_are_on_one_curve_where_the_answer_is_yes_and_else_on_two() -> None:
    batch = drawn("pathfinder", rows=60)
    for ids, joined in zip(batch.ids, batch.targets[:, 0].tolist(), strict=True):
        found = pieces(ids.reshape(16, 16).numpy())
        dotted = [piece for piece in found if any(ids.reshape(16, 16)[y, x] == pathfinder.DOT for y, x in piece)]
        assert len(dotted) == (1 if joined else 2)


def test_half_of_the_pictures_join_their_dots() -> None:
    assert float(drawn("pathfinder", rows=40).targets.float().mean()) == 0.5


def test_a_picture_is_a_square() -> None:
    with pytest.raises(ValueError, match=r"pathfinder: 200 tokens are no square of 12 x 12"):
        drawn("pathfinder", length=200)


def test_curves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no 3 curves of up to 60 dashes fit into 16 x 16"):
        drawn("pathfinder", rows=1, dashes=60)


# Real text


def test_files_that_are_tested_on_are_not_trained_on() -> None:
    task = tasks.build({"name": "sources", "packages": 4})
    train = {file.tobytes() for files, _ in sources._files("train").values() for file in files}
    test = {file.tobytes() for files, _ in sources._files("test").values() for file in files}
    assert task.held_out() != task and test and not (train & test - {b""})


# What is refused


@pytest.mark.parametrize(
    ("name", "length", "said"),
    [
        ("mqar", 15, "4 pairs and their questions take 16"),
        ("copying", 15, "8 tokens and their copies take 16"),
        ("motif", 4, "the patterns take 5"),
    ],
)
def test_lengths_that_hold_no_task_are_refused_with_numbers(name: str, length: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: {length} tokens are too few, {said}"):
        drawn(name, length=length)


def test_a_misspelt_task_or_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'mqar'"):
        tasks.build({"name": "mqra"})
    with pytest.raises(ValueError, match="task mqar: unknown key 'pair'; did you mean 'pairs'"):
        tasks.build({"name": "mqar", "pair": 3})


def test_a_task_of_ones_own_is_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "echo.py").write_text(
        "from headway.compare.tasks import Task, at_tokens\n"
        "class Echo(Task, frozen=True):\n"
        "    vocabulary = 5\n"
        "    def batch(self, random, rows, length):\n"
        "        ids = random.integers(5, size=(rows, length))\n"
        "        return at_tokens(ids, ids, ids >= 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="never runs code"):
        tasks.find("mine.echo")
    import importlib

    importlib.import_module("mine.echo")
    try:
        assert tasks.build({"name": "mine.echo"}).answers == 5
    finally:
        del sys.modules["mine.echo"], sys.modules["mine"]


def test_the_place_of_a_question_does_not_tell_whose_it_is() -> None:
    batch = drawn("mqar", rows=2000, pairs=4, symbols=8)
    first = sum(int(ids[at[0]]) == int(ids[0]) for ids, counts in zip(batch.ids, batch.counts, strict=True)
                if len(at := counts.nonzero()[:, 0]))  # fmt: skip
    assert abs(first / 2000 - 1 / 4) < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_an_expression_that_cannot_be_so_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listops, "TRIES", 50)
    with pytest.raises(ValueError, match="listops: no tree of depth 1"):
        drawn("listops", depth=1)
