"""Claims about answering: the loss of a span, windows, no answer, and that what was trained answers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from objective import gradients, learned, made
from torch import nn

import headway
from headway.objectives.answer import rates
from headway.recipe import Recipe, read
from headway.train.data import Prepared

ENCODER: dict[str, Any] = {
    "kind": "encoder",
    "width": 32,
    "stack": {"blocks": [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {}}], "repeat": 2},
}
NAMES, COLOURS = ["ann", "bob", "eve", "joe"], ["red", "blue", "dark green", "pink"]


def write(folder: Path, rows: int = 300) -> Path:
    """Whose coat has which colour: three people are told of, and one in four questions is about another."""
    draw = np.random.default_rng(0)
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question", "context", "answer"])
        for i in range(rows):
            people, colours = draw.permutation(NAMES), draw.permutation(COLOURS)
            told = [f"{who} wears {colour} ." for who, colour in zip(people[:3], colours, strict=False)]
            asked = int(draw.integers(0, 4))
            table.writerow([f"{people[asked]} {i}", " ".join(told), colours[asked] if asked < 3 else ""])
    return folder / "rows.csv"


def recipe(source: Path, **changed: Any) -> Recipe:
    given: dict[str, Any] = {
        "data": {"source": str(source), "held_out": 10},
        "tokenizers": {"input": {"kind": "whitespace"}},
        "objective": {"name": "answer"},
        "budget": {"steps": 3},
        "batch_tokens": 500,
        "precision": "fp32",
        "optimizer": {"warmup": 2},
        "model": ENCODER,
    }
    return read({**given, **changed})


@pytest.fixture
def task(tmp_path: Path) -> tuple[Prepared, nn.Module]:
    return made(recipe(write(tmp_path)))


def some(prepared: Prepared, first: int, last: int) -> Any:
    examples = [e for row in prepared.splits.train[first:last] for e in prepared.objective.encode(row, prepared.tools)]
    return prepared.objective.collate(examples, np.random.default_rng(0))


def test_loss_is_of_first_and_last_token_among_context_and_no_answer(task: tuple[Prepared, nn.Module]) -> None:
    prepared, net = task
    batch = some(prepared, 0, 6)
    with torch.no_grad():
        logits = net.head("spans", net(batch.ids, batch.valid, types=batch.types)).double()  # type: ignore[operator]
        found = float(prepared.objective(net, batch).total)
    by_hand, nones = 0.0, 0
    for row, (question, context, answer) in enumerate(prepared.splits.train[:6]):
        ids = [1, *prepared.tools.ids(question), 2, *prepared.tools.ids(context), 2]
        assert batch.ids[row, : len(ids)].tolist() == ids
        begin = len(prepared.tools.ids(question)) + 2
        places = [0, *range(begin, len(ids) - 1)]
        words = context.split()
        at = words.index(answer.split()[0]) + begin if answer else 0
        end = at + len(answer.split()) - 1 if answer else 0
        nones += not answer
        for side, place in ((0, at), (1, end)):
            by_hand -= float(logits[row, places, side].log_softmax(0)[places.index(place)])
    assert abs(found - by_hand) < 1e-4 and 0 < nones < 6


def test_one_batch_is_learned_by_heart(task: tuple[Prepared, nn.Module]) -> None:
    prepared, net = task
    assert learned(prepared, net, some(prepared, 0, 10), steps=60, rate=1e-2) < 0.05


def test_micro_batches_are_one_batch_and_padding_changes_nothing(task: tuple[Prepared, nn.Module]) -> None:
    prepared, net = task
    found = [
        gradients(prepared, net, [some(prepared, *part) for part in parts])
        for parts in ([(0, 12)], [(0, 3), (3, 4), (4, 12)])
    ]
    assert abs(found[0][0] - found[1][0]) < 1e-6
    assert max(float((a - b).abs().max()) for a, b in zip(found[0][1], found[1][1], strict=True)) < 1e-6


def test_of_a_long_context_the_windows_that_lack_the_answer_have_none(tmp_path: Path) -> None:
    prepared, _ = made(recipe(write(tmp_path), max_tokens=12, objective={"name": "answer", "stride": 4}))
    row = ("ann", "bob wears red . eve wears blue . ann wears dark green .", "dark green")
    found = list(prepared.objective.encode(row, prepared.tools))
    assert [len(ids) <= 12 for ids, *_ in found] == [True] * 3
    assert [tuple(place[2:]) for *_, place in found] == [(0, 0), (9, 10), (5, 6)]
    ids, _, (at, length, start, end) = found[1]
    assert prepared.objective.reader.decode(ids[start : end + 1]).split() == ["dark", "green"]  # type: ignore[attr-defined]
    assert at == 3 and at + length == len(ids) - 1


def test_a_bad_row_is_told(task: tuple[Prepared, nn.Module]) -> None:
    prepared, _ = task
    with pytest.raises(ValueError, match="'mauve' does not stand in its context"):
        list(prepared.objective.encode(("ann", "ann wears red .", "mauve"), prepared.tools))


def test_rates_are_those_of_squad() -> None:
    assert rates(["The red coat.", "", ""], ["red coat", "", "blue"]) == {"exact": 2 / 3, "f1": 2 / 3}
    assert rates(["dark green"], ["green"]) == {"exact": 0.0, "f1": 2 / 3}


def test_what_was_trained_answers_and_says_when_it_cannot(tmp_path: Path) -> None:
    given = recipe(write(tmp_path, 1500), budget={"steps": 400}, batch_tokens=800, evaluations=2, test_limit=60)
    result = headway.train(msgspec.to_builtins(given), out=tmp_path / "run")
    assert result["exact"] > 0.85 > result["f1_baseline"]
    model = headway.load(tmp_path / "run", "cpu")
    found = model.answer("ann 1", "eve wears dark green . ann wears blue . joe wears pink .", stride=16)
    assert found.text == "blue" and found.no_answer_probability < 0.5
    found = model.answer("bob 1", "eve wears dark green . ann wears blue . joe wears pink .", stride=16)
    assert found.no_answer_probability > found.score
