"""Summary: the whole context as one fixed vector, the same for every token that asks (1406.1078, 1409.3215).

y_t = W [c_first; c_last]: the two ends of the encoder's states, where a recurrent net has summed up all it read.
It is the bottleneck that attention was invented to remove (1409.0473), kept here so that the removal can be measured.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.layers import residual_output
from headway.mask import Mask
from headway.mixers import Cost, Mixer
from headway.positions import Positions
from headway.state import Cross, State


class Summary(Mixer):
    """One fixed context vector; only for the `cross` slot of a block."""

    CAN: ClassVar = frozenset({"cross", "padding", "stream"})

    def __init__(self, width: int, *, positions: Positions | None = None) -> None:
        super().__init__()
        self.width = width
        self.out = residual_output(nn.Linear(2 * width, width))

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        if context is None:
            raise ValueError("summary sums up a context and was given none: use it in a block's cross slot")
        self.require(mask, state, context)
        if not isinstance(state, Cross | None):
            raise ValueError(f"summary streams with a Cross state, not {type(state).__name__}: use init_state")
        return self._summary(context, mask.valid, state).expand(-1, x.shape[1], -1)

    def _summary(self, context: Tensor, valid: Tensor | None, state: Cross | None) -> Float[Tensor, "B 1 C"]:
        if state is not None and state.kept:
            return state.kept[0]
        vector = self.out(torch.cat(_ends(context, valid), -1))[:, None]
        if state is not None:
            state.kept = (vector,)
        return vector

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        return Cross()

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        return Cost(flops=4 * self.width**2, state_bytes=4 * self.width, activation_bytes=8 * self.width)


def _ends(context: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    if valid is None:
        return context[:, 0], context[:, -1]
    index = torch.arange(context.shape[1], device=context.device)
    first = torch.where(valid, index, context.shape[1] - 1).amin(1)
    last = torch.where(valid, index, 0).amax(1)
    rows = torch.arange(context.shape[0], device=context.device)
    return context[rows, first], context[rows, last]
