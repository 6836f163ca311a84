"""BitFit (2106.10199): nothing but biases trains, y = f(x) + d with d beside the frozen bias of a linear or a norm.

d starts at zero. Kept apart from the bias, it can be switched off, mixed and given away as any other adapter.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.adapt import _int8
from headway.adapt._base import Adapter, own_class


class Method(Adapter):
    """Stands at whatever has a bias of its own; it has no options."""

    TARGETS: ClassVar = ("*",)

    def __init__(self, module: Any, outputs: slice | None = None) -> None:
        super().__init__()
        bias, self.outputs = module.bias, outputs
        self.shift = nn.Parameter(torch.zeros_like(bias[outputs or slice(None)], dtype=torch.float32))

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        kinds = (nn.Linear, _int8.RoundedLinear, nn.LayerNorm)
        return own_class(module) in kinds and module.bias is not None and not name.startswith("heads.")

    def delta(self, x: Float[Tensor, "*S K"], y: Float[Tensor, "*S N"]) -> Float[Tensor, "*S N"]:
        return self._widened(y.shape[-1]).to(y.dtype).expand_as(y)

    def merge(self, weight: Tensor, bias: Tensor | None, amount: float) -> tuple[Tensor, Tensor | None]:
        assert bias is not None
        return weight, (bias.float() + amount * self._widened(len(bias))).to(bias.dtype)

    def _widened(self, width: int) -> Float[Tensor, " N"]:
        if self.outputs is None:
            return self.shift
        return nn.functional.pad(self.shift, (self.outputs.start, width - self.outputs.stop))
