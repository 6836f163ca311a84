"""-sum log p(label) of many logits over a large vocabulary, with little beside the logits: L = sum_i (log Z_i - x_iy).

PyTorch's cross-entropy keeps log p of every token for the way back, and makes a second array of that size to go there;
here log Z of each row is kept, and dL/dx = p - 1[y] is made from it, a few rows at a time, so that they stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from headway.data.batches import IGNORE

AT_ONCE = 2**18  # logits that go through together


def nats(logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """The sum over all labels that are not IGNORE, in float32."""
    if logits.device.type != "cpu" or not (logits.requires_grad and torch.is_grad_enabled()):
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    return _Nats.apply(logits, labels)  # type: ignore[no-any-return]


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        asked = labels != IGNORE
        at = labels.where(asked, 0)[:, None]
        logsum = torch.empty(len(logits), device=logits.device)
        for rows in _parts(logits):
            logsum[rows] = logits[rows].float().logsumexp(1)
        ctx.save_for_backward(logits, at, asked, logsum)
        return (logsum - logits.gather(1, at)[:, 0].float()).where(asked, 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, at, asked, logsum = ctx.saved_tensors
        weight = gradient * asked[:, None]
        found = torch.empty_like(logits)
        for rows in _parts(logits):
            part = logits[rows].float() - logsum[rows, None]  # a new array: of the rows, of the cache's size
            found[rows] = part.exp_().mul_(weight[rows])
        return found.scatter_add_(1, at, -weight.to(found.dtype)), None


def _parts(logits: Tensor) -> Iterator[slice]:
    count = max(1, AT_ONCE // logits.shape[1])
    return (slice(start, start + count) for start in range(0, len(logits), count))
