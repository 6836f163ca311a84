"""Vectors of all ranks, with gradients: what each rank's loss asks of a vector is added up on the rank that made it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "N P"]) -> Float[Tensor, "M P"]:
        counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
        sizes = [int(count) for count in counts]
        even = x.new_zeros(max(sizes), x.shape[1])
        even[: len(x)] = x
        parts = [torch.empty_like(even) for _ in sizes]
        dist.all_gather(parts, even)
        ctx.first, ctx.count = sum(sizes[: dist.get_rank()]), len(x)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "M P"]) -> Float[Tensor, "N P"]:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.count]


def gathered(x: Float[Tensor, "N P"]) -> tuple[Float[Tensor, "M P"], int]:
    """The rows of all ranks in order of rank, and where this rank's begin; ranks may have differently many."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=x.device)
    counts[dist.get_rank()] = len(x)
    dist.all_reduce(counts)
    return _Gather.apply(x), int(counts[: dist.get_rank()].sum())  # type: ignore[no-any-return, no-untyped-call]


def alone() -> bool:
    """Whether no other rank is there."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
