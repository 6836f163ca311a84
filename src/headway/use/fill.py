"""Fill: what a masked language model puts in a text's gaps (BERT, 1810.04805): p(x_i | the text, x_i masked)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from headway.loaded import Loaded
from headway.use.passes import passes


class Filled(NamedTuple):
    """One filling of one gap: the whole text with it, the token as text, its probability."""

    text: str
    token: str
    probability: float


@torch.inference_mode()
def fill(model: Loaded, text: Any, *, top: int = 5) -> list[list[Filled]]:
    """See `headway.hub.Loaded.fill`."""
    if not isinstance(text, str):
        raise ValueError(f"fill takes one text, not a {type(text).__name__}: call it for each")
    if model.kind != "encoder" or "lm" not in model.net.heads:
        heads = ", ".join(getattr(model.net, "heads", {})) or "none"
        raise ValueError(f"fill needs an encoder with an 'lm' head; this {model.kind} has these heads: {heads}")
    tokenizer = model.tokenizer
    mask = tokenizer.facts.names.get("mask")
    if mask is None or tokenizer.mask is None:
        raise ValueError("fill: this tokenizer has no mask token, so nothing can be filled in")
    if mask not in text:
        raise ValueError(f"fill: no gap in {text[:40]!r}: write {mask} where a word is missing")
    if type(top) is not int or not 1 <= top <= model.spec["vocab"]:
        raise ValueError(f"fill: top is how many fillings, from 1 to {model.spec['vocab']}, not {top!r}")
    found = tokenizer.encode(text, honour=frozenset([mask]))
    model.check_length(len(found.ids), text)
    group = next(passes(model, [found.ids], [found.types], task="lm"))
    gaps = [i for i, token in enumerate(found.ids) if token == tokenizer.mask]
    known = min(model.spec["vocab"], tokenizer.vocab)  # a table may be padded to a round size
    logits = model.net.head("lm", group.hidden[:, gaps])[0].float()
    best = logits.softmax(-1)[:, :known].topk(min(top, known))
    return [
        [_filled(model, text, mask, gap, token, p) for token, p in zip(tokens, shares, strict=True)]
        for gap, (tokens, shares) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    ]


def _filled(model: Loaded, text: str, mask: str, gap: int, token: int, probability: float) -> Filled:
    """The text with its gap of that number filled; other gaps stay."""
    parts = text.split(mask)
    before, after = mask.join(parts[: gap + 1]), mask.join(parts[gap + 1 :])
    spelt, word = model.tokenizer.tokens([token])[0], model.tokenizer.decode([token], specials=True)
    if (mark := model.tokenizer.continues) and spelt.startswith(mark):
        return Filled(before.rstrip() + spelt.removeprefix(mark) + after, word, probability)
    opens = word.startswith(" ") or spelt[:1] in ("\u0120", "\u2581")  # marks of what begins one
    word = word.strip() or word
    space = " " if opens and before and not before[-1].isspace() else ""
    return Filled(before + space + word + after, word, probability)
