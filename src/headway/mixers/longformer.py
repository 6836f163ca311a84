"""Longformer: a token sees a window around itself, dilated or not; a few global tokens see all and are seen by all.

y_t = softmax(q_t K_N^T / sqrt(D)) V_N, N = {t + d j: -left <= j <= right} and the global tokens (arXiv 2004.05150);
for a global token N is everything, and it may look with a query, keys and values of its own. A window dilated by d is
a plain window over every d-th token, so all of it runs on `attend`, in memory that grows with tokens x window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.attend import Glance, attend, kept_bytes
from headway.kernels import Call
from headway.layers import residual_output
from headway.mask import Mask
from headway.mixers import Cost, Mixer
from headway.mixers._folded import Fold, Slots, beside, by_index, hiding, narrower, slots_of, take, with_global_rows
from headway.positions import Positions
from headway.spec import Size
from headway.state import Ring, State

Reach = Annotated[int, Meta(ge=0, le=2**24)]
Window = tuple[int | None, int | None]


def reference(
    mixer: Longformer, x: Float[Tensor, "B T C"], mask: Mask, pos: Int[Tensor, "B T"]
) -> Float[Tensor, "B T C"]:
    """The definition, over all pairs of tokens."""
    shares, v = mixer.map(x, mask=mask, pos=pos), mixer.project(x, pos)[2]
    y = shares @ v
    if mask.globals is not None and mixer.global_query is not None:
        is_global = mask.is_global(pos)[:, None, :, None]
        y = torch.where(is_global, shares @ mixer.project_global(x, pos, x, pos)[2], y)
    return mixer._leave(y)


class Longformer(Mixer):
    """Window attention with global tokens.

    heads, head_dim (default: width / heads), bias: of the projections, as in `attention`. window: (left, right), steps
    that a token sees to either side, or one number for both; each layer of a stack has its own. dilation: tokens a
    step, one number or one a head. global_projections: global tokens look with queries, keys and values of their own,
    as in published checkpoints; all others look at them with the ordinary ones.

    Which tokens are global the mask says: `Mask(window=(None, None), globals=...)`, by position. They relax the layer's
    window as they relax the mask's; a window of the mask narrows the layer's, and (None, None) leaves it as it is.
    Under a causal mask a global token sees its past and is seen by what comes after it.
    """

    CAN: ClassVar = frozenset({"causal", "bidirectional", "padding", "segments", "window", "globals", "stream"})

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        heads: Size = 4,
        head_dim: Size | None = None,
        bias: bool = False,
        window: Reach | tuple[Reach, ...] = 256,  # not tuple[Reach, Reach]: in a union, msgspec 0.22 crashes on it
        dilation: Size | tuple[Size, ...] = 1,
        global_projections: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"longformer: width {width} is no multiple of {heads} heads; set head_dim or other heads")
        self.dilations = (dilation,) * heads if isinstance(dilation, int) else tuple(dilation)
        if len(self.dilations) != heads:
            raise ValueError(f"longformer: {len(self.dilations)} dilations for {heads} heads: give one, or one a head")
        self.positions = positions or Positions()
        if self.positions.biases:
            scheme = type(self.positions).__name__.lower()
            raise ValueError(f"longformer: {scheme} adds to the score of every pair, which is T x T: choose rotary")
        self.width, self.heads, self.head_dim = width, heads, head_dim or width // heads
        sides = (window, window) if isinstance(window, int) else tuple(window)
        if len(sides) != 2:
            raise ValueError(f"longformer: a window has two sides, left and right, and {list(sides)} has {len(sides)}")
        self.window = (sides[0], sides[1])
        inner = heads * self.head_dim
        self.query_key = nn.Linear(width, 2 * inner, bias=bias)  # values apart: positions may replace the other two
        self.value = nn.Linear(width, inner, bias=bias)
        self.global_query, self.global_key, self.global_value = (
            nn.Linear(width, inner, bias=bias) if global_projections else None for _ in range(3)
        )
        self.out = residual_output(nn.Linear(inner, width, bias=bias))

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        self.require(mask, state, context)
        q, k, v = self.project(x, pos)
        if state is not None:
            ring = self._ring(state, mask)
            begins = ring.length == 0  # then there is no past beyond the tokens at hand
            remembered = ring.append(k, v, pos, padded=mask.valid is not None)
            if not begins:
                return self._leave(self._streamed(q, *remembered, mask, pos, ring.padded))
        mask = by_index(mask, pos)
        apart = self.global_query is not None or max(self.dilations) > 1
        slots = slots_of(mask.globals) if apart and mask.globals is not None else None
        parts = [self._near(q[:, run], k[:, run], v[:, run], every, mask, slots) for every, run in self._runs()]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if slots is not None:
            if self.global_query is not None:
                q, k, v = self.project_global(x, pos, take(x, slots.at), take(pos, slots.at))
            else:
                q = take(q.transpose(1, 2), slots.at).transpose(1, 2)
            y = with_global_rows(y, q, k, v, mask, slots)
        return self._leave(y)

    def glance(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Within:
        """What `forward` does with the same input, by the definition, taken apart: rows of its map, as wanted."""
        self.require(mask, context=context)
        q, k, v = self.project(x, pos)
        how: dict[str, Any] = {"mask": mask, "q_pos": pos, "k_pos": pos, "scale": self.head_dim**-0.5}
        far, is_global = None, torch.zeros_like(pos, dtype=torch.bool)
        if mask.globals is not None:
            is_global = mask.is_global(pos)
            if self.global_query is not None:
                far_q, far_k, far_v = self.project_global(x, pos, x, pos)
                far = Glance(q=far_q, k=far_k, v=far_v, **how)
        reach: dict[str, Any] = {"window": self.window, "dilations": self.dilations}
        return Within(q=q, k=k, v=v, **how, **reach, is_global=is_global, far=far)

    def map(self, x: Float[Tensor, "B T C"], *, mask: Mask, pos: Int[Tensor, "B T"]) -> Float[Tensor, "B H T S"]:
        """Who looks at whom, by the definition; the rows of tokens that see any sum to one."""
        return self.glance(x, mask=mask, pos=pos).rows(slice(None))

    def project(
        self, x: Float[Tensor, "B T C"], pos: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """Queries, keys and values, with their positions."""
        q, k = self.query_key(x).chunk(2, -1)
        return self._placed(q, pos), self._placed(k, pos), self._split(self.value(x))

    def project_global(
        self, x: Float[Tensor, "B T C"], pos: Int[Tensor, "B T"], x_q: Float[Tensor, "B Q C"], q_pos: Int[Tensor, "B Q"]
    ) -> tuple[Float[Tensor, "B H Q D"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """The queries of the tokens `x_q`, and the keys and values of all, that global tokens look with."""
        assert self.global_query is not None and self.global_key is not None and self.global_value is not None
        q, k, v = self.global_query(x_q), self.global_key(x), self.global_value(x)
        return self._placed(q, q_pos), self._placed(k, pos), self._split(v)

    def _split(self, projected: Tensor) -> Float[Tensor, "B H T D"]:
        return projected.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _placed(self, projected: Tensor, pos: Tensor) -> Float[Tensor, "B H T D"]:
        return self.positions.rotate(self._split(projected), pos)

    def _leave(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(2))

    def _runs(self) -> list[tuple[int, slice]]:
        """Neighbouring heads of one dilation, which are computed together."""
        runs, start = [], 0
        for every, same in groupby(self.dilations):
            stop = start + len(list(same))
            runs.append((every, slice(start, stop)))
            start = stop
        return runs

    def _near(
        self, q: Tensor, k: Tensor, v: Tensor, every: int, mask: Mask, slots: Slots | None
    ) -> Float[Tensor, "B H T D"]:
        """What tokens see in their windows and of the global tokens, for heads of one dilation."""
        every = min(every, q.shape[2])  # from there on a token has only itself in reach
        if every == 1:
            return attend(q, k, v, replace(mask, window=narrower(mask.window, self.window)))
        fold = Fold(q.shape[0], q.shape[2], every, slots, q.device)
        within, scale = fold.mask(mask, self.window), q.shape[3] ** -0.5
        if slots is None:
            return fold.back(attend(fold(q), fold(k), fold(v), within, scale=scale))
        hidden, marks = hiding(mask, slots, q.shape[2])
        q, k, v = beside(q, hidden), beside(k, marks), beside(v, 0 * marks)
        return fold.back(attend(fold(q), fold(k), fold(v), within, scale=scale))[..., : self.head_dim]

    def _ring(self, state: State, mask: Mask) -> Ring:
        """The state, where this mask can be streamed: a token can see none that is yet to come or forgotten."""
        if not isinstance(state, Ring):
            raise ValueError(f"longformer streams with a Ring, not {type(state).__name__}: use init_state")
        if not mask.causal:
            raise ValueError("longformer streams only under a causal mask: without one, tokens yet to come are seen")
        if "segments" in mask.facts:
            raise ValueError("longformer cannot stream packed segments: stream one sequence a row")
        if "globals" in mask.facts:
            raise ValueError(
                f"longformer: a stream remembers {state.window} tokens, and a global one sees all of its past: "
                "leave globals out of the mask, or call without a state"
            )
        return state

    def _streamed(
        self, q: Tensor, k: Tensor, v: Tensor, k_pos: Tensor, mask: Mask, pos: Tensor, padded: bool
    ) -> Float[Tensor, "B H T D"]:
        """What new tokens see of those remembered and of themselves."""
        (left, right), last = self.window, k.shape[2] - 1
        alone = pos.shape[1] == 1 and not padded and mask.facts == {"causal"}
        parts = []
        for every, run in self._runs():
            if alone:  # it sees every key of its own step that the window reaches, so no mask is needed
                near = slice(max(last - left * every, last % every), None, every)
                parts.append(attend(q[:, run], k[:, run, near], v[:, run, near]))
                continue
            within = replace(mask, valid=None) & Mask(window=(left * every, right * every))
            if every > 1:  # tokens that are whole steps apart are a segment
                within = within & Mask(segments=pos % every, key_segments=k_pos % every)
            parts.append(attend(q[:, run], k[:, run], v[:, run], within, q_pos=pos, k_pos=k_pos))
        return torch.cat(parts, 1)

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        if cross:
            raise ValueError("longformer reads no context: choose attention as the cross mixer")
        return Ring(self.window[0] * max(self.dilations))

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        """Without global tokens. FLOPs are those of the definition that a kernel is held to: all pairs of each
        interleaved sequence, so a dilation of d divides them by d, and a window, of which kernels make use, does not.
        """
        inner, scores, kept = self.heads * self.head_dim, 0, 0
        for dilation, run in self._runs():
            every = min(dilation, length)
            call = Call(
                mask=Mask(window=self.window),
                rows=every,
                heads=run.stop - run.start,
                kv_heads=run.stop - run.start,
                queries=-(-length // every),
                keys=-(-length // every),
                head_dim=self.head_dim,
                value_dim=self.head_dim,
                dtype=torch.float32,
                device=self.out.weight.device.type,
                gradients=True,
            )
            scores += call.rows * call.heads * call.queries * call.keys
            kept += kept_bytes(call)
        together = max(self.dilations) == 1  # else the outputs are put in order once more
        held = min(length, self.window[0] * max(self.dilations))
        return Cost(
            flops=2 * length * self.width * 4 * inner + 4 * scores * self.head_dim,
            state_bytes=held * (8 * inner + 8),
            activation_bytes=4 * length * (self.width + (4 if together else 5) * inner) + kept,
        )


@dataclass(frozen=True, kw_only=True)
class Within(Glance):
    """A call of Longformer, taken apart; `far` where global tokens look with queries of their own."""

    window: tuple[int, int]
    dilations: tuple[int, ...]
    is_global: Bool[Tensor, "B T"]
    far: Glance | None

    def of(self, row: int) -> Glance:
        return replace(super().of(row), far=None if self.far is None else self.far.of(row))  # type: ignore[call-arg]

    def scores(self, rows: slice, heads: slice) -> Float[Tensor, "B H R S"]:
        return self._with_far(super().scores(rows, heads), rows, lambda far: far.scores(rows, heads))

    def pulled(self, of_output: Float[Tensor, "B H T E"], rows: slice, heads: slice) -> Float[Tensor, "B H R S"]:
        near = super().pulled(of_output, rows, heads)
        return self._with_far(near, rows, lambda far: far.pulled(of_output, rows, heads))

    def allowed(self, rows: slice, heads: slice) -> Bool[Tensor, "B H R S"]:
        (left, right), step = self.window, self.k_pos[:, None, :] - self.q_pos[:, rows, None]  # B R S
        every, step = torch.tensor(self.dilations[heads], device=step.device)[:, None, None], step[:, None]
        reached = (step % every == 0) & (step >= -left * every) & (step <= right * every)
        relaxed = self.is_global[:, rows, None] | self.is_global[:, None, :]
        return super().allowed(rows, heads) & (reached | relaxed[:, None])

    def _with_far(self, near: Tensor, rows: slice, ask: Callable[[Glance], Tensor]) -> Float[Tensor, "B H R S"]:
        """`near`, and in the rows of global tokens what their own queries say."""
        here = self.is_global[:, None, rows, None]
        return near if self.far is None or not bool(here.any()) else torch.where(here, ask(self.far), near)
