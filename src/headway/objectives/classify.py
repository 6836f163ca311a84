"""Classify: cross-entropy of what a text, a pair of texts or a picture is, or of what each word of a text is.

-sum_i w(y_i) log p(y_i | x_i) over texts, or over words (each word's first token is asked); "balanced" weights are
w(c) = N / (classes x N(c)), one on average over the training rows, so that rare classes count as much as common ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.data.batches import IGNORE, Batch, asked, padded
from headway.data.examples import Example
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives import Base, Score, Unfit, with_vocabulary
from headway.objectives._baselines import classes, span_f1, words_alone
from headway.objectives._pictures import batch_of, stored
from headway.objectives._tools import Tools
from headway.objectives._vectors import hidden, read, reader, text_of, with_types
from headway.recipe import Recipe
from headway.use.classify import names_of, spans_of, tag, words

OF: dict[str, dict[str, str]] = {
    "text": {"text": "source", "label": "label"},
    "pair": {"text": "source", "second": "source", "label": "label"},
    "words": {"text": "source", "label": "labels"},
    "image": {"image": "image", "label": "label"},
}


@dataclass(frozen=True, kw_only=True)
class Classed(Batch):
    """Texts, or pictures (the others are None then), and the class of each, or of each token (IGNORE: not asked)."""

    labels: Int[Tensor, "B"] | Int[Tensor, "B T"]  # noqa: F821 (jaxtyping reads "B")
    ids: Int[Tensor, "B T"] | None = None
    types: Int[Tensor, "B T"] | None = None
    valid: Bool[Tensor, "B T"] | None = None
    pixels: Float[Tensor, "B 3 H W"] | None = None


class Objective(Base):
    """`of`: what is classified: a "text", a "pair" of texts, the "words" of a text (columns hold texts, and as many
    labels between spaces as the text has words between spaces), or an "image".

    `weights`: of classes in the loss: "none", "balanced", or by label. `truncate`: cut texts that are too long.
    """

    def __init__(
        self,
        of: Literal["text", "pair", "words", "image"] = "text",
        weights: Literal["none", "balanced"] | dict[str, float] = "none",
        truncate: bool = False,
    ) -> None:
        if isinstance(weights, dict) and not all(0 <= weight < float("inf") for weight in weights.values()):
            raise ValueError(f"objective.weights are numbers from 0 up, by label: {weights}")
        self.of, self.weights, self.truncate = of, weights, truncate
        self.head = "tokens" if of == "words" else "classify"
        self.weight: Tensor | None = None
        self.METRIC = ("span_f1" if of == "words" else "accuracy", False)
        self.KINDS = ("vision", "convnet") if of == "image" else ("encoder",)

    def use(self, tools: Tools) -> str:
        return "classify {} PICTURE.png" if self.of == "image" else 'classify {} "TEXT"'

    def columns(self) -> dict[str, str]:
        return OF[self.of]

    def ready(self, tools: Tools) -> None:
        self.start, self.image, self.number = tools.start, tools.image, {name: i for i, name in enumerate(tools.labels)}
        if len(tools.labels) < 2:
            raise ValueError(f"all training rows have the label {tools.labels[0]!r}: there is nothing to tell apart")
        if self.of == "image" and self.image is None:
            raise ValueError("this model does not say the size of its pictures: give model.patches.image")
        if self.weights == "balanced":
            counts = torch.tensor(tools.counts, dtype=torch.float32)
            self.weight = counts.sum() / (len(counts) * counts)
        elif isinstance(self.weights, dict):
            if set(self.weights) != set(tools.labels):
                odd = sorted(set(self.weights) ^ set(tools.labels))
                raise ValueError(f"objective.weights name each label once; {', '.join(odd[:5])} stand on one side only")
            self.weight = torch.tensor([self.weights[name] for name in tools.labels])

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        if self.of != "image":
            model = with_vocabulary(model, "vocab", tools.vocab, tools.start)
        if self.of == "pair" and tools.start is None:
            model = with_types(model)
        heads = msgspec.to_builtins(model.get("heads", {}))
        given = {"pool": "none" if self.of == "words" else "mean", **heads.get(self.head, {})}
        known = tuple(given.get("labels") or ())
        if known and known != tools.labels:
            raise ValueError(
                f"the head '{self.head}' has the labels {', '.join(known)[:80]}, and the rows have "
                f"{', '.join(tools.labels)[:80]}: give model.heads.{self.head} to begin anew"
            )
        outputs = given.get("outputs")
        if outputs not in (None, len(tools.labels)):
            raise ValueError(f"model.heads.{self.head}.outputs is {outputs}, and there are {len(tools.labels)} labels")
        return {**model, "heads": {**heads, self.head: {**given, "outputs": len(tools.labels), "labels": tools.labels}}}

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        if self.of == "words":
            return [self._words(row[0], str(row[1]).split(), tools)]
        label = self.number.get(str(row[-1]))
        if label is None:
            raise Unfit(f"the label {str(row[-1])[:40]!r} stands in no training row: add rows that have it")
        if self.of == "image":
            try:
                return [(stored(row[0]), (label,))]
            except ValueError as problem:
                raise Unfit(str(problem)) from None
        ids, types = text_of(tools, row[0], row[1] if self.of == "pair" else None, truncate=self.truncate)
        return [(ids, types, (label,))]

    def _words(self, text: str, labels: list[str], tools: Tools) -> tuple[list[int], list[int], list[int]]:
        """Ids, types, and a label for the first token of each word, as `headway classify` tells words apart: those that
        a word between spaces falls into share its label, and begin nothing anew (B- becomes I-)."""
        told, starts = text.split(), _starts(text)
        if len(told) != len(labels):
            raise Unfit(f"the text {text[:40]!r} has {len(told)} words, and there are {len(labels)} labels for them")
        if alien := [label for label in labels if label not in self.number]:
            raise Unfit(f"the label {alien[0][:40]!r} stands in no training row: add rows that have it")
        ids, types = text_of(tools, text, truncate=self.truncate)
        found, seen = [IGNORE] * len(ids), -1
        for start, _, token in words(reader(tools), text, ids):
            word = int(np.searchsorted(starts, start, "right")) - 1
            label = labels[word]
            if word == seen and tag(label)[0]:
                label = f"I-{tag(label)[1]}" if f"I-{tag(label)[1]}" in self.number else label
            found[token], seen = self.number[label], word
        return ids, types, found

    def sizes(self, example: Example) -> tuple[int, ...]:
        """A text's tokens; a picture counts as one."""
        return (1,) if self.of == "image" else (len(example[0]),)

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Classed:
        if self.of == "image":
            assert self.image is not None
            labels = torch.tensor([int(label[0]) for _, label in examples])
            pixels = batch_of([picture for picture, _ in examples], self.image)
            return Classed(labels=labels, pixels=pixels, tokens=len(examples), targets=len(examples))
        found = read([(example[0], example[1]) for example in examples])
        if self.of == "words":
            labels, _ = padded([example[2] for example in examples], IGNORE)
        else:
            labels = torch.tensor([int(example[2][0]) for example in examples])
        targets = int((labels != IGNORE).sum())
        return Classed(
            labels=labels, ids=found.ids, types=found.types, valid=found.valid, tokens=found.tokens, targets=targets
        )

    def predict(self, model: nn.Module, batch: Classed) -> tuple[Tensor, Tensor]:
        net: Any = model
        if batch.pixels is not None:
            return net.head(self.head, net(batch.pixels)), batch.labels
        logits = net.head(self.head, hidden(net, batch, self.start, self.head), batch.ids, batch.valid)
        there = asked(batch.labels, batch.targets)
        return logits.flatten(0, -2)[there], batch.labels.flatten()[there]

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        total, plain = super().judge(logits, labels)
        if self.weight is None:
            return total, plain
        return F.cross_entropy(logits.float(), labels, self.weight.to(logits.device), reduction="sum"), plain

    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """Accuracy, and the mean F1 of the classes; of words, the F1 of spans that are told whole."""
        if self.of == "words":
            return Score(self._spans(model, rows, tools))
        inputs = [tuple(row[:2]) if self.of == "pair" else row[0] for row in rows]
        told = model.classify(inputs, top=1, truncate=self.truncate)
        found = [one.label for one in told]  # type: ignore[union-attr]
        return Score({**rates([str(row[-1]) for row in rows], found), "test_rows": len(rows)}, found)

    def _spans(self, model: Loaded, rows: Sequence[Values], tools: Tools) -> dict[str, Any]:
        names, texts = names_of(model, "tokens"), [row[0] for row in rows]
        found = model.classify(texts, truncate=self.truncate)
        known = lambda spans: {(span.label, span.start, span.end) for span in spans}
        pairs = []
        for row, spans in zip(rows, found, strict=True):
            ids, _, labels = self._words(row[0], str(row[1]).split(), tools)
            true = spans_of(model, row[0], ids, [names[max(i, 0)] for i in labels], [1.0] * len(ids))
            pairs.append((known(true), known(spans)))
        share, wanted = span_f1(pairs)
        return {"span_f1": share, "test_rows": len(rows), "test_spans": wanted}

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        """By logistic regression on tf-idf or on pixels, where scikit-learn is there; else the commonest class. Words
        get the label that each has most often."""
        if self.of == "words":
            return words_alone(train, rows)
        return classes(train, rows, self.of, recipe.seed)


def rates(wanted: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur."""
    scores = []
    for name in sorted(set(wanted)):
        right = sum(a == b == name for a, b in zip(wanted, found, strict=True))
        scores.append(2 * right / (wanted.count(name) + found.count(name)))
    accuracy = sum(a == b for a, b in zip(wanted, found, strict=True)) / max(1, len(wanted))
    return {"accuracy": accuracy, "macro_f1": sum(scores) / max(1, len(scores))}


def _starts(text: str) -> list[int]:
    """Where each word between spaces begins."""
    return list(_places(text))


def _places(text: str) -> Iterator[int]:
    at = 0
    for word in text.split():
        at = text.index(word, at)
        yield at
        at += len(word)
