"""A frozen base in 8 bits to train adapters upon (2305.14314 does it in 4): y = x (s W_8)^T + b, weights alone rounded.

Each product turns the whole numbers back into floats, one layer at a time, on the way forward and again on the way
back, where dL/dx = dL/dy (s W_8) is exact. Memory is one byte a weight instead of four. Rounding: `headway.rounding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from headway.adapt._base import put
from headway.layers import residual_output
from headway.rounding import MIX, blockwise, hadamard, round_weight

TOKENS = ("embedding", "source", "target")  # what models call their tables of tokens


class _Product(torch.autograd.Function):
    """x W^T + b, where of W nothing but its whole numbers and scales is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, scales: Tensor, mixing: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rounded, scales, mixing)
        return F.linear(x, weight_from(rounded, scales, mixing, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0]
        rounded, scales, mixing = ctx.saved_tensors
        return gradient @ weight_from(rounded, scales, mixing, gradient.dtype), None, None, None, None


def weight_from(
    rounded: Int8[Tensor, "N K"], scales: Float[Tensor, " N"], mixing: Float[Tensor, "M M"], dtype: torch.dtype
) -> Float[Tensor, "N K"]:
    """The weight that whole numbers and scales stand for."""
    return blockwise(rounded.to(dtype).mul_(scales[:, None].to(dtype)), mixing.to(dtype))


class RoundedLinear(nn.Module):
    """A frozen linear of 8-bit weights that lets gradients through. Its numbers are buffers: nothing trains them."""

    weight: Tensor
    rounded: Tensor
    scales: Tensor
    mixing: Tensor

    def __init__(
        self,
        rounded: Int8[Tensor, "N K"],
        scales: Float[Tensor, " N"],
        bias: Tensor | None,
        mix: int,
        kind: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = rounded.shape
        self.register_buffer("rounded", rounded)
        self.register_buffer("scales", scales)
        self.register_buffer("mixing", hadamard(self.in_features, mix).to(rounded.device), persistent=False)
        # all that mixers ask of a weight: its dtype and device
        self.register_buffer("weight", torch.empty(0, dtype=kind, device=rounded.device), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = _Product.apply(x.flatten(0, -2), self.rounded, self.scales, self.mixing, bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


class RoundedEmbedding(nn.Module):
    """Looks rows up in a table of 8-bit weights."""

    weight: Tensor
    rounded: Tensor
    scales: Tensor
    mixing: Tensor

    def __init__(self, rounded: Int8[Tensor, "V C"], scales: Float[Tensor, " V"], mix: int, kind: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("rounded", rounded)
        self.register_buffer("scales", scales)
        self.register_buffer("mixing", hadamard(rounded.shape[1], mix).to(rounded.device), persistent=False)
        self.register_buffer("weight", torch.empty(0, dtype=kind, device=rounded.device), persistent=False)

    def forward(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S C"]:
        rows = self.rounded[ids].to(self.weight.dtype) * self.scales[ids][..., None].to(self.weight.dtype)
        with torch.autocast(rows.device.type, enabled=False):  # a table in floats is looked up in its own precision
            return blockwise(rows, self.mixing.to(rows.dtype))


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear or a table, rounded or not."""
    if isinstance(module, RoundedLinear | RoundedEmbedding):
        return weight_from(module.rounded, module.scales, module.mixing, module.weight.dtype)
    return module.weight  # type: ignore[return-value]


def round_base(net: nn.Module, mix: int = MIX, apart: Sequence[str] = ()) -> None:
    """Rounds the weights of linears and token embeddings of a network to 8 bits, in place; shared ones once.

    What lies in a module named in `apart` stays. Tables that models read as they are (of positions, types) stay, too.
    """
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def once(weight: Tensor) -> tuple[Tensor, Tensor]:
        if id(weight) not in done:
            rounded, scales = round_weight(weight.cpu(), mix)
            done[id(weight)] = rounded.to(weight.device), scales.to(weight.device)
        return done[id(weight)]

    made: dict[nn.Module, nn.Module] = {}
    for where, parent in list(net.named_modules()):
        for name, child in parent._modules.items():
            if child is None or any(f"{where}.{name}.".startswith(f"{one}.") for one in apart):
                continue
            if type(child) is nn.Linear and child not in made:
                made[child] = RoundedLinear(*once(child.weight), child.bias, mix, child.weight.dtype)
                if getattr(child, "is_residual_output", False):
                    residual_output(made[child])
            elif type(child) is nn.Embedding and name in TOKENS and child not in made:
                made[child] = RoundedEmbedding(*once(child.weight), mix, child.weight.dtype)
            if child in made:
                made[child].train(child.training)
                parent._modules[name] = made[child]


def move_adapters(old: nn.Module, new: nn.Module) -> None:
    """Has the adapters of a module stand at another that takes its place."""
    if "adapters" in old._modules:
        for name, parts in old.adapters.items():  # type: ignore[operator,union-attr]
            for part, adapter in parts.items():
                adapter.linear = (new,)
                put(new, old.adaptation, name, part, adapter, adapter.place)  # type: ignore[arg-type]
