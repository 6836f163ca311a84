"""Record: what a page about attention is made of, whatever model it comes from: sides, places, heads and their maps.

A side is a row of tokens (or the patches of a picture), a place one mixer in one layer, a head one map of a place.
Maps are asked for one at a time, so that no record ever holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Integer
from msgspec import to_builtins

from headway.spec import Strict

Array = np.ndarray
TILE = 256  # rows


class Side(Strict, frozen=True, kw_only=True):
    """Tokens in order; of a picture, `skip` tokens that are no patches and then `grid` (rows, columns) of patches."""

    name: str
    tokens: tuple[str, ...]
    grid: tuple[int, int] | None = None
    skip: int = 0
    picture: str | None = None  # a data: URI


class Place(Strict, frozen=True, kw_only=True):
    """One mixer of one layer: tokens of the side `rows` look at those of the side `columns`, once a head.

    What goes through all layers is a place of its own, with a note that says what it is. share: weights are shares of
    a row, told in percent.
    """

    stack: str
    layer: int
    slot: str
    mixer: str
    heads: int
    rows: int = 0
    columns: int = 0
    note: str = ""
    share: bool = True


class Head(Strict, frozen=True, kw_only=True):
    """Its summary: the pattern that holds and its score in 0..1, entropy in nats, mean distance in tokens.

    error: of an implied map, |map - softmax| / |softmax|, of the softmax that it may come near.
    """

    pattern: str | None = None
    score: float | None = None
    entropy: float | None = None
    distance: float | None = None
    error: float | None = None


@runtime_checkable
class Maps(Protocol):
    """Where the weights come from, by place and head; T rows look at S columns."""

    def map(self, place: int, head: int) -> Float[Array, "T S"]:
        """All of them."""

    def top(self, place: int, head: int, k: int) -> tuple[Integer[Array, "T k"], Float[Array, "T k"]]:
        """The `k` weights of each row that are furthest from zero, their columns and values, largest first."""

    def blocks(self, place: int, head: int, size: int) -> Float[Array, "t s"]:
        """Means over `size` x `size` weights: t = ceil(T / size), s = ceil(S / size)."""


@dataclass(frozen=True)
class Record:
    """Everything that is shown. `heads` has one entry a head, in the order of the places."""

    title: str
    model: str
    sides: Sequence[Side]
    places: Sequence[Place]
    heads: Sequence[Head]
    maps: Maps
    definitions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.places:
            raise ValueError("look: nothing to show: no layer of this model has a map")
        total = sum(place.heads for place in self.places)
        if len(self.heads) != total:
            raise ValueError(f"look: {len(self.heads)} heads are described, and the places have {total}")

    def size(self, place: Place) -> tuple[int, int]:
        """T and S."""
        return len(self.sides[place.rows].tokens), len(self.sides[place.columns].tokens)


@dataclass(frozen=True)
class Arrays:
    """Maps that are there already, one array [H, T, S] a place."""

    places: Sequence[Float[Array, "_ _ _"]]

    def map(self, place: int, head: int) -> Float[Array, "T S"]:
        return self.places[place][head]

    def top(self, place: int, head: int, k: int) -> tuple[Integer[Array, "T k"], Float[Array, "T k"]]:
        return largest(self.places[place][head], k)

    def blocks(self, place: int, head: int, size: int) -> Float[Array, "t s"]:
        return block_means(self.places[place][head], size)


def largest(weights: Float[Array, "T S"], k: int) -> tuple[Integer[Array, "T k"], Float[Array, "T k"]]:
    """The columns of the `k` entries of each row that are furthest from zero, and the entries, largest first."""
    found = [_some_largest(weights[start : start + TILE], k) for start in range(0, len(weights), TILE)]
    columns = np.concatenate(found)
    return columns, np.take_along_axis(weights, columns, 1)


def _some_largest(weights: Float[Array, "T S"], k: int) -> Integer[Array, "T k"]:
    size = -np.abs(weights)
    some = np.argpartition(size, k - 1, axis=1)[:, :k]
    some.sort(axis=1)  # of equal entries the first column leads
    return np.take_along_axis(some, np.argsort(np.take_along_axis(size, some, 1), axis=1, kind="stable"), 1)


def block_means(weights: Float[Array, "T S"], size: int) -> Float[Array, "t s"]:
    """Means over `size` x `size` blocks; those at the edges are over what is there."""
    rows, columns = (np.arange(0, n, size) for n in weights.shape)
    sums = np.add.reduceat(np.add.reduceat(weights.astype(np.float64), rows, 0), columns, 1)
    heights, widths = (np.diff(np.append(starts, n)) for starts, n in zip((rows, columns), weights.shape, strict=True))
    return sums / np.outer(heights, widths)


def figures(record: Record, k: int = 8) -> dict[str, Any]:
    """The record in numbers, for JSON: what is known of each head, and of each row its `k` largest weights."""
    heads, places = iter(record.heads), []
    for number, place in enumerate(record.places):
        _, columns = record.size(place)
        told = []
        for head in range(place.heads):
            at, weights = record.maps.top(number, head, min(k, columns))
            summary = to_builtins(next(heads))
            told.append({**summary, "at": at.tolist(), "weights": np.round(weights.astype(float), 6).tolist()})
        where = {
            **to_builtins(place),
            "rows": record.sides[place.rows].name,
            "columns": record.sides[place.columns].name,
        }
        places.append({**where, "heads": told})
    sides = [{"name": side.name, "tokens": side.tokens, "grid": side.grid} for side in record.sides]
    return {"title": record.title, "model": record.model, "sides": sides, "places": places,
            "definitions": record.definitions}  # fmt: skip
