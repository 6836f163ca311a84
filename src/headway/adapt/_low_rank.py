"""A frozen linear and its change of low rank as one step: y = x W^T + b + (x A^T) B^T.

PyTorch would add three arrays of the size of x on the way back, and one of the size of y on the way forward; here each
product is added into what there is: dL/dx = g W + (g B) A, dL/dB = g^T (x A^T), dL/dA = (g B)^T x. Where there are many
tokens, W + B A is smaller than what would be added, and stands in for W, for as long as its product takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.adapt._frozen import product


class LowRank(torch.autograd.Function):
    """`apply(x, weight, bias, down, up)`: x `Float[S K]`, A `Float[R K]`, B `Float[N R]`. The weight is taken for a
    constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        if _many(x, weight):
            return product(x, torch.addmm(weight, up, down), bias)
        return product(x, weight, bias).addmm_(product(x, down), up.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, down, up = ctx.saved_tensors
        inner, for_x = product(gradient, up.T), None
        if ctx.needs_input_grad[0] and _many(x, weight):
            for_x = product(gradient, torch.addmm(weight, up, down).T)
        elif ctx.needs_input_grad[0]:
            for_x = product(gradient, weight.T).addmm_(inner, down)
        return for_x, None, None, product(inner.T, x.T), product(product(x, down).T, gradient.T).T


def _many(x: Tensor, weight: Tensor) -> bool:
    """Whether writing W + B A there and back is less than adding to y and dL/dx."""
    outputs, inputs = weight.shape
    return len(x) * (outputs + inputs) > 2 * outputs * inputs
