"""The moving average of the weights (Polyak, EMA): often better than any of the weights it is made of.

average <- d average + (1 - d) weights, with d = min(ema, (1 + t) / (10 + t)) at step t, so that the first weights,
which know nothing, are soon forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from headway.train.network import learned, relearn


class Average:
    """The average of all that a model learns; what is no float is the model's own. In fp32 at least."""

    def __init__(self, model: nn.Module, ema: float) -> None:
        self.ema = ema
        self.tensors: dict[str, Tensor] = {}
        self.restore(learned(model))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Begins with these."""
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes the weights in that a model has after a step, counted from 0."""
        weight = 1.0 - min(self.ema, (1.0 + step) / (10.0 + step))
        for name, tensor in learned(model).items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, weight)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """The model has the average for its weights for as long as the block lasts."""
        own = {name: tensor.detach().clone() for name, tensor in learned(model).items()}
        relearn(model, self.tensors)
        try:
            yield
        finally:
            relearn(model, own)
