"""Shifted local patterns: one of a few short patterns stands somewhere in noise of the same symbols: which one?

What decides is near itself and may stand anywhere: a kernel that slides over the row is the answer in one layer.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from headway.compare.tasks import Batch, Task, of_rows, require_length


class Motif(Task, frozen=True):
    """patterns: their number. size: symbols in a pattern. symbols: different ones there are. Patterns are fixed."""

    causal: ClassVar[bool] = False
    pooled: ClassVar[bool] = True

    patterns: Annotated[int, Meta(ge=2, le=64)] = 4
    size: Annotated[int, Meta(ge=2, le=64)] = 5
    symbols: Annotated[int, Meta(ge=2, le=256)] = 4

    @property
    def vocabulary(self) -> int:
        return self.symbols

    @property
    def answers(self) -> int:
        return self.patterns

    def shapes(self) -> np.ndarray:
        """The patterns, int of patterns x size, all different."""
        many = self.symbols**self.size
        if many < self.patterns:
            raise ValueError(f"motif: {self.size} of {self.symbols} symbols make {many} patterns, not {self.patterns}")
        drawn = np.random.default_rng(0).choice(many, self.patterns, replace=False)
        return drawn[:, None] // self.symbols ** np.arange(self.size) % self.symbols

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        require_length("motif", length, self.size, "the patterns")
        ids = random.integers(self.symbols, size=(rows, length))
        labels = random.integers(self.patterns, size=rows)
        at = random.integers(length - self.size + 1, size=(rows, 1)) + np.arange(self.size)
        np.put_along_axis(ids, at, self.shapes()[labels], 1)
        return of_rows(ids, labels)
