"""Copying (1511.06464): some tokens, a long wait, and then all of them again, in order.

Nothing tells which token comes next but its place, so a memory must hold all of them, and attention must count.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from msgspec import Meta

from headway.compare.tasks import Batch, Task, at_tokens, require_length

BLANK, ASK, FIRST = 0, 1, 2


def rows_of(symbols: np.ndarray, places: np.ndarray, length: int) -> Batch:
    """Rows with `symbols` at `places`, asked for one after the other at the end."""
    rows, many = symbols.shape
    ids, targets = np.zeros((2, rows, length), dtype=np.int64)
    np.put_along_axis(ids, places, FIRST + symbols, 1)
    ids[:, length - many :] = ASK
    targets[:, length - many :] = FIRST + symbols
    return at_tokens(ids, targets, targets > 0)


class Copying(Task, frozen=True):
    """memorise: tokens to copy. symbols: different ones there are."""

    memorise: Annotated[int, Meta(ge=1, le=4096)] = 8
    symbols: Annotated[int, Meta(ge=2, le=2**20)] = 8

    @property
    def vocabulary(self) -> int:
        return FIRST + self.symbols

    def chance(self, length: int) -> float:
        return 1 / self.symbols

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        require_length("copying", length, 2 * self.memorise, f"{self.memorise} tokens and their copies")
        symbols = random.integers(self.symbols, size=(rows, self.memorise))
        return rows_of(symbols, np.broadcast_to(np.arange(self.memorise), symbols.shape), length)
