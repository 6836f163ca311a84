"""Answer: what an encoder-decoder writes by itself, token by token, its weights as they lie.

`generate` would pack them, and unpacking makes new ones: an optimizer would go on with those that nobody uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.loaded import Inputs, Loaded
from headway.mask import Mask
from headway.positions import Learned
from headway.probe.stacks import evaluating
from headway.text import BOS, EOS, PAD, Tokenizer

NO_START = "look: this encoder-decoder does not say what its answers begin with: set facts.start"
LIMIT = 128  # tokens of a published model's answer, as many as `generate` writes


@torch.no_grad()
def answer_of(loaded: Loaded, source: Inputs, mask: Mask | None) -> list[int]:
    """The likeliest token each time, until the model ends: what `generate` writes, without the end."""
    net, facts, written = loaded.net, loaded.facts, list[int]()
    own = isinstance(loaded.target, Tokenizer)
    start, ends, never = (BOS, (EOS,), [PAD, BOS]) if own else (facts.start, facts.eos, list(facts.bad))
    if start is None:
        raise ValueError(NO_START)
    place = net.decoder.positions
    limit = (loaded.max_tokens or LIMIT) if own else LIMIT
    limit = min(limit, place.length) if isinstance(place, Learned) else limit
    with evaluating(net):
        memory, state, last = net.encode(source.ids, source.valid, mask), net.init_state(1, limit), start
        for step in range(limit):
            given = source.ids.new_full((1, 1), last)
            logits: Tensor = net.decode(given, memory, pos=torch.full_like(given, step), state=state)[0, -1].float()
            logits[never] = float("-inf")
            forced = facts.forced_bos if step == 0 else facts.forced_eos if step == limit - 1 else None
            last = int(logits.argmax()) if own or forced is None else forced
            if last in ends:
                break
            written.append(last)
    return written
