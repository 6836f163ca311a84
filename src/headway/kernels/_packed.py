"""Packed sequences side by side in a row: each by itself through PyTorch's fused kernels, without a mask.

A row of sequences of n_1, n_2, ... tokens costs sum n_i^2 so, and (sum n_i)^2 under a dense mask. Neighbours of one
length go together. Where the sequences stand is read off the segments, which on a GPU would stall it: for a CPU only.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from headway.mask import Mask


def fits(mask: Mask, queries: int, keys: int, bias: bool, device: str) -> bool:
    """Whether a mask tells packed sequences apart and asks for nothing that would need to be dense."""
    plain = mask.facts <= {"causal", "bidirectional", "segments"} and not mask.also and mask.key_segments is None
    own = mask.segments is not None and queries == keys and not bias
    return plain and own and device == "cpu" and not torch.compiler.is_compiling()


def lengths(
    mask: Mask, q_pos: Int[Tensor, "#B T"] | None, k_pos: Int[Tensor, "#B T"] | None, rows: int
) -> list[list[int]] | None:
    """How long the sequences of each row are; None where one is in pieces, or has padding or a gap within."""
    assert mask.segments is not None
    segments = mask.segments.expand(rows, -1)
    if k_pos is not None or q_pos is not None:
        if k_pos is None or bool((k_pos < 0).any()):
            return None
        if mask.causal:
            within = segments[:, 1:] == segments[:, :-1]
            same = q_pos is k_pos or (q_pos is not None and torch.equal(q_pos, k_pos))
            if not same or bool(((k_pos.diff(dim=1) != 1) & within).any()):
                return None
    found = [torch.unique_consecutive(row, return_counts=True) for row in segments]
    if any(len(names.unique()) < len(names) for names, _ in found):
        return None
    return [counts.tolist() for _, counts in found]


def run(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: list[list[int]], scale: float, dropout: float
) -> Tensor:
    """As `attend`, for rows that consist of sequences of these lengths."""
    grouped = q.shape[1] != k.shape[1]
    rows = []
    for i, counts in enumerate(lengths):
        runs = [(length, len(list(same))) for length, same in groupby(counts)]
        parts = zip(*(t[i].split([length * count for length, count in runs], 1) for t in (q, k, v)), strict=True)
        row = []
        for (length, count), part in zip(runs, parts, strict=True):
            a, b, c = (t.unflatten(1, (count, length)).transpose(0, 1) for t in part)  # count H length D
            y = F.scaled_dot_product_attention(
                a, b, c, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
            )
            row.append(y.transpose(1, 2).flatten(0, 1))  # tokens first, as the map behind it reads them
        rows.append(torch.cat(row).transpose(0, 1))
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)
