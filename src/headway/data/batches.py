"""Batches of (nearly) equal lengths, counted in tokens, in an order that is a pure function of (seed, step).

Grouping by length and counting tokens, not rows, follows Vaswani et al. 2017 (arXiv:1706.03762, section 5.1). A run
that stops at a step goes on exactly where it was: nothing has to be stored but the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.text import BOS, EOS, PAD

IGNORE = -100  # the label that cross entropy leaves out
Example = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Batch:
    """`source_valid` is None when no source is padded; `tokens` counts the real ones of source and target, EOS too."""

    source: Int[Tensor, "B S"]
    source_valid: Bool[Tensor, "B S"] | None
    target_in: Int[Tensor, "B T"]
    target_out: Int[Tensor, "B T"]
    tokens: int


def collate(examples: Sequence[Example]) -> Batch:
    """Pad to the right: source + EOS, BOS + target (what the decoder reads), target + EOS (what it should say)."""
    if not examples:
        raise ValueError("cannot collate 0 examples")
    source, source_valid = _padded([[*source, EOS] for source, _ in examples], PAD)
    target_in, _ = _padded([[BOS, *target] for _, target in examples], PAD)
    target_out, target_valid = _padded([[*target, EOS] for _, target in examples], IGNORE)
    return Batch(
        source=torch.from_numpy(source),
        source_valid=None if source_valid.all() else torch.from_numpy(source_valid),
        target_in=torch.from_numpy(target_in),
        target_out=torch.from_numpy(target_out),
        tokens=int(source_valid.sum() + target_valid.sum()),
    )


def _padded(rows: list[list[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    valid = np.arange(lengths.max()) < lengths[:, None]
    table = np.full(valid.shape, fill, np.int64)
    table[valid] = np.fromiter(chain.from_iterable(rows), np.int64, lengths.sum())
    return table, valid


class Batches:
    """Cut examples into batches of at most `tokens` padded tokens, rows * (longest source + longest target).

    Examples are sorted by length; equal lengths are shuffled anew every epoch, and so is the order of the batches.
    Where the sorted list is cut depends on lengths alone, so every epoch has `len(self)` batches.
    """

    def __init__(self, examples: Sequence[Example], *, tokens: int, seed: int) -> None:
        if not examples:
            raise ValueError("cannot make batches of 0 examples")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative: use 0 or more")
        self._examples, self._seed = examples, seed
        # each side carries one more token, EOS or BOS
        self._lengths = np.array([(len(source) + 1, len(target) + 1) for source, target in examples])
        needs = self._lengths.sum(1)
        if needs.max() > tokens:
            worst = int(needs.argmax())
            source, target = self._lengths[worst]
            raise ValueError(
                f"example {worst} needs {needs[worst]} tokens (source {source} and target {target}, ends included) "
                f"but a batch holds batch_tokens={tokens}: raise it to {needs[worst]} or leave out long examples"
            )
        # targets go up, then down, then up with each next source length: a batch that spans two has no leap in it
        source, target = self._lengths.T
        self._rank = np.where(source % 2, -target, target), source
        self._cuts = _cuts(self._lengths[np.lexsort(self._rank)], tokens)
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._cuts) + 1

    def batch(self, step: int) -> Batch:
        """The batch of this step, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step={step} is negative: steps count from 0")
        epoch, index = divmod(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._arrange(epoch))
        return collate([self._examples[i] for i in self._epoch[1][index]])

    def _arrange(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as indices into the examples."""
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._examples))
        order = order[np.lexsort([key[order] for key in self._rank])]  # stable: equal lengths stay shuffled
        chunks = np.split(order, self._cuts)
        return [chunks[i] for i in random.permutation(len(chunks))]


def _cuts(lengths: np.ndarray, tokens: int) -> list[int]:
    """Where each next batch starts, filling every batch from sorted lengths (source, target) as far as it goes."""
    cuts: list[int] = []
    start = longest = 0
    for i, (source, target) in enumerate(lengths.tolist()):
        longest = max(longest, target)
        if (i + 1 - start) * (source + longest) > tokens:  # sorted: the last source is the longest
            cuts.append(i)
            start, longest = i, target
    return cuts
