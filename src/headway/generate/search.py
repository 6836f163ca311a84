"""Greedy and beam search over an encoder-decoder, one cached step a token.

Greedy takes the likeliest token each time. Beam search keeps the k likeliest beginnings; a finished one competes on
by its log-probability over length^`penalty` (1609.08144, simplified). With k = 1 it is greedy search.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.block import reorder
from headway.models.seq2seq import Memory, Model
from headway.text import BOS, EOS, PAD


class Found(NamedTuple):
    """The written ids, without BOS and EOS, and their log-probability, that of the EOS included."""

    ids: list[int]
    log_probability: float


@torch.inference_mode()
def greedy(
    model: Model, source: Int[Tensor, "B S"], valid: Bool[Tensor, "B S"] | None = None, *, limit: int = 64
) -> list[Found]:
    """The likeliest next token, until EOS or `limit` tokens. Rows that are done leave the batch."""
    rows = source.shape[0]
    memory, state = model.encode(source, valid), model.init_state(rows, limit)
    written = source.new_full((rows, limit), PAD)
    score = torch.zeros(rows, device=source.device)
    alive = torch.arange(rows, device=source.device)  # the rows still in the batch
    done = torch.zeros(rows, dtype=torch.bool, device=source.device)
    last = source.new_full((rows, 1), BOS)
    for t in range(limit):
        pos = last.new_full((len(alive), 1), t)
        best, token = model.decode(last, memory, pos=pos, state=state)[:, -1].float().log_softmax(-1).max(-1)
        score[alive] += best.masked_fill(done, 0.0)
        written[alive, t] = token
        done = done | (token == EOS)
        going = (~done).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < 0.75 * len(alive):  # shrinking costs a copy, so not for every row that ends
            alive, token, done, memory = alive[going], token[going], done[going], _rows(memory, going)
            reorder(state, going)
        last = token[:, None]
    return [Found(_until_end(ids), s) for ids, s in zip(written.tolist(), score.tolist(), strict=True)]


@torch.inference_mode()
def beam(
    model: Model,
    source: Int[Tensor, "B S"],
    valid: Bool[Tensor, "B S"] | None = None,
    *,
    beams: int = 4,
    limit: int = 64,
    penalty: float = 1.0,
) -> list[Found]:
    """The best of `beams` beginnings kept side by side, by log-probability over length^penalty."""
    if beams < 1:
        raise ValueError(f"beams is 1 or more, not {beams}")
    rows, device = source.shape[0], source.device
    every = torch.arange(rows, device=device)
    memory = _rows(model.encode(source, valid), every.repeat_interleave(beams))
    written = source.new_full((rows, beams, 0), PAD)
    score = torch.full((rows, beams), float("-inf"), device=device)
    score[:, 0] = 0.0  # all beams start alike, so one of them speaks first
    done = torch.zeros(rows, beams, dtype=torch.bool, device=device)
    length = torch.zeros(rows, beams, dtype=torch.long, device=device)
    last = source.new_full((rows * beams, 1), BOS)
    state = model.init_state(rows * beams, limit)
    for t in range(limit):
        pos = last.new_full((rows * beams, 1), t)
        logits = model.decode(last, memory, pos=pos, state=state)[:, -1].float()
        step = logits.log_softmax(-1).view(rows, beams, -1)  # B k V
        stay = torch.full_like(step, float("-inf"))
        stay[..., PAD] = 0.0  # a finished beam has one continuation: itself
        total = score[..., None] + torch.where(done[..., None], stay, step)
        lengths = torch.where(done, length, length + 1)
        rank = total / lengths[..., None].clamp(min=1) ** penalty
        best = rank.flatten(1).topk(beams, 1).indices
        origin, token = best // step.shape[-1], best % step.shape[-1]
        score = total.flatten(1).gather(1, best)
        length, done = lengths.gather(1, origin), done.gather(1, origin)
        written = torch.cat([written.gather(1, origin[..., None].expand(-1, -1, t)), token[..., None]], -1)
        done = done | (token == EOS)
        if bool(done.all()):
            break
        reorder(state, (every[:, None] * beams + origin).flatten())
        last = token.reshape(-1, 1)
    winner = (score / length.clamp(min=1) ** penalty).argmax(1)
    return [
        Found(_until_end(ids), s)
        for ids, s in zip(written[every, winner].tolist(), score[every, winner].tolist(), strict=True)
    ]


def _rows(memory: Memory, rows: Tensor) -> Memory:
    return Memory(memory.x[rows], None if memory.valid is None else memory.valid[rows])


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids
