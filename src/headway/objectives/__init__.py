"""Objectives: what a model is trained to do. One file each, found by its name in a recipe.

Each file defines a class `Objective(Base)`, whose options are the keyword arguments of its `__init__`. It says which
columns it reads, what a row becomes (`encode`), how examples make a batch (`collate`), and the loss: a *sum* over
`batch.targets`, so that the caller normalises over whatever it accumulates.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from headway.data.batches import Batch, Batches, Order
from headway.data.examples import Example
from headway.data.sources import Values, fewer
from headway.hub import Loaded
from headway.loaded import Facts
from headway.objectives._nats import nats
from headway.objectives._tools import Tools
from headway.recipe import Recipe
from headway.spec import convert, nearest
from headway.text import Tokenizer
from headway.vocabulary.own import dressed


class Loss(NamedTuple):
    """`total` is what is minimised, `plain` what is shown (the cross-entropy without smoothing, say), both summed over
    `tokens`, the batch's targets."""

    total: Tensor
    plain: Tensor
    tokens: int


class Unfit(ValueError):
    """A row that no example can be made of; the message says why, and what would help."""


def empty(text: str) -> Unfit:
    """Of a text without tokens."""
    return Unfit(f"the text {text[:40]!r} has no tokens: give it at least one")


class Score(NamedTuple):
    """`metrics` on held-out rows, by name; `rows` what was written or chosen for each, where a page may show it."""

    metrics: dict[str, Any]
    rows: list[Any] = []


class Base(ABC):
    """What objectives share. A new one overrides what differs: always `collate`, and `predict` or `__call__`.

    KINDS: the models it trains. COLUMNS: the columns it reads (fields of `data` in a recipe) and what reads each:
    "source" and "target" tokenizers, "label" (one of the classes), "image", or "plain". EXTRA: tokens that a tokenizer
    trained for it has besides. METRIC: what ranks models that are compared, and whether lower is
    better.
    An objective that wraps another takes these from it.
    """

    KINDS: tuple[str, ...] = ()
    COLUMNS: dict[str, str] = {"text": "source"}
    EXTRA: tuple[str, ...] = ()
    METRIC: tuple[str, bool] = ("valid_loss", True)

    def columns(self) -> dict[str, str]:
        """COLUMNS, or fewer or more of them as the options have it."""
        return self.COLUMNS

    def lender(self) -> Loaded | None:
        """A model whose tokenizers a new model takes over (a teacher's), where the recipe loads none."""
        return None

    def ready(self, tools: Tools) -> None:
        """Keeps the ids that `collate` needs (of a mask, of padding); called once, before anything is encoded."""
        return

    @abstractmethod
    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        """The model's spec with the sizes that vocabulary and classes turned out to have."""

    @abstractmethod
    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """The examples of a row, usually one. Raises `Unfit` where there is none."""

    def sizes(self, example: Example) -> tuple[int, ...]:
        """What an example takes up in a batch, in tokens, by column."""
        return (len(example[0]),)

    def batches(self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, length: int, seed: int) -> Order:
        """The order of batches: of `tokens` at most, rows of `length` at most."""
        return Batches(examples, sizes, tokens=tokens, seed=seed, collate=self.collate)

    def order(self, examples: Sequence[Example], *, tokens: int, length: int, seed: int) -> Order:
        """`batches` of examples, each measured by `sizes`."""
        width = len(self.sizes(examples[0]))
        flat = (size for example in examples for size in self.sizes(example))
        sizes = np.fromiter(flat, np.int32, len(examples) * width).reshape(-1, width)
        return self.batches(examples, sizes, tokens=tokens, length=length, seed=seed)

    @abstractmethod
    def collate(self, examples: Any, random: np.random.Generator) -> Batch:
        """A batch of examples; all that is drawn at random comes from `random`, a function of seed and step."""

    def predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits `Float[N O]` of a batch's N targets, and what each is, `Int[N]`: what a teacher is asked for, too."""
        raise ValueError(f"{type(self).__module__}: has no logits a target, which this needs")

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised and what is shown, of what `predict` gave: -sum log p(label), unless overridden."""
        total = nats(logits, labels)
        return total, total.detach()

    def __call__(self, model: nn.Module, batch: Any) -> Loss:
        """The loss of a batch, summed over its targets."""
        return Loss(*self.judge(*self.predict(model, batch)), batch.targets)

    def backward(
        self, model: nn.Module, batches: Sequence[Any], targets: float, scope: Callable[[int], Any]
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

    def begin(self, net: nn.Module) -> None:
        """A training begins: gives a network what only training needs, forgets what another training left."""
        return

    def kept(self) -> dict[str, Tensor]:
        """What is remembered from step to step beside the model; it is part of every checkpoint."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The way back of `kept`."""
        return

    @torch.no_grad()
    def rehearse(self, net: nn.Module, batch: Any, tools: Tools) -> None:
        """Shows a new model the longest example it may meet, so that a mistake costs a second and no training."""
        self(net, batch)

    def asked(self, rows: Sequence[Values], limit: int | None) -> Sequence[Values]:
        """So many of the held-out rows, the same ones every time."""
        return fewer(rows, limit)

    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """The field's metric on rows that the model takes (`asked` of those that were held out)."""
        return Score({})

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        """What something plain that learns from the training rows reaches on held-out ones: `..._baseline`."""
        return {}

    def use(self, tools: Tools) -> str:
        """The command that uses what was trained, with {} for its folder: shown when a run ends."""
        known = {"decoder": 'generate {} "TEXT"', "seq2seq": 'run {} "TEXT"'}
        return known.get(self.KINDS[0], "embed {} FILE -o vectors.npy")

    def loaded(self, net: nn.Module, spec: dict[str, Any], tools: Tools) -> Loaded:
        """The trained model as `headway.load` gives it."""
        start, source = tools.start, tools.source
        spec = {key: value for key, value in spec.items() if key not in ("load", "adapt", "freeze")}
        if start is not None:
            return Loaded(net, spec, start.source, start.target, facts=start.facts, image=tools.image)
        if spec["kind"] == "seq2seq" and isinstance(source, Tokenizer):
            return Loaded(net, spec, source, tools.target, max_tokens=tools.max_tokens, lowercase=tools.lowercase)
        facts = Facts(max_tokens=tools.max_tokens, bos=tools.bos, pad=tools.pad, lowercase=tools.lowercase)
        if tools.eos is not None:
            facts = msgspec.structs.replace(facts, eos=(tools.eos,))
        if isinstance(source, Tokenizer):  # used from here on as what was downloaded is
            source = dressed(source, lowercase=tools.lowercase)
        return Loaded(net, spec, source, facts=facts, image=tools.image)


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


def with_vocabulary(model: dict[str, Any], key: str, size: int, start: Loaded | None = None) -> dict[str, Any]:
    """A model's spec whose `key` is the tokenizer's size; a recipe that says another one is told so. The table of a
    checkpoint may have more rows than its tokenizer has ids."""
    if start is not None and model[key] >= size:
        return model
    if model.get(key) not in (None, 0, size):
        raise ValueError(f"model.{key} is {model[key]}, and the tokenizer has {size}: leave it out")
    return {**model, key: size}


def with_head(model: dict[str, Any], name: str, head: dict[str, Any]) -> dict[str, Any]:
    """A model's spec that has the head an objective trains, unless the recipe brings one of that name."""
    heads = model.get("heads", {})
    return model if name in heads else {**model, "heads": {**heads, name: head}}
