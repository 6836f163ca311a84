"""A frozen linear and its change of low rank as one step: y = x W^T + b + s (x A^T) B^T.

PyTorch would add three arrays of the size of x on the way back, and one of the size of y on the way forward; here each
product is added into what there is: dL/dx = g W + s (g B) A, dL/dB = s g^T (x A^T), dL/dA = s (g B)^T x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRank(torch.autograd.Function):
    """`apply(x, weight, bias, down, up, scale, outputs)`: x `Float[S K]`; `outputs` are those that B changes. The
    weight is taken for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float,
                outputs: slice) -> Tensor:  # fmt: skip
        y, h = F.linear(x, weight, bias), F.linear(x, down)
        y[:, outputs].addmm_(h, up.T, alpha=scale)
        ctx.save_for_backward(x, h, weight, down, up)
        ctx.scale, ctx.outputs = scale, outputs
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, h, weight, down, up = ctx.saved_tensors
        own = gradient[:, ctx.outputs]
        inner = torch.mm(own, up).mul_(ctx.scale)
        for_x = torch.mm(gradient, weight).addmm_(inner, down) if ctx.needs_input_grad[0] else None
        for_up = torch.mm(own.T, h).mul_(ctx.scale)
        return for_x, None, None, torch.mm(inner.T, x), for_up, None, None
