"""Drift: how far a swapped model's states and answers are from the original's on the same text.

cos(h_l, h'_l) at each layer l, KL(p || p') of the predictions, and how good both are at what they were trained for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.hub import Loaded
from headway.objectives.distill import divergence
from headway.spec import Strict
from headway.swap.reading import Seen, batches, read

Watch = Callable[[str, int, int], None]  # what is being done, how much of it is done, and how much there is


class Drift(Strict, frozen=True):
    """On `rows` of `length` tokens. cosine: the mean over tokens behind each layer, by stack. vector: the mean cosine
    of the averaged last states, a text's vector. kl: nats a prediction; agreement: the share of predictions whose
    likeliest answer stays. metric: "perplexity" of the next token, or "accuracy" at hidden ones; None where there is
    neither. original, swapped: that metric of the two."""

    rows: int
    length: int
    cosine: dict[str, tuple[float, ...]]
    vector: float
    kl: float | None
    agreement: float | None
    metric: str | None
    original: float | None
    swapped: float | None


class _Sums:
    """What adds up over batches."""

    def __init__(self) -> None:
        self.cosine: dict[str, Tensor] = {}
        self.vector = self.tokens = self.rows = self.kl = self.same = self.predicted = self.labels = 0.0
        self.nats, self.right = [0.0, 0.0], [0, 0]

    def add(self, one: Seen, two: Seen, labels: Tensor | None) -> None:
        for stack, layers in one.layers.items():
            pairs = zip(layers, two.layers[stack], strict=True)
            found = torch.stack([F.cosine_similarity(a.float(), b.float(), dim=-1).sum() for a, b in pairs])
            self.cosine[stack] = self.cosine.get(stack, 0) + found * (len(layers[0]) / layers[0][..., 0].numel())
        a, b = (next(iter(seen.layers.values()))[-1].float().mean(1) for seen in (one, two))
        self.vector += float(F.cosine_similarity(a, b, dim=-1).sum())
        self.rows += len(a)
        at = 0
        for told, mine in zip(one.logits(), two.logits(), strict=True):
            self.kl += float(divergence(mine, told, 1.0))
            self.same += int(told.argmax(-1).eq(mine.argmax(-1)).sum())
            self.predicted += len(told)
            if labels is not None:
                wanted = labels[at : at + len(told)]
                for i, logits in enumerate((told, mine)):
                    self.nats[i] += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
                    self.right[i] += int(logits.argmax(-1).eq(wanted).sum())
                at += len(told)
                self.labels += len(told)


@torch.no_grad()
def drift(original: Loaded, swapped: Loaded, rows: Tensor, watch: Watch = lambda what, done, total: None) -> Drift:
    """How far `swapped` is from `original` on rows of ids, or on pictures, each of which both read once."""
    sums, done = _Sums(), 0
    for batch in batches(original, rows):
        watch("measuring drift", done, len(rows))
        sums.add(read(original, batch), read(swapped, batch), batch.labels)
        done += len(batch.given)
    metric: str | None = None
    values: list[Any] = [None, None]
    if sums.labels:
        metric = "perplexity" if original.kind == "decoder" else "accuracy"
        values = [math.exp(nats / sums.labels) for nats in sums.nats]
        values = values if metric == "perplexity" else [right / sums.labels for right in sums.right]
    return Drift(
        rows=len(rows),
        length=rows.shape[1] if rows.ndim == 2 else 0,
        cosine={stack: tuple((found / sums.rows).tolist()) for stack, found in sums.cosine.items()},
        vector=sums.vector / sums.rows,
        kl=sums.kl / sums.predicted if sums.predicted else None,
        agreement=sums.same / sums.predicted if sums.predicted else None,
        metric=metric,
        original=values[0],
        swapped=values[1],
    )
