"""PyTorch's fused kernels; the mask is lowered to nothing, to `is_causal`, or to a dense boolean of B x T x S.

Packed sequences are taken one by one on a CPU, so that none pays for its neighbours (`_packed`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import Call, _packed, places
from headway.mask import Mask

SHORT = 512  # queries, and keys, up to which three products beat the fused way back in bf16
PIECES = 256  # and up to which they do where sequences are packed


def refuses(call: Call) -> str:
    return "PyTorch's kernels have no logit soft-cap" if call.softcap else ""


def pays(call: Call) -> str:
    if free(call.mask, call.positions, call.bias):
        return "is_causal, queries and keys start together" if call.mask.causal else "no mask is needed"
    if _packed.fits(call.mask, call.queries, call.keys, call.bias, call.device):
        return "packed sequences one by one, where each stands in one piece"
    asked = call.mask.facts - {"bidirectional"}
    asked |= {name for name in ("positions", "bias") if getattr(call, name)}
    return f"the mask is lowered to a dense one of {call.queries} x {call.keys}, because of {', '.join(sorted(asked))}"


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
    grouped, unfused = q.shape[1] != k.shape[1], _slow_back(q, k, v) and not dropout
    positions = q_pos is not None or k_pos is not None
    if bias is not None and not mask.causal and free(mask, positions, False):  # it hides nothing
        if unfused:
            return _unfused(q, k, v, bias.to(q.dtype), scale)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
    if free(mask, positions, bias is not None):
        if unfused:
            seen = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask.causal else None
            return _unfused(q, k, v, seen, scale)
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=mask.causal, scale=scale, enable_gqa=grouped
        )
    packed = (not unfused or q.shape[2] > PIECES) and _packed.fits(
        mask, q.shape[2], k.shape[2], bias is not None, q.device.type
    )
    if packed and (lengths := _packed.lengths(mask, q_pos, k_pos, q.shape[0])) is not None:
        return _packed.run(q, k, v, mask.causal, lengths, scale, dropout)
    allowed = mask.allows(*places(q, k, q_pos, k_pos))[:, None]  # B 1 T S, or B 1 1 S where queries do not differ
    unseen = ~allowed.any(-2)[..., None]
    k, v = (t.masked_fill(unseen, 0.0) for t in (k, v))
    alive = allowed.any(-1, keepdim=True)
    lowered = allowed | ~alive
    if bias is not None:
        lowered = torch.where(lowered, bias, float("-inf")).to(q.dtype)
    if unfused:
        return _unfused(q, k, v, lowered, scale).masked_fill(~alive, 0.0)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=lowered, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    return y.masked_fill(~alive, 0.0)


def free(mask: Mask, positions: bool, bias: bool) -> bool:
    """Whether PyTorch can do without a dense mask."""
    return not positions and not bias and mask.facts <= {"causal", "bidirectional"}


def _slow_back(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the fused way back loses: on a CPU in bf16 (torch 2.13) it takes up to 8x what it does in fp32."""
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return trains and q.dtype == torch.bfloat16 and q.device.type == "cpu" and max(q.shape[2], k.shape[2]) <= SHORT


def _unfused(q: Tensor, k: Tensor, v: Tensor, lowered: Tensor | None, scale: float) -> Tensor:
    """`lowered` is the mask as PyTorch takes it: true where a query may look, or what is added to the scores."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if lowered is not None and lowered.ndim == 2 and lowered.dtype == torch.bool:  # the same for all: in one call
        hidden = torch.zeros_like(lowered, dtype=q.dtype).masked_fill(~lowered, float("-inf"))
        scores = torch.baddbmm(hidden, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
        return (scores.softmax(-1) @ v.flatten(0, 1)).view(*q.shape[:3], v.shape[-1])
    scores = (q @ k.mT) * scale
    if lowered is not None and lowered.dtype == torch.bool:
        scores = scores.masked_fill(~lowered, float("-inf"))
    elif lowered is not None:
        scores = scores + lowered
    return scores.softmax(-1) @ v
