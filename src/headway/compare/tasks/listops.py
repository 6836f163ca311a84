"""ListOps (1804.06028), as in Long Range Arena (2011.04006): [MAX 2 9 [MIN 4 7 ] 0 ] is 9. What is the value?

A node is a digit with probability 3/4, and always at the greatest depth; else one of MIN, MAX, MED (the median, rounded
down) and SM (the sum modulo 10) over 2 to `arguments` nodes. Trees whose length falls outside a quarter of the row to
all of it are drawn again: at 2,000 tokens, the published 500 to 2,000.
"""

from __future__ import annotations

import random as plain
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from headway.compare.tasks import PAD, Batch, Task, of_rows, require_length

OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE, DIGIT = 1, 2  # ids: padding, the closing bracket, ten digits, four operators
OPERATOR = DIGIT + 10
DIGITS = 0.75  # the share of nodes that are a digit
TRIES = 1_000_000  # expressions that are drawn, until one has the wanted length
SAMPLED = 500  # rows that tell how common the commonest answer is


def value(operator: int, numbers: list[int]) -> int:
    """What an operator, by its place in OPERATORS, makes of digits."""
    match OPERATORS[operator]:
        case "MIN":
            return min(numbers)
        case "MAX":
            return max(numbers)
        case "SM":
            return sum(numbers) % 10
    ordered, middle = sorted(numbers), len(numbers) // 2
    return ordered[middle] if len(numbers) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


class Listops(Task, frozen=True):
    """depth: of the deepest node, the outermost having 1. arguments: the most of one operator. Both as published."""

    causal: ClassVar[bool] = False
    pooled: ClassVar[bool] = True
    PUBLISHED: ClassVar = {
        "attention": "36.4%",
        "attention, local": "15.8%",
        "linformer": "35.7%",
        "performer": "18.0%",
        "linear": "16.1%",
        "S4": "59.6%",
    }
    SETUP: ClassVar = (
        "Long Range Arena: 500 to 2,000 tokens, 96,000 rows; 6 layers of width 512, 5,000 steps of 32 rows"
    )

    depth: Annotated[int, Meta(ge=1, le=40)] = 10
    arguments: Annotated[int, Meta(ge=2, le=40)] = 10

    @property
    def vocabulary(self) -> int:
        return OPERATOR + len(OPERATORS)

    @property
    def answers(self) -> int:
        return 10

    def chance(self, length: int) -> float:
        """Of one who always gives the commonest answer."""
        return _commonest(self, length)

    def batch(self, random: np.random.Generator, rows: int, length: int) -> Batch:
        require_length("listops", length, 8, "one operator and its digits")
        draw = plain.Random(int(random.integers(2**62)))  # numpy's numbers cost ten times as much one by one
        ids, labels = np.full((rows, length), PAD, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        for row in range(rows):
            tokens, labels[row] = self.tree(draw, length // 4, length)
            ids[row, : len(tokens)] = tokens
        return of_rows(ids, labels, ids != PAD)

    def tree(self, draw: plain.Random, least: int, most: int) -> tuple[list[int], int]:
        """Ids of an expression of `least` to `most` tokens, and its value."""
        for _ in range(TRIES):
            tokens: list[int] = []
            found = self._grow(draw.random, tokens, most)
            if found is not None and len(tokens) >= least:
                return tokens, found
        raise ValueError(f"listops: no tree of depth {self.depth} and {self.arguments} arguments has {least} to {most} "
                         "tokens: raise them, or take shorter rows")  # fmt: skip

    def _grow(self, drawn: Callable[[], float], tokens: list[int], most: int) -> int | None:
        """Writes one expression into `tokens` and gives its value; None where it needs more than `most` tokens."""
        open_: list[tuple[int, int, list[int]]] = []  # operators, how many numbers each takes, and those it has
        while len(tokens) + len(open_) < most:
            if len(open_) + 1 >= self.depth or drawn() < DIGITS:
                number = int(10 * drawn())
                tokens.append(DIGIT + number)
            else:
                operator = int(len(OPERATORS) * drawn())
                tokens.append(OPERATOR + operator)
                open_.append((operator, 2 + int((self.arguments - 1) * drawn()), []))
                continue
            while open_:
                operator, many, numbers = open_[-1]
                numbers.append(number)
                if len(numbers) < many:
                    break
                tokens.append(CLOSE)
                number = value(operator, numbers)
                open_.pop()
            else:
                return number
        return None


@lru_cache
def _commonest(task: Listops, length: int) -> float:
    labels = task.batch(np.random.default_rng(0), SAMPLED, length).targets[:, 0]
    return float(labels.bincount().max()) / SAMPLED
