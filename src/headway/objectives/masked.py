"""Masked: cross-entropy of words hidden from a text, given what stands on both sides of them (BERT, 1810.04805).

-sum_{i in M} log p(x_i | x with M hidden). M is drawn anew each time a text is seen (RoBERTa, 1907.11692), or once for
each of `static` copies. Of the hidden tokens 80% become the mask, 10% another token, 10% stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headway.data.batches import IGNORE, Batches, Order, Packed, asked
from headway.data.examples import Example
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives import Base, Score, with_head, with_vocabulary
from headway.objectives._probe import probed
from headway.objectives._tokens import Tokens, guessed, pieces, rows_of
from headway.objectives._tools import Tools
from headway.recipe import Recipe
from headway.vocabulary import PublishedTokenizer

HEAD = {"dense": True, "activation": "gelu", "norm": "layer", "tie": True}


class Objective(Base):
    """`rate`: the share of tokens that is hidden; of those, `mask` become the mask and `swap` another token.

    `whole_word`: all tokens of a word are hidden, or none. `static`: so many copies of each text, each with gaps of its
    own that stay (0: new ones each time). `pack`: texts share rows. `probe`: rows have a `label`, and the test asks how
    well frozen features tell it, beside those of an untrained model and the words alone.
    """

    KINDS = ("encoder",)
    EXTRA = ("<mask>",)

    def __init__(
        self,
        rate: float = 0.15,
        mask: float = 0.8,
        swap: float = 0.1,
        whole_word: bool = False,
        static: int = 0,
        pack: bool = False,
        probe: bool = False,
    ) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"objective.rate is the share of hidden tokens, above 0 and below 1, not {rate}")
        if min(mask, swap) < 0 or mask + swap > 1:
            raise ValueError(
                f"objective.mask and swap are shares of what is hidden, 1 together at most: {mask}, {swap}"
            )
        if not 0 <= static <= 1000:
            raise ValueError(f"objective.static is how many copies of a text have gaps of their own, not {static}")
        self.rate, self.mask, self.swap, self.whole_word, self.static = rate, mask, swap, whole_word, static
        self.pack, self.probe = pack, probe

    def use(self, tools: Tools) -> str:
        names = tools.source.facts.names if isinstance(tools.source, PublishedTokenizer) else {}
        return f'fill {{}} "This is a {names.get("mask", "<mask>")}."'

    def columns(self) -> dict[str, str]:
        return {"text": "source", "label": "label"} if self.probe else {"text": "source"}

    def ready(self, tools: Tools) -> None:
        self.hidden, self.pad, self.ordinary = tools.extra["<mask>"], tools.pad, tools.ordinary

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        return with_head(
            with_vocabulary(model, "vocab", tools.vocab, tools.start), "lm", {**HEAD, "outputs": tools.vocab}
        )

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """Pieces of the text, each with the specials around it: ids, their words (-1 for specials), number of copy."""
        for ids, words in pieces(row[0], tools):
            for copy in range(max(1, self.static)):
                yield ids, words, (copy,)

    def batches(self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, length: int, seed: int) -> Order:
        if self.pack:
            return Packed(examples, sizes, tokens=tokens, length=length, seed=seed, collate=self._rows)
        return Batches(examples, sizes, tokens=tokens, seed=seed, collate=self.collate)

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Tokens:
        return self._rows([[example] for example in examples], random)

    def _rows(self, rows: Sequence[Sequence[Example]], random: np.random.Generator) -> Tokens:
        return rows_of([[self.hide(example, random) for example in row] for row in rows], self.pad)

    def hide(self, example: Example, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids with gaps, and labels: what stood in the gaps, IGNORE elsewhere."""
        ids, words, copy = (np.asarray(field) for field in example)
        if self.static:
            random = np.random.default_rng([int(copy[0]), *ids.tolist()])
        there = words >= 0
        _, place = np.unique(words if self.whole_word else np.arange(len(ids)), return_inverse=True)
        luck = np.where(there, random.random(len(ids))[place], 1.0)  # the same for the tokens of a word
        chosen = there & (luck < max(self.rate, luck.min() + 1e-9))  # one at least
        labels = np.where(chosen, ids, IGNORE)
        turn, other = random.random(len(ids)), random.choice(self.ordinary, len(ids))
        found = np.where(turn < self.mask, self.hidden, np.where(turn < self.mask + self.swap, other, ids))
        return np.where(chosen, found, ids), labels

    def predict(self, model: nn.Module, batch: Tokens) -> tuple[Tensor, Tensor]:
        x = model(batch.ids, batch.valid, mask=batch.mask, pos=batch.pos)
        gaps = asked(batch.labels, batch.targets)  # the vocabulary is large, and few tokens are asked for
        return model.head("lm", x.flatten(0, 1)[gaps][None])[0], batch.labels.flatten()[gaps]  # type: ignore[operator]

    @torch.inference_mode()
    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """The share of hidden tokens that is told right, beside always saying the commonest; and the probe."""
        found = guessed(self, model, rows, tools, recipe)
        metrics: dict[str, Any] = {
            "fill_accuracy": found.right,
            "fill_accuracy_baseline": found.commonest,
            "fill_perplexity": math.exp(found.nats),
            "fill_perplexity_baseline": math.exp(found.entropy),
        }
        return Score({**metrics, **(probed(model, rows, tools, recipe.seed) if self.probe else {})})
