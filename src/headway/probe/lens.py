"""Logit lens: what a model would say if it stopped after each layer (nostalgebraist 2020; 2303.08112).

logits_l = head(norm(h_l)), the model's own last norm and head on what layer l leaves; those of the last layer are the
model's own, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.models import decoder, encoder, seq2seq, vision
from headway.probe.stacks import bare, eager, head_at, is_compiled, leaving, stack_at

if TYPE_CHECKING:
    from headway.probe.look import Look


class Said(NamedTuple):
    """The likeliest ids of each layer, row and token, likeliest first."""

    probabilities: Float[Tensor, "L B T k"]
    ids: Int[Tensor, "L B T k"]


class Lens:
    """The states that each layer leaves, read by the model's last norm and head whenever they are asked for."""

    def __init__(self, states: list[Float[Tensor, "B T C"]], read: Callable[[Tensor], Tensor]) -> None:
        self.states, self._read = states, read

    @torch.no_grad()
    def logits(self, layer: int) -> Float[Tensor, "B T V"]:
        """Of one layer; -1 is the last."""
        if not -len(self.states) <= layer < len(self.states):
            raise ValueError(f"lens: no layer {layer}; the layers are 0 to {len(self.states) - 1}")
        return self._read(self.states[layer])

    def top(self, k: int = 5) -> Said:
        """The `k` likeliest ids of every layer, of one layer's logits at a time."""
        found = [self.logits(layer).float().softmax(-1).topk(k) for layer in range(len(self.states))]
        return Said(torch.stack([one.values for one in found]), torch.stack([one.indices for one in found]))


def lens(look: Look, *, head: str | None = None, stack: str | None = None) -> Lens:
    """What each layer would say. head: of a decoder or encoder, one that reads every token ("lm", or the only one)."""
    name, body = stack_at(look.net, stack)
    read = _head(look, head, every=True)
    if isinstance(bare(look.net), seq2seq.Model):
        if name != "decoder":
            raise ValueError(f"lens: '{name}' has no head of its own: leave out stack, for the decoder's")
        read = bare(look.net).head_of
    with torch.no_grad(), eager() if is_compiled(look.net) else nullcontext():
        states, _ = leaving(look.rerun, body.blocks)
    return Lens(states, lambda x: read(body.norm(x)))


def outcome(look: Look, head: str | None = None) -> Tensor:
    """Runs the model again: what its head (`head`, or "lm", or the only one with outputs) makes of its states, or, of a
    model without one, what `forward` gives: the states, an encoder-decoder's logits, the scores of two towers."""
    return _head(look, head)(look.rerun())


def _head(look: Look, name: str | None, every: bool = False) -> Callable[[Tensor], Tensor]:
    """The head as a function of hidden states. `every`: only one that reads every token, and there must be one."""
    net = bare(look.net)
    if not isinstance(net, encoder.Model | decoder.Model | vision.Model):
        if name is not None or (every and not isinstance(net, seq2seq.Model)):
            raise ValueError(f"this model has no head {name or 'that reads every token'}: give one with such a head")
        return lambda output: output
    found = head_at(net, name, every)
    if found is None and name is None and not every:
        return lambda x: x
    if found is None:
        there = ", ".join(net.heads) or "none"
        raise ValueError(f"lens: no head {name or 'that reads every token'} (heads: {there}): load one, and name it")
    name = found
    if isinstance(net, vision.Model):
        return lambda x: net.head(name, x)
    ids, valid = look.reading.ids["source"], look.reading.valid["source"]
    return lambda x: net.head(name, x, ids, valid)
