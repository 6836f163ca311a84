"""Show: a Look as the record of a page: sides, places, heads and maps, and beside them what goes through all layers.

Maps are asked of the look when they are packed, one head at a time, so that a long text is never kept squared.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from headway.probe.capture import Place as MixerPlace
from headway.probe.flow import MOST
from headway.probe.implied import errors_of, whole
from headway.probe.patterns import PATTERNS
from headway.probe.record import Array, Arrays, Head, Maps, Place, Record, Side, largest
from headway.probe.stacks import bare, entering

if TYPE_CHECKING:
    from headway.probe.look import Look

WALK_BYTES = 2**25  # of an implied map, all its heads, at a time: a mixer lays two or three as large beside it
KEPT = 8  # of each row's largest, as many as a page shows
LONGEST_COMPARED = 1024  # tokens up to which an implied map is compared with its softmax as a whole
PATCH = re.compile(r"r(\d+)c(\d+)")
ROLLOUT = (
    "Attention rollout (2005.00928): what share of each token comes from each token that went in, through all layers"
)
RELEVANCE = "Gradient-weighted relevance (2103.15679): what carries the similarity of the two"
IMPLIED = "What {} does to its values, as a map: it forms no weights, so rows need not add up to one"
INFLUENCE = (
    "Influence: the norm of the derivative of what leaves the layer, token by token, with respect to what enters it"
)


class Shown(NamedTuple):
    """A place, its heads, and where its maps come from (which know it as place 0)."""

    place: Place
    heads: list[Head]
    maps: Maps


@dataclass(frozen=True)
class Looked:
    """The maps of one place of a look."""

    look: Look
    place: MixerPlace

    @property
    def where(self) -> dict[str, Any]:
        return {"layer": self.place.layer, "stack": self.place.stack, "slot": self.place.slot}

    def map(self, place: int, head: int) -> Float[Array, "T S"]:
        return _array(self.look.map(head=head, **self.where))

    def top(self, place: int, head: int, k: int) -> tuple[Integer[Array, "T k"], Float[Array, "T k"]]:
        found = self.look.top(head=head, k=k, **self.where)
        return found.keys.cpu().numpy(), _array(found.weights)

    def blocks(self, place: int, head: int, size: int) -> Float[Array, "t s"]:
        """The look's blocks are shares of a block of keys, and a page's are means."""
        count = len(self.look.tokens[self.place.keys])
        return _array(self.look.blocks(head=head, size=size, **self.where)) / np.diff([*range(0, count, size), count])


class Told(NamedTuple):
    """What one walk over the rows of a place found of all its heads: means of blocks, and each row's largest."""

    place: MixerPlace
    size: int | None
    means: Float[Array, "H t s"]
    at: Integer[Array, "H T k"]
    weights: Float[Array, "H T k"]


@dataclass(frozen=True)
class Implied:
    """The maps that a mixer without weights implies, which it gives for all heads at once: of some rows at a time.

    last: what was found of the place that was asked for last, by its kind; the implied places of a record share it.
    """

    look: Look
    place: MixerPlace
    heads: int
    last: dict[str, Any]

    def map(self, place: int, head: int) -> Float[Array, "T S"]:
        if self.last.get("map", (None,))[0] != self.place:
            self.last.clear()  # its memory is free before more is taken
            self.last["map"] = (self.place, self._rows(None))
        return self.last["map"][1][head]

    def top(self, place: int, head: int, k: int) -> tuple[Integer[Array, "T k"], Float[Array, "T k"]]:
        told = self._told(None, k)
        return told.at[head, :, :k], told.weights[head, :, :k]

    def blocks(self, place: int, head: int, size: int) -> Float[Array, "t s"]:
        return self._told(size, min(KEPT, len(self.look.tokens[self.place.keys]))).means[head]

    def _told(self, size: int | None, k: int) -> Told:
        told: Told | None = self.last.get("told")
        if told is None or told.place != self.place or size not in (None, told.size) or k > told.at.shape[2]:
            self.last.clear()
            self.last["told"] = told = self._walk(size, k)
        return told

    def _walk(self, size: int | None, k: int) -> Told:
        queries, keys = (len(self.look.tokens[side]) for side in (self.place.queries, self.place.keys))
        step, edge = max(1, WALK_BYTES // (4 * self.heads * keys)), size or max(queries, keys)
        starts = [np.arange(0, count, edge) for count in (queries, keys)]
        sums, found = np.zeros((len(starts[0]), self.heads, len(starts[1]))), []
        for start in range(0, queries, step):
            part = self._rows(slice(start, min(start + step, queries)))
            found.append([largest(one, k) for one in part])
            by_key = np.add.reduceat(part, starts[1], 2, dtype=np.float64)
            np.add.at(sums, np.arange(start, start + part.shape[1]) // edge, by_key.swapaxes(0, 1))
        high, wide = (np.diff([*first, count]) for first, count in zip(starts, (queries, keys), strict=True))
        at, weights = (
            np.stack([np.concatenate([part[head][i] for part in found]) for head in range(self.heads)]) for i in (0, 1)
        )
        return Told(self.place, size, sums.swapaxes(0, 1) / np.outer(high, wide), at, weights)

    def _rows(self, rows: slice | None) -> Float[Array, "H R S"]:
        where: dict[str, Any] = {"stack": self.place.stack, "slot": self.place.slot}
        return whole(self.look.at(self.place.layer, **where), 0, rows).map[0].detach().float().cpu().numpy()


@dataclass(frozen=True)
class Together:
    """The maps of all places, wherever each comes from."""

    shown: list[Shown]

    def map(self, place: int, head: int) -> Float[Array, "T S"]:
        return self.shown[place].maps.map(0, head)

    def top(self, place: int, head: int, k: int) -> tuple[Integer[Array, "T k"], Float[Array, "T k"]]:
        return self.shown[place].maps.top(0, head, k)

    def blocks(self, place: int, head: int, size: int) -> Float[Array, "t s"]:
        return self.shown[place].maps.blocks(0, head, size)


def record_of(look: Look, title: str, model: str = "a model") -> Record:
    """All that a look has to show of the first row of its batch; a model that forms no maps shows influence instead."""
    sides = {name: _side(look, name, tokens) for name, tokens in look.tokens.items()}
    if look.written:
        sides["written"] = Side(name="what it writes", tokens=tuple(look.written))
    if _has_towers(look):
        sides["similarity"] = Side(name="similarity", tokens=("similarity",))
    numbers = {name: i for i, name in enumerate(sides)}
    shown = [*_mixers(look, numbers), *_rollout(look, numbers), *_relevance(look, numbers)]
    named = {head.pattern for one in shown for head in one.heads}
    return Record(
        title=title,
        model=model,
        sides=list(sides.values()),
        places=[one.place for one in shown],
        heads=list(chain.from_iterable(one.heads for one in shown)),
        maps=Together(shown),
        definitions={name: pattern.definition for name, pattern in PATTERNS.items() if name in named},
    )


def _side(look: Look, name: str, tokens: list[str]) -> Side:
    """Of a picture, with what the model saw of it."""
    places = [PATCH.fullmatch(token) for token in tokens]
    patches = [(int(place[1]), int(place[2])) for place in places if place]
    if not patches or None in places[-len(patches) :] or name in look.reading.ids:
        return Side(name=name, tokens=tuple(tokens))
    rows, columns = (1 + max(numbers) for numbers in zip(*patches, strict=True))
    named = (f"patch {row},{column}" for row, column in patches)
    skip = len(tokens) - len(patches)
    return Side(name=name, tokens=(*tokens[:skip], *named), grid=(rows, columns), skip=skip, picture=_picture(look))


def _picture(look: Look) -> str | None:
    """The pixels that the model was given, as a picture again."""
    from headway.models.vision import Model as Vision

    spec = getattr(look.model, "image", None)
    tower = next((module for module in look.net.modules() if isinstance(module, Vision)), None)
    if spec is None or tower is None:
        return None
    from PIL import Image

    pixels = entering(look.rerun, tower.patches)[0][0][0].float().cpu()
    values = (pixels * Tensor(spec.std)[:, None, None] + Tensor(spec.mean)[:, None, None]) / spec.rescale
    image = Image.fromarray(values.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())
    image.save(file := io.BytesIO(), "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --- What there is to show


def _mixers(look: Look, numbers: dict[str, int]) -> Iterator[Shown]:
    """Every mixer's maps, or those it implies, or else the influence of tokens on one another."""
    seen = [place for place in look.places if place.has_maps]
    found = {(head.stack, head.layer, head.slot, head.head): head for head in look.heads()} if seen else {}
    last: dict[str, Any] = {}
    for place, mixer in zip(look.places, (one.mixer for one in look.seen), strict=True):
        if place.has_maps:
            heads = [found[place.stack, place.layer, place.slot, head] for head in range(place.heads)]
            kept = [Head(pattern=h.pattern, score=h.score, entropy=h.entropy, distance=h.distance) for h in heads]
            yield Shown(_place(place, numbers), kept, Looked(look, place))
        elif hasattr(mixer, "implied"):
            yield _implied(look, place, numbers, last)
        else:
            yield _influence(look, place, numbers)


def _place(place: MixerPlace, numbers: dict[str, int], **more: Any) -> Place:
    """What a decoder looks at in a source, it does for the sake of what it writes."""
    rows = "written" if place.slot == "cross" and "written" in numbers else place.queries
    where: dict[str, Any] = {"stack": place.stack, "layer": place.layer, "slot": place.slot, "mixer": place.mixer}
    return Place(**{**where, "heads": place.heads, **more}, rows=numbers[rows], columns=numbers[place.keys])


def _implied(look: Look, place: MixerPlace, numbers: dict[str, int], last: dict[str, Any]) -> Shown:
    long = len(look.tokens[place.queries]) > LONGEST_COMPARED
    found = whole(look.at(place.layer, stack=place.stack, slot=place.slot), 0, slice(0, 1) if long else None)
    count = found.map.shape[1]
    one = _place(place, numbers, heads=count, note=IMPLIED.format(place.mixer), share=False)
    errors = [None] * count if long else errors_of(found)
    return Shown(one, [Head(error=error) for error in errors], Implied(look, place, count, last))


def _influence(look: Look, place: MixerPlace, numbers: dict[str, int]) -> Shown:
    found = look.influence(place.layer, stack=place.stack, of=place.keys)
    seen = look.at(place.layer, stack=place.stack, slot=place.slot)
    together = f"; {found.block} neighbouring tokens are told as one" if found.block > 1 else ""
    rows = columns = (seen.pos[0] >= 0).nonzero()[:, 0]  # padding, which influence leaves out, has zeros
    if seen.context is not None:
        valid = seen.mask.of(0).valid
        columns = torch.arange(seen.context.shape[1]) if valid is None else valid[0].nonzero()[:, 0]
    weights = found.map.new_zeros(len(look.tokens[place.queries]), len(look.tokens[place.keys]))
    weights[rows[:, None], columns.to(rows)] = found.map.repeat_interleave(found.block, 0)[: len(rows)]
    one = _place(place, numbers, heads=1, note=INFLUENCE + together, share=False)
    return _single(one, weights)


def _rollout(look: Look, numbers: dict[str, int]) -> Iterator[Shown]:
    """Of every stack whose layers all form maps, unless it is too long to be told of all tokens."""
    for stack in dict.fromkeys(place.stack for place in look.places):
        here = [place for place in look.places if place.stack == stack]
        own = here[0].queries
        if not all(place.has_maps for place in here) or len(look.tokens[own]) ** 2 > MOST:
            continue
        for side, weights in look.rollout(stack=stack).items():
            rows = own if side == own or "written" not in numbers else "written"
            slot = "rollout" if side == own else f"rollout to {side}"
            yield _single(_alone(stack, slot, ROLLOUT, numbers[rows], numbers[side]), weights)


def _relevance(look: Look, numbers: dict[str, int]) -> Iterator[Shown]:
    """Which words and patches carry the similarity of two towers."""
    if "similarity" in numbers and all(place.has_maps for place in look.places):
        for side, weights in look.relevance().items():
            place = _alone(side, "relevance", RELEVANCE, numbers["similarity"], numbers[side], share=False)
            yield _single(place, weights[None])


def _alone(stack: str, slot: str, note: str, rows: int, columns: int, share: bool = True) -> Place:
    """What goes through all layers of a stack."""
    return Place(
        stack=stack, layer=0, slot=slot, mixer=slot, heads=1, rows=rows, columns=columns, note=note, share=share
    )


def _single(place: Place, weights: Float[Tensor, "T S"]) -> Shown:
    return Shown(place, [Head()], Arrays([_array(weights)[None]]))


def _has_towers(look: Look) -> bool:
    from headway.models.dual import Model as Dual

    return isinstance(bare(look.net), Dual)


def _array(weights: Tensor) -> Float[Array, "T S"]:
    return weights.detach().float().cpu().numpy()


def write_look(look: Look, path: str | Path, title: str, model: str = "a model") -> None:
    """The page of a look, one self-contained HTML file."""
    from headway.probe.page import write_page

    write_page(record_of(look, title, model), Path(path))
