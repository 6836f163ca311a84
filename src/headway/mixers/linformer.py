"""Linformer: attention over keys and values that a learned matrix shortens to a fixed rank (2006.04768).

y = W_o attend(W_q x, E (c W_k), F (c W_v)), c = x or the context, E and F of rank x length: time and memory grow with
the length, not with its square. Where all heads share E, E (c W) is (E c) W, cheaper once tokens outnumber the rank.
Each shortened key sums over all tokens, those to come included: it can be neither causal nor a stream of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.attend import FULL, attend, kept_bytes, weights
from headway.kernels import Call
from headway.layers import Table, residual_output
from headway.mask import Mask
from headway.mixers import Cost, Implied, Mixer, without_padding
from headway.positions import Positions, Rotary
from headway.spec import Size
from headway.state import Cross, State


class Linformer(Mixer):
    """Attention of linear cost.

    heads, head_dim: as in attention. rank: keys and values that are left (k). length: the most tokens (n).
    sharing: "none" (an E and an F a head), "headwise" (one E, one F), "key-value" (E = F), "layerwise" (E = F, one for
    all layers of a stack with this rank and length). E tells positions by itself; where a stack has rotary ones, they
    turn queries and keys, at a price: keys are then always projected before they are shortened.
    """

    CAN: ClassVar = frozenset({"bidirectional", "cross", "padding", "stream"})  # it streams over a context alone

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        heads: Size,
        head_dim: Size | None = None,
        rank: Size = 256,
        length: Size = 512,
        sharing: Literal["none", "headwise", "key-value", "layerwise"] = "headwise",
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"linformer: width {width} is no multiple of {heads} heads; set head_dim or other heads")
        if positions is not None and positions.biases:
            raise ValueError(
                "linformer: ALiBi is a penalty a key, and each of its keys is many: choose other positions"
            )
        self.width, self.heads, self.head_dim = width, heads, head_dim or width // heads
        self.rank, self.length, self.sharing = rank, length, sharing
        self.rotary = positions if isinstance(positions, Rotary) else None
        inner = heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        matrices = {"none": 2 * heads, "headwise": 2}.get(sharing, 1)
        self.shorten = Table(length, matrices * rank, bias=False)  # E of each head, then F of each head
        self.out = residual_output(nn.Linear(inner, width))

    def tie(self, earlier: Sequence[Mixer]) -> None:
        if self.sharing != "layerwise":
            return
        like = (self.sharing, self.rank, self.length)
        for other in earlier:
            if isinstance(other, Linformer) and (other.sharing, other.rank, other.length) == like:
                self.shorten = other.shorten
                return

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        self._refuse(mask, state, context)
        q = self._heads(self.query(x))
        if context is None:
            q = q if self.rotary is None else self.rotary.rotate(q, pos)
            k, v = self._keys_values(x, mask.valid, pos if self.rotary is not None else None)
        elif state is None:
            k, v = self._keys_values(context, mask.valid)
        else:
            k, v = self._remembered(state, context, mask.valid)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))

    def _refuse(self, mask: Mask, state: State | None, context: Tensor | None) -> None:
        alien = mask.facts - self.CAN | ({"stream"} if state is not None and context is None else set())
        if alien:
            raise ValueError(
                f"linformer cannot do {', '.join(sorted(alien))}: each of its {self.rank} keys sums over all tokens of "
                "a row, those to come included; use it in an encoder or over a context, or choose attention"
            )

    def _keys_values(
        self, c: Float[Tensor, "B S C"], valid: Bool[Tensor, "B S"] | None, turned: Int[Tensor, "B S"] | None = None
    ) -> tuple[Float[Tensor, "B H K D"], Float[Tensor, "B H K D"]]:
        """Shortened keys and values; keys turn by the positions `turned`, if there are any."""
        tokens = c.shape[1]
        if tokens > self.length:
            raise ValueError(f"linformer: {tokens} tokens, and its `length` is {self.length}: shorten them or raise it")
        if valid is not None:  # column i of E belongs to token i of a row, wherever the row's padding stands
            front = valid.int().argsort(dim=1, descending=True, stable=True)
            c = c.masked_fill(~valid[..., None], 0.0).gather(1, front[..., None].expand_as(c))
            turned = None if turned is None else turned.gather(1, front)
        matrices = self.shorten.weight[:, :tokens]
        if turned is None and self._shortens_first(tokens):
            short = matrices @ c
            return self._heads(self.key(short[:, : self.rank])), self._heads(self.value(short[:, -self.rank :]))
        k, v = self._heads(self.key(c)), self._heads(self.value(c))
        if turned is not None and self.rotary is not None:
            k = self.rotary.rotate(k, turned)
        each = matrices.unflatten(0, (-1, self.heads if self.sharing == "none" else 1, self.rank))
        return torch.einsum("hkt,bhtd->bhkd", each[0], k), torch.einsum("hkt,bhtd->bhkd", each[-1], v)

    def _remembered(self, state: State, context: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        if not isinstance(state, Cross):
            raise ValueError(
                f"linformer streams with a Cross state, not {type(state).__name__}: use init_state(..., cross=True)"
            )
        if not state.kept:
            state.kept = self._keys_values(context, valid)
        k, v = state.kept
        return k, v

    def _heads(self, x: Tensor) -> Float[Tensor, "B H T D"]:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _shortens_first(self, tokens: int) -> bool:
        """Whether (E c) W is legal and takes fewer operations than E (c W)."""
        inner = self.heads * self.head_dim
        first = self.shorten.out_features * tokens * self.width + 2 * self.rank * self.width * inner
        return self.sharing != "none" and first < 2 * tokens * inner * (self.width + self.rank)

    def implied(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
        rows: slice | None = None,
    ) -> Implied:
        """The weights of the shortened keys, carried back to the tokens by F: they need not sum to one."""
        self._refuse(mask, None, context)
        q, c = self._heads(self.query(x)), x if context is None else context
        turned = pos if context is None and self.rotary is not None else None
        q = q if turned is None or self.rotary is None else self.rotary.rotate(q, turned)
        k, _ = self._keys_values(c, mask.valid, turned)
        carry = self.shorten.weight[:, : c.shape[1]].unflatten(
            0, (-1, self.heads if self.sharing == "none" else 1, self.rank)
        )[-1].expand(len(c), -1, -1, -1)  # fmt: skip
        if mask.valid is not None:  # a token's column is its place among those of its row
            places = (mask.valid.cumsum(1) - 1).clamp(min=0)[:, None, None].expand(-1, *carry.shape[1:3], -1)
            carry, c = carry.gather(3, places), c.masked_fill(~mask.valid[..., None], 0.0)
        found = without_padding(weights(q[:, :, rows or slice(None)], k) @ carry, mask, context, rows)
        return Implied(found, self._heads(self.value(c)), lambda y: self.out(y.transpose(1, 2).flatten(2)))

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        if not cross:
            raise ValueError(
                f"linformer cannot stream: each of its {self.rank} keys sums over all tokens, those to come included; "
                "it streams only in a cross slot, over a context that is whole"
            )
        return Cross()

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        tokens, inner, own = context_length or length, self.heads * self.head_dim, context_length is None
        matrices = self.shorten.out_features
        if self._shortens_first(tokens) and not (own and self.rotary is not None):
            shortening = matrices * tokens * self.width + 2 * self.rank * self.width * inner
            between = matrices * self.width
        else:
            shortening = 2 * tokens * inner * (self.width + self.rank)
            between = 2 * tokens * inner
        call = Call(
            mask=FULL,
            rows=1,
            heads=self.heads,
            kv_heads=self.heads,
            queries=length,
            keys=self.rank,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            dtype=torch.float32,
            device=self.out.weight.device.type,
            gradients=True,
        )
        read = (length if own else length + tokens) * self.width
        kept = read + between + 2 * (length + self.rank) * inner  # what is read; queries, outputs, keys and values
        return Cost(
            flops=2 * (2 * length * self.width * inner + shortening + 2 * length * self.rank * inner),
            state_bytes=0 if own else 8 * self.rank * inner,
            activation_bytes=4 * kept + kept_bytes(call),
        )


def from_package(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `LinformerSelfAttention` of PyPI's `linformer`, each head with keys and values of its own, as those
    of a `Linformer` with sharing "headwise" (its `length` is their `seq_len`, `rank` their `k`)."""
    return {
        "query.weight": weights["to_q.weight"],
        "key.weight": weights["to_k.weight"],
        "value.weight": weights["to_v.weight"],
        "shorten.weight": torch.cat([weights["proj_k"].T, weights["proj_v"].T]),
        "out.weight": weights["to_out.weight"],
        "out.bias": weights["to_out.bias"],
    }
