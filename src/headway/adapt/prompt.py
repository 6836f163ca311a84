"""Prompt tuning (2104.08691): `length` learned embeddings stand before those of the input; nothing else trains.

y = stack([P; E(x)]), of which the tokens' own outputs are given on. An encoder that a decoder reads gives all of them,
so that the prompt is read, too. The tokens' positions move up by `length`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.adapt._base import Adapter, own_class
from headway.adapt._before import begins, moved, widened
from headway.adapt.bottleneck import last_of
from headway.attend import FULL
from headway.block import Residual, Stack, States
from headway.mask import Mask


class Method(Adapter):
    """Stands at the stack that reads the input. length: of the prompt, in tokens; it starts uniform in [-0.5, 0.5]."""

    TARGETS: ClassVar = ("stack", "encoder")
    BY_ROW: ClassVar = False
    ALONE: ClassVar = True

    def __init__(
        self, module: Any, outputs: slice | None = None, *, length: Annotated[int, Meta(ge=1, le=2**16)] = 16
    ) -> None:
        super().__init__()
        self.length = length
        last = next(
            last for m in module.modules() if isinstance(m, Residual) and (last := last_of(m.inner)) is not None
        )
        width, device = last.out_features, last.weight.device
        self.prompt = nn.Parameter(torch.empty(length, width, device=device).uniform_(-0.5, 0.5))

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        return own_class(module) is Stack

    def around(
        self,
        call: Callable[..., Tensor],
        amount: float,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: States | None = None,
        context: Float[Tensor, "B S C"] | None = None,
        context_mask: Mask = FULL,
    ) -> Float[Tensor, "B N C"]:
        count, pos = self.length, moved(pos, self.length)
        more = {"state": state, "context": context, "context_mask": context_mask}
        if state is not None and not begins(state, "prompt"):
            return call(x, mask=mask, pos=pos, **more)
        x = torch.cat([self.prompt.to(x.dtype).expand(len(x), -1, -1), x], 1)
        pos = torch.cat([torch.arange(count, device=pos.device).expand(len(pos), -1), pos], 1)
        y = call(x, mask=widened(mask, count, "prompt"), pos=pos, **more)
        return y if self.place == "encoder" else y[:, count:]
