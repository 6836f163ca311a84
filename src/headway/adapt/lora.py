"""LoRA (2106.09685): a linear learns a change of low rank, y = W x + b + s B A x, with s = alpha / rank.

rsLoRA (2312.03732) has s = alpha / sqrt(rank), so that high ranks learn as fast as low ones. DoRA (2402.09353) learns
the length m of each row apart from its direction: W' = m (W + s B A) / |W + s B A|, the length taken as a constant on
the way back (its section 4.3). B starts at zero, so that nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.adapt import _int8
from headway.adapt._base import Adapter, own_class
from headway.layers import Dropout

SPARE = 8  # products a token of other rows' adapters that cost less than gathering an adapter for each row


class Method(Adapter):
    """`down` is A, `up` is B. alpha: default 16. dropout: of what goes into A."""

    TARGETS: ClassVar = ("blocks.*.{mixer,cross}.{q,v}",)

    def __init__(
        self,
        module: nn.Module,
        outputs: slice | None = None,
        *,
        rank: Annotated[int, Meta(ge=1)] = 8,
        alpha: Annotated[float, Meta(gt=0)] = 16.0,
        dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0,
        rslora: bool = False,
        dora: bool = False,
    ) -> None:
        super().__init__()
        weight = _int8.weight_of(module)
        (whole, inputs), self.outputs = weight.shape, outputs
        own = whole if outputs is None else outputs.stop - outputs.start
        if rank > min(own, inputs):
            raise ValueError(f"lora: rank {rank} is larger than a layer of {inputs} inputs and {own} outputs; "
                             f"choose at most {min(own, inputs)}")  # fmt: skip
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = Dropout(dropout) if dropout else None
        self.down = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.up = nn.Parameter(torch.zeros(own, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as the paper's authors have it
        self.length: nn.Parameter | None = None
        if dora:
            rows = weight.detach().float()[outputs or slice(None)]
            self.length = nn.Parameter(rows.norm(dim=1))

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        return own_class(module) in (nn.Linear, _int8.RoundedLinear)

    def around(self, call: Callable[..., Tensor], amount: float, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        y = call(x)
        if not torch.is_floating_point(y):
            raise ValueError(f"lora: a linear gave {y.dtype}")
        h = F.linear(x if self.dropout is None else self.dropout(x), self.down.to(x.dtype))
        return _added(y, h, self._widened(y.shape[-1]), amount * self.scale)

    def delta(self, x: Float[Tensor, "*S K"], y: Float[Tensor, "*S N"]) -> Float[Tensor, "*S N"]:
        return self.scale * F.linear(F.linear(x, self.down.to(x.dtype)), self._widened(y.shape[-1]).to(x.dtype))

    def _widened(self, width: int) -> Float[Tensor, "N R"]:
        """B with zeros at the outputs that it does not change."""
        if self.outputs is None:
            return self.up
        return F.pad(self.up, (0, 0, self.outputs.start, width - self.outputs.stop))

    def merge(
        self, weight: Float[Tensor, "N K"], bias: Tensor | None, amount: float
    ) -> tuple[Float[Tensor, "N K"], Tensor | None]:
        change = self._widened(len(weight)) @ self.down
        return (weight.float() + amount * self.scale * change).to(weight.dtype), bias

    @classmethod
    def of_rows(
        cls,
        adapters: Sequence[Any],
        which: Int[Tensor, " B"],
        x: Float[Tensor, "B *T K"],
        y: Float[Tensor, "B *T N"],
    ) -> Float[Tensor, "B *T N"]:
        return super().of_rows(adapters, which, x, y)


def _added(
    y: Float[Tensor, "*S N"], h: Float[Tensor, "*S R"], up: Float[Tensor, "N R"], scale: float
) -> Float[Tensor, "*S N"]:
    """y + scale h up^T, into y, which is a linear's own answer that nobody else reads."""
    y.view(-1, y.shape[-1]).addmm_(h.flatten(0, -2).to(y.dtype), up.T.to(y.dtype), alpha=scale)
    return y
