"""Answer: what an encoder-decoder writes by itself, its weights as they lie.

`model.generate` would pack them, and unpacking makes new ones: an optimizer would go on with those that nobody uses.
"""

from __future__ import annotations

from headway.generate.search import greedy
from headway.generate.write import Options, tokens
from headway.loaded import Inputs, Loaded
from headway.positions import Learned
from headway.probe.stacks import evaluating
from headway.text import Tokenizer


def answer_of(loaded: Loaded, source: Inputs) -> list[int]:
    """The likeliest token each time, until the model ends, without the end."""
    with evaluating(loaded.net):
        if not isinstance(loaded.target, Tokenizer):
            return [token.id for token in tokens(loaded, source.ids.tolist(), Options()) if not token.ended]
        place, limit = loaded.net.decoder.positions, loaded.max_tokens or Options().tokens
        limit = min(limit, place.length) if isinstance(place, Learned) else limit
        return greedy(loaded.net, source.ids, source.valid, limit=limit)[0].ids
