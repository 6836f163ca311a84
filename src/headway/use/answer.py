"""Answer: the span of a text that answers a question (extractive; SQuAD 1606.05250, without an answer 1806.03822).

p(i, j) = softmax(start)_i softmax(end)_j over a window's context tokens and its first token, which stands for "no
answer". A long context is read in overlapping windows; the best span of any is the answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.loaded import Loaded
from headway.use.passes import passes


class Answer(NamedTuple):
    """context[start:end], its probability, that of there being no answer, and the next best that were asked for."""

    text: str
    start: int
    end: int
    score: float
    no_answer_probability: float
    others: tuple[Answer, ...] = ()


class Window(NamedTuple):
    """One reading: ids and types, where the context stands in it, and where that begins in the whole."""

    ids: list[int]
    types: list[int]
    at: int
    first: int
    length: int


@torch.inference_mode()
def answer(
    model: Loaded, question: Any, context: Any, *, top: int = 1, stride: int = 128, max_answer: int = 30
) -> Answer:
    """See `headway.hub.Loaded.answer`."""
    heads = getattr(model.net, "heads", {})
    if "spans" not in heads:
        raise ValueError(
            f"answer needs a 'spans' head; this {model.kind} has these heads: {', '.join(heads) or 'none'}"
        )
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"answer: the {name} is {'empty' if isinstance(text, str) else 'no text'}: give a text")
    for name, value, least in (("top", top, 1), ("stride", stride, 0), ("max_answer", max_answer, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"answer: {name} is {least} or more, not {value!r}")
    encoded = model.tokenizer.encode(question, context)
    offsets = [place for place, of in zip(encoded.offsets, encoded.sequence, strict=True) if of == 1]
    cut = windows(model.max_tokens, encoded.ids, encoded.types, encoded.sequence, question, stride)
    none, best = 1.0, dict[tuple[int, int], float]()
    for group in passes(model, [w.ids for w in cut], [w.types for w in cut], task="spans"):
        logits = model.net.head("spans", group.hidden, group.ids, group.valid).float()
        for row, scores in zip(group.rows, logits, strict=True):
            window = cut[row]
            no, spans = _best(scores, window, top, max_answer)
            none = min(none, no)
            for i, j, share in spans:
                place = _trimmed(context, offsets[window.first + i][0], offsets[window.first + j][1])
                if place[0] < place[1]:
                    best[place] = max(share, best.get(place, 0.0))
    ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:top]
    if not ranked:
        raise ValueError("answer: the context has no word that the tokenizer reads: give another")
    found = [Answer(context[start:end], start, end, share, none) for (start, end), share in ranked]
    return found[0]._replace(others=tuple(found[1:]))


def windows(
    most: int | None, ids: list[int], types: list[int], sequence: list[int | None], question: str, stride: int
) -> list[Window]:
    """The pair as it stands, or, where it has more than `most` tokens, with parts of the context in turn."""
    places = [i for i, of in enumerate(sequence) if of == 1]
    if not places:
        raise ValueError("answer: the context has no tokens: give a text")
    head, tail = places[0], places[-1] + 1
    limit = most or len(ids)
    room = limit - head - (len(ids) - tail)
    if len(ids) <= limit:
        return [Window(ids, types, head, 0, len(places))]
    if room <= stride:
        raise ValueError(
            f"answer: question {question[:40]!r} and marks are {limit - room} of the {limit} tokens that this model "
            f"takes, and windows overlap by {stride}: shorten the question, or lower stride"
        )
    found = []
    for first in range(0, len(places), room - stride):
        part = slice(head + first, min(head + first + room, tail))
        found.append(
            Window(
                ids[:head] + ids[part] + ids[tail:],
                types[:head] + types[part] + types[tail:],
                head,
                first,
                part.stop - part.start,
            )
        )
        if part.stop == tail:
            break
    return found


def _best(
    logits: Float[Tensor, "T 2"], window: Window, top: int, max_answer: int
) -> tuple[float, list[tuple[int, int, float]]]:
    """The probability of no answer, and the best spans of a window, as tokens of its context."""
    seen = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    seen[0] = True
    seen[window.at : window.at + window.length] = True  # what lies behind it, padding included, is none
    start, end = logits[:, 0], logits[:, 1]
    start, end = (t.masked_fill(~seen, float("-inf")).softmax(0) for t in (start, end))
    part = slice(window.at, window.at + window.length)
    pairs = start[part, None] * end[part]
    pairs = torch.where(_valid(window.length, max_answer, logits.device), pairs, 0.0)
    found = pairs.flatten().topk(min(2 * top + 8, pairs.numel()))  # more than asked: some may be one span, or blank
    spans = [(i // window.length, i % window.length, p) for i, p in zip(found.indices.tolist(), found.values.tolist(),
                                                                      strict=True)]  # fmt: skip
    return float(start[0] * end[0]), [span for span in spans if span[2] > 0]


def _valid(count: int, max_answer: int, device: torch.device) -> Bool[Tensor, "T T"]:
    """Spans that begin before they end, within `max_answer` tokens."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu().tril(max_answer - 1)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends, which some tokenizers' pieces hold."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
