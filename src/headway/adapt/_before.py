"""What adapters put before all tokens: positions move up by as many, and masks let everyone see it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from headway.block import States
from headway.mask import Mask
from headway.state import KeyValue, Ring


def moved(pos: Int[Tensor, "B T"], count: int) -> Int[Tensor, "B T"]:
    """Positions behind `count` further tokens; padding stays at -1."""
    one = pos[:1] if pos.stride(0) == 0 else pos  # rows that are one row expanded stay so: a bias by distance is shared
    return torch.where(one >= 0, one + count, one).expand(pos.shape)


def widened(mask: Mask, count: int, who: str) -> Mask:
    """The mask of tokens that stand behind `count` others, which all may see."""
    if mask.segments is not None:
        raise ValueError(f"{who}: sequences that are packed into one row cannot each have {count} tokens of their own "
                         "before them: train without packing")  # fmt: skip
    pad = lambda flags: None if flags is None else F.pad(flags, (count, 0), value=True)
    prefixed = isinstance(mask.prefix, Tensor) or mask.prefix
    changed: dict[str, Any] = {
        "valid": pad(mask.valid),
        "globals": pad(mask.globals),
        "prefix": mask.prefix + count if prefixed else 0,
        "sinks": mask.sinks + count if mask.sinks else 0,
        "also": tuple(widened(other, count, who) for other in mask.also),
    }
    return replace(mask, **changed)


def begins(states: States, who: str) -> bool:
    """Whether a stream has seen no token yet."""
    found = [mixer for mixer, _ in states if isinstance(mixer, KeyValue | Ring)]
    if not found:
        raise ValueError(f"{who}: no layer of this stream counts the tokens it has seen (attention does), so that none "
                         "could stand before them: read the whole text at once")  # fmt: skip
    return found[0].length == 0
