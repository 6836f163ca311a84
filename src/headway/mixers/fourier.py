"""Fourier: the control that mixes everything and learns nothing; the real part of a 2-D Fourier transform (2105.03824).

y_{t,c} = sum over s, d of x_{s,d} cos(2 pi (t s / L + c d / C)) / sqrt(L C), over the L tokens and C channels of a row.
FNet leaves 1 / sqrt(L C) out, as its norms stand behind the sum; with it a residual keeps its size under any wiring.
The transform costs some 2.5 L C log2(L C) operations, which `cost` leaves out: they are no matrix products.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.mask import Mask
from headway.mixers import Cost, Implied, Mixer
from headway.positions import Positions
from headway.state import State


def reference(x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
    """The definition, in time and memory of L x L: cos(a + b) = cos a cos b - sin a sin b."""
    tokens, channels = (_angles(size, x) for size in x.shape[1:])
    return (tokens.cos() @ x @ channels.cos() - tokens.sin() @ x @ channels.sin()) / math.sqrt(x[0].numel())


def transform(x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
    """The same by fast transforms: of the channels half is computed, and the rest is its mirror image."""
    channels = x.shape[2]
    half = torch.fft.fft(torch.fft.rfft(x, norm="ortho"), dim=1, norm="ortho").real
    rest = half[..., 1 : channels - channels // 2].flip(1, 2).roll(1, 1)  # y_{t,c} = y_{-t,-c}
    return torch.cat([half, rest], -1)


class Fourier(Mixer):
    """A fixed transform without a parameter. Padded rows are transformed in groups of equal length."""

    CAN: ClassVar = frozenset({"bidirectional", "padding"})

    def __init__(self, width: int, *, positions: Positions | None = None) -> None:
        super().__init__()

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        if mask.causal:
            raise ValueError("fourier cannot be causal: each output sums over all tokens; use it in an encoder")
        self.require(mask, state, context)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # there is no transform of bf16
        y = transform(wide) if mask.valid is None else _padded(wide, mask.valid)
        return y.to(x.dtype)

    def implied(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
        rows: slice | None = None,
    ) -> Implied:
        """Two heads, whose sum it is: cosines of the tokens' angles, which weigh x cos, and sines, which weigh -x sin,
        of the channels'."""
        self.require(mask, context=context)
        valid = torch.ones_like(pos, dtype=torch.bool) if mask.valid is None else mask.valid
        places, lengths = valid.cumsum(1) - 1, valid.sum(1)[:, None, None]
        run = rows or slice(None)
        steps = places[:, run, None] * places[:, None] % lengths  # reduced first, so that large angles stay exact
        angles = steps.to(x.dtype) * (2 * math.pi / lengths)
        there = valid[:, run, None] & valid[:, None]
        found = torch.stack([angles.cos(), angles.sin()], 1) / lengths[:, None].sqrt()
        channels = _angles(x.shape[2], x)
        x = x.masked_fill(~valid[..., None], 0.0) * x.shape[2] ** -0.5
        values = torch.stack([x @ channels.cos(), -(x @ channels.sin())], 1)
        return Implied(found.masked_fill(~there[:, None], 0.0), values, lambda y: y.sum(1))

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        raise ValueError("fourier cannot stream: each output sums over all tokens; use it in an encoder")

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        return Cost(flops=0, state_bytes=0, activation_bytes=0)


def _padded(x: Tensor, valid: Tensor) -> Tensor:
    """Each row's tokens transformed over their own number, zeros at padding; asks the device for the lengths."""
    y = torch.zeros_like(x)
    lengths = valid.sum(1)
    for length in lengths.unique().tolist():
        if length:
            there = valid & (lengths == length)[:, None]
            y[there] = transform(x[there].unflatten(0, (-1, length))).flatten(0, 1)
    return y


def _angles(size: int, like: Tensor) -> Tensor:
    """2 pi i j / size; the product is reduced first, so that large angles stay exact."""
    index = torch.arange(size, device=like.device)
    return (index[:, None] * index % size).to(like.dtype) * (2 * math.pi / size)
