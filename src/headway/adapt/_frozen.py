"""Products with weights that do not learn, while others do: y = x W^T + b and dL/dx = dL/dy W; of x nothing is kept.

On a CPU oneDNN takes both in fp32: it has AVX-512 on every make, where MKL keeps to AVX2 on all but Intel's. Without
gradients nothing changes: what answers gives the very bits of the model as it was.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def product(x: Float[Tensor, "S K"], weight: Float[Tensor, "N K"], bias: Tensor | None = None) -> Float[Tensor, "S N"]:
    """x W^T + b, without a gradient."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available() or not x.numel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def is_frozen(linear: nn.Linear, x: Tensor) -> bool:
    """Whether a linear is one plain product with a constant, in one precision, of something that trains."""
    weight, bias = linear.weight, linear.bias
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    plain = type(weight) is nn.Parameter and x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)
    return torch.is_grad_enabled() and not learns and plain and not torch.compiler.is_compiling()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.T), None, None


def _forward(linear: nn.Linear, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
    if x.device.type != "cpu" or not x.requires_grad or not is_frozen(linear, x):
        return nn.Linear.forward(linear, x)
    y = _Product.apply(x.flatten(0, -2), linear.weight, linear.bias)
    return y.view(*x.shape[:-1], linear.out_features)  # type: ignore[no-any-return]


def speed_up(net: nn.Module) -> None:
    """Has the frozen linears of a network that no adapter changes take these products; they stay what they are."""
    for module in net.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
