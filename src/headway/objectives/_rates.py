"""Error rates of what a model writes: token errors (phonemes, PER; else TER) and sequences not exactly right (WER).

A prediction is measured against the nearest of the listed targets and is right if it equals any of them. The token
error rate is the sum of edit distances over the sum of the lengths of those nearest targets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from headway.hub import Loaded


class Rates(NamedTuple):
    """Shares: 0.1 is one in ten."""

    per: float
    wer: float
    words: int


class Scored(NamedTuple):
    """One test input: what was listed, what was written, the edits between, and the nearest target's length."""

    input: str
    expected: list[str]
    predicted: str
    edits: int
    length: int


def units(text: str, kind: str) -> Sequence[str]:
    """What an edit counts: characters for a character tokenizer, else what stands between spaces."""
    return text if kind == "characters" else text.split()


def score(input: str, expected: list[str], predicted: str, kind: str) -> Scored:
    """Against the nearest listed target, the longer one of two as near."""
    from rapidfuzz.distance import Levenshtein

    said = units(predicted, kind)
    edits, length = min(
        ((Levenshtein.distance(said, units(one, kind)), len(units(one, kind))) for one in expected),
        key=lambda found: (found[0], -found[1]),
    )
    return Scored(input, expected, predicted, edits, length)


def rates(scored: Sequence[Scored]) -> Rates:
    """Token and sequence error rates over all of `scored`."""
    if not scored:
        return Rates(float("nan"), float("nan"), 0)
    wrong = sum(s.edits > 0 for s in scored)
    return Rates(sum(s.edits for s in scored) / max(1, sum(s.length for s in scored)), wrong / len(scored), len(scored))


def by_length(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The same by length of the input: the shortest third, the middle, the longest, as near as whole lengths allow."""
    lengths = sorted(len(s.input) for s in scored)
    if not lengths:
        return []
    low, high = lengths[len(lengths) // 3], lengths[2 * len(lengths) // 3]
    parts = (
        (f"short (up to {low})", lambda n: n <= low),
        (f"middle ({low + 1} to {high})", lambda n: low < n <= high),
        (f"long (over {high})", lambda n: n > high),
    )
    rows = []
    for bucket, belongs in parts:
        found = rates([s for s in scored if belongs(len(s.input))])
        if found.words:
            rows.append({"bucket": bucket, "words": found.words, "per": found.per, "wer": found.wer})
    return rows


def evaluate(
    model: Loaded,
    references: dict[str, list[str]],
    kind: str,
    *,
    beams: int = 1,
    batch: int = 256,
    penalty: float = 1.0,
    max_tokens: int | None = None,
) -> tuple[list[Scored], float]:
    """Writes an answer for every input; returns the scores and the inputs answered a second. `max_tokens`: of an
    answer, for published models, which do not say it."""
    inputs = sorted(references, key=lambda text: (len(text), text))
    answers: list[str] = []
    began = time.perf_counter()
    for i in range(0, len(inputs), 4 * batch):
        chunk = inputs[i : i + 4 * batch]
        found = model.generate(chunk, beams=beams, batch=batch, penalty=penalty, max_tokens=max_tokens)
        answers += [one.text for one in found]
    seconds = time.perf_counter() - began
    scored = [score(text, references[text], answer, kind) for text, answer in zip(inputs, answers, strict=True)]
    return scored, len(inputs) / seconds
