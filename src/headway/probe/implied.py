"""Implied maps: what a mixer that forms no attention weights does to its values, as a map all the same.

out = finish(M values): M is carried back through a projection (Linformer), read off random features (Performer), off a
recurrence (linear attention, state spaces) or a transform. See `headway.mixers.Implied`, which a mixer of one's own may
give, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headway.mixers import Implied
from headway.probe.capture import Seen
from headway.probe.stacks import check_row

if TYPE_CHECKING:
    from headway.probe.look import Look


class ImpliedMap(NamedTuple):
    """map: what a head multiplies its values by; rows need not sum to one, and entries may be below zero. exact: the
    softmax of the same queries and keys, where there are such; error: |map - exact| / |exact|, Frobenius norms."""

    map: Float[Tensor, "R S"]
    exact: Float[Tensor, "R S"] | None
    error: float | None


def implied(
    look: Look,
    layer: int,
    head: int = 0,
    *,
    stack: str | None = None,
    slot: str | None = None,
    row: int = 0,
    rows: slice | None = None,
) -> ImpliedMap:
    """The map of a layer whose mixer forms none; as in `look.map`. rows: the queries that are wanted, for long inputs.

    A convolution's tells sizes: the Frobenius norm of what a token's channels are multiplied by.
    """
    found = whole(look.at(layer, stack=stack, slot=slot), row, rows)
    count = found.map.shape[1]
    if not 0 <= head < count:
        raise ValueError(f"implied: no head {head} in layer {layer}, whose maps are 0 to {count - 1}")
    exact = None if found.exact is None else found.exact()[0, head]
    return ImpliedMap(found.map[0, head], exact, None if exact is None else _error(found.map[0, head], exact))


def errors_of(found: Implied) -> list[float | None]:
    """Of each head of the first row, where there is a softmax to compare with."""
    if found.exact is None:
        return [None] * found.map.shape[1]
    return [_error(one, exact) for one, exact in zip(found.map[0], found.exact()[0], strict=True)]


def _error(one: Float[Tensor, "R S"], exact: Float[Tensor, "R S"]) -> float:
    return float((one - exact).norm() / exact.norm())


def whole(seen: Seen, row: int, rows: slice | None = None) -> Implied:
    """All heads of one row of the batch, `Float[1 H R S]`, with values and the rest of the mixer."""
    place = seen.place
    where = f"layer {place.layer} of '{place.stack}'"
    if place.has_maps:
        raise ValueError(f"implied: {where} is {place.mixer}, which forms its weights: use look.map")
    if not hasattr(seen.mixer, "implied"):
        raise ValueError(f"implied: {where} is {place.mixer}, which is no map of its values: use look.influence")
    check_row(row, seen.x)
    if rows is not None and not range(seen.x.shape[1])[rows]:
        raise ValueError(f"implied: {rows} of {seen.x.shape[1]} queries is none of them: choose one or more")
    with torch.inference_mode(False), torch.no_grad():
        own = lambda t: None if t is None else t[row : row + 1].clone()  # what inference made has no gradients
        return seen.mixer.implied(
            own(seen.x), mask=seen.mask.of(row), pos=own(seen.pos), context=own(seen.context), rows=rows
        )
