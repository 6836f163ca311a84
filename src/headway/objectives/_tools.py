"""Tools: what turns rows into ids and back, learned from the training rows alone or brought by a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from headway.data.sources import Values
from headway.hub import Loaded
from headway.text import BOS, EOS, PAD, Tokenizer, TokenizerSpec
from headway.vocabulary import PublishedTokenizer


@dataclass(frozen=True)
class Tools:
    """`source` and `target` read the two sides (the same where there is one); `labels` are the classes, sorted;
    `extra` the ids of what an objective asked to have besides (a mask, sentinels); `start` what is trained on from."""

    source: Tokenizer | PublishedTokenizer | None
    target: Tokenizer | PublishedTokenizer | None
    labels: tuple[str, ...]
    extra: Mapping[str, int]
    max_tokens: int
    lowercase: bool
    start: Loaded | None

    def encode(self, text: str, second: str | None = None) -> tuple[list[int], list[int]]:
        """Ids and types of a text, or of a pair, with the specials that the tokenizer puts around them; our own, that
        puts none, gives BOS text EOS (second EOS)."""
        if isinstance(self.source, PublishedTokenizer):
            found = self.source.encode(text, second)
            return found.ids, found.types
        one = [BOS, *self.ids(text), EOS]
        two = [] if second is None else [*self.ids(second), EOS]
        return one + two, [0] * len(one) + [1] * len(two)

    def ids(self, text: str) -> list[int]:
        """A text's bare ids, without specials."""
        if isinstance(self.source, PublishedTokenizer):
            return self.source.encode(text, specials=False).ids
        assert self.source is not None, "an objective that reads texts names their columns"
        return self.source.encode(text)

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
) -> Tools:
    """`columns` says of each value of a row what reads it: "source", "target", "label", or something else."""
    kinds = list(columns.values())
    source = target = None
    names: dict[str, int] = {}
    if start is not None:
        source, target = start.source, start.target
    else:
        source = _trained(specs[0], rows, kinds, "source", extra)
        target = _trained(specs[1], rows, kinds, "target", ())
    if isinstance(source, Tokenizer) and start is None:
        names = {name: source.special(name) for name in extra}
    labels: set[str] = set()
    if "label" in kinds:
        at = kinds.index("label")
        labels = {str(row[at]) for row in rows}
    lowercase = start.lowercase if start is not None else _lower(rows, kinds)
    return Tools(source, target or source, tuple(sorted(labels)), names, max_tokens, lowercase, start)


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
