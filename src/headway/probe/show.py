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

from headway.probe.capture import Place as Seen
from headway.probe.flow import MOST
from headway.probe.patterns import PATTERNS
from headway.probe.record import Array, Arrays, Head, Maps, Place, Record, Side, block_means
from headway.probe.stacks import bare, entering

if TYPE_CHECKING:
    from headway.probe.look import Look

TILE = 256  # rows
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
    place: Seen

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


@dataclass(frozen=True)
class Implied:
    """The maps that a mixer without weights implies, asked for some rows at a time where the text is long."""

    look: Look
    place: Seen

    def map(self, place: int, head: int) -> Float[Array, "T S"]:
        return _array(self._rows(head, None))

    def top(self, place: int, head: int, k: int) -> tuple[Integer[Array, "T k"], Float[Array, "T k"]]:
        found = [Arrays([part[None]]).top(0, 0, k) for part in self._tiles(head, TILE)]
        return np.concatenate([at for at, _ in found]), np.concatenate([weights for _, weights in found])

    def blocks(self, place: int, head: int, size: int) -> Float[Array, "t s"]:
        return np.concatenate([block_means(part, size) for part in self._tiles(head, size)])

    def _tiles(self, head: int, size: int) -> Iterator[Float[Array, "R S"]]:
        count = len(self.look.tokens[self.place.queries])
        for start in range(0, count, size):
            yield _array(self._rows(head, slice(start, min(start + size, count))))

    def _rows(self, head: int, rows: slice | None) -> Float[Tensor, "R S"]:
        where: dict[str, Any] = {"layer": self.place.layer, "stack": self.place.stack, "slot": self.place.slot}
        return self.look.implied(head=head, rows=rows, **where).map


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
    for place, mixer in zip(look.places, (one.mixer for one in look.seen), strict=True):
        if place.has_maps:
            heads = [found[place.stack, place.layer, place.slot, head] for head in range(place.heads)]
            kept = [Head(pattern=h.pattern, score=h.score, entropy=h.entropy, distance=h.distance) for h in heads]
            yield Shown(_place(place, numbers), kept, Looked(look, place))
        elif hasattr(mixer, "implied"):
            yield _implied(look, place, numbers)
        else:
            yield _influence(look, place, numbers)


def _place(place: Seen, numbers: dict[str, int], **more: Any) -> Place:
    """What a decoder looks at in a source, it does for the sake of what it writes."""
    rows = "written" if place.slot == "cross" and "written" in numbers else place.queries
    where: dict[str, Any] = {"stack": place.stack, "layer": place.layer, "slot": place.slot, "mixer": place.mixer}
    return Place(**{**where, "heads": place.heads, **more}, rows=numbers[rows], columns=numbers[place.keys])


def _implied(look: Look, place: Seen, numbers: dict[str, int]) -> Shown:
    from headway.probe.implied import whole

    where: dict[str, Any] = {"layer": place.layer, "stack": place.stack, "slot": place.slot}
    count = whole(look.at(**where), 0, slice(0, 1)).map.shape[1]
    one = _place(place, numbers, heads=count, note=IMPLIED.format(place.mixer), share=False)
    long = len(look.tokens[place.queries]) > LONGEST_COMPARED
    errors = [None if long else look.implied(head=head, **where).error for head in range(count)]
    return Shown(one, [Head(error=error) for error in errors], Implied(look, place))


def _influence(look: Look, place: Seen, numbers: dict[str, int]) -> Shown:
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
