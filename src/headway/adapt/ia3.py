"""(IA)^3 (2205.05638): keys, values and what goes into a feed-forward's last linear are multiplied by learned vectors.

y = l * (W x + b), and W (l * x) + b where the linear ends a residual branch (in the paper: the feed-forward's). l
starts at one, so that nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.adapt import _int8
from headway.adapt._base import Adapter, own_class


class Method(Adapter):
    """One vector a linear, or a part of its outputs; it has no options."""

    TARGETS: ClassVar = ("blocks.*.{mixer,cross}.{k,v}", "blocks.*.feedforward.leave")

    def __init__(self, module: Any, outputs: slice | None = None) -> None:
        super().__init__()
        self.inputs, self.outputs = getattr(module, "is_residual_output", False), outputs
        whole = module.in_features if self.inputs else module.out_features
        size = whole if outputs is None else outputs.stop - outputs.start
        self.margin: tuple[int, int] = (0, 0) if outputs is None else (outputs.start, whole - outputs.stop)
        self.scale = nn.Parameter(torch.ones(size, device=module.weight.device))

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        return own_class(module) in (nn.Linear, _int8.RoundedLinear)

    def around(self, call: Callable[..., Tensor], amount: float, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        scale = self._whole(amount).to(x.dtype)
        return call(x * scale) if self.inputs else call(x) * scale

    @classmethod
    def of_rows(
        cls,
        adapters: Sequence[Any],
        which: Int[Tensor, " B"],
        call: Callable[..., Tensor],
        x: Float[Tensor, "B *T K"],
    ) -> Float[Tensor, "B *T N"]:
        """Each row's vector is gathered; where it has none, the last, of ones."""
        vectors = [adapter._whole(1.0) for adapter in adapters]
        own = torch.stack([*vectors, torch.ones_like(vectors[0])])[which].to(x.dtype)
        own = own.view(len(own), *[1] * (x.ndim - 2), -1)
        return call(x * own) if adapters[0].inputs else call(x) * own

    def merge(
        self, weight: Float[Tensor, "N K"], bias: Tensor | None, amount: float
    ) -> tuple[Float[Tensor, "N K"], Tensor | None]:
        scale = self._whole(amount).to(weight.dtype)
        if self.inputs:
            return weight * scale, bias
        return weight * scale[:, None], None if bias is None else bias * scale

    def _whole(self, amount: float) -> Float[Tensor, " N"]:
        """The vector for all of the linear's numbers; between one and l where it acts in part."""
        scale = self.scale if amount == 1 else 1 + amount * (self.scale - 1)
        return scale if self.outputs is None else F.pad(scale, self.margin, value=1.0)
