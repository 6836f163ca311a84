"""Claims about the plain baseline of an encoder-decoder: the answer of whoever is spelled most alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import task, write_pairs

import headway
from headway.objectives import _baselines
from headway.objectives._baselines import nearest_input

TRAIN = [("cat", "K AE T"), ("cat", "K AA T"), ("dogs", "D AO G Z"), ("mat", "M AE T")]


def test_the_nearest_training_input_answers() -> None:
    """Of "hat", "cat" and "mat" are as near, and the first one's first target is taken: one of three is wrong."""
    found = nearest_input(TRAIN, [("hat", "HH AE T"), ("dogs", "D AO G Z")], "whitespace")
    assert found["per_baseline"] == pytest.approx(1 / 7)
    assert found["wer_baseline"] == pytest.approx(1 / 2)


def test_any_listed_target_is_right_and_letters_count_as_units_where_targets_are_letters() -> None:
    rows = [("bat", "K AA"), ("bat", "K AE T")]
    assert nearest_input(TRAIN, rows, "whitespace")["wer_baseline"] == 0
    assert nearest_input(TRAIN, [("catt", "K AE TTT")], "characters")["per_baseline"] == pytest.approx(2 / 8)


def test_where_inputs_are_too_many_fewer_are_asked_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_baselines, "STEPS", 10)  # of 4 letters a word: two words
    found = nearest_input(TRAIN, [("hat", "HH AE T")], "whitespace")
    assert found["baseline"] == "the target of the nearest training input of 2"


def test_a_trained_encoder_decoder_stands_beside_it(tmp_path: Path) -> None:
    result = headway.train(task(write_pairs(tmp_path / "pairs.tsv")), out=tmp_path / "run")
    assert 0 < result["per_baseline"] < 1 and 0 < result["wer_baseline"] <= 1
    assert result["baseline"] == "the target of the nearest training input"
