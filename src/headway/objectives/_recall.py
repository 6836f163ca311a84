"""Recall: how often what belongs to a query is among those that score highest; and plain ways to score."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SLOTS = 4096  # for hashed n-grams


def recall(scores: Float[Tensor, "N M"], right: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The share of N queries one of whose own (`right`, among M) is the best, or among the ten best."""
    best = torch.stack([row[list(own)].max() for row, own in zip(scores, right, strict=True)])
    places = (scores > best[:, None]).sum(1)  # how many are better; those as good do not count against it
    ties = (scores == best[:, None]).sum(1) - 1
    places = places + ties // 2  # as chance would have it
    return {
        "recall_at_1": float((places < 1).float().mean()),
        "recall_at_10": float((places < 10).float().mean()),
        "test_queries": len(right),
        "test_candidates": scores.shape[1],
    }


def ngrams(texts: Sequence[str], longest: int = 3) -> Float[Tensor, "N S"]:
    """Each text as how often it has each n-gram of its letters and digits, of length one."""
    found = torch.zeros(len(texts), SLOTS)
    for i, text in enumerate(texts):
        letters = "".join(c for c in text.lower() if c.isalnum())
        for n in range(1, longest + 1):
            for at in range(len(letters) - n + 1):
                found[i, zlib.crc32(letters[at : at + n].encode()) % SLOTS] += 1
    return torch.nn.functional.normalize(found, dim=-1)


def chance(right: Sequence[Sequence[int]], candidates: int) -> dict[str, Any]:
    """What guessing reaches."""
    own = sum(len(set(one)) for one in right) / max(1, len(right))
    return {
        "recall_at_1_baseline": min(1.0, own / candidates),
        "recall_at_10_baseline": min(1.0, 10 * own / candidates),
        "baseline": "chance",
    }
