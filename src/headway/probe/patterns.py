"""Patterns: what each head does in few words: how widely and how far it looks, and a named pattern where one holds.

A score is the mean weight that falls where the pattern says, over the tokens that could follow it and had a choice. It
holds where it reaches its threshold and exceeds, by a fifth of all weight, what an even look would give there.
Previous token and induction: 2209.11895 (Olsson et al.); separators: 1906.04341 (Clark et al.); sinks: 2309.17453.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.attend import Glance
from headway.loaded import Facts as Told
from headway.loaded import Loaded
from headway.models import decoder
from headway.probe.capture import Place, Seen, capture
from headway.probe.maps import TILE_BYTES
from headway.probe.stacks import bare, check_row

if TYPE_CHECKING:
    from headway.probe.look import Look

NEAR = 4  # tokens to either side that are local
ROWS = 1024  # of a longer text, so many tokens are measured, evenly spaced
FEWEST = 4  # tokens that a score is a mean of
MARGIN = 0.2
REPEATED = 50  # tokens of the random sequence that induction heads are found with


class Pattern(NamedTuple):
    """What a pattern says, and from which score on it holds."""

    definition: str
    threshold: float


PATTERNS = {
    "previous token": Pattern("looks at the token before", 0.5),
    "next token": Pattern("looks at the token behind", 0.5),
    "itself": Pattern("looks at the token itself", 0.5),
    "same token": Pattern("looks at other places of the same token, where there are any", 0.4),
    "first-token sink": Pattern("rests on the first token", 0.5),
    "separator": Pattern("rests on the tokens that end or part texts", 0.5),
    "induction": Pattern(
        "in a random sequence that is repeated, looks at what followed the same token the first time", 0.4
    ),
    "alignment": Pattern(
        "looks further on with every token: the correlation of its place with the mean place it looks at", 0.9
    ),
    "local": Pattern(f"looks no further than {NEAR} tokens to either side", 0.8),  # weaker than all others: last
}


class Head(NamedTuple):
    """What one head does.

    entropy: of its weights, in nats, a mean over tokens. distance: to what it looks at, in tokens, likewise; None for
    a context, whose places are others. pattern, score: the pattern that holds, or None. scores: of all that could be
    measured.
    """

    stack: str
    layer: int
    slot: str
    head: int
    entropy: float
    distance: float | None
    pattern: str | None
    score: float | None
    scores: dict[str, float]


class Facts(NamedTuple):
    """What patterns ask about the tokens of one row: ids where they have any, and which are separators."""

    ids: Int[Tensor, " S"] | None
    separators: Bool[Tensor, " S"] | None


def heads(look: Look, row: int = 0) -> list[Head]:
    """Every head of every place that forms weights, in order; a ValueError where there is none."""
    seen = [one for one in look.seen if one.place.has_maps]
    if not seen:
        there = ", ".join(dict.fromkeys(one.place.mixer for one in look.seen)) or "no mixer of Headway's"
        raise ValueError(f"look: this model ({there}) forms no attention weights: use look.influence")
    check_row(row, *(one.x for one in seen))
    induction = _induction(look)
    found = []
    with torch.no_grad():
        for one in seen:
            more = induction.get(one.place)
            found += _measured(one, row, _facts(look, one.place, row), more)
    return found


def _facts(look: Look, place: Place, row: int) -> Facts:
    ids = look.reading.ids.get(place.keys)
    if ids is None:
        return Facts(None, None)
    marks = look.reading.separators
    separators = torch.isin(ids[row], torch.tensor(marks, device=ids.device)) if marks else None
    return Facts(ids[row] if place.slot == "self" else None, separators)


def _measured(seen: Seen, row: int, facts: Facts, induction: Tensor | None) -> list[Head]:
    place, given = seen.place, seen.glance().of(row)
    cross = place.slot == "cross"
    masses = partial(_over_context if cross else _over_tokens, given=given, facts=facts)
    sums: dict[str, Tensor] = {}  # by name: of the weights, of an even look, and over how many tokens, a head
    centres = []
    for rows in _tiles(given):
        weights, allowed = given.rows(rows)[0], given.allowed(rows, slice(None))[0]
        seeing = allowed.sum(-1)
        own, even = masses(weights, rows), masses(allowed / seeing.clamp(min=1)[..., None], rows)
        own |= {"entropy": torch.special.entr(weights).sum(-1)}
        for name, each in own.items():
            least = even.get(name, each)
            who = (seeing > 1) & (least > 0) if name in PATTERNS else seeing > 0
            parts = torch.stack([each * who, (least * who).expand_as(each), who.expand_as(each)]).double().sum(-1)
            sums[name] = sums.get(name, 0) + parts
        places = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        centres.append(weights @ places)
    means = {name: (part[0] / part[2].clamp(min=1)).tolist() for name, part in sums.items()}
    scores = {name: part[:2] / part[2] for name, part in sums.items() if name in PATTERNS and part[2, 0] >= FEWEST}
    if cross and (line := _correlations(torch.cat(centres, -1))) is not None:
        scores["alignment"] = torch.stack([line, torch.zeros_like(line)])
    if induction is not None:
        scores["induction"] = torch.stack([induction, torch.zeros_like(induction)])
    return [
        _head(place, head, means, {name: tuple(part[:, head].tolist()) for name, part in scores.items()})
        for head in range(place.heads)
    ]


def _head(place: Place, head: int, means: dict[str, list[float]], scores: dict[str, tuple[float, ...]]) -> Head:
    holding = [name for name in PATTERNS if name in scores and holds(name, *scores[name])]
    # where nothing repeats, an induction head rests on the first token; and what is local may say more than that
    firm = [name for name in holding if name == "induction"] or [name for name in holding if name != "local"] or holding
    best = max(firm, key=lambda name: scores[name][0] - scores[name][1], default=None)
    return Head(
        place.stack,
        place.layer,
        place.slot,
        head,
        means["entropy"][head],
        means["distance"][head] if "distance" in means else None,
        best,
        None if best is None else scores[best][0],
        {name: score for name, (score, _) in scores.items()},
    )


def holds(name: str, score: float, even: float) -> bool:
    """Whether a pattern holds; `even` is the score of an even look."""
    return score >= PATTERNS[name].threshold and score >= even + MARGIN


def _tiles(given: Glance) -> Iterator[slice]:
    """Some rows at a time; of a long text every so many-th one."""
    heads, queries, keys = given.q.shape[1], given.q.shape[2], given.k.shape[2]
    step = max(1, queries // ROWS)
    size = max(1, TILE_BYTES // (4 * heads * keys)) * step
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries), step)


def _over_tokens(weights: Float[Tensor, "H R S"], rows: slice, given: Glance, facts: Facts) -> dict[str, Tensor]:
    """How much of each row's weight falls where a pattern says, `Float[H R]`, and how far it looks."""
    count, device = weights.shape[-1], weights.device
    at = torch.arange(count, device=device)[rows]
    steps = torch.arange(-NEAR, NEAR + 1, device=device)
    keys = at[:, None] + steps
    inside = (keys >= 0) & (keys < count)
    near = weights.gather(-1, keys.clamp(0, count - 1).expand(len(weights), -1, -1)) * inside
    away = (given.k_pos[0] - given.q_pos[0, rows, None]).abs().to(weights.dtype)
    found = _over_context(weights, rows, given, facts)
    found |= {
        "previous token": near[..., NEAR - 1],
        "itself": near[..., NEAR],
        "next token": near[..., NEAR + 1],
        "local": near.sum(-1),
        "distance": torch.einsum("hrs,rs->hr", weights, away),
    }
    if facts.ids is not None:
        same = facts.ids[rows, None] == facts.ids
        same[torch.arange(len(at), device=device), at] = False
        found["same token"] = torch.einsum("hrs,rs->hr", weights, same.to(weights.dtype))
    return found


def _over_context(weights: Float[Tensor, "H R S"], rows: slice, given: Glance, facts: Facts) -> dict[str, Tensor]:
    first = int((given.k_pos[0] >= 0).int().argmax())
    found = {"first-token sink": weights[..., first]}
    if facts.separators is not None:
        found["separator"] = weights @ facts.separators.to(weights.dtype)
    return found


def _correlations(centres: Float[Tensor, "H T"]) -> Float[Tensor, " H"] | None:
    """Of where a token stands with the mean place it looks at."""
    if centres.shape[1] < FEWEST:
        return None
    place = torch.arange(centres.shape[1], device=centres.device, dtype=torch.double)
    line, centres = place - place.mean(), centres.double() - centres.double().mean(-1, keepdim=True)
    return (centres @ line) / (centres.norm(dim=-1) * line.norm()).clamp(min=1e-9)


@torch.no_grad()
def _induction(look: Look) -> dict[Place, Tensor]:
    """The score of each head of a decoder, on random tokens that come twice."""
    net = bare(look.net)
    if not isinstance(net, decoder.Model):
        return {}
    facts = look.model.facts if isinstance(look.model, Loaded) else Told()
    vocab = (look.model.vocab if isinstance(look.model, Loaded) else None) or net.embedding.num_embeddings
    most = [facts.max_tokens, getattr(net.stack.positions, "length", None)]  # learned positions end somewhere
    count = min([REPEATED, vocab] + [(length - 1) // 2 for length in most if length is not None])
    if count < FEWEST:
        return {}
    drawn = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:count]
    begin = [] if facts.bos is None else [facts.bos]
    ids = torch.tensor([[*begin, *drawn.tolist(), *drawn.tolist()]], device=net.embedding.weight.device)
    second = slice(len(begin) + count, ids.shape[1])
    _, seen = capture(look.net, lambda: look.net(ids))
    found = {}
    for one in seen:
        if one.place.has_maps:
            weights = one.glance().rows(second)[0]
            found[one.place] = weights.diagonal(len(begin) + 1, 1, 2)[:, :count].mean(-1).double()
    return found
