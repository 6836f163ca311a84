"""Linear attention: keys and values are summed up in one matrix a head, so that a token costs the same at any length.

y_t = S_t^T q_t, S_t = decay_t S_{t-1} + k_t v_t^T (see `headway.recurrence`, which holds the definitions, token by
token). plain: 2006.16236; retention: 2307.08621; gated: 2312.06635; delta: 2412.06464.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.attend import weights
from headway.layers import residual_output
from headway.mask import Mask
from headway.mixers import RUN, Cost, Implied, Mixer, in_runs, linear_map, of_run, without_padding
from headway.positions import Positions
from headway.recurrence import Steps, delta, flops, kept_bytes, recur, restart
from headway.spec import Size
from headway.state import Recurrent, State

RANK = 16  # of the map to the gates of GLA, and what divides their logs (2312.06635, section 4.4)
LEAST = 1e-6  # of a normaliser: a query that sees nothing gets zeros


class Linear(Mixer):
    """Linear attention of four kinds. heads; head_dim: default width / heads.

    plain: features elu + 1, divided by the sum of the weights. The only one without a decay, and so the only one that
      has a `bidirectional` form: all tokens are summed.
    retention: a fixed decay a head, 1 - 2^(-5-h); rotary positions turn queries and keys; group norm.
    gated: a decay a key channel, from the token (GLA).
    delta: unit keys; a token replaces a share beta of what S says of its key; a decay a head (gated DeltaNet, without
      its short convolution, which a hybrid stack can put in front).
    All but plain close with a norm a head and a gate: y = W_o (norm(y) silu(W_g x)).
    """

    CAN: ClassVar = frozenset({"causal", "bidirectional", "padding", "segments", "stream"})

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        kind: Literal["plain", "retention", "gated", "delta"] = "gated",
        heads: Size = 4,
        head_dim: Size | None = None,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"linear: width {width} is no multiple of {heads} heads; set head_dim or other heads")
        if bidirectional and kind != "plain":
            raise ValueError(f"linear: {kind} forgets with time and has no bidirectional form: use kind=plain")
        self.width, self.kind, self.heads, self.bidirectional = width, kind, heads, bidirectional
        self.head_dim = head_dim or width // heads
        self.positions = positions or Positions()
        inner = heads * self.head_dim
        self.enter = nn.Linear(width, inner * (3 if kind == "plain" else 4), bias=False)  # q, k, v, gate
        self.out = residual_output(nn.Linear(inner, width, bias=False))
        if kind == "retention":
            self.norm: nn.Module = nn.LayerNorm(self.head_dim, elementwise_affine=False)  # group norm, a group a head
            self.register_buffer("fixed", torch.log1p(-(2.0 ** -(5 + torch.arange(heads)))), persistent=False)
            self.fixed: Tensor
        elif kind != "plain":
            self.norm = nn.RMSNorm(self.head_dim)
        if kind == "gated":
            self.forget = nn.Sequential(nn.Linear(width, RANK, bias=False), nn.Linear(RANK, inner))
        if kind == "delta":
            self.rates, self.steps = nn.Linear(width, 2 * heads, bias=False), Steps(heads)

    @property
    def can(self) -> frozenset[str]:
        if self.kind != "plain":
            return self.CAN - {"bidirectional"}
        return self.CAN - {"segments"} - ({"causal", "stream"} if self.bidirectional else {"bidirectional"})

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
        y, after = in_runs(self._mixed, x, pos, mask, (_remembered(state, mask),))
        if isinstance(state, Recurrent):
            state.tensors = after
        return y

    def _mixed(
        self, x: Tensor, pos: Tensor, mask: Mask, before: Tensor | None
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B H K W"]]:
        x, q, k, v, gate = self._entered(x, mask)
        y, after = self._summed(q, k, v, x, mask, pos, before)
        return self._left(y, gate), after

    def _entered(self, x: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The tokens with padding zeroed, and their queries, keys, values (B H T D) and gates."""
        if mask.valid is not None:
            x = x.masked_fill(~mask.valid[..., None], 0.0)
        q, k, v, *gate = self.enter(x).chunk(3 if self.kind == "plain" else 4, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return x, q, k, F.silu(v) if self.kind == "delta" else v, gate[0] if gate else None

    def _summed(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Mask, pos: Tensor, before: Tensor | None
    ) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K W"]]:
        match self.kind:
            case "plain":
                return self._plain(q, k, v, mask, before)
            case "delta":
                return self._delta(q, k, v, x, mask, before)
        return self._decayed(q, k, v, x, mask, pos, before)

    def _left(self, y: Float[Tensor, "B H T V"], gate: Tensor | None) -> Float[Tensor, "B T C"]:
        y = y.transpose(1, 2)  # B T H V
        return self.out(y.flatten(2) if gate is None else self.norm(y).flatten(2) * F.silu(gate))

    def implied(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
        rows: slice | None = None,
    ) -> Implied:
        """The map from values to outputs that the sums amount to, beside the softmax where there are shares of one."""
        self.require(mask, context=context)

        def mix(v: Tensor, run: slice, kept: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            part, own = of_run(mask, run), x[:, run]
            own, q, k, *_ = self._entered(own, part)
            y, after = self._summed(q, k, v, own, part, pos[:, run], kept[0] if kept else None)
            return y, (after,)

        size = RUN if mask.causal and mask.segments is None else None
        found = linear_map(mix, x[:, None].expand(-1, self.heads, -1, -1), x.shape[1], rows, size=size)
        found = without_padding(found, mask, None, rows)
        exact: Callable[[], Tensor] | None = None
        if rows is not None and self.kind != "plain":
            return Implied(found)
        _, q, k, v, gate = self._entered(x, mask)
        if self.kind == "plain":
            own = rows or slice(None)
            shares = lambda: weights(q[:, :, own], k, mask, q_pos=pos[:, own], k_pos=pos)
            exact = lambda: without_padding(shares(), mask, None, rows)
        return Implied(found, exact=exact) if rows else Implied(found, v, lambda y: self._left(y, gate), exact)

    def _plain(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, before: Tensor | None
    ) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K W"]]:
        """A column of ones beside the values sums up the weights, in the outputs as in the state."""
        q, k, v = F.elu(q).add_(1), F.elu(k).add_(1), F.pad(v, (0, 1), value=1.0)
        if mask.valid is not None:
            k = k.masked_fill(~mask.valid[:, None, :, None], 0.0)
        if mask.causal:
            y, after = recur(q, k, v, state=before)
        else:
            after = k.mT @ v
            y = q @ after
        return y[..., :-1] / (y[..., -1:] + LEAST), after

    def _decayed(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Mask, pos: Tensor, before: Tensor | None
    ) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
        if self.kind == "gated":
            decay = F.logsigmoid(self.forget(x)).div_(RANK)
            decay = decay.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        else:
            q, k = self.positions.rotate(q, pos), self.positions.rotate(k, pos)
            decay = self.fixed[:, None].expand(len(x), -1, x.shape[1])
        return recur(q * self.head_dim**-0.5, k, v, decay=_masked(decay, mask), state=before)

    def _delta(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Mask, before: Tensor | None
    ) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
        beta, rate = self.rates(x).chunk(2, -1)
        _, decay = self.steps(rate)
        q, k = (F.normalize(F.silu(t), dim=-1) for t in (q, k))
        beta = beta.transpose(1, 2).sigmoid()
        return delta(q, k, v, beta, decay=_masked(decay, mask), state=before)

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        if self.bidirectional:
            raise ValueError("linear: a bidirectional sum needs tokens yet to come, so it cannot stream")
        like, values = self.out.weight, self.head_dim + (self.kind == "plain")
        size = (batch, self.heads, self.head_dim, values)
        return Recurrent(like.new_zeros(size, dtype=torch.promote_types(like.dtype, torch.float32)))

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        inner, values = self.heads * self.head_dim, self.head_dim + (self.kind == "plain")
        maps = self.width * inner * (4 if self.kind == "plain" else 5)
        maps += {"gated": RANK * (self.width + inner), "delta": self.width * 2 * self.heads}.get(self.kind, 0)
        call = {"plain": "none", "retention": "same", "gated": "channel", "delta": "delta"}[self.kind]
        if self.bidirectional:
            mixing, kept = 4 * length * inner * values, 4 * 4 * length * inner
        else:
            mixing = flops(length, self.heads, self.head_dim, values, call)
            kept = kept_bytes(length, self.heads, self.head_dim, values, call)
        inside = {"plain": 5 * inner, "retention": 8 * inner}.get(self.kind, 11 * inner + 16 * self.heads)
        return Cost(
            flops=2 * length * maps + mixing,
            state_bytes=0 if self.bidirectional else 4 * inner * values,
            activation_bytes=4 * length * (self.width + inside) + kept,
        )


def _masked(decay: Tensor, mask: Mask) -> Tensor:
    """Padding lets nothing fade, and a packed sequence starts from nothing."""
    if mask.valid is not None:
        there = mask.valid[:, None] if decay.ndim == 3 else mask.valid[:, None, :, None]
        decay = decay.masked_fill(~there, 0.0)
    return decay if mask.segments is None else restart(decay, mask.segments)


def _remembered(state: State | None, mask: Mask) -> Tensor | None:
    if state is None:
        return None
    if not isinstance(state, Recurrent):
        raise ValueError(f"linear streams with a Recurrent state, not {type(state).__name__}: use init_state")
    if mask.segments is not None:
        raise ValueError("linear cannot stream packed segments: stream one sequence a row")
    return state.tensors[0]
