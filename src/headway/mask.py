"""Mask: a frozen value that says who may see whom.

One definition, `allows(q_pos, k_pos)`, written on *positions*; is_causal flags, block lists and dense booleans are
lowerings of it, made as late as possible by `attend`. Padding and an empty cache slot are one thing: `k_pos = -1`.
Written on positions rather than on indices, a mask stays right with a cache (SDPA's `is_causal` does not).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Mask:
    """Who may see whom. Masks combine with `&`: a pair is visible where both masks allow it.

    causal: a query sees no key behind its own position.
    prefix: relaxes `causal`: keys at positions below it are visible to all (one number, or one a row, `Int[B]`).
    window: (left, right), how far a query sees to either side of itself; None is unbounded.
    sinks: relaxes `window`: keys at positions below it stay visible (arXiv 2309.17453).
    globals: relaxes `window`: `Bool[B N]`, true where the token at that position sees and is seen by all (2004.05150).
    valid: `Bool[B S]`, false where a key is padding.
    segments: `Int[B T]`, packed sequences; a query sees keys of its own segment. `key_segments` where keys differ.
    """

    causal: bool = False
    prefix: int | Int[Tensor, " B"] = 0
    window: tuple[int | None, int | None] | None = None
    sinks: int = 0
    globals: Bool[Tensor, "B N"] | None = None
    valid: Bool[Tensor, "B S"] | None = None
    segments: Int[Tensor, "B T"] | None = None
    key_segments: Int[Tensor, "B S"] | None = None
    also: tuple[Mask, ...] = ()  # further masks that must allow too, where two do not merge into one

    def __post_init__(self) -> None:
        if (isinstance(self.prefix, Tensor) or self.prefix) and not self.causal:
            raise ValueError("Mask: prefix relaxes causal, and this mask is not causal; add causal=True")
        if (self.sinks or self.globals is not None) and self.window is None:
            raise ValueError("Mask: sinks and globals relax a window, and this mask has none; add window=(left, right)")
        if self.window is not None and any(side is not None and side < 0 for side in self.window):
            raise ValueError(f"Mask: a window reaches 0 or more tokens to either side, not {self.window}")
        if self.key_segments is not None and self.segments is None:
            raise ValueError("Mask: key_segments say where the keys belong; say where the queries do with segments=")

    def __and__(self, other: Mask) -> Mask:
        """What both allow. Facts merge where the merged fact is exact; one that does not is kept beside the rest."""
        beside = self.also + other.also
        near, far = (self, other) if self.window is not None else (other, self)
        window = _narrower(near.window, far.window)
        if far.window is not None and (_relaxed(near) or _relaxed(far)):
            window = near.window
            beside += (Mask(window=far.window, sinks=far.sinks, globals=far.globals),)
        packed, apart = (self, other) if self.segments is not None else (other, self)
        if apart.segments is not None:
            beside += (Mask(segments=apart.segments, key_segments=apart.key_segments),)
        return Mask(
            causal=self.causal or other.causal,
            prefix=_least_prefix(self, other),
            window=window,
            sinks=near.sinks,
            globals=near.globals,
            valid=_both(self.valid, other.valid),
            segments=packed.segments,
            key_segments=packed.key_segments,
            also=beside,
        )

    @cached_property
    def facts(self) -> frozenset[str]:
        """What this mask asks for, in the words of a mixer's `CAN`; known without looking at a tensor."""
        asked = {"causal" if self.causal else "bidirectional"}
        asked |= {"prefix"} if isinstance(self.prefix, Tensor) or self.prefix else set()
        asked |= {"window"} if self.window is not None else set()
        asked |= {"sinks"} if self.sinks else set()
        asked |= {"globals"} if self.globals is not None else set()
        asked |= {"padding"} if self.valid is not None else set()
        asked |= {"segments"} if self.segments is not None else set()
        for other in self.also:
            asked |= other.facts - {"bidirectional"}
        return frozenset(asked - {"bidirectional"} if "causal" in asked else asked)

    def allows(self, q_pos: Int[Tensor, "#B T"], k_pos: Int[Tensor, "#B S"]) -> Bool[Tensor, "#B #T S"]:
        """The definition: true where the query at `q_pos` may see the key at `k_pos`; never for `k_pos = -1`."""
        q, k = q_pos[:, :, None], k_pos[:, None, :]
        allowed = k >= 0
        if self.valid is not None:
            allowed = allowed & self.valid[:, None, :]
        if self.causal:
            prefix = self.prefix[:, None, None] if isinstance(self.prefix, Tensor) else self.prefix
            allowed = allowed & ((k <= q) | (k < prefix))
        if self.window is not None:
            allowed = allowed & self._near(q_pos, k_pos)
        if self.segments is not None:
            keys = self.segments if self.key_segments is None else self.key_segments
            allowed = allowed & (self.segments[:, :, None] == keys[:, None, :])
        for other in self.also:
            allowed = allowed & other.allows(q_pos, k_pos)
        return allowed

    def queries(self, rows: slice) -> Mask:
        """The mask of these queries alone, by index, over all keys."""
        if self.segments is None and not self.also:
            return self
        theirs = self.segments if self.key_segments is None else self.key_segments
        own = None if self.segments is None else self.segments[:, rows]
        return replace(self, segments=own, key_segments=theirs, also=tuple(other.queries(rows) for other in self.also))

    def of(self, row: int) -> Mask:
        """The mask of one row of the batch."""
        one = lambda t: t[row : row + 1] if isinstance(t, Tensor) and len(t) > 1 else t
        names = ("prefix", "globals", "valid", "segments", "key_segments")
        own: dict[str, Any] = {name: one(getattr(self, name)) for name in names}
        return replace(self, **own, also=tuple(other.of(row) for other in self.also))

    def _near(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        assert self.window is not None
        left, right = self.window
        q, k = q_pos[:, :, None], k_pos[:, None, :]
        near = torch.ones_like(k, dtype=torch.bool)
        if left is not None:
            near = near & (k >= q - left)
        if right is not None:
            near = near & (k <= q + right)
        if self.sinks:
            near = near | ((k >= 0) & (k < self.sinks))
        if self.globals is not None:
            near = near | self.is_global(q_pos)[:, :, None] | self.is_global(k_pos)[:, None, :]
        return near

    def is_global(self, pos: Int[Tensor, "#B T"]) -> Bool[Tensor, "#B T"]:
        """True where a token at that position is global."""
        assert self.globals is not None
        rows, known = self.globals.shape
        flags = self.globals.expand(max(rows, pos.shape[0]), known)
        pos = pos.expand(flags.shape[0], pos.shape[1])
        return flags.gather(1, pos.clamp(0, known - 1)) & (pos >= 0) & (pos < known)


def _relaxed(mask: Mask) -> bool:
    return bool(mask.sinks) or mask.globals is not None


def _both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    if one is None or two is None:
        return two if one is None else one
    return one & two


def _least_prefix(one: Mask, two: Mask) -> int | Tensor:
    """A mask that is not causal does not bound the prefix; of two causal masks the shorter prefix holds."""
    if not (one.causal and two.causal):
        return one.prefix if one.causal else two.prefix
    if isinstance(one.prefix, Tensor) or isinstance(two.prefix, Tensor):
        device = next(p.device for p in (one.prefix, two.prefix) if isinstance(p, Tensor))
        return torch.minimum(torch.as_tensor(one.prefix, device=device), torch.as_tensor(two.prefix, device=device))
    return min(one.prefix, two.prefix)


def _narrower(
    one: tuple[int | None, int | None] | None, two: tuple[int | None, int | None] | None
) -> tuple[int | None, int | None] | None:
    if one is None or two is None:
        return two if one is None else one

    def least(a: int | None, b: int | None) -> int | None:
        return min((side for side in (a, b) if side is not None), default=None)

    return least(one[0], two[0]), least(one[1], two[1])
