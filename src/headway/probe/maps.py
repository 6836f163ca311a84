"""Maps: a head's attention weights from what its mixer was given: whole, some rows, the largest, or averaged in blocks.

All of it goes through tiles of some rows, so that a long text costs time but hardly any memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.attend import Glance
from headway.probe.capture import Seen
from headway.probe.stacks import check_row, chosen

TILE_BYTES = 2**22  # of weights at a time: the scores, the mask and the weights lie beside one another


class Top(NamedTuple):
    """The largest weights of each row and the keys they are of, largest first."""

    weights: Float[Tensor, "T k"]
    keys: Int[Tensor, "T k"]


def find(seen: Sequence[Any], layer: int, stack: str | None, slot: str | None) -> Any:
    """The one of a place (all have a `place`), or a ValueError that says which places there are."""
    if not seen:
        raise ValueError("look: this module holds no mixer of Headway's: look at a model, stack, block or mixer")
    stack = chosen((one.place.stack for one in seen), stack)
    here = [one for one in seen if one.place.stack == stack]
    there = [one for one in here if one.place.layer == layer]
    if not there:
        layers = [one.place.layer for one in here]
        raise ValueError(f"look: no layer {layer} in '{stack}', whose layers are {min(layers)} to {max(layers)}")
    for one in there:
        if slot in (None, one.place.slot):
            return one
    slots = ", ".join(one.place.slot for one in there)
    raise ValueError(f"look: layer {layer} of '{stack}' has no '{slot}' mixer; it has {slots}")


def check(seen: Seen, head: int, row: int) -> None:
    """A ValueError where a place has no such head, or forms no map at all."""
    place = seen.place
    where = f"layer {place.layer} of '{place.stack}'"
    if not place.has_maps:
        other = "look.implied, or look.influence" if hasattr(seen.mixer, "implied") else "look.influence"
        raise ValueError(f"look: {where} is {place.mixer}, which forms no attention weights: use {other}")
    if not 0 <= head < place.heads:
        raise ValueError(f"look: no head {head} in {where}, whose heads are 0 to {place.heads - 1}")
    check_row(row, seen.x)


def tiles(glance: Glance, heads: int = 1) -> Iterator[slice]:
    """Neighbouring queries, so many that the weights of `heads` heads take some megabytes."""
    queries, keys = glance.q.shape[2], glance.k.shape[2]
    size = max(1, TILE_BYTES // (4 * heads * keys))
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


@torch.no_grad()
def some(given: Glance, head: int, start: int, stop: int) -> Float[Tensor, "R S"]:
    """See `Look.rows`."""
    queries = given.q.shape[2]
    if not 0 <= start < stop <= queries:
        raise ValueError(f"look: rows {start} to {stop} of {queries} tokens: 0 <= start < stop <= {queries}")
    return _rows(given, head, slice(start, stop))


@torch.no_grad()
def whole(given: Glance, head: int) -> Float[Tensor, "T S"]:
    """See `Look.map`."""
    found = given.q.new_empty(given.q.shape[2], given.k.shape[2], dtype=_dtype(given))
    for tile in tiles(given):
        found[tile] = _rows(given, head, tile)
    return found


@torch.no_grad()
def top(given: Glance, head: int, k: int) -> Top:
    """See `Look.top`."""
    if not 1 <= k <= given.k.shape[2]:
        raise ValueError(f"look: the {k} largest of {given.k.shape[2]} weights: k is 1 to {given.k.shape[2]}")
    parts = [_rows(given, head, tile).topk(k) for tile in tiles(given)]
    return Top(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


@torch.no_grad()
def blocks(given: Glance, head: int, size: int) -> Float[Tensor, "I J"]:
    """See `Look.blocks`."""
    if size < 1:
        raise ValueError(f"look: blocks of {size} tokens: size is 1 or more")
    queries, keys = given.q.shape[2], given.k.shape[2]
    many = -(-keys // size)
    found = given.q.new_zeros(-(-queries // size), many, dtype=_dtype(given))
    alive = found.new_zeros(len(found), 1)
    of_key = torch.arange(keys, device=found.device) // size
    for tile in tiles(given):
        shares = _rows(given, head, tile)
        by_block = shares.new_zeros(len(shares), many).index_add_(1, of_key, shares)
        of_query = torch.arange(tile.start, tile.stop, device=found.device) // size
        found.index_add_(0, of_query, by_block)
        alive.index_add_(0, of_query, (shares.amax(1, keepdim=True) > 0).to(found.dtype))
    return found / alive.clamp(min=1)


def _rows(given: Glance, head: int, tile: slice) -> Float[Tensor, "R S"]:
    return given.rows(tile, slice(head, head + 1))[0, 0]


def _dtype(given: Glance) -> Any:
    return torch.promote_types(given.q.dtype, torch.float32)
