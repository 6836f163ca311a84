"""Batches, in an order that is a pure function of (seed, step): of nearly equal lengths, or packed without padding.

Grouping by length and counting tokens, not rows, follows Vaswani et al. 2017 (arXiv:1706.03762, section 5.1). A run
that stops at a step goes on exactly where it was: nothing has to be stored but the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.data.examples import Example

IGNORE = -100  # the label that cross entropy leaves out
Collate = Callable[[Any, np.random.Generator], Any]  # a batch of examples (`Packed`: of rows of examples)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an objective reads. `tokens` counts the real tokens in it, `targets` what its loss is a sum over."""

    tokens: int
    targets: int

    def to(self, device: torch.device) -> Any:
        """The same on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def padded(rows: Sequence[Sequence[Any] | np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """`Int[B T]`, filled up on the right, and `Bool[B T]`, false where it was."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    valid = np.arange(lengths.max()) < lengths[:, None]
    table = np.full(valid.shape, fill, np.int64)
    table[valid] = np.concatenate(rows)
    return torch.from_numpy(table), torch.from_numpy(valid)


def asked(labels: Tensor, targets: int) -> Tensor:
    """Where labels are, `Int[N]`, as places in the flat tensor; how many is known, so that no GPU waits to be told."""
    return torch.nonzero_static(labels.flatten() != IGNORE, size=targets).squeeze(1)


class Order(ABC):
    """Batches by number, over all epochs: each epoch is arranged anew, as a pure function of seed and epoch.

    `count`: batches in an epoch. `longest`: what is collated to try the longest example, and little else. `collate`
    makes a batch of what `_arrange` gives for it, with a generator of its own.
    """

    def __init__(
        self, examples: Sequence[Example], count: int, longest: Sequence[int], seed: int, collate: Collate
    ) -> None:
        self._examples, self._count, self._longest, self._seed, self._collate = examples, count, longest, seed, collate
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._count

    def batch(self, step: int) -> Any:
        """The batch of this number, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step={step} is negative: steps count from 0")
        epoch, index = divmod(step, self._count)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._arrange(epoch))
        return self._made(self._epoch[1][index], step, 1)

    def longest(self) -> Any:
        """A batch that holds the longest example, and little else."""
        return self._made(self._longest, 2)

    def _made(self, chosen: Sequence[int] | np.ndarray, *number: int) -> Any:
        return self._collate([self._taken(int(i)) for i in chosen], np.random.default_rng([self._seed, *number]))

    def _taken(self, i: int) -> Any:
        """What a number of `_arrange` stands for."""
        return self._examples[i]

    @abstractmethod
    def _arrange(self, epoch: int) -> list[np.ndarray]:
        """The numbers in each batch of an epoch."""


def check(examples: Sequence[Example], seed: int) -> None:
    """What batches can be made of."""
    if not len(examples):
        raise ValueError("cannot make batches of 0 examples")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative: use 0 or more")


class Batches(Order):
    """Cut examples into batches of at most `tokens` padded tokens: rows * (the largest size of each column, summed).

    `sizes` is `Int[N K]`, tokens of each example, by column (source, target). Examples are sorted by them; equal ones
    are shuffled anew every epoch, and so is the order of the batches. Where the sorted list is cut depends on sizes
    alone, so every epoch has `len(self)` batches.
    """

    def __init__(
        self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, seed: int, collate: Collate
    ) -> None:
        check(examples, seed)
        needs = sizes.sum(1)
        worst = int(needs.argmax())
        if needs[worst] > tokens:
            raise ValueError(
                f"example {worst} needs {needs[worst]} tokens ({' and '.join(map(str, sizes[worst]))}, ends included) "
                f"but a batch holds batch_tokens={tokens}: raise it to {needs[worst]} or leave out long examples"
            )
        # targets go up, then down, then up with each next source length: a batch that spans two has no leap in it
        first, last = sizes[:, 0], sizes[:, -1]
        self._rank = np.where(first % 2, -last, last), first
        self._cuts = _cuts(sizes[np.lexsort(self._rank)], tokens)
        super().__init__(examples, len(self._cuts) + 1, [worst], seed, collate)

    def _arrange(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._examples))
        order = order[np.lexsort([key[order] for key in self._rank])]  # stable: equal lengths stay shuffled
        chunks = np.split(order, self._cuts)
        return [chunks[i] for i in random.permutation(len(chunks))]


class Packed(Order):
    """Rows of at most `length` tokens, each filled with whole examples, so that next to nothing is padding.

    Which examples share a row is fixed (best fit, the longest first); the rows are shuffled anew every epoch.
    `collate` is given rows of examples, and keeps them from seeing each other (`Mask.segments`).
    """

    def __init__(
        self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, length: int, seed: int, collate: Collate
    ) -> None:
        check(examples, seed)
        if tokens < length:
            raise ValueError(f"a batch holds batch_tokens={tokens}, and a row max_tokens={length}: raise batch_tokens")
        self._rows, self._per_batch = _fitted(sizes[:, 0], length), tokens // length
        # rows are filled longest first, so that the first one holds the longest example
        super().__init__(examples, -(-len(self._rows) // self._per_batch), [0], seed, collate)

    def _taken(self, i: int) -> list[Example]:
        return [self._examples[j] for j in self._rows[i]]

    def _arrange(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        return np.split(order, range(self._per_batch, len(order), self._per_batch))


def _cuts(sizes: np.ndarray, tokens: int) -> list[int]:
    """Where each next batch starts, filling every batch from sorted sizes as far as it goes."""
    cuts: list[int] = []
    start, largest = 0, [0] * sizes.shape[1]
    for i, size in enumerate(sizes.tolist()):
        largest = [max(pair) for pair in zip(largest, size, strict=True)]
        if (i + 1 - start) * sum(largest) > tokens:
            cuts.append(i)
            start, largest = i, size
    return cuts


def _fitted(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Examples by row: each goes where it leaves the least room, the longest first."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left, row; sorted
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        if size > length:
            raise ValueError(f"example {i} has {size} tokens, and a row takes max_tokens={length}: cut it, or raise it")
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > size:
            insort(rooms, (room - size, row))
    return rows
