"""LoRA (2106.09685): a linear learns a change of low rank, y = W x + b + s B A x, with s = alpha / rank.

rsLoRA (2312.03732) has s = alpha / sqrt(rank), so that high ranks learn as fast as low ones. DoRA (2402.09353) learns
the length m of each row apart from its direction: W' = m (W + s B A) / |W + s B A|, the length taken as a constant on
the way back (its section 4.3). B starts at zero, so that nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.adapt import _int8, _targets, bitfit
from headway.adapt._base import Adapter, own_class
from headway.adapt._frozen import is_frozen
from headway.adapt._low_rank import LowRank
from headway.layers import Dropout

SPARE = 8  # products a token of other rows' adapters that cost less than gathering an adapter for each row


class Method(Adapter):
    """`down` is A, `up` is B. alpha: default 16. dropout: of what goes into A. bias: whose biases train with it: of the
    linears that it changes ("targets"), or all of the network's."""

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
        bias: Literal["none", "targets", "all"] = "none",
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
        self.linear: tuple[Any] = (module,)  # in a tuple, it is nobody's child
        if dora:
            self.length = nn.Parameter(weight.detach().float()[self._rows].norm(dim=1))

    @property
    def _rows(self) -> slice:
        return self.outputs or slice(None)

    @classmethod
    def beside(cls, net: nn.Module, places: list[Any], options: dict[str, Any]) -> list[tuple[Any, Adapter]]:
        if options["bias"] == "none":
            return []
        if options["bias"] == "all":
            places = [place for place in _targets.places(net, bitfit.Method.fits) if place.part == _targets.WHOLE]
        found = [place for place in places if place.module.bias is not None]
        return [
            (place._replace(part=f"bias_{place.part}"), bitfit.Method(place.module, place.outputs)) for place in found
        ]

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        return own_class(module) in (nn.Linear, _int8.RoundedLinear)

    @classmethod
    def together(cls, acting: Sequence[tuple[Any, float]], call: Callable[..., Tensor], x: Tensor) -> Tensor:
        linear: Any = getattr(call, "__self__", None)
        if linear is None or not all(adapter._at_once(linear, x) for adapter, _ in acting):
            return super().together(acting, call, x)
        down = torch.cat([adapter.down for adapter, _ in acting])
        outputs = len(linear.weight)
        up = torch.cat([amount * adapter.scale * adapter._widened(outputs) for adapter, amount in acting], 1)
        y = LowRank.apply(x.flatten(0, -2), linear.weight, linear.bias, down, up)
        return y.view(*x.shape[:-1], y.shape[-1])

    def around(self, call: Callable[..., Tensor], amount: float, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        y = call(x)
        h = F.linear(x if self.dropout is None else self.dropout(x), self.down.to(x.dtype))
        if self.length is None:
            return _added(y, h, self._widened(y.shape[-1]), amount * self.scale)
        bias: Any = self.linear[0].bias
        rows, gain = self._rows, (self.length / self._lengths()).to(y.dtype)
        turned = y[..., rows] + self.scale * F.linear(h, self.up.to(h.dtype)).to(y.dtype)
        turned = turned * gain if bias is None else turned * gain + bias[rows].to(y.dtype) * (1 - gain)
        changed = y[..., rows] + amount * (turned - y[..., rows])
        return torch.cat(
            [y[..., : rows.start or 0], changed, y[..., y.shape[-1] if rows.stop is None else rows.stop :]], -1
        )

    def _at_once(self, linear: nn.Module, x: Tensor) -> bool:
        """Whether it changes a plain linear's own product, trained upon in one precision."""
        if linear is not self.linear[0] or own_class(linear) is not nn.Linear or self.length is not None:
            return False
        dropped = self.dropout is not None and self.training
        return not dropped and self.down.dtype == x.dtype and is_frozen(linear, x)  # type: ignore[arg-type]

    @torch.no_grad()
    def _lengths(self) -> Float[Tensor, " N"]:
        """|W + s B A| of each row, from |W|^2 + 2 s B (W A)^T + s^2 B (A A^T) B^T: no second weight is made."""
        weight = _int8.weight_of(self.linear[0])[self._rows].float()
        up, down = self.scale * self.up, self.down
        twice = 2 * (weight @ down.T * up).sum(1)
        return (weight.square().sum(1) + twice + (up @ (down @ down.T) * up).sum(1)).sqrt()

    def _widened(self, width: int) -> Float[Tensor, "N R"]:
        """B with zeros at the outputs that it does not change."""
        if self.outputs is None:
            return self.up
        return F.pad(self.up, (0, 0, self.outputs.start, width - self.outputs.stop))

    def merge(
        self, weight: Float[Tensor, "N K"], bias: Tensor | None, amount: float
    ) -> tuple[Float[Tensor, "N K"], Tensor | None]:
        merged = weight.clone().float()
        rows = merged[self._rows]
        changed = rows + self.scale * self.up @ self.down
        if self.length is not None:
            changed = changed * (self.length / self._lengths())[:, None]  # of the frozen weight, whatever acts beside
        rows += amount * (changed - rows)
        return merged.to(weight.dtype), bias

    @classmethod
    def of_rows(
        cls,
        adapters: Sequence[Any],
        which: Int[Tensor, " B"],
        call: Callable[..., Tensor],
        x: Float[Tensor, "B *T K"],
    ) -> Float[Tensor, "B *T N"]:
        """Few tokens a row: all adapters are one product, and each row keeps its own part of it. Else the rows' own
        adapters are gathered, and multiplied as a batch."""
        if any(adapter.length is not None for adapter in adapters):
            return super().of_rows(adapters, which, call, x)
        y, ranks = call(x), [len(adapter.down) for adapter in adapters]
        tokens = x.flatten(1, -2) if x.ndim > 2 else x[:, None]  # B T K
        downs = [adapter.down for adapter in adapters]
        ups = [adapter.scale * adapter._widened(y.shape[-1]) for adapter in adapters]
        if tokens.shape[1] * (len(adapters) - 1) <= SPARE:
            owner = torch.repeat_interleave(torch.tensor(ranks)).to(which.device)
            h = F.linear(tokens, torch.cat(downs).to(x.dtype)) * which[:, None, None].eq(owner).to(x.dtype)
            return _added(y, h, torch.cat(ups, 1), 1.0)
        most = max(ranks)
        down = torch.stack([F.pad(one, (0, 0, 0, most - len(one))) for one in downs])
        up = torch.stack([F.pad(one, (0, most - one.shape[1])) for one in ups])
        there = which.ge(0)[:, None, None].to(x.dtype)
        own = which.clamp(min=0)
        h = torch.bmm(tokens, down.to(x.dtype)[own].mT) * there
        y.view(len(y), -1, y.shape[-1]).baddbmm_(h.to(y.dtype), up.to(y.dtype)[own].mT)
        return y


def _added(
    y: Float[Tensor, "*S N"], h: Float[Tensor, "*S R"], up: Float[Tensor, "N R"], scale: float
) -> Float[Tensor, "*S N"]:
    """y + scale h up^T, into y, which is a linear's own answer that nobody else reads."""
    y.view(-1, y.shape[-1]).addmm_(h.flatten(0, -2).to(y.dtype), up.T.to(y.dtype), alpha=scale)
    return y
