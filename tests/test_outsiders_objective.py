"""A new objective is one new file, and nothing else is edited: it trains, is measured, and its model is used."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_pairs

import headway
from headway import objectives

# a decoder that learns how long each text is, in letters, from the text's last token
TOY = '''
"""Length: squared error of a text's length."""
import numpy as np
import torch

from headway.objectives import Base, Loss, Score, with_head, with_vocabulary
from headway.objectives._tokens import rows_of


class Objective(Base):
    """`scale`: what a length is divided by."""

    KINDS = ("decoder",)

    def __init__(self, scale: float = 10.0) -> None:
        self.scale = scale

    def spec(self, model, tools):
        return with_head(with_vocabulary(model, "vocab", tools.vocab), "length", {"pool": "last", "outputs": 1})

    def encode(self, row, tools):
        ids = tools.ids(row[0])
        return [(ids, ids)]

    def collate(self, examples, random):
        return rows_of([[example] for example in examples], 0)

    def __call__(self, model, batch):
        said = model.head("length", model(batch.ids, batch.valid), batch.ids, batch.valid)[:, 0]
        lengths = (batch.ids != 0).sum(1) / self.scale
        total = ((said - lengths) ** 2).sum()
        return Loss(total, total.detach(), len(said))

    def score(self, model, rows, tools, recipe):
        return Score({"rows_measured": len(rows)})
'''


def test_an_objective_from_outside_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "length.py").write_text(TOY, "utf-8")
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path / "kinds")])
    assert "length" in objectives.names()
    recipe = {
        "data": {"source": str(write_pairs(tmp_path / "pairs.tsv")), "text": "input"},
        "objective": {"name": "length", "scale": 8.0},
        "budget": {"steps": 60},
        "optimizer": {"warmup": 5},
        "batch_tokens": 256,
        "precision": "fp32",
        "model": {"kind": "decoder", "width": 16, "stack": {"blocks": [{"mixer": {"name": "rnn"}}]}},
    }
    result = headway.train(recipe, out=tmp_path / "run")
    curve = [point["valid_loss"] for point in result["curve"]]
    assert result["rows_measured"] > 0 and curve[-1] < curve[0] / 2
    assert "length" in headway.load(tmp_path / "run").spec["heads"]
    with pytest.raises(ValueError, match=r"objective: unknown key 'sale'; did you mean 'scale'"):
        headway.train({**recipe, "objective": {"name": "length", "sale": 8.0}}, out=tmp_path / "other")
