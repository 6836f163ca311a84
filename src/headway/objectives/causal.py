"""Causal: cross-entropy of each token given those before it (GPT-2).

-sum_t log p(x_t | x_<t). Documents longer than a row are cut; short ones share rows, and never see each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headway.data.batches import Batches, Order, Packed, asked
from headway.data.examples import Example, Examples
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives import Base, Score, empty, with_head, with_vocabulary
from headway.objectives._tokens import Tokens, rows_of
from headway.objectives._tools import Tools
from headway.recipe import Recipe


class Objective(Base):
    """`pack`: whether short documents share a row; a mixer that knows no segments needs them apart."""

    KINDS = ("decoder",)
    COLUMNS = {"text": "source"}

    def __init__(self, pack: bool = True) -> None:
        self.pack = pack

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        tied = {"outputs": tools.vocab, "bias": False, "tie": True}
        return with_head(with_vocabulary(model, "vocab", tools.vocab, tools.start), "lm", tied)

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """Begin, text, end; cut into rows, each of which predicts the first token of the next."""
        ids = tools.ids(row[0])
        if not ids:
            raise empty(row[0])
        begin = tools.bos if tools.bos is not None else tools.eos
        ids = ([] if begin is None else [begin]) + ids + ([] if tools.eos is None else [tools.eos])
        length = tools.max_tokens
        for start in range(0, len(ids) - 1, length):
            piece = ids[start : start + length + 1]
            yield piece[:-1], piece[1:]

    def batches(self, examples: Sequence[Example], sizes: np.ndarray, *, tokens: int, length: int, seed: int) -> Order:
        if self.pack:
            return Packed(examples, sizes, tokens=tokens, length=length, seed=seed, collate=self.collate)
        alone = lambda chosen, random: self.collate([[example] for example in chosen], random)
        return Batches(examples, sizes, tokens=tokens, seed=seed, collate=alone)

    def collate(self, examples: Sequence[Sequence[Example]], random: np.random.Generator) -> Tokens:
        return rows_of(examples, 0)

    def predict(self, model: nn.Module, batch: Tokens) -> tuple[Tensor, Tensor]:
        x = model(batch.ids, batch.valid, mask=batch.mask, pos=batch.pos)
        logits, labels = model.head("lm", x).flatten(0, 1), batch.labels.flatten()  # type: ignore[operator]
        if batch.valid is None:
            return logits, labels
        there = asked(labels, batch.targets)
        return logits[there], labels[there]

    @torch.inference_mode()
    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """Bits per byte of the text: what the model's likelihood of all tokens comes to, ends included."""
        examples = Examples(example for row in rows for example in self.encode(row, tools))
        order = self.order(examples, tokens=recipe.batch_tokens, length=recipe.max_tokens, seed=0)
        losses = [self(model.net, order.batch(i).to(model.device)) for i in range(len(order))]
        nats, tokens = sum(float(loss.plain) for loss in losses), sum(loss.tokens for loss in losses)
        size = sum(len(row[0].encode()) for row in rows)
        bits = nats / math.log(2)
        return Score({"bits_per_byte": bits / size, "perplexity": math.exp(nats / tokens), "test_bytes": size})

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        """Bits per byte of xz, and of zstd where zstandard is installed, which have read the training text before."""
        known, size = [], 0
        for i in range(len(train) - 1, -1, -1):  # from the end, as far as a compressor's window reaches back
            if size >= KNOWN:
                break
            known.append(train[i][0].encode())
            size += len(known[-1])
        return compressed(b"".join(reversed(known))[-KNOWN:], "".join(row[0] for row in rows).encode())


KNOWN = 2**25  # bytes of training text that a compressor may have read; the windows of both reach that far


def compressed(known: bytes, text: bytes) -> dict[str, Any]:
    """How many bits a byte of `text` adds to the compressed size of `known`."""
    import lzma

    found = {"bits_per_byte_xz_baseline": _added(lambda data: len(lzma.compress(data, preset=9)), known, text)}
    try:
        import zstandard
    except ModuleNotFoundError:
        return {**found, "baseline": "xz; zstd beside it needs: pip install zstandard"}
    wide = zstandard.ZstdCompressionParameters.from_level(19, window_log=26, enable_ldm=True)
    squeeze = zstandard.ZstdCompressor(compression_params=wide)
    return {**found, "bits_per_byte_zstd_baseline": _added(lambda data: len(squeeze.compress(data)), known, text)}


def _added(size: Callable[[bytes], int], known: bytes, text: bytes) -> float:
    return 8 * (size(known + text) - size(known)) / len(text)
