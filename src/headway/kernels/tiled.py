"""FlashAttention in plain PyTorch, tile by tile: softmax(q k^T) v without ever a T x S matrix (2205.14135, 2307.08691).

Online softmax: over tiles of keys keep the largest score m so far, l = sum e^(s - m) and acc = sum e^(s - m) v; when m
grows to m', both shrink by e^(m - m'). At the end y = acc / l. The way back keeps m + log l of each query and makes the
weights anew: p = e^(s - m - log l), dv = p^T dy, ds = p (dy v^T - rowsum(dy y)), dq = ds k, dk = ds^T q.
This is the readable twin of the Triton kernel; it honours every mask, because it asks the mask about each tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels import Call, places
from headway.mask import Mask

TILE = 256  # queries, and keys, of a tile
LONG = 1024  # from here on a matrix of the scores is what hurts


def refuses(call: Call) -> str:
    return "dropout would need its random choice again on the way back" if call.dropout else ""


def pays(call: Call) -> str:
    if call.softcap and min(call.queries, call.keys) >= LONG:
        return f"PyTorch has no soft-cap, and the reference would hold {call.queries} x {call.keys} scores a head"
    return ""


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    groups = k.shape[1]
    facts = Facts(mask, *places(q, k, q_pos, k_pos), scale, softcap, TILE)
    q = q.unflatten(1, (groups, -1))  # B G R T D: R query heads share one of the G key/value heads
    if bias is not None:
        bias = bias.unflatten(1, (groups, -1) if bias.shape[1] > 1 else (1, 1))
    return Tiled.apply(q, k[:, :, None], v[:, :, None], bias, facts).flatten(1, 2)


def part_of(mask: Mask, queries: slice, keys: slice) -> Mask:
    """The mask of a tile: `part.allows(q_pos[:, queries], k_pos[:, keys])` is that part of what `mask` allows."""
    key_segments = mask.segments if mask.key_segments is None else mask.key_segments
    return replace(
        mask,
        valid=None if mask.valid is None else mask.valid[:, keys],
        segments=None if mask.segments is None else mask.segments[:, queries],
        key_segments=None if key_segments is None else key_segments[:, keys],
        also=tuple(part_of(other, queries, keys) for other in mask.also),
    )


@dataclass(frozen=True)
class Facts:
    """What a tile needs to know besides queries, keys, values and bias."""

    mask: Mask
    q_pos: Int[Tensor, "#B T"]
    k_pos: Int[Tensor, "#B S"]
    scale: float
    softcap: float | None
    tile: int

    def seen_tiles(self, queries: slice) -> Iterator[tuple[slice, Bool[Tensor, "#B 1 1 t s"]]]:
        """The tiles of keys that these queries look at, with what they may see there."""
        for keys in _slices(self.k_pos.shape[1], self.tile):
            allowed = part_of(self.mask, queries, keys).allows(self.q_pos[:, queries], self.k_pos[:, keys])
            if allowed.device.type == "cpu" and not allowed.any():  # asking a GPU would make it wait
                continue
            yield keys, allowed.expand(-1, queries.stop - queries.start, -1)[:, None, None]

    def scores(
        self,
        q: Float[Tensor, "B G R t D"],
        k: Float[Tensor, "B G 1 s D"],
        bias: Float[Tensor, "#B #G #R t s"] | None,
        allowed: Bool[Tensor, "#B 1 1 t s"],
    ) -> tuple[Float[Tensor, "B G R t s"], Float[Tensor, "B G R t s"] | float]:
        """The scores of a tile, -inf where nothing may be seen, and how fast the soft-cap lets each of them rise."""
        scores = (q @ k.mT) * self.scale
        slope: Tensor | float = 1.0
        if self.softcap is not None:
            bent = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * bent, 1 - bent.square()
        if bias is not None:
            scores = scores + bias
        return scores.masked_fill(~allowed, float("-inf")), slope


class Tiled(torch.autograd.Function):
    """Attention of `B G R T D` queries over `B G 1 S D` keys, forward and backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, facts: Facts) -> Tensor:
        y = q.new_empty(*q.shape[:-1], v.shape[-1])
        logsum = q.new_empty(q.shape[:-1], dtype=_wide(q))
        for queries in _slices(q.shape[-2], facts.tile):
            q_tile = q[..., queries, :].to(logsum.dtype)
            most = torch.full_like(logsum[..., queries, None], float("-inf"))
            total, sum_v = torch.zeros_like(most), most.new_zeros(y[..., queries, :].shape)
            for keys, allowed in facts.seen_tiles(queries):
                k_tile, v_tile = (_seen(t, keys, allowed, most.dtype) for t in (k, v))
                scores, _ = facts.scores(q_tile, k_tile, _tile(bias, queries, keys, most.dtype), allowed)
                more = torch.maximum(most, scores.amax(-1, keepdim=True))
                pivot = more.masked_fill(more == float("-inf"), 0.0)  # nothing seen so far: e^(-inf - 0) = 0
                shares, shrink = (scores - pivot).exp(), (most - pivot).exp()
                total = total * shrink + shares.sum(-1, keepdim=True)
                sum_v = sum_v * shrink + shares @ v_tile
                most = more
            y[..., queries, :] = sum_v / total.masked_fill(total == 0, 1.0)
            blind = total == 0  # its weights come out as e^(s - inf) = 0
            logsum[..., queries] = (most + total.log()).masked_fill(blind, float("inf"))[..., 0]
        ctx.save_for_backward(q, k, v, bias, y, logsum)
        ctx.facts = facts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, y, logsum = ctx.saved_tensors
        facts, wide = ctx.facts, logsum.dtype
        dq, dk, dv = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[3] else None
        delta = (dy.to(wide) * y.to(wide)).sum(-1, keepdim=True)  # = sum of p (dy v^T) over all keys
        for queries in _slices(q.shape[-2], facts.tile):
            q_tile, dy_tile = (t[..., queries, :].to(wide) for t in (q, dy))
            for keys, allowed in facts.seen_tiles(queries):
                k_tile, v_tile = (_seen(t, keys, allowed, wide) for t in (k, v))
                scores, slope = facts.scores(q_tile, k_tile, _tile(bias, queries, keys, wide), allowed)
                shares = (scores - logsum[..., queries, None]).exp()
                dscores = shares * (dy_tile @ v_tile.mT - delta[..., queries, :])
                if dbias is not None:
                    dbias[..., queries, keys] += dscores.sum_to_size(dbias[..., queries, keys].shape)
                dscores = dscores * slope * facts.scale
                dv[..., keys, :] += (shares.mT @ dy_tile).sum(2, keepdim=True)
                dk[..., keys, :] += (dscores.mT @ q_tile).sum(2, keepdim=True)
                dq[..., queries, :] += dscores @ k_tile
        grads = (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))
        return *grads, None if dbias is None else dbias.to(bias.dtype), None


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _wide(t: Tensor) -> torch.dtype:
    """The type to sum in."""
    return torch.promote_types(t.dtype, torch.float32)


def _seen(t: Tensor, keys: slice, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A tile of keys or values; what none of the tile's queries may see is zeroed, NaN included: 0 * NaN is NaN."""
    return torch.where(allowed.any(-2)[..., None], t[..., keys, :].to(dtype), 0.0)


def _tile(bias: Tensor | None, queries: slice, keys: slice, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[..., queries, keys].to(dtype)
