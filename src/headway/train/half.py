"""Pure bf16 with a master copy of the weights in fp32 (1710.03740): what is computed is all bf16, what is kept is not.

The optimiser steps in fp32, and the copy is rounded from it anew after each step; gradients are added up in fp32.
Buffers (angles, statistics) are the model's own, in its own precision.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Half:
    """`net` is a copy of `model` to run forward and back; its gradients are handed over to the model by `collect`."""

    def __init__(self, model: nn.Module) -> None:
        buffers = dict(model.named_buffers())
        shared = {id(buffer): buffer for buffer in buffers.values()}
        self.net = copy.deepcopy(model, dict(shared))  # what the memo holds is not copied
        self.own: list[Tensor] = list(model.parameters())
        self.copies: list[Tensor] = list(self.net.parameters())
        for parameter in self.copies:
            parameter.data = parameter.data.to(torch.bfloat16)

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the model's weights into the copy."""
        torch._foreach_copy_(self.copies, self.own)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the copy's gradients to the model's, and forgets them."""
        for parameter, half in zip(self.own, self.copies, strict=True):
            if half.grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = half.grad.to(parameter.dtype)
            else:
                parameter.grad.add_(half.grad)
            half.grad = None
