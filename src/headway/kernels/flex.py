"""FlexAttention, compiled by PyTorch (arXiv 2412.05496): the mask is code inside the kernel, on positions.

A block mask says which tiles of 128 x 128 are seen in part or whole. It is made once, from the mask itself, and kept
for as long as the tensors live that it was made from, so that all layers of a model share one.
On the CPU PyTorch has the way forward only.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from headway.kernels import Call, places
from headway.kernels.tiled import part_of
from headway.mask import Mask

LEAST = 16  # queries, keys and head width
LONG = 1024  # from here on a dense mask is what costs
BLOCK = 128  # queries, and keys, of a block
FORMS = 64  # of calls that may each be compiled, before a further one is an error


def refuses(call: Call) -> str:
    if call.dropout:
        return "FlexAttention has no dropout"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention computes in float32, and the call is in {str(call.dtype).removeprefix('torch.')}"
    if min(call.queries, call.keys) < LEAST or min(call.head_dim, call.value_dim) < LEAST:
        sizes = f"{call.queries} x {call.keys} tokens with heads of {min(call.head_dim, call.value_dim)}"
        return f"FlexAttention starts at {LEAST} tokens and heads {LEAST} wide, not {sizes}"
    return _unable(call)


def pays(call: Call) -> str:
    """Not measured on a GPU yet: it is taken where PyTorch's other kernels need a dense mask, or cannot."""
    dense = call.positions or not call.mask.facts <= {"causal", "bidirectional"}
    if call.device != "cuda" or call.bias or min(call.queries, call.keys) < LONG or not (dense or call.softcap):
        return ""
    return f"PyTorch's other kernels would need {call.queries} x {call.keys} scores or a dense mask of that size"


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
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # on the CPU it asks about the tensors themselves
    blocks, seen = blocks_of(q, k, mask, q_pos, k_pos)
    if seen is not None:
        k, v = (torch.where(seen[:, None, :, None], t, 0.0) for t in (k, v))  # 0 * NaN is NaN
    blocks.mask_mod = mask_mod_of(mask, q.shape[0], q_pos, k_pos)
    score_mod = score_mod_of(bias, softcap)
    grouped = q.shape[1] != k.shape[1]
    with torch._dynamo.config.patch(recompile_limit=FORMS):
        return _compiled(q.device.type)(
            q, k, v, score_mod=score_mod, block_mask=blocks, scale=scale, enable_gqa=grouped
        )


def mask_mod_of(mask: Mask, rows: int, q_pos: Tensor | None, k_pos: Tensor | None) -> Callable[..., Tensor]:
    """`mask.allows` for one query and one key, by their indices. It is compiled: nothing checks types inside."""
    spread = lambda t: t.expand(rows, *t.shape[1:]) if isinstance(t, Tensor) else t
    q_places, k_places, valid, segments, flags, prefix = map(
        spread, (q_pos, k_pos, mask.valid, mask.segments, mask.globals, mask.prefix)
    )
    key_segments = segments if mask.key_segments is None else spread(mask.key_segments)
    causal, sinks, (left, right) = mask.causal, mask.sinks, mask.window or (None, None)
    others = [mask_mod_of(other, rows, q_pos, k_pos) for other in mask.also]

    @no_type_check
    def is_global(b: Tensor, at: Tensor) -> Tensor:
        return flags[b, at.clamp(0, flags.shape[1] - 1)] & (at >= 0) & (at < flags.shape[1])

    @no_type_check
    def in_window(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = k >= 0
        if left is not None:
            near = near & (k >= q - left)
        if right is not None:
            near = near & (k <= q + right)
        if sinks:
            near = near | (k < sinks)
        if flags is not None:
            near = near | is_global(b, q) | is_global(b, k)
        return near

    @no_type_check
    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q = query if q_places is None else q_places[b, query]
        k = key if k_places is None else k_places[b, key]
        ok = (k >= 0) & in_window(b, q, k)
        if valid is not None:
            ok = ok & valid[b, key]
        if causal:
            ok = ok & ((k <= q) | (k < (prefix[b] if isinstance(prefix, Tensor) else prefix)))
        if segments is not None:
            ok = ok & (segments[b, query] == key_segments[b, key])
        for other in others:
            ok = ok & other(b, h, query, key)
        return ok

    return allowed


def score_mod_of(bias: Float[Tensor, "#B #H T S"] | None, softcap: float | None) -> Callable[..., Tensor] | None:
    """Soft-cap and bias of one scaled score, by the indices of its row, head, query and key."""
    if bias is None and softcap is None:
        return None

    @no_type_check
    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b if bias.shape[0] > 1 else b * 0, h if bias.shape[1] > 1 else h * 0, query, key]
        return score

    return score_mod


@dataclass(frozen=True)
class Kept:
    """A block mask and what it was made from: plain facts, and tensors at a version, not kept alive by it."""

    facts: tuple[object, ...]
    tensors: tuple[tuple[weakref.ref[Tensor], int], ...]
    blocks: Any
    seen: Bool[Tensor, "B S"] | None

    def alive(self) -> bool:
        return all(tensor() is not None for tensor, _ in self.tensors)

    def is_of(self, facts: tuple[object, ...], tensors: list[Tensor]) -> bool:
        pairs = zip(self.tensors, tensors, strict=False)  # equal facts tell of equally many
        return self.facts == facts and all(kept() is t and then == _version(t) for (kept, then), t in pairs)


_kept: deque[Kept] = deque(maxlen=8)


def blocks_of(
    q: Tensor, k: Tensor, mask: Mask, q_pos: Tensor | None, k_pos: Tensor | None
) -> tuple[Any, Bool[Tensor, "B S"] | None]:
    """The block mask, yet without its mask_mod, and which keys any query sees (None: all); made once and kept."""
    plain, tensors = _made_of(mask)
    tensors += [t for t in (q_pos, k_pos) if t is not None]
    facts = (*plain, q_pos is None, k_pos is None, q.shape[2], k.shape[2], str(q.device))
    for kept in list(_kept):
        if not kept.alive():
            _kept.remove(kept)
        elif kept.is_of(facts, tensors):
            return copy(kept.blocks), kept.seen
    with torch.no_grad():
        blocks, seen = _make(mask, *places(q, k, q_pos, k_pos), rows=q.shape[0] if tensors else 1)
    of = tuple((weakref.ref(t), _version(t)) for t in tensors)
    kept = Kept(facts, of, blocks, seen if tensors else None)  # without tensors each key is seen from its own place
    _kept.append(kept)
    return copy(blocks), kept.seen


def _make(mask: Mask, q_pos: Tensor, k_pos: Tensor, rows: int) -> tuple[Any, Bool[Tensor, "B S"]]:
    """One row of blocks after the other, so that no more than that of the whole matrix is ever there."""
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys = q_pos.shape[1], k_pos.shape[1]
    seen = torch.zeros(rows, keys, dtype=torch.bool, device=q_pos.device)
    some, every = [], []
    for start in range(0, queries, BLOCK):
        part = slice(start, min(start + BLOCK, queries))
        allowed = part_of(mask, part, slice(0, keys)).allows(q_pos[:, part], k_pos)
        allowed = allowed.expand(rows, part.stop - start, keys)
        seen |= allowed.any(1)
        filled = F.pad(allowed, (0, -keys % BLOCK, 0, start + BLOCK - part.stop)).unflatten(-1, (-1, BLOCK))
        some.append(filled.any(-1).any(1))
        every.append(filled.all(-1).all(1))
    whole = torch.stack(every, 1)
    partly = torch.stack(some, 1) & ~whole
    blocks = BlockMask.from_kv_blocks(
        *_ordered(partly), *_ordered(whole), BLOCK_SIZE=BLOCK, seq_lengths=(queries, keys)
    )
    return blocks, seen


def _ordered(blocks: Bool[Tensor, "B Q K"]) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which; those first, in order."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _made_of(mask: Mask) -> tuple[list[object], list[Tensor]]:
    """The plain facts of a mask, and its tensors in an order that the plain facts fix."""
    plain: list[object] = []
    tensors: list[Tensor] = []
    for field in (mask.causal, mask.prefix, mask.window, mask.sinks, mask.globals, mask.valid, mask.segments):
        plain.append("tensor" if isinstance(field, Tensor) else field)
        tensors += [field] if isinstance(field, Tensor) else []
    plain.append(mask.key_segments is not None)
    tensors += [mask.key_segments] if mask.key_segments is not None else []
    for other in mask.also:
        more, further = _made_of(other)
        plain.append(tuple(more))
        tensors += further
    return plain, tensors


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


@cache
def _compiled(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False if device == "cpu" else None)


@cache
def _compilers() -> tuple[bool, bool]:
    """Whether there is one for the GPU and one for the CPU."""
    return find_spec("triton") is not None, any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


def _unable(call: Call) -> str:
    """Why it does not run on this machine."""
    for_gpu, for_cpu = _compilers()
    if call.device == "cuda":
        return "" if for_gpu else "FlexAttention on a GPU needs Triton; `pip install triton`"
    if call.device != "cpu":
        return f"FlexAttention is for CUDA and the CPU, not for {call.device}"
    if call.gradients:
        return "FlexAttention has no way back on the CPU"
    return "" if for_cpu else "FlexAttention on the CPU needs a C++ compiler: install g++ or clang++"
