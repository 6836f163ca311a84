"""Identity: the control that mixes nothing; y_t = W x_t, the output map that every mixer has, and no more.

What a model with it reaches is owed to everything but mixing (the "feed-forward only" rows of 2105.03824 and
2111.11418). A token sees itself alone, so every mask holds by itself.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.layers import residual_output
from headway.mask import Mask
from headway.mixers import Cost, Implied, Mixer, without_padding
from headway.positions import Positions
from headway.state import Recurrent, State


class Identity(Mixer):
    """No mixing at all."""

    CAN: ClassVar = frozenset(
        {"causal", "bidirectional", "padding", "segments", "window", "sinks", "prefix", "globals", "stream"}
    )

    def __init__(self, width: int, *, positions: Positions | None = None) -> None:
        super().__init__()
        self.width = width
        self.out = residual_output(nn.Linear(width, width))

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        self.require(mask, state, context)
        if not isinstance(state, Recurrent | None):
            raise ValueError(f"identity streams with a Recurrent state, not {type(state).__name__}: use init_state")
        return self.out(x)

    def implied(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
        rows: slice | None = None,
    ) -> Implied:
        """Ones where a token meets itself."""
        self.require(mask, context=context)
        index = torch.arange(x.shape[1], device=x.device)
        found = (index[rows or slice(None), None] == index).to(x.dtype).expand(len(x), 1, -1, -1)
        return Implied(without_padding(found, mask, context, rows), x[:, None], lambda y: self.out(y[:, 0]))

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        return Recurrent()

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        return Cost(flops=2 * length * self.width**2, state_bytes=0, activation_bytes=4 * length * self.width)
