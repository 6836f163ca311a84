"""Counting over time: after each token, how many of a kind have come so far, modulo a few (parity: modulo 2).

It takes one number that each step changes, which is what a recurrence is; in one layer of attention there is none
(Hahn, 1906.06755, shows it of parity for hard attention).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from msgspec import Meta

from headway.compare.tasks import Batch, Task, at_tokens


class Counting(Task, frozen=True):
    """modulo: counts are told modulo so many."""

    modulo: Annotated[int, Meta(ge=2, le=64)] = 3

    @property
    def vocabulary(self) -> int:
        return 2

    @property
    def answers(self) -> int:
        return self.modulo

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        ids = random.integers(2, size=(rows, length))
        return at_tokens(ids, ids.cumsum(1) % self.modulo, np.ones_like(ids))
