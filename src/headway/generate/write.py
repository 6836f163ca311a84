"""Writing: prompts go in, texts come out, as a stream of tokens or all at once; greedy, drawn, or by beams.

Rows of one batch do not know of each other: each has its own randomness, its own end, and leaves when it is done.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from typing import Annotated, NamedTuple

import torch
from msgspec import Meta

from headway.generate.sampling import Drawn, Sampling, draw
from headway.generate.search import CROWDED, Beams
from headway.generate.writer import writer_of
from headway.loaded import Loaded
from headway.models import seq2seq
from headway.positions import Learned
from headway.spec import Size


class Options(Sampling, frozen=True):
    """`tokens`: how many a row writes at most. `stop`: strings that end a text, and are left out of it. `seed` with a
    row's number is its randomness. `beams`: beginnings kept by beam search, which compete by log-probability over
    length^`penalty`; they draw nothing."""

    tokens: Size = 128
    stop: tuple[str, ...] = ()
    seed: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    beams: Annotated[int, Meta(ge=1, le=1024)] = 1
    penalty: Annotated[float, Meta(ge=0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beams > 1 and (self.temperature or self.repetition_penalty != 1):
            raise ValueError("beams keep the likeliest beginnings and draw nothing: leave out temperature and "
                             "repetition_penalty")  # fmt: skip
        if any(not text for text in self.stop):
            raise ValueError("stop: an empty string stands everywhere; leave it out")


class Written(NamedTuple):
    """What one row wrote: ids without the end, the log-probability of each (the end's last, where it came to it), and
    whether it came to its end or stopped at the limit."""

    ids: list[int]
    log_probabilities: list[float]
    ended: bool


class Token(NamedTuple):
    """One token of one row, as it is written; `ended` with the last one, whose id may be the end's."""

    row: int
    id: int
    log_probability: float
    ended: bool


def tokens(
    model: Loaded,
    rows: Sequence[Sequence[int]],
    how: Options,
    numbers: Sequence[int] | None = None,
    *,
    copies: int = 1,
) -> Generator[Token, set[int] | None, None]:
    """Tokens of all rows as they come; the caller may `send` the rows that need not go on (a stop string).

    `numbers`: what each row is called among all prompts, for its randomness (default: as they stand here). `copies`:
    how many texts go on from each row, which is read once; they are rows of their own, one after the other.
    """
    room = room_for(model, rows, how.tokens)
    writer = writer_of(model, rows, max(room))
    logits = writer.first()
    if copies > 1:
        again = torch.arange(len(rows), device=model.device).repeat_interleave(copies)
        writer.keep(again)
        logits, rows, room = logits[again], [rows[i] for i in again.tolist()], [room[i] for i in again.tolist()]
    there = list(range(len(rows)))
    seen = [list(row) if model.kind == "decoder" else [] for row in rows]
    luck = [random.Random((how.seed << 32) + row) for row in numbers or there]
    bad = torch.tensor(model.facts.bad, dtype=torch.long, device=model.device) if model.facts.bad else None
    done, asked = set[int](), set[int]()
    for step in range(max(room)):
        drawn = draw(logits, how, [seen[row] for row in there], [luck[row] for row in there], bad)
        if (must := forced(model, step, max(room))) is not None:
            drawn = Drawn(torch.full_like(drawn.ids, must), logits.float().log_softmax(1)[:, must])
        said = drawn.ids
        for row, token, log_p in zip(there, said.tolist(), drawn.log_probabilities.tolist(), strict=True):
            if row in done:
                continue
            seen[row].append(token)
            ended = token in model.facts.eos
            more = yield Token(row, token, log_p, ended)
            asked |= more or set()
            if ended or row in asked or step + 1 >= room[row]:
                done.add(row)
        staying = [i for i, row in enumerate(there) if row not in done]
        if not staying:
            return
        if len(staying) < CROWDED * len(there):
            kept = torch.tensor(staying, device=logits.device)
            writer.keep(kept)
            said, there = said[kept], [there[i] for i in staying]
        logits = writer.next(said)


def room_for(model: Loaded, rows: Sequence[Sequence[int]], wanted: int) -> list[int]:
    """How many tokens each row may write: what is wanted, or what the model has places for."""
    limit = model.max_tokens
    for row in rows:
        if not row:
            raise ValueError("cannot go on from an empty prompt: give at least one token")
        model.check_length(len(row) + (model.kind == "decoder"))
    if isinstance(model.net, seq2seq.Model):
        place = model.net.decoder.positions
        return [min(wanted, place.length) if isinstance(place, Learned) else wanted for _ in rows]
    if limit is None:
        return [wanted for _ in rows]
    return [min(wanted, limit - len(row)) for row in rows]


def forced(model: Loaded, step: int, room: int) -> int | None:
    """What a checkpoint must write first, and at the limit, whatever is likely."""
    if step == 0 and model.facts.forced_bos is not None:
        return model.facts.forced_bos
    return model.facts.forced_eos if step == room - 1 else None


@torch.inference_mode()
def beams(model: Loaded, rows: Sequence[Sequence[int]], how: Options) -> list[Written]:
    """The best of `how.beams` beginnings of each row; one cut at the limit wins only where none has ended."""
    rooms = room_for(model, rows, how.tokens)
    if len(set(rooms)) > 1:  # some end where the model does: none may cut its neighbours short
        return [beams(model, [row], how)[0] for row in rows]
    count, width, device, room = len(rows), how.beams, model.device, rooms[0]
    writer = writer_of(model, [row for row in rows for _ in range(width)], room)
    kept, logits = Beams.start(count, width, device), writer.first()
    ends = torch.tensor(sorted(model.facts.eos), dtype=torch.long, device=device)
    bad = torch.tensor(model.facts.bad, dtype=torch.long, device=device)
    base = torch.arange(count, device=device)[:, None] * width
    for step in range(room):
        log_p = logits.float().log_softmax(-1).index_fill(1, bad, float("-inf"))
        if (must := forced(model, step, room)) is not None:
            only = torch.full_like(log_p, float("-inf"))
            only[:, must] = log_p[:, must]
            log_p = only
        kept, origin = kept.grow(log_p.unflatten(0, (count, width)), how.penalty, ends)
        if bool(kept.done.all()):
            break
        writer.keep((base + origin).flatten())
        logits = writer.next(kept.written[:, :, -1].flatten())
    return [_answer(ids, score, set(model.facts.eos)) for ids, score in kept.winners(how.penalty)]


def _answer(ids: list[int], score: float, ends: set[int]) -> Written:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    return Written(ids[:end], [score], end is not None)
