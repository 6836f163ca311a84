"""Batches of equally many examples at random, whatever their lengths, for losses that compare the rows of a batch.

Grouping by length would only ever set examples of one length against each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headway.data.batches import Collate, Order, check
from headway.data.examples import Example


class Shuffled(Order):
    """Batches that hold `tokens` even where all their examples are as long as the longest; anew every epoch.

    `sizes` is `Int[N K]`, tokens of each example, by column. Batches differ by one example at most.
    """

    def __init__(
        self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, seed: int, collate: Collate
    ) -> None:
        check(examples, seed)
        longest = int(sizes.max(0).sum())
        if tokens < 2 * longest:
            raise ValueError(
                f"a batch compares 2 rows or more, of up to {longest} tokens each, and holds batch_tokens={tokens}: "
                f"raise it to {2 * longest}, or set a lower max_tokens"
            )
        most = int(sizes.sum(1).argmax())
        # beside another one, as rows are compared
        super().__init__(examples, -(-len(examples) // (tokens // longest)), [most, most - 1], seed, collate)

    def _arrange(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._examples))
        return np.array_split(order, self._count)
