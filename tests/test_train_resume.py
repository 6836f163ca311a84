"""Claims about going on: whatever is trained, and wherever it stopped, a run ends in the bits it would have ended in.

Every objective, stopped amid an epoch, at the end of one, inside an accumulated step and behind a change of schedule,
with and without processes that make the batches. Weights, optimiser, average, random state and order are compared.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES

import headway
from headway import objectives
from headway.recipe import read
from headway.train import Interrupted
from headway.train.data import Prepared, prepare
from headway.train.loop import Trainer

BLOCKS = [{"mixer": {"name": "attention", "heads": 2}, "feedforward": {"hidden": 32}}]
ENCODER = {"kind": "encoder", "width": 16, "dropout": 0.1, "stack": {"blocks": BLOCKS}}
DECODER = {**ENCODER, "kind": "decoder"}
LOADED = {"load": "TEACHER"}
PAIRED = {**ARCHITECTURES["transformer"], "width": 16, "dropout": 0.1}
# of each objective, the smallest recipe that trains it
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "answer": ({}, ENCODER),
    "causal": ({}, DECODER),
    "classify": ({}, ENCODER),
    "contrastive": ({"pairs": "second"}, ENCODER),
    "distill": ({"teacher": "TEACHER", "of": {"name": "causal"}}, DECODER),
    "fim": ({}, DECODER),
    "grpo": ({"reward": "per", "answers": 2, "tokens": 4, "epochs": 2}, LOADED),
    "masked": ({}, ENCODER),
    "ppo": ({"reward": "per", "answers": 2, "tokens": 4, "epochs": 2}, LOADED),
    "preference": ({}, LOADED),
    "reward": ({}, LOADED),
    "seq2seq": ({"smoothing": 0.1}, PAIRED),
    "span": ({}, PAIRED),
}
PACKED = {"causal", "distill", "fim"}  # whose batches are fewer
ACCUMULATE = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that hold what each objective reads, and a teacher."""
    folder = tmp_path_factory.mktemp("resume")
    words = ["red", "green", "blue", "old", "new", "big", "small", "far"]
    lines = ["input,target,text,second,label,question,context,answer,prompt,chosen,rejected"]
    for i in range(90):
        text = " ".join(words[(i * k) % 8] for k in range(1, 2 + i % 4)) + f" {i}"
        row = [text, " ".join(text.upper()), text, text[::-1], words[i % 3], f"which {i}?", text, text.split()[0]]
        row += [text, text.split()[0], text.split()[-1]]
        lines.append(",".join(row))
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", "utf-8")
    headway.train({**recipe_of("causal", folder), "budget": {"steps": 1}, "workers": 0}, out=folder / "TEACHER")
    return folder


def recipe_of(name: str, folder: Path) -> dict[str, Any]:
    options, model = RECIPES[name]
    options = {key: str(folder / value) if value == "TEACHER" else value for key, value in options.items()}
    tokenizers = {"input": {"kind": "characters"}, "target": {"kind": "characters"}}
    if model is LOADED:  # which brings its own
        tokenizers = {}
    return {
        "data": {"source": str(folder / "rows.csv"), "held_out": 10},
        "tokenizers": tokenizers,
        "objective": {"name": name, **options},
        "model": {"load": str(folder / "TEACHER")} if model is LOADED else model,
        "budget": {"steps": 10},
        "batch_tokens": 128 if name in PACKED else 1280 if model is LOADED else 640,
        "max_tokens": 64,
        "precision": "fp32",
        "evaluations": 3,
        "accumulate": ACCUMULATE,
        "checkpoint_seconds": 0,
        # up over steps 0 to 2, level to step 4, down from there
        "optimizer": {"warmup": 3, "schedule": "wsd", "decay": 0.5, "ema": 0.9},
    }


@cache
def prepared_of(name: str, folder: Path) -> Prepared:
    return prepare(read(recipe_of(name, folder)))


def loop_of(name: str, folder: Path, out: Path, workers: int = 0) -> Trainer:
    recipe = read({**recipe_of(name, folder), "workers": workers})
    out.mkdir(parents=True, exist_ok=True)
    assert recipe.model is not None
    return Trainer(recipe, recipe.model, recipe.optimizer, prepared_of(name, folder), out)


def ended(out: Path) -> dict[str, Any]:
    """Everything that a run left, but for what clocks said; each tensor by its bytes."""
    last = max((out / "checkpoints").glob("step-*"))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    progress = json.loads((last / "progress.json").read_text("utf-8"))
    for record in (*lines, progress, *progress["curve"]):
        record.pop("seconds")
    return {
        **{path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))},
        "order": lines,
        "progress": progress,
        "random": torch.get_rng_state().tolist(),
    }


@cache
def whole(name: str, folder: Path) -> dict[str, Any]:
    """What the run ends in that nothing stopped."""
    loop_of(name, folder, folder / name).fit()
    return ended(folder / name)


class Crash(Exception):
    pass


def stop(loop: Trainer, moment: str) -> int:
    """Trains to a moment, and no further; the step to which a run can go back."""
    batches = len(loop.prepared.batches)
    epoch = batches // math.gcd(batches, ACCUMULATE)  # steps until epoch and step end together
    first = {"amid an epoch": 1, "epoch end": epoch, "inside accumulation": 2, "behind a schedule change": 6}[moment]
    step = next(s for s in range(first, 10) if (s * ACCUMULATE % batches == 0) == (moment == "epoch end"))
    if moment == "inside accumulation":
        scope = loop._scope

        @contextmanager
        def crashing(part: int) -> Iterator[None]:
            if (loop.progress.step, part) == (step, 1):
                raise Crash
            with scope(part):
                yield

        loop._scope = crashing  # type: ignore[method-assign]
        with pytest.raises(Crash):
            loop.fit()
        return step
    loop.watch = lambda status: os.kill(os.getpid(), signal.SIGINT) if status.step == step else None
    with pytest.raises(Interrupted):
        loop.fit()
    return step


def cases() -> Iterator[Any]:
    usual = {("causal", "inside accumulation", 0), ("seq2seq", "epoch end", 0), ("masked", "amid an epoch", 2),
             ("contrastive", "behind a schedule change", 0), ("fim", "epoch end", 2)}  # fmt: skip
    for name in objectives.names():
        for moment in ("amid an epoch", "epoch end", "inside accumulation", "behind a schedule change"):
            for workers in (0, 2):
                marks = [] if (name, moment, workers) in usual else [pytest.mark.long]
                yield pytest.param(name, moment, workers, marks=marks, id=f"{name}-{moment}-{workers} workers")


@pytest.mark.parametrize(("name", "moment", "workers"), list(cases()))
def test_a_run_goes_on_to_the_same_bits(folder: Path, tmp_path: Path, name: str, moment: str, workers: int) -> None:
    step = stop(loop_of(name, folder, tmp_path, workers), moment)
    resumed = loop_of(name, folder, tmp_path, workers)
    assert resumed.resume() and resumed.progress.step == step
    torch.manual_seed(99)  # a process of its own has another random state
    resumed.fit()
    found, wanted = ended(tmp_path), whole(name, folder)
    assert found.keys() == wanted.keys()
    for part in wanted:
        assert found[part] == wanted[part], part


def test_there_is_a_recipe_for_every_objective() -> None:
    assert set(objectives.names()) <= RECIPES.keys(), "add the smallest recipe that trains it"
