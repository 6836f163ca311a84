"""Texts in pieces, rows of tokens as a batch, and how well targets are told: for objectives that label tokens.

Packed rows keep their examples apart by segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.data.batches import IGNORE, Batch, padded
from headway.data.examples import Example, Examples
from headway.data.sources import Values
from headway.hub import Loaded
from headway.mask import Mask
from headway.objectives import Base, empty
from headway.objectives._tools import Tools
from headway.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Tokens(Batch):
    """`labels` are IGNORE where nothing is predicted; `valid` is None where no row is padded; `segments` and `pos`
    (each example counts from 0) are None where every row is one example."""

    ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    segments: Int[Tensor, "B T"] | None = None
    pos: Int[Tensor, "B T"] | None = None

    @property
    def mask(self) -> Mask | None:
        """What keeps packed examples apart."""
        return None if self.segments is None else Mask(segments=self.segments)


def rows_of(rows: Sequence[Sequence[Example]], pad: int) -> Tokens:
    """Each row's examples (ids, labels) one after the other, filled up on the right."""
    flat = [[np.asarray(ids) for ids, _ in row] for row in rows]
    ids, valid = padded([np.concatenate(row) for row in flat], pad)
    labels, _ = padded([np.concatenate([labels for _, labels in row]) for row in rows], IGNORE)
    segments = pos = None
    if any(len(row) > 1 for row in rows):
        segments, _ = padded([np.repeat(np.arange(len(row)), [len(x) for x in row]) for row in flat], -1)
        pos, _ = padded([np.concatenate([np.arange(len(x)) for x in row]) for row in flat], -1)
    targets = int((labels != IGNORE).sum())
    whole = bool(valid.all())
    return Tokens(
        ids=ids,
        labels=labels,
        valid=None if whole else valid,
        segments=segments,
        pos=pos,
        tokens=int(valid.sum()),
        targets=targets,
    )


def pieces(text: str, tools: Tools) -> Iterator[tuple[list[int], list[int]]]:
    """A text in pieces that the model takes, each with the specials around it; the word of each id, -1 for specials."""
    ids, words = tools.words(text)
    inner = [i for i, word in enumerate(words) if word >= 0]
    if not inner:
        raise empty(text)
    first, last = inner[0], inner[-1] + 1
    room = tools.max_tokens - first - (len(ids) - last)
    if room < 1:
        raise ValueError(f"max_tokens={tools.max_tokens} leaves no room beside the specials of a text: raise it")
    for start in range(first, last, room):
        end = min(start + room, last)
        yield ids[:first] + ids[start:end] + ids[last:], words[:first] + words[start:end] + words[last:]


class Guessed(NamedTuple):
    """Of held-out targets: the share told right, and by always saying the commonest of them; -log p each, and the
    entropy of how common each is, in nats."""

    right: float
    commonest: float
    nats: float
    entropy: float


def guessed(objective: Base, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Guessed:
    """How well a model says the targets of held-out rows."""
    examples = Examples(example for row in rows for example in objective.encode(row, tools))
    order = objective.order(examples, tokens=recipe.batch_tokens, length=recipe.max_tokens, seed=recipe.seed)
    right, nats, asked = 0, 0.0, []
    for step in range(len(order)):
        logits, labels = objective.predict(model.net, order.batch(step).to(model.device))
        nats += float(torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        asked.append(labels.cpu())
    counts = torch.cat(asked).bincount().double()
    shares = counts[counts > 0] / counts.sum()
    total = int(counts.sum())
    return Guessed(right / total, float(shares.max()), nats / total, float(-(shares * shares.log()).sum()))
