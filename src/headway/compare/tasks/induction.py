"""Induction (2209.11895; as set up in Mamba, 2312.00752): a special token once, and again at the end: what came
after it the first time?

One answer a row, so little to learn from; whoever has learned it can be asked at any length.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from headway.compare.tasks import Batch, Task, at_tokens, require_length

SPECIAL = 0


class Induction(Task, frozen=True):
    """symbols: different tokens there are, beside the special one."""

    PUBLISHED: ClassVar = {"attention with rotary positions": "83.6% at 512 and 31.3% at 1,024, trained at 256"}
    SETUP: ClassVar = "Mamba: 2 layers, vocabulary 16, trained at 256"

    symbols: Annotated[int, Meta(ge=2, le=2**20)] = 15

    @property
    def vocabulary(self) -> int:
        return 1 + self.symbols

    def chance(self, length: int) -> float:
        return 1 / self.symbols

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        require_length("induction", length, 3, "the special token, what follows it and the question")
        ids = 1 + random.integers(self.symbols, size=(rows, length))
        at, row = random.integers(length - 2, size=rows), np.arange(rows)
        ids[row, at] = ids[:, -1] = SPECIAL
        targets = np.zeros_like(ids)
        targets[:, -1] = ids[row, at + 1]
        return at_tokens(ids, targets, targets > 0)
