"""Selective copying (Mamba, 2312.00752): tokens scattered among blanks, and then all of them again, in order.

Where they stand differs from row to row, so a convolution, which weighs by distance alone, cannot fetch them.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from headway.compare.tasks import Batch, require_length
from headway.compare.tasks.copying import Copying, rows_of


class SelectiveCopying(Copying, frozen=True):
    """Options are those of `copying`."""

    PUBLISHED: ClassVar = {"S4": "18.3%", "Hyena": "30.1%", "Mamba": "99.8%"}
    SETUP: ClassVar = "Mamba: 2 layers, 16 tokens to copy out of 4,096, vocabulary 16, 400,000 steps"

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        require_length("selective_copying", length, 2 * self.memorise, f"{self.memorise} tokens and their copies")
        symbols = random.integers(self.symbols, size=(rows, self.memorise))
        before = random.random((rows, length - self.memorise)).argsort(1)[:, : self.memorise]
        return rows_of(symbols, np.sort(before, 1), length)
