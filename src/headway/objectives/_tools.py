"""Tools: what turns rows into ids and back, learned from the training rows alone or brought by a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headway.data.sources import Values
from headway.hub import Loaded
from headway.image import ImageSpec
from headway.text import BOS, EOS, PAD, Tokenizer, TokenizerSpec
from headway.vocabulary import PublishedTokenizer

SPELT = {
    "<fim_prefix>": ("<fim-prefix>", "<|fim_prefix|>", "<|fim_begin|>", "\u2581<PRE>", "<PRE>"),
    "<fim_suffix>": ("<fim-suffix>", "<|fim_suffix|>", "<|fim_hole|>", "\u2581<SUF>", "<SUF>"),
    "<fim_middle>": ("<fim-middle>", "<|fim_middle|>", "<|fim_end|>", "\u2581<MID>", "<MID>"),
}  # StarCoder's own first, then SantaCoder, Qwen, DeepSeek, Code Llama


@dataclass(frozen=True)
class Tools:
    """`source` and `target` read the two sides (the same where there is one); `labels` are the classes, sorted, and
    `counts` how many training rows have each; `extra` the ids of what an objective asked to have besides (a mask,
    sentinels); `start` what is trained on from; `image` what pictures become;
    `lender` whose tokenizers they are, where it is a teacher's."""

    source: Tokenizer | PublishedTokenizer | None
    target: Tokenizer | PublishedTokenizer | None
    labels: tuple[str, ...]
    extra: Mapping[str, int]
    max_tokens: int
    lowercase: bool
    start: Loaded | None
    counts: tuple[int, ...] = ()
    image: ImageSpec | None = None
    lender: Loaded | None = None

    def encode(self, text: str, second: str | None = None) -> tuple[list[int], list[int]]:
        """Ids and types of a text, or of a pair, with the specials that the tokenizer puts around them; our own, that
        puts none, gives BOS text EOS (second EOS)."""
        if isinstance(self.source, PublishedTokenizer):
            read = self.source.encode(text, second)
            return read.ids, read.types
        one = [BOS, *self.ids(text), EOS]
        two = [] if second is None else [*self.ids(second), EOS]
        return one + two, [0] * len(one) + [1] * len(two)

    def ids(self, text: str) -> list[int]:
        """A text's bare ids, without specials."""
        if isinstance(self.source, PublishedTokenizer):
            return self.source.encode(text, specials=False).ids
        assert self.source is not None, "an objective that reads texts names their columns"
        return self.source.encode(text)

    def text(self, ids: Sequence[int]) -> str:
        """What some ids say; specials say nothing."""
        assert self.source is not None, "an objective that reads texts names their columns"
        return self.source.decode(ids)

    def words(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode`, and the word that each id is of, counted from 0; -1 for the specials around the text."""
        if isinstance(self.source, PublishedTokenizer):
            found = self.source.encode(text)
            return found.ids, [-1 if word is None else word for word in found.words]
        assert self.source is not None, "an objective that reads texts names their columns"
        ids, words = self.source.words(text)
        return [BOS, *ids, EOS], [-1, *words, -1]

    @property
    def ordinary(self) -> np.ndarray:
        """The ids that stand for text: all but the specials."""
        special = self.source.special_ids if self.source is not None else frozenset()
        return np.array([i for i in range(self.vocab) if i not in special])

    @property
    def pad(self) -> int:
        return (self.source.pad or 0) if isinstance(self.source, PublishedTokenizer) else PAD

    @property
    def bos(self) -> int | None:
        return self.source.bos if isinstance(self.source, PublishedTokenizer) else BOS

    @property
    def eos(self) -> int | None:
        return self.source.eos if isinstance(self.source, PublishedTokenizer) else EOS

    @property
    def begin(self) -> int:
        """What an encoder-decoder's decoder reads first: as the checkpoint says, or BOS."""
        told = self.start or self.lender
        said = told.facts.start if told is not None else None
        return said if said is not None else BOS if self.bos is None else self.bos

    @property
    def end(self) -> int:
        """What a text ends with."""
        return EOS if self.eos is None else self.eos

    @property
    def vocab(self) -> int:
        """How many ids the source has."""
        assert self.source is not None
        return self.source.vocab


def learn(
    columns: Mapping[str, str],
    extra: Iterable[str],
    rows: Iterable[Values],
    specs: tuple[TokenizerSpec, TokenizerSpec],
    *,
    max_tokens: int,
    start: Loaded | None,
    lender: Loaded | None = None,
    image: ImageSpec | None = None,
) -> Tools:
    """`columns` says of each value of a row what reads it: "source", "target", "label" (one class), "labels" (one for
    each word), or something else. A checkpoint that is gone on from (`start`) brings its tokenizers, and so does a
    teacher (`lender`)."""
    kinds = list(columns.values())
    source = target = None
    brought = start or lender
    if brought is not None:
        source, target = brought.source, brought.target
        if brought.max_tokens is not None and max_tokens > brought.max_tokens:
            raise ValueError(f"max_tokens is {max_tokens}, and the checkpoint takes {brought.max_tokens}: lower it")
    else:
        source = _trained(specs[0], rows, kinds, "source", extra)
        target = _trained(specs[1], rows, kinds, "target", ())
    names = {name: _special(source, name) for name in extra}
    labels = Counter[str]()
    for at, kind in enumerate(kinds):
        if kind in ("label", "labels"):
            labels.update(label for row in rows for label in (str(row[at]).split() if kind == "labels" else [row[at]]))
    lowercase = start.lowercase if start is not None else _lower(rows, kinds)
    known = tuple(sorted(labels))
    counts = tuple(labels[label] for label in known)
    return Tools(source, target or source, known, names, max_tokens, lowercase, start, counts, image, lender)


def _special(source: Tokenizer | PublishedTokenizer | None, name: str) -> int:
    """The id of a special that an objective asks for; published tokenizers spell some in ways of their own."""
    if isinstance(source, Tokenizer):
        return source.special(name)
    if source is None:
        raise ValueError(f"this objective needs the token {name}, and the checkpoint came without a tokenizer")
    known = [found for spelt in (name, *SPELT.get(name, ())) if (found := source.special(spelt)) is not None]
    if name == "<mask>" and source.mask is not None:
        known = [source.mask]
    if not known:
        raise ValueError(f"the checkpoint's tokenizer has no {name}, which this objective needs: use one that has it")
    return known[0]


def _trained(
    spec: TokenizerSpec, rows: Iterable[Values], kinds: list[str], side: str, extra: Iterable[str]
) -> Tokenizer | None:
    places = [i for i, kind in enumerate(kinds) if kind == side]
    if not places:
        return None
    return Tokenizer.train(spec, (row[i] for row in rows for i in places), extra)


def _lower(rows: Iterable[Values], kinds: list[str]) -> bool:
    """Whether no training input has an upper-case letter, so that a user's is lowered too."""
    places = [i for i, kind in enumerate(kinds) if kind == "source"]
    return bool(places) and all(row[i] == row[i].lower() for row in rows for i in places)
