"""Our own FlashAttention, in Triton (2205.14135, 2307.08691): what a call is lowered to before the kernels run.

Causal and window are two numbers, how far a query sees back and forth; padding is a key at position -1. Where positions
are given, each tile's least and greatest tell, on the device, which tiles can meet at all: no promise is needed.
The kernels are in `_flash_triton.py`, which needs Triton and is imported when first used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels import Call, places
from headway.mask import Mask

CAN = {"causal", "bidirectional", "window", "padding", "segments"}
WIDEST = 128  # of a head
LONG = 1024  # from here on a dense mask is what costs
FAR = 2**30  # beyond any position


def refuses(call: Call) -> str:
    if why := _unable(call.device):
        return why
    if more := sorted(call.mask.facts - CAN) or (["two masks that do not merge"] if call.mask.also else []):
        return f"its kernels know no {', '.join(more)}"
    if more := [name for name in ("bias", "softcap", "dropout") if getattr(call, name)]:
        return f"its kernels know no {', '.join(more)}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32, and the call is in {str(call.dtype).removeprefix('torch.')}"
    if call.head_dim != call.value_dim or call.head_dim > WIDEST:
        return f"its heads are up to {WIDEST} wide, values as queries, not {call.head_dim} and {call.value_dim}"
    return "" if call.rows and call.queries and call.keys else "there is nothing to compute"


def pays(call: Call) -> str:
    """Not measured on a GPU yet: it is left to PyTorch's own flash kernels wherever these need no dense mask."""
    dense = call.positions or not call.mask.facts <= {"causal", "bidirectional"}
    if call.device != "cuda" or not dense or min(call.queries, call.keys) < LONG:
        return ""
    return f"PyTorch would need a dense mask of {call.queries} x {call.keys}"


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
    from headway.kernels._flash_triton import GRAIN

    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return Flash.apply(q, k, v, plan_of(q, k, mask, q_pos, k_pos, scale, GRAIN))


@dataclass(frozen=True)
class Plan:
    """What the kernels need to know besides queries, keys and values.

    back, forth: how far a query sees, None is all the way. q_at, k_at: positions, -1 where a key is not there; None
    where they are indices. q_edges, k_edges: for each `grain` tokens, the first and the last index they may meet.
    holes: there may be keys, not at -1, that no query sees.
    """

    scale: float
    back: int | None
    forth: int | None
    q_at: Int[Tensor, "B T"] | None = None
    k_at: Int[Tensor, "B S"] | None = None
    q_segments: Int[Tensor, "B T"] | None = None
    k_segments: Int[Tensor, "B S"] | None = None
    q_edges: Int[Tensor, "B 2 Q"] | None = None
    k_edges: Int[Tensor, "B 2 K"] | None = None
    holes: bool = False


class Flash(torch.autograd.Function):
    """Attention by the kernels of `_flash_triton.py`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        from headway.kernels import _flash_triton

        with torch.cuda.device_of(q):
            y, logsum = _flash_triton.forward(q, k, v, plan)
        ctx.save_for_backward(q, k, v, y, logsum)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from headway.kernels import _flash_triton

        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        with torch.cuda.device_of(dy):
            q, k, v, y, logsum = ctx.saved_tensors
            return *_flash_triton.backward(dy, q, k, v, y, logsum, ctx.plan), None


def plan_of(
    q: Tensor, k: Tensor, mask: Mask, q_pos: Tensor | None, k_pos: Tensor | None, scale: float, grain: int
) -> Plan:
    """A mask and positions, lowered; nothing of it waits for the device."""
    back, forth = mask.window or (None, None)
    forth = 0 if mask.causal else forth  # a window reaches 0 or more forth
    if q_pos is None and k_pos is None and mask.valid is None and mask.segments is None:
        return Plan(scale, back, forth)
    one_place = q_pos is k_pos and q.shape[2] == k.shape[2] and mask.key_segments is None  # each key sees itself
    rows = q.shape[0]
    q_at, k_at = (t.expand(rows, -1).int().contiguous() for t in places(q, k, q_pos, k_pos))
    if mask.valid is not None:
        k_at = torch.where(mask.valid, k_at, -1).contiguous()
    q_segments = k_segments = None
    if mask.segments is not None:
        of_keys = mask.segments if mask.key_segments is None else mask.key_segments
        q_segments, k_segments = (t.expand(rows, -1).int().contiguous() for t in (mask.segments, of_keys))
    meet = may_meet(q_at, k_at, q_segments, k_segments, back, forth, grain)
    edges = edges_of(meet, grain, k_at.shape[1]), edges_of(meet.mT, grain, q_at.shape[1])
    return Plan(scale, back, forth, q_at, k_at, q_segments, k_segments, *edges, holes=not one_place)


def may_meet(
    q_at: Int[Tensor, "B T"],
    k_at: Int[Tensor, "B S"],
    q_segments: Int[Tensor, "B T"] | None,
    k_segments: Int[Tensor, "B S"] | None,
    back: int | None,
    forth: int | None,
    grain: int,
) -> Bool[Tensor, "B Q K"]:
    """False where no query among these `grain` sees a key among those, judged by the least and greatest of each."""
    q_least, q_most = _ends(q_at, grain)
    k_least, k_most = _ends(k_at.masked_fill(k_at < 0, FAR), grain)[0], _ends(k_at, grain)[1]
    meet = (k_most >= 0)[:, None, :].expand(-1, q_least.shape[1], -1)
    if back is not None:
        meet = meet & (k_most[:, None, :] >= q_least[:, :, None] - min(back, FAR))
    if forth is not None:
        meet = meet & (k_least[:, None, :] <= q_most[:, :, None] + min(forth, FAR))
    if q_segments is not None and k_segments is not None:
        (q_least, q_most), (k_least, k_most) = _ends(q_segments, grain), _ends(k_segments, grain)
        meet = meet & (k_least[:, None, :] <= q_most[:, :, None]) & (k_most[:, None, :] >= q_least[:, :, None])
    return meet


def edges_of(meet: Bool[Tensor, "B Q K"], grain: int, length: int) -> Int[Tensor, "B 2 Q"]:
    """The first index that each of Q may meet, and the one behind the last, of `length`; where none, an empty range."""
    at = torch.arange(meet.shape[2], dtype=torch.int32, device=meet.device)
    first = torch.where(meet, at, meet.shape[2]).amin(-1)
    behind = torch.where(meet, at + 1, 0).amax(-1)
    return torch.stack([first, behind], 1).mul(grain).clamp(max=length).int()


def _ends(at: Int[Tensor, "B T"], grain: int) -> tuple[Int[Tensor, "B Q"], Int[Tensor, "B Q"]]:
    """The least and the greatest of each `grain` tokens."""
    short = -at.shape[1] % grain
    least, most = (F.pad(at, (0, short), value=value).unflatten(1, (-1, grain)) for value in (FAR, -FAR))
    return least.amin(-1), most.amax(-1)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _too_old() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"its kernels need compute capability 8.0, and this GPU has {major}.{minor}" if major < 8 else ""


def _unable(device: str) -> str:
    """Why it does not run on this machine."""
    if not _has_triton():
        return "Triton is not installed; `pip install triton`"
    if device == "cuda":
        return _too_old()
    if device != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU, or TRITON_INTERPRET=1"
    return ""
