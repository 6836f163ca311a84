"""Batches of equally many examples at random, whatever their lengths, for losses that compare the rows of a batch.

Grouping by length would only ever set examples of one length against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headway.data.examples import Example


class Shuffled:
    """Batches that hold `tokens` even where all their examples are as long as the longest; anew every epoch.

    `sizes` is `Int[N K]`, tokens of each example, by column. Batches differ by one example at most.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        sizes: np.ndarray,
        *,
        tokens: int,
        seed: int,
        collate: Callable[[list[Example], np.random.Generator], Any],
    ) -> None:
        self._examples, self._seed, self._collate = examples, seed, collate
        longest = int(sizes.max(0).sum())
        if tokens < 2 * longest:
            raise ValueError(
                f"a batch compares 2 rows or more, of up to {longest} tokens each, and holds batch_tokens={tokens}: "
                f"raise it to {2 * longest}, or set a lower max_tokens"
            )
        self._longest = int(sizes.sum(1).argmax())
        self._count = -(-len(examples) // (tokens // longest))
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        return self._count

    def batch(self, step: int) -> Any:
        """The batch of this number, counted from 0 over all epochs."""
        epoch, index = divmod(step, self._count)
        if self._epoch[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
            self._epoch = (epoch, np.array_split(order, self._count))
        chosen = [self._examples[int(i)] for i in self._epoch[1][index]]
        return self._collate(chosen, np.random.default_rng([self._seed, step, 1]))

    def longest(self) -> Any:
        """The longest example beside another one."""
        pair = [self._examples[self._longest], self._examples[self._longest - 1]]
        return self._collate(pair, np.random.default_rng([self._seed, 2]))
