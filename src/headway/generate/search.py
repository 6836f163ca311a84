"""Greedy and beam search over an encoder-decoder, one cached step a token.

Greedy takes the likeliest token each time. Beam search keeps the k likeliest beginnings; a finished one competes on
by its log-probability over length^`penalty` (1609.08144, simplified). With k = 1 it is greedy search. Neither writes
PAD or BOS, and log-probabilities are the model's own all the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.block import reorder
from headway.generate.step import step_of
from headway.models.seq2seq import Memory, Model
from headway.text import BOS, EOS, PAD

EXPECTED = 16  # tokens that states have room for at first; it doubles, and `limit` is far beyond most answers
CROWDED = 0.75  # share of rows still going below which the others leave: it costs a copy, so not for each that ends


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
    memory, state = model.encode(source, valid), model.init_state(rows, min(limit, EXPECTED))
    step = step_of(model, memory, state)
    ids: list[list[int]] = [[] for _ in range(rows)]
    score, going = [0.0] * rows, [True] * rows
    there = list(range(rows))  # whom each row of the batch answers
    last = source.new_full((rows, 1), BOS)
    for t in range(limit):
        best, token = _log_probabilities(step(last, last.new_full(last.shape, t))).max(-1)
        for row, value, said in zip(there, best.tolist(), token.tolist(), strict=True):
            if going[row]:
                score[row] += value
                going[row] = said != EOS
                if going[row]:
                    ids[row].append(said)
        staying = [i for i, row in enumerate(there) if going[row]]
        if not staying:
            break
        if len(staying) < CROWDED * len(there):
            there = [there[i] for i in staying]
            kept = torch.tensor(staying, device=source.device)
            token, memory = token[kept], _rows(memory, kept)
            reorder(state, kept)
            step = step_of(model, memory, state)
        last = token[:, None]
    return [Found(*found) for found in zip(ids, score, strict=True)]


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
    """The best of `beams` beginnings kept side by side, by log-probability over length^penalty.

    One that `limit` cuts is the answer only where none has come to its end. Rows that are done leave the batch.
    """
    if beams < 1:
        raise ValueError(f"beams is 1 or more, not {beams}")
    rows, device = source.shape[0], source.device
    there = torch.arange(rows, device=device)  # whom each row of beams answers
    memory = _rows(model.encode(source, valid), there.repeat_interleave(beams))
    state = model.init_state(rows * beams, min(limit, EXPECTED))
    step = step_of(model, memory, state)
    kept = Beams.start(rows, beams, device)
    last = source.new_full((rows * beams, 1), BOS)
    answers: dict[int, Found] = {}
    for t in range(limit):
        log_p = _log_probabilities(step(last, last.new_full(last.shape, t)))
        kept, origin = kept.grow(log_p.unflatten(0, (-1, beams)), penalty)
        going = (~kept.done.all(1)).nonzero()[:, 0]
        from_row = torch.arange(len(there), device=device)
        if len(going) < CROWDED * len(there):
            ended = kept.done.all(1).nonzero()[:, 0]
            answers |= zip(there[ended].tolist(), kept.rows(ended).best(penalty), strict=True)
            there, kept, origin, from_row = there[going], kept.rows(going), origin[going], going
            if len(going) == 0:
                break
        moved = (from_row[:, None] * beams + origin).flatten()
        reorder(state, moved)
        if len(moved) < len(last):
            memory = _rows(memory, moved)
            step = step_of(model, memory, state)
        last = kept.written[:, :, -1].reshape(-1, 1)
    answers |= zip(there.tolist(), kept.best(penalty), strict=True)
    return [answers[row] for row in range(rows)]


class Beams(NamedTuple):
    """What beam search keeps of B rows of k beginnings; `length` counts the EOS."""

    written: Int[Tensor, "B k T"]
    score: Float[Tensor, "B k"]
    length: Int[Tensor, "B k"]
    done: Bool[Tensor, "B k"]

    @classmethod
    def start(cls, rows: int, beams: int, device: torch.device) -> Beams:
        """Nothing is written yet. All beams start alike, so one of them speaks first."""
        score = torch.full((rows, beams), float("-inf"), device=device)
        score[:, 0] = 0.0
        length = torch.zeros(rows, beams, dtype=torch.long, device=device)
        return cls(length.new_zeros(rows, beams, 0), score, length, length.bool())

    def grow(
        self, log_p: Float[Tensor, "B k V"], penalty: float, ends: Int[Tensor, " N"] | None = None
    ) -> tuple[Beams, Int[Tensor, "B k"]]:
        """The best continuations by one token, and which beginning of its row each of them continues; `ends` are the
        ids that end one (default: EOS)."""
        beams, vocab = log_p.shape[1:]
        stay = torch.full_like(log_p, float("-inf"))
        stay[..., PAD] = 0.0  # a finished beam has one continuation: itself
        total = self.score[..., None] + torch.where(self.done[..., None], stay, log_p)
        length = torch.where(self.done, self.length, self.length + 1)
        best = (total / length[..., None] ** penalty).flatten(1).topk(beams, 1).indices
        origin, token = best // vocab, best % vocab
        before = self.written.gather(1, origin[..., None].expand(-1, -1, self.written.shape[2]))
        grown = Beams(
            torch.cat([before, token[..., None]], -1),
            total.flatten(1).gather(1, best),
            length.gather(1, origin),
            self.done.gather(1, origin) | (token == EOS if ends is None else torch.isin(token, ends)),
        )
        return grown, origin

    def rows(self, rows: Int[Tensor, " R"]) -> Beams:
        """Those rows alone."""
        return Beams(*(t[rows] for t in self))

    def best(self, penalty: float) -> list[Found]:
        """Each row's answer: the best of those that came to their end, or of all where none did."""
        return [Found(ids[: ids.index(EOS)] if EOS in ids else ids, score) for ids, score in self.winners(penalty)]

    def winners(self, penalty: float) -> list[tuple[list[int], float]]:
        """The same with what stands behind the end."""
        value = self.score / self.length.clamp(min=1) ** penalty
        ended = self.done & self.score.isfinite()
        winner = value.masked_fill(~ended & ended.any(1, keepdim=True), float("-inf")).argmax(1)
        row = torch.arange(len(winner), device=winner.device)
        written, score = self.written[row, winner].tolist(), self.score[row, winner].tolist()
        return list(zip(written, score, strict=True))


def _log_probabilities(logits: Float[Tensor, "B 1 V"]) -> Float[Tensor, "B V"]:
    """Of each next token; PAD and BOS, the ids before EOS, are none."""
    log_p = logits[:, -1].float().log_softmax(-1)
    log_p[:, :EOS] = float("-inf")
    return log_p


def _rows(memory: Memory, rows: Tensor) -> Memory:
    return Memory(memory.x[rows], None if memory.valid is None else memory.valid[rows])
