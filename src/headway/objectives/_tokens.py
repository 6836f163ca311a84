"""Rows of tokens as a batch, for objectives that label tokens; packed rows keep their examples apart by segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.data.batches import IGNORE, Batch, padded
from headway.data.examples import Example
from headway.mask import Mask


@dataclass(frozen=True, kw_only=True)
class Tokens(Batch):
    """`labels` are IGNORE where nothing is predicted; `valid` is None where no row is padded; `segments` and `pos`
    (each example counts from 0) are None where every row is one example."""

    ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    segments: Int[Tensor, "B T"] | None = None
    pos: Int[Tensor, "B T"] | None = None

    @property
    def mask(self) -> Mask | None:
        """What keeps packed examples apart."""
        return None if self.segments is None else Mask(segments=self.segments)


def rows_of(rows: Sequence[Sequence[Example]], pad: int) -> Tokens:
    """Each row's examples (ids, labels) one after the other, filled up on the right."""
    flat = [[np.asarray(ids) for ids, _ in row] for row in rows]
    ids, valid = padded([np.concatenate(row) for row in flat], pad)
    labels, _ = padded([np.concatenate([labels for _, labels in row]) for row in rows], IGNORE)
    segments = pos = None
    if any(len(row) > 1 for row in rows):
        segments, _ = padded([np.repeat(np.arange(len(row)), [len(x) for x in row]) for row in flat], -1)
        pos, _ = padded([np.concatenate([np.arange(len(x)) for x in row]) for row in flat], -1)
    targets = int((labels != IGNORE).sum())
    whole = bool(valid.all())
    return Tokens(
        ids=ids,
        labels=labels,
        valid=None if whole else valid,
        segments=segments,
        pos=pos,
        tokens=int(valid.sum()),
        targets=targets,
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum log p(label), over the labels there are; `logits` are `Float[B T V]`, `labels` `Int[B T]`."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
