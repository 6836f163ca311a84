"""The four architectures of the demo, made tiny, and small data for them: for every test that trains."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from headway import models
from headway.data.pairs import Pairs, collate
from headway.models.seq2seq import Model
from headway.recipe import Recipe, read
from headway.train.data import Prepared, prepare
from headway.train.loop import Trainer


def _stack(block: dict[str, Any], positions: dict[str, Any]) -> dict[str, Any]:
    return {"positions": positions, "blocks": [block]}


def _model(encoder: dict[str, Any], decoder: dict[str, Any], positions: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "seq2seq",
        "width": 32,
        "encoder": _stack(encoder, positions),
        "decoder": _stack(decoder, positions),
    }


READER = {"mixer": {"name": "rnn", "bidirectional": True}}
WRITER = {"mixer": {"name": "rnn"}}
LOOK = {"name": "attention", "heads": 2}
ARCHITECTURES = {
    "rnn": _model(READER, {**WRITER, "cross": {"name": "summary"}}, {"name": "none"}),
    "rnn_attention": _model(READER, {**WRITER, "cross": LOOK}, {"name": "none"}),
    "conv": _model(
        {"mixer": {"name": "conv"}},
        {"mixer": {"name": "conv"}, "cross": {**LOOK, "heads": 1}},
        {"name": "learned", "length": 64},
    ),
    "transformer": _model(
        {"mixer": LOOK, "feedforward": {"hidden": 64}},
        {"mixer": LOOK, "cross": LOOK, "feedforward": {"hidden": 64}},
        {"name": "rotary"},
    ),
}
SMALLEST = {**ARCHITECTURES["transformer"], "width": 16}


def write_pairs(path: Path, rows: int = 200) -> Path:
    """A task that is quickly learned: say the letters backwards. Inputs differ, and all three parts get some."""
    draw = random.Random(0)
    words = sorted({"".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(rows)})
    lines = [f"{word}\t{' '.join(reversed(word.upper()))}" for word in words]
    path.write_text("\n".join(["input\ttarget", *lines]) + "\n", "utf-8")
    return path


def task(source: Path | str, **changed: Any) -> dict[str, Any]:
    """A recipe as a dict, a dozen steps of the smallest model unless `changed` says otherwise."""
    return {
        "data": {"source": str(source)},
        "tokenizers": {"input": {"kind": "characters"}, "target": {"kind": "whitespace"}},
        "budget": {"steps": 12},
        "batch_tokens": 512,
        "max_tokens": 24,
        "precision": "fp32",
        "evaluations": 3,
        "optimizer": {"warmup": 2},
        "model": SMALLEST,
        **changed,
    }


def trainer(folder: Path, source: Path, **changed: Any) -> Trainer:
    """A trainer of the one model of a `task`, as `headway.train` makes it."""
    recipe, prepared = prepared_task(source, **changed)
    folder.mkdir(parents=True, exist_ok=True)
    assert recipe.model is not None
    return Trainer(recipe, recipe.model, recipe.optimizer, prepared, folder)


def prepared_task(source: Path, **changed: Any) -> tuple[Recipe, Prepared]:
    recipe = read(task(source, **changed))
    return recipe, prepare(recipe)


def fresh(name: str, source_vocab: int = 12, target_vocab: int = 12) -> Model:
    """One of the four, untrained."""
    net = models.build({**ARCHITECTURES[name], "source_vocab": source_vocab, "target_vocab": target_vocab})
    assert isinstance(net, Model)
    return net.eval()


def eight_pairs() -> Pairs:
    """A batch of 8 pairs of differing lengths; ids from 4, as the first four are special."""
    draw = random.Random(1)
    ids = lambda: [draw.randint(4, 11) for _ in range(draw.randint(2, 6))]
    return collate([(ids(), ids()) for _ in range(8)])
