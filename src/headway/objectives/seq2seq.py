"""Sequence to sequence: cross-entropy of each target token given the source and the targets before it.

-sum_t log p(y_t | y_<t, x), with label smoothing (1512.00567): a share of the probability spread over the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.data.batches import asked
from headway.data.examples import Example
from headway.data.pairs import Pairs, shifted
from headway.data.sources import Values, references
from headway.generate.search import greedy
from headway.hub import Loaded
from headway.objectives import Base, Score, Unfit, with_vocabulary
from headway.objectives._baselines import nearest_input
from headway.objectives._rates import by_length, evaluate, rates
from headway.objectives._tools import Tools
from headway.recipe import Recipe
from headway.text import EOS, Tokenizer
from headway.vocabulary import PublishedTokenizer


class Objective(Base):
    """`smoothing`: the share of the target's probability that is spread over all tokens."""

    KINDS = ("seq2seq",)
    METRIC = ("wer", True)
    COLUMNS = {"input": "source", "target": "target"}

    def __init__(self, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"objective.smoothing is a share from 0 to below 1, not {smoothing}")
        self.smoothing = smoothing
        self.plain: tuple[Sequence[Values], dict[str, Any]] | None = None

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        assert tools.source is not None and tools.target is not None
        sized = with_vocabulary(model, "source_vocab", tools.source.vocab, tools.start)
        return with_vocabulary(sized, "target_vocab", tools.target.vocab, tools.start)

    def ready(self, tools: Tools) -> None:
        self.start, self.pad, self.own = tools.begin, tools.pad, isinstance(tools.target, Tokenizer)

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """Both sides with their ends: our own EOS, or the specials that a checkpoint puts around a text."""
        assert tools.source is not None and tools.target is not None
        (source, inner), (target, told) = _ended(tools.source, row[0]), _ended(tools.target, row[1])
        if not inner or max(inner, told) > tools.max_tokens:
            raise Unfit(
                f"the pair {row[0][:40]!r} is {inner} and {told} tokens; "
                f"the model takes 1 to {tools.max_tokens}: raise max_tokens"
            )
        return [(source, target)]

    def sizes(self, example: Example) -> tuple[int, ...]:
        return len(example[0]), len(example[1])

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Pairs:
        return shifted(examples, self.start, self.pad)

    def predict(self, model: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
        logits = model(batch.source, batch.target_in, batch.source_valid).flatten(0, 1)
        labels = batch.target_out.flatten()
        there = asked(labels, batch.targets)
        return logits[there], labels[there]

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits.float(), -1)
        plain = F.nll_loss(log_p, labels, reduction="sum")
        if not self.smoothing:
            return plain, plain.detach()
        return (1 - self.smoothing) * plain - self.smoothing * log_p.mean(-1).sum(), plain.detach()

    @torch.no_grad()
    def rehearse(self, net: nn.Module, batch: Any, tools: Tools) -> None:
        longest = torch.zeros(1, tools.max_tokens + 1, dtype=torch.long)  # and the end
        net(longest, longest)
        greedy(net.eval(), longest, limit=2)  # type: ignore[arg-type]

    def asked(self, rows: Sequence[Values], limit: int | None) -> Sequence[Values]:
        """So many inputs, each with all that is listed for it."""
        chosen = set(sorted(references(rows), key=lambda text: hashlib.sha256(text.encode()).digest())[:limit])
        return [row for row in rows if row[0] in chosen]

    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """Error rates by what the model writes (`_rates`), under `beams` and `penalty`."""
        scored, speed = evaluate(
            model,
            references(rows),
            self.unit(recipe),
            beams=recipe.beams,
            penalty=recipe.penalty,
            batch=256 if self.own else 32,
            max_tokens=None if self.own else tools.max_tokens,
        )
        found = rates(scored)
        metrics = {
            "per": found.per,
            "wer": found.wer,
            "test_words": found.words,
            "decode_words_per_second": speed,
            "beams": recipe.beams,
            "penalty": recipe.penalty,
            "by_length": by_length(scored),
        }
        return Score(metrics, scored)

    def unit(self, recipe: Recipe) -> str:
        """What error rates count by: the target's tokens, or words where a checkpoint brought its tokenizer."""
        return recipe.tokenizers.target.kind if self.own else "whitespace"

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        if self.plain is None or self.plain[0] is not train:  # models of a comparison share it
            self.plain = train, nearest_input(train, rows, self.unit(recipe))
        return self.plain[1]


def _ended(tokenizer: Tokenizer | PublishedTokenizer, text: str) -> tuple[list[int], int]:
    """A side of a pair with its ends, and how long it is to the model's limit, which leaves our own end out."""
    if isinstance(tokenizer, Tokenizer):
        ids = tokenizer.encode(text)
        return [*ids, EOS], len(ids)
    ids = tokenizer.encode(text).ids
    return ids, len(ids)
