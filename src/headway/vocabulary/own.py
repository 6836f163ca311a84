"""A tokenizer trained on the spot, as published ones are: with marks around a text, pairs, and places in characters.

So what is trained from nothing is used like what was downloaded: text is <bos> text <eos>, a pair <bos> a <eos> b <eos>
with the second part of another type.
"""

from __future__ import annotations

import json

from headway.text import BOS, EOS, SPECIALS, Tokenizer
from headway.vocabulary.facts import NAMES, Facts, Name
from headway.vocabulary.published import PublishedTokenizer


def dressed(tokenizer: Tokenizer, *, lowercase: bool = False) -> PublishedTokenizer:
    """The same ids by the interface of a published tokenizer. `lowercase`: it learned from lower case alone, so what it
    reads is lowered."""
    import tokenizers
    from tokenizers.normalizers import Lowercase
    from tokenizers.processors import TemplateProcessing

    core = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.record()))
    begin, end = SPECIALS[BOS], SPECIALS[EOS]
    core.post_processor = TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(begin, BOS), (end, EOS)],
    )
    if lowercase:
        core.normalizer = Lowercase()
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    names: dict[Name, str] = {name: f"<{name}>" for name in NAMES if f"<{name}>" in known}
    return PublishedTokenizer(core, Facts(names=names), "a trained tokenizer")
