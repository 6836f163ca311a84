"""Writer: a model that writes, a token of each row at a time: a decoder behind its prompts, or an encoder-decoder
behind its sources. What a row may see does not depend on its neighbours: prompts are padded on the left, unseen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.block import reorder
from headway.generate.decode import step_of as step_of_decoder
from headway.generate.step import step_of
from headway.loaded import Loaded, follow
from headway.models import decoder, seq2seq
from headway.quantize import PackedLinear

MANY, LONG = 4, 32  # rows, and tokens of each, from which a packed copy of a tied head is worth its time and memory


@runtime_checkable
class Writer(Protocol):
    """The contract of both."""

    def first(self) -> Float[Tensor, "B V"]:
        """Logits of the first token of each row."""
        ...

    def next(self, ids: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Logits of the token behind `ids`."""
        ...

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        """Row i becomes what row `rows[i]` was; rows may repeat, and may be left out."""
        ...


def writer_of(model: Loaded, rows: Sequence[Sequence[int]], room: int) -> Writer:
    """For rows of ids, with room for so many new tokens; a ValueError where the model does not write."""
    if isinstance(model.net, decoder.Model):
        return _Decoder(model, rows, room)
    if isinstance(model.net, seq2seq.Model):
        return _Seq2Seq(model, rows, room)
    raise ValueError(f"this model ({model.kind}) does not write: generate needs a decoder or an encoder-decoder")


class _Decoder:
    def __init__(self, model: Loaded, rows: Sequence[Sequence[int]], room: int) -> None:
        self.net: decoder.Model = model.net
        self.head = self.net.heads.find("lm")
        if len(rows) >= MANY and room >= LONG and isinstance(self.head.out, PackedLinear):
            self.head.out.spread()
        self.longest = max(len(row) for row in rows)
        pad, device = model.padding, model.device
        self.ids = torch.tensor([[pad] * (self.longest - len(row)) + list(row) for row in rows], device=device)
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        self.padded = any(len(row) < self.longest for row in rows)
        self.state = self.net.init_state(len(rows), self.longest + room)

    @torch.inference_mode()
    def first(self) -> Float[Tensor, "B V"]:
        pos = torch.arange(self.longest, device=self.ids.device) - (self.longest - self.lengths)[:, None]
        valid = pos >= 0 if self.padded else None
        x = self.net(self.ids, valid, pos=pos.clamp(min=-1), state=self.state)
        self.step = step_of_decoder(self.net, self.state, len(self.lengths))
        return self.head(x[:, -1:])[:, 0]

    @torch.inference_mode()
    def next(self, ids: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        x = self.step(ids[:, None], self.lengths[:, None])
        self.lengths = self.lengths + 1
        return self.head(x)[:, 0]

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        reorder(self.state, rows)
        follow(self.net, rows.tolist())
        self.lengths = self.lengths[rows]
        self.step = step_of_decoder(self.net, self.state, len(rows))


class _Seq2Seq:
    @torch.inference_mode()
    def __init__(self, model: Loaded, rows: Sequence[Sequence[int]], room: int) -> None:
        self.net: seq2seq.Model = model.net
        start = model.facts.start
        if start is None:
            raise ValueError("this encoder-decoder does not say what its answers begin with: set facts.start")
        inputs = model.batch(rows)
        self.memory = self.net.encode(inputs.ids, inputs.valid, model.global_tokens("generate", inputs))
        self.state = self.net.init_state(len(rows), room + 1)
        self.step = step_of(self.net, self.memory, self.state)
        self.begin = inputs.ids.new_full((len(rows),), start)
        self.written = 0

    @torch.inference_mode()
    def first(self) -> Float[Tensor, "B V"]:
        return self.next(self.begin)

    @torch.inference_mode()
    def next(self, ids: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        pos = torch.full_like(ids[:, None], self.written)
        self.written += 1
        return self.step(ids[:, None], pos)[:, -1]

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        reorder(self.state, rows)
        follow(self.net, rows.tolist())
        valid = None if self.memory.valid is None else self.memory.valid[rows]
        self.memory = seq2seq.Memory(self.memory.x[rows], valid)
        self.step = step_of(self.net, self.memory, self.state)
