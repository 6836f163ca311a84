"""Average: the control that mixes without choosing; attention whose weights are all the same, then the output map.

y_t = W (the mean of the tokens that t may see): a running mean under a causal mask (average attention, 1805.00631),
else the mean of all (pooling, as in 2111.11418, over the whole row).
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


def reference(x: Float[Tensor, "B T C"], mask: Mask, pos: Int[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
    """The definition, under any mask, in time and memory of T x T. A token that sees nothing gets zeros."""
    allowed = mask.allows(pos, pos).expand(x.shape[0], x.shape[1], -1)
    x = x.masked_fill(~allowed.any(1)[..., None], 0.0)
    return (allowed.to(x.dtype) @ x) / allowed.sum(-1, keepdim=True).clamp(min=1)


class Average(Mixer):
    """The mean of what a token may see. Packed segments take the definition, whose cost grows with the square."""

    CAN: ClassVar = frozenset({"causal", "bidirectional", "padding", "segments", "stream"})

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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a long sum in few bits loses its last terms
        return self.out(self._mean(wide, mask, pos, state).to(x.dtype))

    def _mean(self, x: Tensor, mask: Mask, pos: Tensor, state: State | None) -> Float[Tensor, "B T C"]:
        if state is not None:
            _require_streamable(mask, state)
        if mask.segments is not None:
            return reference(x, mask, pos)
        x = _cleared(x, mask)
        if not mask.causal:
            count = x.shape[1] if mask.valid is None else mask.valid.sum(1).clamp(min=1)[:, None, None]
            return (x.sum(1, keepdim=True) / count).expand(-1, x.shape[1], -1)
        total = x.cumsum(1)
        if isinstance(state, Recurrent):
            total = total + state.tensors[0][:, None]
            state.tensors = (total[:, -1],)
        return total / (pos + 1).clamp(min=1)[..., None]

    def implied(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
        rows: slice | None = None,
    ) -> Implied:
        """Equal shares for all that a token may see."""
        self.require(mask, context=context)
        run = rows or slice(None)
        own = pos[:, run]
        allowed = mask.queries(run).allows(own, pos).expand(*own.shape, -1)
        found = (allowed / allowed.sum(-1, keepdim=True).clamp(min=1)).to(x.dtype)[:, None]
        return Implied(
            without_padding(found, mask, None, rows), _cleared(x, mask)[:, None], lambda y: self.out(y[:, 0])
        )

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        like = self.out.weight
        return Recurrent(like.new_zeros(batch, self.width, dtype=torch.promote_types(like.dtype, torch.float32)))

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        mean = 4 * length * self.width
        return Cost(flops=2 * length * self.width**2, state_bytes=4 * self.width, activation_bytes=mean)


def _cleared(x: Tensor, mask: Mask) -> Tensor:
    return x if mask.valid is None else x.masked_fill(~mask.valid[..., None], 0.0)


def _require_streamable(mask: Mask, state: State) -> None:
    if not isinstance(state, Recurrent):
        raise ValueError(f"average streams with a Recurrent state, not {type(state).__name__}: use init_state")
    if mask.segments is not None:
        raise ValueError("average cannot stream packed segments: stream one sequence a row")
    if not mask.causal:
        raise ValueError("average streams only under a causal mask: the mean of all needs tokens yet to come")
