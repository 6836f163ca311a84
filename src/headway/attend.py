"""Exact attention: softmax(q k^T * scale + bias, over what the mask allows) v (arXiv 1706.03762).

`reference` is the definition, a dozen lines. Every other backend must equal it, gradients included; the fastest legal
one is the default, chosen from facts known on the Python side (no device sync), and `explain` says which and why.
Letters, here and everywhere: B batch, T queries, S keys, H heads, G key/value heads, D head width, C model width,
V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from headway.mask import Mask

FULL = Mask()


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S E"],
    mask: Mask = FULL,
    *,
    q_pos: Int[Tensor, "B T"] | None = None,
    k_pos: Int[Tensor, "B S"] | None = None,
    bias: Float[Tensor, "#B #H T S"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Float[Tensor, "B H T E"]:
    """Exact attention with the fastest legal backend; heads in groups share keys and values (1911.02150, 2305.13245).

    Positions are 0, 1, 2, ... where not given; a key at -1 is seen by nobody. A query that may see nothing gives
    zeros. `scale` is 1/sqrt(D) where not given; `bias` is added to the scaled scores.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attend: {q.shape[1]} query heads do not share {k.shape[1]} key/value heads evenly")
    chosen = backend or "sdpa"
    if chosen not in BACKENDS:
        raise ValueError(f"attend: no backend '{chosen}'; there is {', '.join(BACKENDS)}")
    compares = ", ".join(sorted(mask.facts & {"causal", "window"}))
    if compares and (q_pos is None) != (k_pos is None):
        raise ValueError(f"attend: a {compares} mask compares positions: give q_pos and k_pos, or neither")
    if compares and q_pos is None and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attend: {q.shape[2]} queries and {k.shape[2]} keys under a {compares} mask need q_pos and k_pos"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[chosen](q, k, v, mask, q_pos, k_pos, bias, scale, dropout)


def explain(mask: Mask = FULL, *, positions: bool = False, bias: bool = False) -> str:
    """Which backend `attend` takes for such a call, how it lowers the mask, and why.

    `positions`: whether q_pos and k_pos are given, as they are with a cache or padding.
    """
    if mask.facts == {"bidirectional"} and not positions and not bias:
        return "sdpa: no mask is needed, PyTorch's flash kernel runs free"
    if mask.facts == {"causal"} and not positions and not bias:
        return "sdpa: is_causal, queries and keys start together"
    asked = ", ".join(sorted(mask.facts | ({"positions"} if positions else set()) | ({"bias"} if bias else set())))
    return f"sdpa: lowered to a dense mask of B x T x S, because of {asked}"


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """The definition. What nobody may look at (NaN, say) is zeroed first, so that it never leaks, backward included."""
    allowed = mask.allows(*_positions(q, k, q_pos, k_pos)).expand(-1, q.shape[2], -1)[:, None]  # B 1 T S
    seen = allowed.any(-2)[..., None]
    k, v = (torch.where(seen, t, 0).repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    alive = allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed, float("-inf")).masked_fill(~alive, 0.0)
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ v).masked_fill(~alive, 0.0)


def weights(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    mask: Mask = FULL,
    *,
    q_pos: Int[Tensor, "B T"] | None = None,
    k_pos: Int[Tensor, "B S"] | None = None,
    bias: Float[Tensor, "#B #H T S"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """The attention map itself: the reference with an identity for values, so that map @ v is the output."""
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(k.shape[0], k.shape[1], -1, -1)
    return attend(q, k, eye, mask, q_pos=q_pos, k_pos=k_pos, bias=bias, scale=scale, backend="reference")


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """PyTorch's fused kernels; the mask is lowered to nothing, to `is_causal`, or to a dense boolean."""
    grouped = q.shape[1] != k.shape[1]
    free = bias is None and q_pos is None and k_pos is None and mask.facts <= {"causal", "bidirectional"}
    if free:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal="causal" in mask.facts, scale=scale, enable_gqa=grouped
        )
    allowed = mask.allows(*_positions(q, k, q_pos, k_pos))[:, None]  # B 1 T S, or B 1 1 S where queries do not differ
    unseen = ~allowed.any(-2)[..., None]
    k, v = (t.masked_fill(unseen, 0.0) for t in (k, v))
    alive = allowed.any(-1, keepdim=True)
    lowered = allowed | ~alive
    if bias is not None:
        lowered = torch.where(lowered, bias, float("-inf")).to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=lowered, dropout_p=dropout, scale=scale, enable_gqa=grouped)
    return y.masked_fill(~alive, 0.0)


def _positions(q: Tensor, k: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> tuple[Tensor, Tensor]:
    q_pos = torch.arange(q.shape[2], device=q.device)[None] if q_pos is None else q_pos
    k_pos = torch.arange(k.shape[2], device=k.device)[None] if k_pos is None else k_pos
    return q_pos, k_pos


BACKENDS = {"reference": reference, "sdpa": sdpa}
