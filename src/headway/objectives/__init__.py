"""Objectives: what a model is trained to do. One file each, found by its name in a recipe.

Each file defines a class `Objective(Base)`, whose options are the keyword arguments of its `__init__`. It says which
columns it reads, what a row becomes (`encode`), how examples make a batch (`collate`), and the loss: a *sum* over
`batch.targets`, so that the caller normalises over whatever it accumulates.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from headway.data.batches import Batch, Batches, Order
from headway.data.examples import Example
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives._tools import Tools
from headway.recipe import Recipe
from headway.spec import convert, nearest


class Loss(NamedTuple):
    """`total` is what is minimised, `plain` what is shown (the cross-entropy without smoothing, say), both summed over
    `tokens`, the batch's targets."""

    total: Tensor
    plain: Tensor
    tokens: int


class Unfit(ValueError):
    """A row that no example can be made of; the message says why, and what would help."""


class Score(NamedTuple):
    """`metrics` on held-out rows, by name; `rows` what was written or chosen for each, where a page may show it."""

    metrics: dict[str, Any]
    rows: list[Any] = []


class Base:
    """What objectives share. A new one overrides what differs; `collate` and `__call__` always do.

    KINDS: the models it trains. COLUMNS: the columns it reads (fields of `data` in a recipe) and what reads each:
    "source" and "target" tokenizers, "label" (one of the classes), "image", or "plain". EXTRA: tokens that a tokenizer
    trained for it has besides. HEAD: the head whose outputs are sized to the vocabulary or the classes.
    """

    KINDS: ClassVar[tuple[str, ...]] = ()
    COLUMNS: ClassVar[dict[str, str]] = {"text": "source"}
    EXTRA: ClassVar[tuple[str, ...]] = ()
    HEAD: ClassVar[str | None] = None

    def columns(self) -> dict[str, str]:
        """COLUMNS, or fewer or more of them as the options have it."""
        return self.COLUMNS

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        """The model's spec with the sizes that vocabulary and classes turned out to have."""
        raise NotImplementedError

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """The examples of a row, usually one. Raises `Unfit` where there is none."""
        raise NotImplementedError

    def sizes(self, example: Example) -> tuple[int, ...]:
        """What an example takes up in a batch, in tokens, by column."""
        return (len(example[0]),)

    def batches(self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, length: int, seed: int) -> Order:
        """The order of batches: of `tokens` at most, rows of `length` at most."""
        return Batches(examples, sizes, tokens=tokens, seed=seed, collate=self.collate)

    def collate(self, examples: Any, random: np.random.Generator) -> Batch:
        """A batch of examples; all that is drawn at random comes from `random`, a function of seed and step."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: Any) -> Loss:
        """The loss of a batch, summed over its targets."""
        raise NotImplementedError

    def backward(
        self, model: nn.Module, batches: Sequence[Any], targets: int, scope: Callable[[int], Any]
    ) -> tuple[float, int]:
        """Gradients of the loss over all micro-batches divided by `targets`; returns the plain loss and its count.

        `scope(i)` is entered for micro-batch i: it seeds the dropout, casts, and holds back the exchange of gradients
        between ranks until the last. A loss that compares rows across micro-batches overrides this.
        """
        plain, count = 0.0, 0
        for i, batch in enumerate(batches):
            with scope(i):
                loss = self(model, batch)
                (loss.total / targets).backward()
            plain, count = plain + float(loss.plain), count + loss.tokens
        return plain, count

    @torch.no_grad()
    def rehearse(self, net: nn.Module, batch: Any, tools: Tools) -> None:
        """Shows a new model the largest batch it may meet, so that a mistake costs a second and no training."""
        self(net, batch)

    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """The field's metric on held-out rows, as the recipe asks (beams, limits)."""
        return Score({})

    def loaded(self, net: nn.Module, spec: dict[str, Any], tools: Tools) -> Loaded:
        """The trained model as `headway.load` gives it."""
        start = tools.start
        if start is not None:
            return Loaded(net, spec, start.source, start.target, facts=start.facts, image=start.image)
        return Loaded(net, spec, tools.source, tools.target, max_tokens=tools.max_tokens, lowercase=tools.lowercase)


def names() -> list[str]:
    """The objectives there are, by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def build(named: dict[str, Any]) -> Any:
    """An objective from {"name": ..., option: value}."""
    name = named.get("name", "seq2seq")
    if name not in names():
        raise ValueError(f"objective.name: no objective '{name}'{nearest(str(name), names())}")
    kind = importlib.import_module(f"{__name__}.{name}").Objective
    parameters = inspect.signature(kind, eval_str=True).parameters.values()
    known = msgspec.defstruct(
        name, [(p.name, p.annotation, p.default) for p in parameters], forbid_unknown_fields=True, kw_only=True
    )
    given = {key: value for key, value in named.items() if key != "name"}
    return kind(**msgspec.structs.asdict(convert(given, known, "objective")))


def with_vocabulary(model: dict[str, Any], key: str, size: int) -> dict[str, Any]:
    """A model's spec whose `key` is the tokenizer's size; a recipe that says another one is told so."""
    if model.get(key) not in (None, 0, size):
        raise ValueError(f"model.{key} is {model[key]}, and the tokenizer has {size}: leave it out")
    return {**model, key: size}


def with_head(model: dict[str, Any], name: str, head: dict[str, Any]) -> dict[str, Any]:
    """A model's spec that has the head an objective trains, unless the recipe brings one of that name."""
    heads = model.get("heads", {})
    return model if name in heads else {**model, "heads": {**heads, name: head}}


def summed(batches: Iterator[Loss]) -> float:
    """The plain loss of many batches, a target."""
    plain, count = 0.0, 0
    for loss in batches:
        plain, count = plain + float(loss.plain), count + loss.tokens
    return plain / max(1, count)
