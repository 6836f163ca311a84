"""Sliding windows in blocks: exact, in O(n w) time and memory, forward and backward (as in arXiv 2004.05150).

    for each block [i, j) of queries:                          # left, right: the window; right is 0 under causal
        keys = [i - left, j + right), and the extra keys outside of it      # extra: sinks and global tokens
        out[i:j] = softmax(q[i:j] k[keys]^T * scale, over what the mask allows of them) v[keys]
    out[r] = softmax(q[r] k^T * scale, over what the mask allows) v         # r: global tokens, which see everything

The way back repeats the scores of a block and keeps one number a query, log(sum(exp(scores))) (arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from headway.kernels import Call, places, sdpa
from headway.mask import Mask

_global_counts: Any = WeakTensorKeyDictionary()


def refuses(call: Call) -> str:
    mask = call.mask
    if mask.window is None:
        return "it is for windows, and the mask has none"
    if mask.window[0] is None:
        return "the window has no bound to the left"
    if mask.window[1] is None and not mask.causal:
        return "the window has no bound to the right, and the mask is not causal"
    if mask.window[1] is None and "prefix" in mask.facts:
        return "the prefix lets a query see ahead, and the window has no bound to the right"
    if call.queries != call.keys:
        return f"it is for self-attention without a cache, not for {call.queries} queries and {call.keys} keys"
    if not call.aligned:
        return "the given positions are not said to be aligned, so that no distance can be read off indices"
    if call.bias:
        return "an additive bias is a dense one of queries x keys"
    if call.dropout:
        return "it has no dropout of weights"
    if call.softcap and "globals" in mask.facts:
        return "the rows of global tokens have no logit soft-cap"
    return ""


def pays(call: Call) -> str:
    left, right = _sides(call.mask)
    size = block_size(left + right + 1, call.device)
    keys = size + left + right
    # Measured on a CPU, 8 heads of 64, sdpa's time over this one's at 1.25 / 1.5 / 2 / 3 times `keys` queries, with
    # gradients: a window of 32 0.9 0.8 1.1 1.4, of 64 0.9 1.0 1.3 1.5, of 128 1.3 1.3 1.6 2.3. A GPU's 8 is a guess.
    if call.queries < (1.25 * keys + 96 if call.device == "cpu" else 8 * keys):
        return ""
    return f"blocks of {size} queries see {keys} keys each, not {call.keys}"


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
    """As `attend`; a query at position -1 is padding and gives zeros."""
    assert bias is None and not dropout
    if torch.compiler.is_compiling():  # a loop over blocks is no graph to unroll
        return torch.compiler.disable(run)(q, k, v, mask, q_pos, k_pos, bias, scale, softcap, dropout)
    device = q.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
        with torch.autocast(device, enabled=False):
            return run(q, k, v, mask, q_pos, k_pos, bias, scale, softcap, dropout)
    plan = _plan(q, k, v, mask, q_pos, k_pos, scale, softcap)
    out: Tensor = _Blocked.apply(q, k, v, plan)
    if plan.rows is None:
        return out
    at = plan.rows[:, None, :, None]
    part = _part(mask, q.shape[0], plan.rows, slice(None))
    q_pos = plan.q_pos.take_along_dim(plan.rows, 1)
    full = sdpa.run(q.take_along_dim(at, 2), k, v, part, q_pos, plan.k_pos, None, scale, None, 0.0)
    return out.scatter(2, at.expand_as(full), full)


def block_size(span: int, device: str) -> int:
    """Queries a block, for windows of `span` keys.

    On a CPU, forward + backward of 8 heads of 64, us a query, for blocks of 32 / 64 / 128 / 256: a window of 64 15 18
    22 35, of 256 32 36 43 54, of 512 61 70 75 85, of 1023 152 143 143 150; the whole path adds some 50 us a block. A
    GPU waits for launches rather than for products, so it takes larger ones (not measured yet).
    """
    if device != "cpu":
        return max(256, span)
    return 32 if span <= 64 else 64 if span <= 512 else 128


class _Block(NamedTuple):
    queries: slice
    keys: slice
    bias: Tensor  # 0 where a query may see a key and -inf where not: #B 1 t s
    seen: Tensor | None  # keys that some query sees, None where that is all: #B 1 s 1


@dataclass
class _Plan:
    """What is visible to whom, block by block; everything but queries, keys and values."""

    mask: Mask
    batch: int
    group: int  # query heads that share a key/value head
    q_pos: Tensor
    k_pos: Tensor
    padded: bool  # positions are given, and may be -1
    dtype: torch.dtype
    scale: float
    softcap: float | None
    fused: bool
    size: int
    extra: Tensor | None = None  # indices of keys that no window hides: #B E
    rows: Tensor | None = None  # indices of queries that see everything: B R
    others: Tensor | None = None  # true for those that the blocks are for: B T
    kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[_Block]:
        left, right = _sides(self.mask)
        length = self.q_pos.shape[1]
        reach = None if self.padded else _reach(self.mask)
        for i in range(0, length, self.size):
            j = min(length, i + self.size)
            lo, hi = max(0, i - left), min(length, j + right)
            if reach is None:
                allowed = self._allowed(i, j, lo, hi)
                seen = allowed.any(-2)[:, None, :, None]
                everything = seen.device.type == "cpu" and bool(seen.all())  # elsewhere asking costs more than it saves
                yield _Block(slice(i, j), slice(lo, hi), self._lowered(allowed), None if everything else seen)
            else:  # blocks that stand alike share one mask, and each key is seen by the query beside it at least
                alike = (j - i, i - lo, hi - j, min(lo, reach))
                if alike not in self.kept:
                    self.kept[alike] = self._lowered(self._allowed(i, j, lo, hi))
                yield _Block(slice(i, j), slice(lo, hi), self.kept[alike], None)

    def _lowered(self, allowed: Tensor) -> Tensor:
        return torch.where(allowed, torch.zeros((), dtype=self.dtype, device=allowed.device), float("-inf"))[:, None]

    def _allowed(self, i: int, j: int, lo: int, hi: int) -> Tensor:
        q_pos, k_pos = self.q_pos[:, i:j], self.k_pos[:, lo:hi]
        allowed = _part(self.mask, self.batch, slice(i, j), slice(lo, hi)).allows(q_pos, k_pos)
        if self.extra is not None:
            part = _part(self.mask, self.batch, slice(i, j), self.extra)
            outside = (self.extra < lo) | (self.extra >= hi)  # an extra key among the near ones counts once
            far = part.allows(q_pos, self.k_pos.take_along_dim(self.extra, 1)) & outside[:, None]
            allowed = torch.cat([allowed, far], -1)
        if self.padded:
            allowed = allowed & (q_pos >= 0)[..., None]
        if self.others is not None:
            allowed = allowed & self.others[:, i:j, None]
        return allowed

    def part(self, x: Tensor, block: _Block) -> Tensor:
        """The keys or values of a block, B H s D; what nobody sees there is zeroed, so that it never leaks."""
        part = x[:, :, block.keys]
        if self.extra is not None:
            part = torch.cat([part, x.take_along_dim(self.extra[:, None, :, None], 2)], 2)
        if block.seen is not None:
            part = torch.where(block.seen, part, 0.0)
        return part.repeat_interleave(self.group, 1) if self.group > 1 else part

    def add(self, total: Tensor, part: Tensor, block: _Block) -> None:
        """Adds the gradient of `part` where it came from."""
        if self.group > 1:
            part = part.unflatten(1, (-1, self.group)).sum(2)
        near = total[:, :, block.keys]
        near += part[:, :, : near.shape[2]]
        if self.extra is not None:
            far = part[:, :, near.shape[2] :].to(total.dtype)
            total.scatter_add_(2, self.extra[:, None, :, None].expand_as(far), far)


class _Blocked(torch.autograd.Function):
    """One pass over the blocks forward and one back; each query block's gradients are added into whole buffers."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)  # heads side by side, as a mixer wants them
        sums = torch.empty(batch, heads, length, dtype=_exact(q.dtype), device=q.device)
        kernel = _fused if plan.fused else _plain
        for block in plan:
            keys, values = plan.part(k, block), plan.part(v, block)
            at = block.queries
            out[:, :, at], sums[:, :, at] = kernel(q[:, :, at], keys, values, block.bias, plan.scale, plan.softcap)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, sums = ctx.saved_tensors
        plan: _Plan = ctx.plan
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=_exact(t.dtype)) for t in (k, v))
        # On a CPU the fused way back is slow in bf16 (torch 2.13): 80 us a query for a window of 512, this one 49.
        kernel = _fused_back if plan.fused and q.dtype in (torch.float32, torch.float64) else _plain_back
        for block in plan:
            keys, values = plan.part(k, block), plan.part(v, block)
            at = block.queries
            near = grad[:, :, at], q[:, :, at], out[:, :, at], sums[:, :, at]
            dq[:, :, at], one, two = kernel(*near, keys, values, block.bias, plan.scale, plan.softcap)
            plan.add(dk, one, block)
            plan.add(dv, two, block)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernel for CPUs: output and logarithm of the sum of exponentials; both 0 for who sees nothing."""
    q, k, v = map(_adjacent, (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)


def _fused_back(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    sums: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grad, q, k, v = map(_adjacent, (grad, q, k, v))
    return back(grad, q, k, v, out, sums, 0.0, False, attn_mask=bias, scale=scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The same for any device, width of values and soft-cap."""
    scores = _capped(q, k, scale, softcap) + bias
    sums = scores.logsumexp(-1)
    sums = sums.masked_fill(sums == float("-inf"), 0.0)  # who sees nothing: exp(-inf - 0) = 0
    return (scores - sums[..., None]).exp().to(v.dtype) @ v, sums


def _plain_back(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    sums: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    capped = _capped(q, k, scale, softcap)
    weights = (capped + bias - sums[..., None]).exp()
    inner = (grad * out).sum(-1, keepdim=True, dtype=weights.dtype)
    slope = weights * ((grad @ v.mT).to(weights.dtype) - inner) * scale
    if softcap is not None:
        slope = slope * (1 - (capped / softcap).square())
    slope = slope.to(q.dtype)
    return slope @ k, slope.mT @ q, weights.to(grad.dtype).mT @ grad


def _capped(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = (q @ k.mT).to(_exact(q.dtype)) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    softcap: float | None,
) -> _Plan:
    given = q_pos is not None
    q_pos, k_pos = places(q, k, q_pos, k_pos)
    if given and q.device.type == "cpu":  # elsewhere looking would stall the device, and the promise is trusted
        _require_aligned(mask, q_pos, k_pos)
    plan = _Plan(
        mask=mask,
        batch=q.shape[0],
        group=q.shape[1] // k.shape[1],
        q_pos=q_pos,
        k_pos=k_pos,
        padded=given,
        dtype=q.dtype,
        scale=scale,
        softcap=softcap,
        fused=q.device.type == "cpu" and q.shape[3] == v.shape[3] and softcap is None,
        size=block_size(sum(_sides(mask)) + 1, q.device.type),
    )
    packed = given and mask.segments is not None  # several sequences a row, each with first and global tokens
    if mask.globals is not None:
        flags = mask.is_global(q_pos)
        plan.rows = _first(flags, int(flags.sum(1).max()) if packed else _most_globals(mask.globals), q.shape[0])
        if plan.rows is not None:
            plan.others = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
            plan.others.scatter_(1, plan.rows, False)
    if mask.globals is not None or mask.sinks:
        flags = (k_pos >= 0) & (k_pos < mask.sinks)
        flags = flags if mask.globals is None else flags | mask.is_global(k_pos)
        most = mask.sinks + (0 if mask.globals is None else _most_globals(mask.globals))
        plan.extra = _first(flags, int(flags.sum(1).max()) if packed else most, flags.shape[0])
    return plan


def _require_aligned(mask: Mask, q_pos: Tensor, k_pos: Tensor) -> None:
    if q_pos is not k_pos and not torch.equal(q_pos, k_pos):
        raise ValueError("attend: aligned queries and keys stand at the same positions, and these do not: leave it out")
    before, now = k_pos[:, :-1], k_pos[:, 1:]
    apart = (now >= 0) & (now != before + 1) & ((before >= 0).cumsum(1) > 0)
    if mask.segments is not None:
        apart &= mask.segments[:, :-1] == mask.segments[:, 1:]
    if bool(apart.any()):
        row, at = apart.nonzero()[0].tolist()
        jump = f"in row {row} {int(now[row, at])} follows {int(before[row, at])}"
        raise ValueError(f"attend: aligned positions rise by one; {jump}: pad at the ends only, or leave aligned out")


def _first(flags: Tensor, most: int, rows: int) -> Tensor | None:
    """Indices of the flagged tokens, at most `most` a row; a row with fewer is filled up with others.

    Whether a pair is visible is asked of the mask for each index, so that one too many is no error.
    """
    most = min(most, flags.shape[1])
    return flags.expand(rows, -1).to(torch.uint8).topk(most, dim=1).indices if most else None


def _most_globals(flags: Tensor) -> int:
    """The largest number of global tokens of a row. It waits for the device, so it is asked once for each tensor."""
    if flags.is_inference():
        return int(flags.sum(1).max())
    counted = _global_counts.get(flags)
    if counted is None or counted[0] != flags._version:
        counted = _global_counts[flags] = (flags._version, int(flags.sum(1).max()))
    return counted[1]


def _sides(mask: Mask) -> tuple[int, int]:
    """How far, in tokens, a query sees to the left and to the right at most."""
    assert mask.window is not None and mask.window[0] is not None
    right = 0 if mask.causal and "prefix" not in mask.facts else mask.window[1]
    assert right is not None
    return mask.window[0], right


def _reach(mask: Mask) -> int | None:
    """From which position on a mask is a matter of distance alone; None where tensors have a say."""
    facts = (mask.globals, mask.valid, mask.segments, mask.key_segments)
    if isinstance(mask.prefix, Tensor) or any(fact is not None for fact in facts):
        return None
    others = [_reach(other) for other in mask.also]
    return None if None in others else max(mask.sinks, mask.prefix, *(o for o in others if o is not None), 0)


def _part(mask: Mask, batch: int, queries: slice | Tensor, keys: slice | Tensor) -> Mask:
    """The mask of some queries and some keys, given by their indices."""

    def take(t: Tensor | None, at: slice | Tensor) -> Tensor | None:
        if t is None:
            return None
        t = t.expand(batch, -1)
        return t[:, at] if isinstance(at, slice) else t.gather(1, at.expand(batch, -1))

    return replace(
        mask,
        prefix=mask.prefix.expand(batch) if isinstance(mask.prefix, Tensor) else mask.prefix,
        globals=None if mask.globals is None else mask.globals.expand(batch, -1),
        valid=take(mask.valid, keys),
        segments=take(mask.segments, queries),
        key_segments=take(mask.segments if mask.key_segments is None else mask.key_segments, keys),
        also=tuple(_part(other, batch, queries, keys) for other in mask.also),
    )


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What sums of this type are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _adjacent(t: Tensor) -> Tensor:
    """The fused kernel reads heads of adjacent numbers."""
    return t if t.stride(-1) == 1 else t.contiguous()
