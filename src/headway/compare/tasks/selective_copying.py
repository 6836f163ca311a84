"""Selective copying (Mamba, 2312.00752): tokens scattered among blanks, and then all of them again, in order.

Where they stand differs from row to row, so a convolution, which weighs by distance alone, cannot fetch them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from headway.compare.tasks import Batch, Task, require_length
from headway.compare.tasks.copying import FIRST, rows_of


class SelectiveCopying(Task, frozen=True):
    """memorise: tokens to copy. symbols: different ones there are."""

    PUBLISHED: ClassVar = {"S4": "18.3%", "Hyena": "30.1%", "Mamba": "99.8%"}
    SETUP: ClassVar = "Mamba: 2 layers, 16 tokens to copy out of 4,096, vocabulary 16, 400,000 steps"

    memorise: Annotated[int, Meta(ge=1, le=4096)] = 8
    symbols: Annotated[int, Meta(ge=2, le=2**20)] = 8

    @property
    def vocabulary(self) -> int:
        return FIRST + self.symbols

    def chance(self, length: int) -> float:
        return 1 / self.symbols

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        require_length("selective_copying", length, 2 * self.memorise, f"{self.memorise} tokens and their copies")
        symbols = random.integers(self.symbols, size=(rows, self.memorise))
        before = random.random((rows, length - self.memorise)).argsort(1)[:, : self.memorise]
        return rows_of(symbols, np.sort(before, 1), length)
