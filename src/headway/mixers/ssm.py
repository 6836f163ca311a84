"""State space model, Mamba-2: a linear recurrence whose decay and step come from the token (2405.21060).

S_t = exp(step_t A) S_{t-1} + step_t B_t x_t^T, y_t = S_t^T C_t + D x_t, a head at a time; in front a short causal
convolution, behind a gated norm. `headway.recurrence` holds the definition token by token and its form in chunks.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.layers import Table, residual_output
from headway.mask import Mask
from headway.mixers import RUN, Cost, Implied, Mixer, in_runs, linear_map, of_run, without_padding
from headway.positions import Positions
from headway.recurrence import Steps, flops, kept_bytes, recur, restart
from headway.spec import Size
from headway.state import Recurrent, State


class Ssm(Mixer):
    """Mamba-2. Only causal: what it remembers fades with time, and time has one direction.

    expand: inner width over width. head_dim: channels that share a decay (default 64, or the largest power of two below
    it that divides the inner width). state_size: numbers remembered of each channel. groups: of heads, each with its
    own B and C. kernel: tokens that the convolution spans.
    """

    CAN: ClassVar = frozenset({"causal", "padding", "segments", "stream"})

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        expand: Size = 2,
        head_dim: Size | None = None,
        state_size: Size = 128,
        groups: Size = 1,
        kernel: Annotated[int, Meta(ge=1, le=64)] = 4,
    ) -> None:
        super().__init__()
        self.width, self.inner = width, expand * width
        self.head_dim = head_dim or math.gcd(64, self.inner)
        if self.inner % self.head_dim:
            raise ValueError(f"ssm: {self.inner} inner channels are no multiple of head_dim {self.head_dim}")
        self.heads, self.groups, self.state_size = self.inner // self.head_dim, groups, state_size
        if self.heads % groups:
            raise ValueError(f"ssm: {self.heads} heads of {self.head_dim} do not share {groups} groups evenly")
        self.kernel, self.mixed = kernel, self.inner + 2 * groups * state_size  # channels of the convolution
        self.enter = nn.Linear(width, self.inner + self.mixed + self.heads, bias=False)
        self.taps = Table(kernel, self.mixed)  # row c is the kernel of channel c
        self.steps = Steps(self.heads)
        self.skip = nn.Parameter(torch.ones(self.heads))  # D; the paper starts from a plain residual
        self.scale = nn.Parameter(torch.ones(self.inner))  # of the norm
        self.out = residual_output(nn.Linear(self.inner, width, bias=False))

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
        y, after = in_runs(self._mixed, x, pos, mask, _remembered(state, mask))
        if isinstance(state, Recurrent):
            state.tensors = after
        return y

    def _mixed(
        self, x: Tensor, pos: Tensor, mask: Mask, before: Tensor | None, tail: Tensor | None
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B H K V"], Float[Tensor, "B R M"]]:
        gate, q, k, v, step, tail = self._entered(x, mask, tail)
        y, after = self._scanned(q, k, v, step, mask, before)
        y = (self.skip[:, None] * v.transpose(1, 2)).add_(y.transpose(1, 2))
        return self._left(y, gate), after, tail

    def _entered(self, x: Tensor, mask: Mask, tail: Tensor | None) -> tuple[Tensor, ...]:
        """What gates, reads (B G T N), writes (B G T N) and is written (B H T V), the steps, and the stream's tail."""
        if mask.valid is not None:
            x = x.masked_fill(~mask.valid[..., None], 0.0)  # no bias: the convolution sees zeros too
        gate, mixed, step = self.enter(x).split([self.inner, self.mixed, self.heads], -1)
        mixed, tail = self._convolved(mixed, tail, mask.segments)
        v, k, q = F.silu(mixed).split([self.inner, *[self.groups * self.state_size] * 2], -1)
        return gate, self._spread(q), self._spread(k), v.unflatten(-1, (self.heads, -1)).transpose(1, 2), step, tail

    def _left(self, y: Float[Tensor, "B T H V"], gate: Tensor) -> Float[Tensor, "B T C"]:
        y = y.flatten(2) * F.silu(gate)
        y = F.rms_norm(y.unflatten(-1, (self.groups, -1)), (self.inner // self.groups,), eps=1e-5).flatten(2)
        return self.out(self.scale * y)

    def implied(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
        rows: slice | None = None,
    ) -> Implied:
        """The semiseparable matrix of each head, C_t^T exp(sum of decays) B_s step_s, and D on its diagonal."""
        self.require(mask, context=context)

        def mix(v: Tensor, run: slice, kept: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            part, (before, tail) = of_run(mask, run), kept or (None, None)
            _, q, k, _, step, tail = self._entered(x[:, run], part, tail)
            y, after = self._scanned(q, k, v, step, part, before)
            return y, (after, tail)

        size = RUN if mask.segments is None else None
        found = linear_map(mix, x[:, None].expand(-1, self.heads, -1, -1), x.shape[1], rows, size=size)
        index = torch.arange(x.shape[1], device=x.device)
        itself = index[rows or slice(None), None] == index
        found = without_padding(found + self.skip[:, None, None] * itself, mask, None, rows)
        if rows is not None:
            return Implied(found)
        gate, _, _, v, *_ = self._entered(x, mask, None)
        return Implied(found, v, lambda y: self._left(y.transpose(1, 2), gate))

    def _scanned(
        self, q: Tensor, k: Tensor, v: Tensor, step: Tensor, mask: Mask, before: Tensor | None
    ) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
        step, decay = self.steps(step)
        if mask.valid is not None:  # no step: nothing fades and nothing is added
            step, decay = (t.masked_fill(~mask.valid[:, None], 0.0) for t in (step, decay))
        if mask.segments is not None:
            decay = restart(decay, mask.segments)
        return recur(q, k, v * step[..., None].to(v.dtype), decay=decay, state=before)

    def _convolved(self, x: Tensor, tail: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each channel's sum over its last `kernel` tokens, and those that the next call of a stream needs."""
        length, reach = x.shape[1], self.kernel - 1
        x = F.pad(x, (0, 0, reach, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], 1)
        y: Any = None
        for i, tap in enumerate(self.taps.weight.T.contiguous()):  # in one piece each: many times faster
            seen = x[:, i : i + length]
            if segments is not None and i < reach:
                same = segments == F.pad(segments, (reach - i, 0))[:, :length]
                seen = seen.masked_fill(~same[..., None], 0.0)
            y = torch.addcmul(self.taps.bias, seen, tap) if y is None else y.addcmul_(seen, tap)
        return y, x[:, length:].clone()  # a view would hold the whole prompt

    def _spread(self, x: Tensor) -> Float[Tensor, "B G T N"]:
        """One B or C for all heads as it is; those of several groups, one a head."""
        x = x.unflatten(-1, (self.groups, -1)).transpose(1, 2)
        return x if self.groups == 1 else x.repeat_interleave(self.heads // self.groups, 1)

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        like = self.out.weight
        return Recurrent(
            like.new_zeros(
                (batch, self.heads, self.state_size, self.head_dim),
                dtype=torch.promote_types(like.dtype, torch.float32),
            ),
            like.new_zeros(batch, self.kernel - 1, self.mixed),
        )

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        maps = self.width * (2 * self.inner + self.mixed + self.heads)
        call, shared = (length, self.heads, self.state_size, self.head_dim, "head"), self.groups == 1
        inside = self.width + 4 * self.mixed + 6 * self.inner + 12 * self.heads
        return Cost(
            flops=2 * length * maps + flops(*call, shared=shared),
            state_bytes=4 * (self.inner * self.state_size + (self.kernel - 1) * self.mixed),
            activation_bytes=4 * length * inside + kept_bytes(*call, shared=shared),
        )


def _remembered(state: State | None, mask: Mask) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, Recurrent):
        raise ValueError(f"ssm streams with a Recurrent state, not {type(state).__name__}: use init_state")
    if mask.segments is not None:
        raise ValueError("ssm cannot stream packed segments: stream one sequence a row")
    return state.tensors[0], state.tensors[1]
