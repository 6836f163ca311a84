"""MQAR, multi-query associative recall (Zoology, 2312.04927): k1 v1 k2 v2 ... and later each key again: what was its
value? A key is asked for once, at a place drawn by a power law, so that most questions come early.

As published but for the vocabulary, which is small here, so that training takes seconds; and what stands between the
questions is blank where theirs is noise of the same tokens, which with few tokens would ask by accident.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from headway.compare.tasks import Batch, Task, at_tokens, require_length

POWER = 0.01  # of the places' law, p ~ x^(POWER - 1), as published


class Mqar(Task, frozen=True):
    """pairs: keys with their values in a row. symbols: different keys there are, and different values."""

    PUBLISHED: ClassVar = {
        "attention": "solved (above 99%) at width 64, at every length",
        "gated convolution": "needs a width of the sequence's length or more",
    }
    SETUP: ClassVar = "Zoology: 2 layers, vocabulary 8,192, (length, pairs) = (64, 4), (128, 8), (256, 16)"

    pairs: Annotated[int, Meta(ge=1, le=4096)] = 4
    symbols: Annotated[int, Meta(ge=1, le=2**20)] = 32

    def __post_init__(self) -> None:
        if self.pairs > self.symbols:
            raise ValueError(f"mqar: {self.pairs} pairs need as many different keys, and there are {self.symbols}")

    @property
    def vocabulary(self) -> int:
        return 1 + 2 * self.symbols  # 0 is the blank

    def chance(self, length: int) -> float:
        """Of one who knows which values stand in the row, and not whose they are."""
        return 1 / self.pairs

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        require_length("mqar", length, 4 * self.pairs, f"{self.pairs} pairs and their questions")
        ids, targets = np.zeros((2, rows, length), dtype=np.int64)
        # neither comes twice: a value that did would be a better guess than chance
        keys, values = random.random((2, rows, self.symbols)).argsort(2)[:, :, : self.pairs] + 1
        values = values + self.symbols
        ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2] = keys, values
        slots = (length - 2 * self.pairs) // 2
        law = np.arange(1, slots + 1) ** (POWER - 1)
        # the largest of log(p) + Gumbel noise are a draw by p without replacement
        noisy = np.log(law / law.sum()) + random.gumbel(size=(rows, slots))
        at = 2 * self.pairs + 2 * (-noisy).argsort(1)[:, : self.pairs]
        at = random.permuted(at, axis=1)  # drawn so, the first has the likeliest place: whose it is would be told
        np.put_along_axis(ids, at, keys, 1)
        np.put_along_axis(targets, at, values, 1)
        return at_tokens(ids, targets, targets > 0)
