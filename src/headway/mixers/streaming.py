"""Streaming: a causal window with sinks whose distance stops growing, for texts of any length (2309.17453).

y_t = softmax(q_t K_N^T / sqrt(D)) V_N, N the last `window` tokens and the first `sinks`, placed as they lie in that
memory: a sink is never farther than the memory is long, so positions stay within what the model was trained on. Under
rotary positions a query is turned twice, to where it stands among the near tokens and among the sinks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor

from headway.attend import Glance, attend, kept_bytes
from headway.kernels import Call
from headway.mask import Mask
from headway.mixers import Cost
from headway.mixers.attention import Attention
from headway.positions import Positions
from headway.spec import Epsilon, Size
from headway.state import Ring, State


class Streaming(Attention):
    """Exact attention over a memory of fixed size. window: tokens to the left; sinks: first tokens that are always
    seen; all else as in `attention`, which differs in leaving the sinks where they stand."""

    CAN: ClassVar = frozenset({"causal", "padding", "segments", "stream"})

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        heads: Size = 4,
        kv_heads: Size | None = None,
        head_dim: Size | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        window: Size = 1020,
        sinks: Annotated[int, Meta(ge=0)] = 4,
        qk_norm: bool = False,
        norm_eps: Epsilon | None = None,
        softcap: Annotated[float, Meta(gt=0)] | None = None,
        scale: Annotated[float, Meta(gt=0)] | None = None,
    ) -> None:
        if positions is not None and positions.biases:
            name = type(positions).__name__.lower()
            raise ValueError(f"streaming: {name} adds to scores by a distance that it would have to bound, too: choose "
                             "attention with a window")  # fmt: skip
        super().__init__(
            width, positions=positions, heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, out_bias=out_bias,
            window=(window, 0), sinks=sinks, qk_norm=qk_norm, norm_eps=norm_eps, softcap=softcap, scale=scale,
        )  # fmt: skip
        self.window, self.sinks = window, sinks

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
        k, v = self._keys_values(x)
        k, k_pos, within = self.positions.rotate(k, pos), pos, mask & self.local
        if state is not None:
            if not isinstance(state, Ring):
                raise ValueError(f"streaming streams with a Ring, not {type(state).__name__}: use init_state")
            if mask.segments is not None:
                raise ValueError("streaming cannot stream packed segments: stream one sequence a row")
            k, v, k_pos = state.append(k, v, pos, padded=mask.valid is not None)
            within = replace(within, valid=None)
        q, k = self._apart(self._queries(x), k, pos, k_pos)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        v = F.pad(v, (0, self.head_dim))  # CPU kernels that never hold the scores want values as wide as keys
        y = attend(q, k, v, within, q_pos=pos, k_pos=k_pos, aligned=state is None, softcap=self.softcap, scale=scale)
        return self.out(y[..., : self.head_dim].transpose(1, 2).flatten(2))

    def _apart(self, q: Tensor, k: Tensor, pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and rotated keys twice as wide: one half meets the near tokens, the other the sinks."""
        near, far = self.positions.rotate(q, pos), self.positions.rotate(q, pos.clamp(max=self.sinks + self.window))
        sink = ((k_pos >= 0) & (k_pos < self.sinks))[:, None, :, None]
        return torch.cat([near, far], -1), torch.cat([k.masked_fill(sink, 0), k.masked_fill(~sink, 0)], -1)

    def glance(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Glance:
        self.require(mask, context=context)
        k, v = self._keys_values(x)
        q, k = self._apart(self._queries(x), self.positions.rotate(k, pos), pos, pos)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return Glance(
            q=q, k=k, v=v, mask=mask & self.local, q_pos=pos, k_pos=pos, scale=scale, softcap=self.softcap
        )  # fmt: skip

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        plain = super().cost(length)
        call = Call(
            mask=self.local & Mask(causal=True), rows=1, heads=self.heads, kv_heads=self.kv_heads, queries=length,
            keys=length, head_dim=2 * self.head_dim, value_dim=2 * self.head_dim, dtype=torch.float32,
            device=self.out.weight.device.type, gradients=True, positions=True, softcap=self.softcap is not None,
        )  # fmt: skip
        inner, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        # held: x, queries, keys, values and output twice as wide, what leaves them, and which keys are sinks
        held = 4 * length * (self.width + 5 * inner + 4 * shared) + 2 * length
        norms = 0 if isinstance(self.query_norm, torch.nn.Identity) else 4 * length * (inner + shared)
        return Cost(
            flops=plain.flops + 4 * length * length * inner,
            state_bytes=plain.state_bytes,
            activation_bytes=held + norms + kept_bytes(call),
        )
