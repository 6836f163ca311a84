"""Masks and positions as Hypothesis draws them, for the tests of the mask and of attention."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from headway.mask import Mask


def integers(draw: st.DrawFn, rows: int, columns: int, least: int, most: int) -> Tensor:
    size = rows * columns
    drawn = draw(st.lists(st.integers(least, most), min_size=size, max_size=size))
    return torch.tensor(drawn, dtype=torch.long).view(rows, columns)


@st.composite
def masks(draw: st.DrawFn, rows: int, queries: int, keys: int) -> Mask:
    """Any mask at all; each field is there or not."""
    asked = draw(st.sets(st.sampled_from(["causal", "prefix", "window", "sinks", "globals", "valid", "segments"])))
    fields: dict[str, Any] = {"causal": "causal" in asked}
    if {"causal", "prefix"} <= asked:
        one = draw(st.integers(0, 6))
        fields["prefix"] = draw(st.sampled_from([one, integers(draw, rows, 1, 0, 6)[:, 0]]))
    if "window" in asked:
        side = st.none() | st.integers(0, 3)
        fields["window"] = (draw(side), draw(side))
        if "sinks" in asked:
            fields["sinks"] = draw(st.integers(1, 3))
        if "globals" in asked:
            fields["globals"] = integers(draw, rows, draw(st.integers(1, 8)), 0, 1).bool()
    if "valid" in asked:
        fields["valid"] = integers(draw, rows, keys, 0, 1).bool()
    if "segments" in asked:
        fields["segments"] = integers(draw, rows, queries, 0, 2)
        if queries != keys or draw(st.booleans()):
            fields["key_segments"] = integers(draw, rows, keys, 0, 2)
    return Mask(**fields)


@st.composite
def scenes(draw: st.DrawFn, count: int = 1) -> tuple[list[Mask], Tensor, Tensor]:
    """Masks, and the positions of queries and keys, which need not count up and may be -1."""
    rows, queries, keys = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    drawn = [draw(masks(rows, queries, keys)) for _ in range(count)]
    return drawn, integers(draw, rows, queries, -1, 7), integers(draw, rows, keys, -1, 7)
