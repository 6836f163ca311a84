"""Attention: projections around `attend`; self and cross; multi-head, grouped and multi-query.

y = W_o attend(W_q x, W_k c, W_v c), c = x or the context. arXiv 1706.03762; grouped heads 2305.13245, one key/value
head 1911.02150; norms of queries and keys 2010.04245, capped scores 2408.00118. A window is a mask over exact
attention, so it is an option here and no mixer of its own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.attend import FULL, Glance, attend, kept_bytes
from headway.kernels import Call
from headway.layers import residual_output
from headway.mask import Mask
from headway.mixers import Cost, Mixer
from headway.positions import Positions
from headway.spec import Epsilon, Size
from headway.state import Cross, KeyValue, Prefixed, Ring, State


class Attention(Mixer):
    """Exact attention.

    heads: query heads. kv_heads: key/value heads shared by groups of queries (default: as many).
    head_dim: default width / heads. bias: on the projections; out_bias: on the last one, where it differs.
    window: (left, right), tokens seen to either side.
    sinks: first tokens that stay visible to a window. qk_norm: each head's queries and keys are normalised (RMS), with
    norm_eps added to the mean square. softcap: bound of the scores. scale: of the scores (default: head_dim^-0.5).
    """

    CAN: ClassVar = frozenset(
        {"causal", "bidirectional", "cross", "padding", "segments", "window", "sinks", "prefix", "globals", "stream"}
    )

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        heads: Size,
        kv_heads: Size | None = None,
        head_dim: Size | None = None,
        bias: bool = False,
        window: tuple[int | None, int | None] | None = None,
        sinks: Annotated[int, Meta(ge=0)] = 0,
        qk_norm: bool = False,
        norm_eps: Epsilon | None = None,
        softcap: Annotated[float, Meta(gt=0)] | None = None,
        scale: Annotated[float, Meta(gt=0)] | None = None,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if head_dim is None and width % heads:
            raise ValueError(f"attention: width {width} is no multiple of {heads} heads; set head_dim or other heads")
        if heads % kv_heads:
            raise ValueError(f"attention: {heads} heads do not share {kv_heads} kv_heads evenly")
        self.width, self.heads, self.kv_heads = width, heads, kv_heads
        self.head_dim = head_dim or width // heads
        self.positions = positions or Positions()
        self.local = Mask(window=window, sinks=sinks)
        self.softcap, self.scale = softcap, scale
        self.query = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.key_value = nn.Linear(width, 2 * kv_heads * self.head_dim, bias=bias)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(self.head_dim, norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.out = residual_output(nn.Linear(heads * self.head_dim, width, bias=bias if out_bias is None else out_bias))

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        prefix, state = (state, state.state) if isinstance(state, Prefixed) else (None, state)
        self.require(mask, state, context)
        q = self._queries(x)
        if context is None:
            y = self._own(q, x, mask & self.local, pos, state, prefix)
        else:
            k, v = self._keys_values(context) if state is None else self._remembered(state, context)
            k, v = (k, v) if prefix is None else prefix.before(k, v)
            y = attend(q, k, v, mask, softcap=self.softcap, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))

    def glance(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Glance:
        """What `forward` does with the same input, taken apart: rows of its map, as many as are wanted."""
        q = self._queries(x)
        k, v = self._keys_values(x if context is None else context)
        how: dict[str, Any] = {"scale": self.head_dim**-0.5 if self.scale is None else self.scale,
                               "softcap": self.softcap}  # fmt: skip
        if context is not None:
            q_pos, k_pos = (torch.arange(t.shape[2], device=t.device).expand(len(t), -1) for t in (q, k))
            return Glance(q=q, k=k, v=v, mask=mask, q_pos=q_pos, k_pos=k_pos, **how)
        q, k = self.positions.rotate(q, pos), self.positions.rotate(k, pos)
        bias = partial(self.positions.bias, self.heads)
        return Glance(q=q, k=k, v=v, mask=mask & self.local, q_pos=pos, k_pos=pos, bias=bias, **how)

    def map(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B H T S"]:
        """The weights that `forward` uses for the same input, by the reference; rows sum to one."""
        return self.glance(x, mask=mask, pos=pos, context=context).rows(slice(None))

    def _own(
        self, q: Tensor, x: Tensor, mask: Mask, pos: Tensor, state: State | None, prefix: Prefixed | None
    ) -> Tensor:
        k, v = self._keys_values(x)
        q, k = self.positions.rotate(q, pos), self.positions.rotate(k, pos)
        if prefix is not None:  # of a stream, its state holds what stands before
            k_pos, (k, v) = prefix.positions(pos), prefix.before(k, v)
            bias = self.positions.bias(self.heads, pos, k_pos)
            how: dict[str, Any] = {"bias": bias, "softcap": self.softcap, "scale": self.scale}
            if mask.facts <= {"bidirectional", "padding"}:  # no positions are compared
                return attend(q, k, v, mask, **how)
            return attend(q, k, v, mask, q_pos=pos, k_pos=k_pos, **how)
        if state is None:
            bias = self.positions.bias(self.heads, pos, pos)
            if mask.facts <= {"causal", "bidirectional", "window"}:  # indices say the same: the kernel stays free
                return attend(q, k, v, mask, bias=bias, softcap=self.softcap, scale=self.scale)
            places = {"q_pos": pos, "k_pos": pos, "aligned": True}
            return attend(q, k, v, mask, **places, bias=bias, softcap=self.softcap, scale=self.scale)  # type: ignore[arg-type]
        if not isinstance(state, KeyValue | Ring):
            raise ValueError(f"attention streams with a KeyValue or a Ring, not {type(state).__name__}: use init_state")
        _require_streamable(mask, pos)
        begins = state.length == 0
        k, v, k_pos = state.append(k, v, pos, padded=mask.valid is not None)
        bias = self.positions.bias(self.heads, pos, k_pos)
        if pos.shape[1] == 1 and not state.padded and mask.facts == {"causal"} and bias is None:
            return attend(q, k, v, softcap=self.softcap, scale=self.scale)  # the newest token sees all that came before
        if (
            begins and bias is None and mask.facts <= {"causal", "window"}
        ):  # no past: indices say the same, as without state
            return attend(q, k, v, mask, softcap=self.softcap, scale=self.scale)
        mask = replace(mask, valid=None)
        return attend(q, k, v, mask, q_pos=pos, k_pos=k_pos, bias=bias, softcap=self.softcap, scale=self.scale)

    def _remembered(self, state: State, context: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(state, Cross):
            raise ValueError("attention over a context needs a Cross state: make it with init_state(..., cross=True)")
        if not state.kept:
            state.kept = self._keys_values(context)
        k, v = state.kept
        return k, v

    def _queries(self, x: Tensor) -> Float[Tensor, "B H T D"]:
        return self.query_norm(self._heads(self.query(x), self.heads))

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.key_value(x).chunk(2, -1)
        return self.key_norm(self._heads(k, self.kv_heads)), self._heads(v, self.kv_heads)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)  # B H T D

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        if cross:
            return Cross()
        if self.local.window is not None and self.local.window[0] is not None:
            return Ring(self.local.window[0], self.local.sinks)
        return KeyValue(capacity)

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        keys = context_length or length
        inner, shared = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        projections = 2 * self.width * (2 * length * inner + keys * shared)
        held = keys
        if context_length is None and self.local.window is not None and self.local.window[0] is not None:
            held = min(length, self.local.window[0] + self.local.sinks)
        position_bytes = 0 if context_length else 8
        biased = context_length is None and self.positions.biases
        call = Call(
            mask=FULL if context_length else self.local,
            rows=1,
            heads=self.heads,
            kv_heads=self.kv_heads,
            queries=length,
            keys=keys,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            dtype=torch.float32,
            device=self.out.weight.device.type,
            gradients=True,
            bias=biased,
            softcap=self.softcap is not None,
        )
        norms = 0 if isinstance(self.query_norm, nn.Identity) else length * inner + keys * shared // 2
        activations = (
            length * (self.width + 2 * inner) + keys * (shared + (self.width if context_length else 0)) + norms
        )
        return Cost(
            flops=projections + 4 * length * keys * inner,
            state_bytes=held * (4 * shared + position_bytes),
            activation_bytes=4 * activations + kept_bytes(call),
        )


def _require_streamable(mask: Mask, pos: Tensor) -> None:
    """A token of a stream can see none that is yet to come."""
    if mask.segments is not None:
        raise ValueError("attention cannot stream packed segments: stream one sequence a row")
    if not mask.causal:
        raise ValueError("attention streams only under a causal mask: without one, tokens yet to come are seen")
    if "prefix" in mask.facts:
        seen = pos.amax(1) + 1
        if bool(((seen > 0) & (seen < torch.as_tensor(mask.prefix, device=pos.device))).any()):
            raise ValueError("attention: a chunk ends within the mask's prefix, whose tokens all see each other")
