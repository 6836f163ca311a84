"""Batches, in an order that is a pure function of (seed, step): of nearly equal lengths, or packed without padding.

Grouping by length and counting tokens, not rows, follows Vaswani et al. 2017 (arXiv:1706.03762, section 5.1). A run
that stops at a step goes on exactly where it was: nothing has to be stored but the step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from headway.data.examples import Example

IGNORE = -100  # the label that cross entropy leaves out


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


@runtime_checkable
class Order(Protocol):
    """Batches by number, over all epochs."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def batch(self, step: int) -> Any:
        """The batch of this number, counted from 0."""

    def longest(self) -> Any:
        """A batch that holds the longest example, and little else."""


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


class Batches:
    """Cut examples into batches of at most `tokens` padded tokens: rows * (the largest size of each column, summed).

    `sizes` is `Int[N K]`, tokens of each example, by column (source, target). Examples are sorted by them; equal ones
    are shuffled anew every epoch, and so is the order of the batches. Where the sorted list is cut depends on sizes
    alone, so every epoch has `len(self)` batches. `collate` makes the batch, with a generator of its own.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        sizes: np.ndarray,
        *,
        tokens: int,
        seed: int,
        collate: Callable[[list[Example], np.random.Generator], Any],
    ) -> None:
        _check(examples, seed)
        self._examples, self._seed, self._collate = examples, seed, collate
        needs = sizes.sum(1)
        self._longest = int(needs.argmax())
        if needs.max() > tokens:
            worst = int(needs.argmax())
            raise ValueError(
                f"example {worst} needs {needs[worst]} tokens ({' and '.join(map(str, sizes[worst]))}, ends included) "
                f"but a batch holds batch_tokens={tokens}: raise it to {needs[worst]} or leave out long examples"
            )
        # targets go up, then down, then up with each next source length: a batch that spans two has no leap in it
        first, last = sizes[:, 0], sizes[:, -1]
        self._rank = np.where(first % 2, -last, last), first
        self._cuts = _cuts(sizes[np.lexsort(self._rank)], tokens)
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        return len(self._cuts) + 1

    def batch(self, step: int) -> Any:
        """The batch of this number, counted from 0 over all epochs."""
        epoch, index = _place(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._arrange(epoch))
        chosen = [self._examples[int(i)] for i in self._epoch[1][index]]
        return self._collate(chosen, np.random.default_rng([self._seed, step, 1]))

    def longest(self) -> Any:
        """The longest example by itself."""
        return self._collate([self._examples[self._longest]], np.random.default_rng([self._seed, 2]))

    def _arrange(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as indices into the examples."""
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._examples))
        order = order[np.lexsort([key[order] for key in self._rank])]  # stable: equal lengths stay shuffled
        chunks = np.split(order, self._cuts)
        return [chunks[i] for i in random.permutation(len(chunks))]


class Packed:
    """Rows of at most `length` tokens, each filled with whole examples, so that next to nothing is padding.

    Which examples share a row is fixed (best fit, the longest first); the rows are shuffled anew every epoch.
    `collate` is given rows of examples, and keeps them from seeing each other (`Mask.segments`).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        sizes: np.ndarray,
        *,
        tokens: int,
        length: int,
        seed: int,
        collate: Callable[[list[list[Example]], np.random.Generator], Any],
    ) -> None:
        _check(examples, seed)
        self._examples, self._seed, self._collate = examples, seed, collate
        if tokens < length:
            raise ValueError(f"a batch holds batch_tokens={tokens}, and a row max_tokens={length}: raise batch_tokens")
        self._rows = _fitted(sizes[:, 0], length)
        self._per_batch = max(1, tokens // length)
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return -(-len(self._rows) // self._per_batch)

    def batch(self, step: int) -> Any:
        """The batch of this number, counted from 0 over all epochs."""
        epoch, index = _place(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._rows)))
        chosen = self._epoch[1][index * self._per_batch : (index + 1) * self._per_batch]
        rows = [[self._examples[i] for i in self._rows[row]] for row in chosen]
        return self._collate(rows, np.random.default_rng([self._seed, step, 1]))

    def longest(self) -> Any:
        """The row that holds the longest example: rows are filled longest first."""
        row = [self._examples[i] for i in self._rows[0]]
        return self._collate([row], np.random.default_rng([self._seed, 2]))


def _check(examples: Sequence[Example], seed: int) -> None:
    if not len(examples):
        raise ValueError("cannot make batches of 0 examples")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative: use 0 or more")


def _place(step: int, batches: int) -> tuple[int, int]:
    if step < 0:
        raise ValueError(f"step={step} is negative: steps count from 0")
    return divmod(step, batches)


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
