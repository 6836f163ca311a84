"""Claims about TensorBoard's figures: they are the log's, once each, also of a run that was stopped and went on."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
from tiny import task, write_pairs

import headway
from headway.train import Interrupted


def figures(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard reads them."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = loader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_the_board_shows_what_the_log_says_once_also_when_a_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = task(write_pairs(tmp_path / "pairs.tsv"), log="tensorboard", checkpoint_seconds=1e6)
    stop = lambda name, status: status.step == 5 and os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted):
        headway.train(recipe, out=tmp_path / "run", watch=stop)
    result = headway.train(recipe, out=tmp_path / "run", resume=True)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    found = figures(tmp_path / "run")
    assert len(logged) == 12
    for name in ("loss", "norm", "rate"):
        assert found[name] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in logged]
    assert found["valid_loss"] == [(p["step"] - 1, pytest.approx(p["valid_loss"], rel=1e-6)) for p in result["curve"]]
    again = headway.train(recipe, out=tmp_path / "run", overwrite=True)  # a board is part of a run
    assert again["steps"] == 12


def test_a_board_without_its_package_is_told_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else found(name, *a)
    )
    recipe = task(write_pairs(tmp_path / "pairs.tsv"), log="tensorboard")
    with pytest.raises(ValueError, match=r"^log: tensorboard needs .*: pip install 'headway\[tensorboard\]'$"):
        headway.train(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
