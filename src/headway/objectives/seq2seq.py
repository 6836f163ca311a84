"""Sequence to sequence: cross-entropy of each target token given the source and the targets before it.

-sum_t log p(y_t | y_<t, x), with label smoothing (1512.00567): a share of the probability spread over the vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from headway.data.batches import IGNORE, Batch
from headway.objectives import Loss


class Objective:
    """`smoothing`: the share of the target's probability that is spread over all tokens."""

    def __init__(self, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"objective.smoothing is a share from 0 to below 1, not {smoothing}")
        self.smoothing = smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        logits = model(batch.source, batch.target_in, batch.source_valid).float()  # B T V
        log_p = F.log_softmax(logits.flatten(0, 1), -1)
        labels = batch.target_out.flatten()
        plain = F.nll_loss(log_p, labels, ignore_index=IGNORE, reduction="sum")
        total = plain
        if self.smoothing:
            uniform = -log_p.mean(-1).masked_fill(labels == IGNORE, 0.0).sum()
            total = (1 - self.smoothing) * plain + self.smoothing * uniform
        return Loss(total, plain.detach(), int((labels != IGNORE).sum()))
