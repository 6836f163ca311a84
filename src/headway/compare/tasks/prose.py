"""Prose: real text, byte by byte: what comes next; or with `hidden`, what stands where a share of them is hidden (BERT,
1810.04805: to 80% behind a mask, to 10% behind another byte, to 10% as it is).

The text is Python's own documentation, which every Python brings; one topic in eight is held out to be tested on.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from headway.compare.tasks import Batch, Task, at_tokens, require_length
from headway.data.builtin import documentation

MASK = 256
TESTED = 8  # a topic in so many is held out


class Prose(Task, frozen=True):
    """hidden: the share of bytes to find from those on both sides; 0 asks for the next byte, everywhere."""

    hidden: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    part: Literal["train", "test"] = "train"

    @property
    def vocabulary(self) -> int:
        return 257

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.hidden == 0

    def chance(self, length: int) -> float:
        """Of one who always says the commonest byte."""
        text = _text("test")
        return float(np.bincount(text).max() / len(text))

    def held_out(self) -> Task:
        return Prose(hidden=self.hidden, part="test")

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        text = _text(self.part)
        if length >= len(text):
            raise ValueError(f"prose: the documentation's {self.part} part has {len(text)} bytes, not {length}")
        require_length("prose", length, 2, "a byte and the next")
        at = random.integers(len(text) - length, size=(rows, 1)) + np.arange(length + 1)
        found = text[at]
        if self.hidden == 0:
            return at_tokens(found[:, :-1], found[:, 1:], np.ones((rows, length)))
        ids, targets = found[:, :-1].copy(), found[:, :-1]
        asked = random.random((rows, length)) < self.hidden
        asked[:, 0] |= ~asked.any(1)  # a row asks something
        fate = random.random((rows, length))
        ids[asked & (fate < 0.8)] = MASK
        other = asked & (fate >= 0.9)
        ids[other] = random.integers(256, size=int(other.sum()))
        return at_tokens(ids, targets, asked)


@lru_cache
def _text(part: str) -> np.ndarray:
    """The topics of a part, one behind the other."""
    chosen = []
    for (text,) in documentation.rows():
        tested = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % TESTED == 0
        if tested == (part == "test"):
            chosen.append(text)
    return np.frombuffer("\n\n".join(chosen).encode(), dtype=np.uint8).astype(np.int64)
