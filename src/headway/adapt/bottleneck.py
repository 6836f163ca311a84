"""Bottleneck adapters: what a branch gives passes through a small network of two layers, and is added to itself.

y + s W_up f(W_down y), behind attention and feed-forward (Houlsby, 1902.00751) or the feed-forward alone (Pfeiffer,
2005.00247); or beside the feed-forward, y + s W_up f(W_down x) of what goes into it (parallel, 2110.04366). W_up starts
at zero, so that nothing is changed.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor, nn

from headway.adapt._base import Adapter
from headway.layers import FeedForward, activate
from headway.mixers import Mixer
from headway.spec import Activation


class Method(Adapter):
    """size: the width of the small network. scale: s (2110.04366 takes 4 for parallel ones)."""

    def __init__(
        self,
        module: Any,
        outputs: slice | None = None,
        *,
        kind: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby",
        size: Annotated[int, Meta(ge=1)] = 16,
        activation: Activation = "relu",
        scale: Annotated[float, Meta(gt=0)] = 1.0,
    ) -> None:
        super().__init__()
        self.parallel, self.activation, self.scale = kind == "parallel", activation, scale
        last = last_of(module)
        width, device = last.out_features, last.weight.device
        if size > width:
            raise ValueError(f"bottleneck: size {size} is more than the width {width} that it narrows: choose less")
        empty = lambda *shape: nn.Parameter(torch.zeros(shape, device=device))
        self.down, self.down_bias = empty(size, width), empty(size)
        self.up, self.up_bias = empty(width, size), empty(width)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @classmethod
    def targets(cls, options: dict[str, Any]) -> tuple[str, ...]:
        return ("blocks.*.{mixer,cross,feedforward}",) if options["kind"] == "houlsby" else ("blocks.*.feedforward",)

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        return isinstance(module, Mixer | FeedForward) and last_of(module) is not None

    def delta(self, x: Float[Tensor, "B T C"], y: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        h = x if self.parallel else y
        down, down_bias, up, up_bias = (p.to(h.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        return self.scale * F.linear(activate(F.linear(h, down, down_bias), self.activation), up, up_bias)


def last_of(module: Any) -> Any:
    """The linear that a branch ends with; None where it has none."""
    return module.leave if isinstance(module, FeedForward) else getattr(module, "out", None)
