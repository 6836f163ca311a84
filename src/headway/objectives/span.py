"""Span: an encoder-decoder writes the spans that are cut out of a text, each behind its sentinel (T5, 1910.10683).

source: Thank you <extra_id_0> me to your party <extra_id_1> week. target: <extra_id_0> for inviting <extra_id_1> last
<extra_id_2>. Of n tokens, round(n rate) are cut out, in spans of `mean` tokens on average, placed at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headway.data.batches import asked
from headway.data.examples import Example
from headway.data.pairs import Pairs, shifted
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives import Base, Score, with_vocabulary
from headway.objectives._tokens import guessed, pieces
from headway.objectives._tools import Tools
from headway.recipe import Recipe

SENTINELS = 100  # as T5 has them


class Objective(Base):
    """`rate`: the share of tokens that is cut out; `mean`: how long a span is on average."""

    KINDS = ("seq2seq",)
    EXTRA = tuple(f"<extra_id_{i}>" for i in range(SENTINELS))

    def __init__(self, rate: float = 0.15, mean: float = 3.0) -> None:
        if not 0 < rate < 1 or not 1 <= mean < math.inf:
            raise ValueError(f"objective.rate is a share between 0 and 1, and mean 1 or more, not {rate} and {mean}")
        self.rate, self.mean = rate, mean

    def ready(self, tools: Tools) -> None:
        spans = self.counts(tools.max_tokens)[1]
        if spans >= SENTINELS:
            raise ValueError(
                f"max_tokens={tools.max_tokens} makes {spans} spans a text, and there are {SENTINELS} sentinels: lower "
                f"max_tokens or objective.rate, or raise objective.mean"
            )
        self.sentinels = np.array([tools.extra[name] for name in self.EXTRA])
        self.start, self.pad, self.eos = tools.begin, tools.pad, tools.end

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        for key in ("source_vocab", "target_vocab"):
            model = with_vocabulary(model, key, tools.vocab, tools.start)
        return model

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """Pieces of the text: bare ids, of which one stays and one goes at least."""
        for ids, words in pieces(row[0], tools):
            bare = [token for token, word in zip(ids, words, strict=True) if word >= 0]
            if len(bare) > 1:
                yield (bare,)

    def counts(self, tokens: int) -> tuple[int, int]:
        """How many of so many tokens are cut out, and in how many spans."""
        cut = min(max(round(tokens * self.rate), 1), tokens - 1)
        return cut, min(max(round(cut / self.mean), 1), tokens - cut + 1)

    def sizes(self, example: Example) -> tuple[int, ...]:
        cut, spans = self.counts(len(example[0]))
        return len(example[0]) - cut + spans + 1, cut + spans + 2  # sentinels and ends

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Pairs:
        return shifted([self.cut(np.asarray(example[0]), random) for example in examples], self.start, self.pad)

    def cut(self, ids: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Source and target, ends included."""
        cut, spans = self.counts(len(ids))
        gone = _parts(cut, spans, random)
        kept = _parts(len(ids) - cut + 2, spans + 1, random)  # none between two spans is empty; at the ends one may be
        kept[0] -= 1
        kept[-1] -= 1
        lengths = np.stack([kept, [*gone, 0]], 1).ravel()
        stretches = np.split(ids, lengths.cumsum()[:-1])
        source, target = [stretches[0]], []
        for i in range(spans):
            source += [self.sentinels[i : i + 1], stretches[2 * i + 2]]
            target += [self.sentinels[i : i + 1], stretches[2 * i + 1]]
        end = np.array([self.eos])
        return np.concatenate([*source, end]), np.concatenate([*target, self.sentinels[spans : spans + 1], end])

    def predict(self, model: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
        there = asked(batch.target_out, batch.targets)
        logits = model(batch.source, batch.target_in, batch.source_valid)
        return logits.flatten(0, 1)[there], batch.target_out.flatten()[there]

    @torch.inference_mode()
    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """The share of target tokens that is told right, each given those before it, beside always the commonest."""
        found = guessed(self, model, rows, tools, recipe)
        return Score(
            {
                "span_accuracy": found.right,
                "span_accuracy_baseline": found.commonest,
                "span_perplexity": math.exp(found.nats),
                "span_perplexity_baseline": math.exp(found.entropy),
            }
        )


def _parts(whole: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """`whole` as a sum of so many numbers above 0, each such sum as likely as any other."""
    cuts = np.sort(random.permutation(whole - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [whole]]))
