"""Folding: a window dilated by d is a plain window over every d-th token, with the global tokens in front of each run.

What Longformer needs to ask `attend` for such windows, for what global tokens see, and for masks between some tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.attend import attend
from headway.mask import Mask

Window = tuple[int | None, int | None]
HIDDEN = 200.0  # minus its square is added to a score that must not count: within fp16, and no exponential is left


class Slots(NamedTuple):
    """Where the global tokens of each row stand, padded to the most in a row; `there` is false in the rest."""

    at: Int[Tensor, "B G"]
    there: Bool[Tensor, "B G"]


class Fold:
    """Tokens as `every` rows of every `every`-th token, the global ones in front of each row, where there are some.

    In front, as sinks, they are seen from every row; behind, as ordinary keys, they are hidden, so as to count once.
    """

    def __init__(self, rows: int, length: int, every: int, slots: Slots | None, device: torch.device) -> None:
        self.rows, self.length, self.every, self.slots, self.device = rows, length, every, slots, device
        self.front = 0 if slots is None else slots.at.shape[1]

    def __call__(self, t: Tensor) -> Tensor:
        """B H T D -> (B every) H (G + T / every) D"""
        lack = -self.length % self.every
        steps = F.pad(t, (0, 0, 0, lack)) if lack else t
        steps = steps.unflatten(2, (-1, self.every)).permute(0, 3, 1, 2, 4)
        if self.slots is not None:
            first = take(t.transpose(1, 2), self.slots.at).transpose(1, 2)
            steps = torch.cat([first[:, None].expand(-1, self.every, -1, -1, -1), steps], 3)
        return steps.flatten(0, 1)

    def back(self, t: Tensor) -> Tensor:
        """(B every) H (G + T / every) D -> B H T D"""
        steps = t[:, :, self.front :].unflatten(0, (-1, self.every)).permute(0, 3, 1, 2, 4)
        return steps.flatten(1, 2)[:, : self.length].transpose(1, 2)

    def mask(self, mask: Mask, window: tuple[int, int]) -> Mask:
        """The mask over the folded tokens, whose indices count steps."""
        valid = mask.valid
        if self.slots is not None:
            assert mask.globals is not None
            valid = ~mask.globals if valid is None else valid & ~mask.globals
        elif valid is None and self.length % self.every:
            valid = torch.ones(self.rows, self.length, dtype=torch.bool, device=self.device)
        folded = self._lowered(replace(mask, valid=valid, globals=None))
        if self.slots is not None:
            assert folded.valid is not None
            folded.valid[:, : self.front] = self.slots.there.repeat_interleave(self.every, 0)
        return replace(folded, window=narrower(folded.window, window), sinks=self.front)

    def _lowered(self, mask: Mask) -> Mask:
        """Each fact in steps; the ends of a window are rounded down to whole ones."""
        left, right = mask.window or (None, None)
        whole = lambda side: None if side is None else side // self.every
        return replace(
            mask,
            window=None if mask.window is None else (whole(left), whole(right)),
            sinks=0 if mask.window is None else self.front,
            globals=self._flat(mask.globals),
            valid=self._flat(mask.valid),
            segments=self._flat(mask.segments),
            key_segments=self._flat(mask.key_segments),
            also=tuple(self._lowered(other) for other in mask.also),
        )

    def _flat(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else self(t[:, None, :, None])[:, 0, :, 0]


def with_global_rows(y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, slots: Slots) -> Tensor:
    """`y` with what the global tokens see of all; `q` are their queries."""
    over_all = replace(cut(mask, slots.at, None), window=None, globals=None)
    q_pos, k_pos = slots.at, torch.arange(k.shape[2], device=k.device).expand(len(k), -1)
    if over_all.facts & {"causal", "window"}:
        rows = attend(q, k, v, over_all, q_pos=q_pos, k_pos=k_pos)
    else:
        rows = attend(q, k, v, over_all)
    index = slots.at[:, None, :, None].expand_as(rows)
    return y.scatter(2, index, torch.where(slots.there[:, None, :, None], rows, y.gather(2, index)))


def hiding(mask: Mask, slots: Slots, length: int) -> tuple[Float[Tensor, "B T G"], Float[Tensor, "B T G"]]:
    """Features beside queries and keys, one a slot, whose product hides from a query the global tokens that it must
    not see (later ones under a causal mask) and is 0 for all others."""
    places = torch.arange(length, device=slots.at.device)[None]
    hidden = ~cut(mask, None, slots.at).allows(places, slots.at)
    marks = (slots.at[:, None] == places[..., None]) & slots.there[:, None]
    return HIDDEN * hidden.expand_as(marks), -HIDDEN * marks


def by_index(mask: Mask, pos: Tensor) -> Mask:
    """The same mask over indices. Within a sequence they rise as positions do, so that only flags need translation;
    each tensor gets all rows."""
    each = lambda t: None if t is None else t.expand(pos.shape[0], -1)
    return replace(
        mask,
        globals=None if mask.globals is None else mask.is_global(pos),
        valid=each(mask.valid),
        segments=each(mask.segments),
        key_segments=each(mask.key_segments),
        also=tuple(by_index(other, pos) for other in mask.also),
    )


def slots_of(flags: Bool[Tensor, "B T"]) -> Slots | None:
    size = int(flags.sum(1).max())  # the one question to a tensor's values
    if size == 0:
        return None
    index = flags.int().argsort(dim=1, descending=True, stable=True)[:, :size]
    return Slots(index, flags.gather(1, index))


def cut(mask: Mask, queries: Tensor | None, keys: Tensor | None) -> Mask:
    """The mask between the tokens at these indices, all where None."""
    theirs = mask.segments if mask.key_segments is None else mask.key_segments
    return replace(
        mask,
        valid=take(mask.valid, keys),
        segments=take(mask.segments, queries),
        key_segments=take(theirs, keys),
        also=tuple(cut(other, queries, keys) for other in mask.also),
    )


def take(t: Tensor | None, index: Tensor | None) -> Any:
    """Each row's entries at `index`."""
    if t is None or index is None:
        return t
    return t.gather(1, index.view(*index.shape, *(1,) * (t.ndim - 2)).expand(*index.shape, *t.shape[2:]))


def beside(t: Float[Tensor, "B H T D"], features: Float[Tensor, "B T G"]) -> Float[Tensor, "B H T E"]:
    return torch.cat([t, features[:, None].expand(-1, t.shape[1], -1, -1).to(t.dtype)], -1)


def narrower(mask: Window | None, own: tuple[int, int]) -> Window | None:
    """Both are relaxed by the same global tokens, so that they merge."""
    return (Mask(window=mask) & Mask(window=own)).window
