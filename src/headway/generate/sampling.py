"""Sampling: which token comes next, given the logits of all.

p ~ softmax(logits / temperature), cut to the `top_k` likeliest, to the fewest that hold `top_p` of the probability
(1904.09751), to those at least `min_p` as likely as the likeliest (2407.01082). Temperature 0 is greedy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor

from headway.spec import Size, Strict


class Sampling(Strict, frozen=True):
    """How the next token is drawn. `repetition_penalty` divides the logits of ids that the row already holds, where
    they are above zero, and multiplies them below (1909.05858); 1 changes nothing."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Size | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p > 0):
            raise ValueError("top_k, top_p and min_p cut what is drawn from, and temperature 0 draws nothing: set it")


class Drawn(NamedTuple):
    """The next id of each row, and its log-probability under the model itself, in nats."""

    ids: Int[Tensor, " B"]
    log_probabilities: Float[Tensor, " B"]


@torch.inference_mode()
def draw(
    logits: Float[Tensor, "B V"],
    how: Sampling,
    seen: Sequence[Sequence[int]],
    luck: Sequence[random.Random],
    bad: Int[Tensor, " N"] | None = None,
) -> Drawn:
    """The next token of each row. `seen`: the ids a row holds; `luck`: its own source of randomness, so that a row's
    answer does not depend on its neighbours; `bad`: ids that are never written."""
    logits = logits.float()
    log_p = logits.log_softmax(1)
    if bad is not None:
        logits = logits.index_fill(1, bad, float("-inf"))
    scores = _less_of_the_same(logits, seen, how.repetition_penalty)
    chosen = _likeliest(scores) if how.temperature == 0 else _drawn(scores / how.temperature, how, luck)
    return Drawn(chosen, log_p.gather(1, chosen[:, None])[:, 0])


def _likeliest(scores: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """The argmax; on a CPU NumPy's, which is ten times as fast."""
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)


def _less_of_the_same(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        held = torch.tensor(sorted(set(ids)), dtype=torch.long, device=logits.device)
        row[held] = torch.where(row[held] > 0, row[held] / penalty, row[held] * penalty)
    return logits


def _drawn(scores: Float[Tensor, "B V"], how: Sampling, luck: Sequence[random.Random]) -> Int[Tensor, " B"]:
    """One number from each row's own source decides, on the line of all probabilities from the likeliest down."""
    count = min(how.top_k or scores.shape[1], scores.shape[1])
    best, ids = scores.topk(count, 1)  # sorted
    p = best.softmax(1)
    before = p.cumsum(1) - p
    kept = (before < how.top_p) & (p >= how.min_p * p[:, :1])
    line = (p * kept).cumsum(1)
    point = torch.tensor([[source.random()] for source in luck], dtype=line.dtype, device=line.device) * line[:, -1:]
    place = torch.searchsorted(line, point, right=True).clamp(max=count - 1)
    last = kept.int().cumsum(1).argmax(1, keepdim=True)  # rounding must not lead beyond what was kept
    return ids.gather(1, torch.minimum(place, last))[:, 0]
