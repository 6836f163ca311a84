"""Answer: where in a text the answer to a question stands, or that it has none (SQuAD 1606.05250, 1806.03822).

-log p(start) - log p(end) over a window's context tokens and its first token, which stands for "no answer" (BERT,
1810.04805). A long context becomes overlapping windows, and those that lack the answer have none.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.data.batches import Batch
from headway.data.examples import Example
from headway.data.sources import Values
from headway.hub import Loaded
from headway.objectives import Base, Loss, Score, Unfit, with_head, with_vocabulary
from headway.objectives._tools import Tools
from headway.objectives._vectors import hidden, limit_of, read, reader, with_types
from headway.recipe import Recipe
from headway.use.answer import windows


@dataclass(frozen=True, kw_only=True)
class Asked(Batch):
    """Questions with a window each; `seen`: where an answer may begin or end; `places`: where it does."""

    ids: Int[Tensor, "B T"]
    types: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"] | None
    seen: Bool[Tensor, "B T"]
    places: Int[Tensor, "B 2"]


class Objective(Base):
    """Rows have a question, a context and an answer, which is the words of the context where they first stand, or empty
    where it holds none. `stride`: tokens that windows of a long context share (default: a quarter of `max_tokens`)."""

    KINDS = ("encoder",)
    METRIC = ("f1", False)
    COLUMNS = {"question": "source", "context": "source", "answer": "plain"}

    def __init__(self, stride: int | None = None) -> None:
        if stride is not None and stride < 0:
            raise ValueError(f"objective.stride is 0 tokens or more, not {stride}")
        self.stride = stride

    def ready(self, tools: Tools) -> None:
        self.start, self.reader, self.limit = tools.start, reader(tools), limit_of(tools)
        self.shared = self.limit // 4 if self.stride is None else self.stride

    def spec(self, model: dict[str, Any], tools: Tools) -> dict[str, Any]:
        model = with_vocabulary(model, "vocab", tools.vocab, tools.start)
        return with_head(model if tools.start is not None else with_types(model), "spans", {"outputs": 2})

    def encode(self, row: Values, tools: Tools) -> Iterable[Example]:
        """Ids and types of each window; where its context begins, how long it is, and the answer's first and last."""
        question, context, answer = row[0], row[1], row[2].strip()
        found = self.reader.encode(question, context)
        offsets = [place for place, of in zip(found.offsets, found.sequence, strict=True) if of == 1]
        try:
            cut = windows(self.limit, found.ids, found.types, found.sequence, question, self.shared)
        except ValueError as problem:
            raise Unfit(str(problem)) from None
        first, last = _tokens(context, answer, offsets) if answer else (-1, -1)
        examples = []
        for window in cut:
            at, end = window.at - window.first, window.first + window.length
            inside = window.first <= first and last < end
            place = (at + first, at + last) if inside else (0, 0)
            examples.append((window.ids, window.types, (window.at, window.length, *place)))
        if answer and not any(example[2][2] for example in examples):
            raise Unfit(f"the answer {answer[:40]!r} is longer than windows share ({self.shared}): raise max_tokens")
        return examples

    def collate(self, examples: Sequence[Example], random: np.random.Generator) -> Asked:
        found = read([(ids, types) for ids, types, _ in examples])
        at, length, start, end = torch.tensor(np.array([place for *_, place in examples])).long().T
        token = torch.arange(found.ids.shape[1])
        seen = (token >= at[:, None]) & (token < (at + length)[:, None]) | (token == 0)
        return Asked(
            ids=found.ids,
            types=found.types,
            valid=found.valid,
            seen=seen,
            places=torch.stack([start, end], 1),
            tokens=found.tokens,
            targets=len(examples),
        )

    def __call__(self, model: nn.Module, batch: Asked) -> Loss:
        net: Any = model
        logits: Float[Tensor, "B T 2"] = net.head(
            "spans", hidden(net, batch, self.start, "spans"), batch.ids, batch.valid
        )
        scores = logits.float().masked_fill(~batch.seen[..., None], float("-inf")).log_softmax(1)
        total = -scores.gather(1, batch.places[:, None]).sum()
        return Loss(total, total.detach(), batch.targets)

    def use(self, tools: Tools) -> str:
        return 'answer {} -q "QUESTION" -c FILE'

    def score(self, model: Loaded, rows: Sequence[Values], tools: Tools, recipe: Recipe) -> Score:
        """Exact matches, and the F1 of the words that are told and those that are right, as SQuAD has them."""
        told = []
        for question, context, _ in rows:
            found = model.answer(question, context, stride=self.shared)
            told.append(found.text if found.score >= found.no_answer_probability else "")
        wanted = [row[2] for row in rows]
        return Score({**rates(wanted, told), "test_questions": len(told)}, told)

    def baseline(self, train: Sequence[Values], rows: Sequence[Values], recipe: Recipe) -> dict[str, Any]:
        """The sentence that shares most words with the question; or that none has an answer, whichever is better."""
        wanted = [row[2] for row in rows]
        sentences = rates(wanted, [_sentence(question, context) for question, context, _ in rows])
        never = rates(wanted, [""] * len(rows))
        best = max(sentences, never, key=lambda found: found["f1"])
        name = "the sentence most like the question" if best is sentences else "always: no answer"
        return {"exact_baseline": best["exact"], "f1_baseline": best["f1"], "baseline": name}


def _tokens(context: str, answer: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first and last token of an answer, where it first stands."""
    at = context.find(answer)
    if at < 0:
        raise Unfit(
            f"the answer {answer[:40]!r} does not stand in its context, word for word: mend it, or leave it empty"
        )
    inside = [i for i, (start, end) in enumerate(offsets) if end > at and start < at + len(answer)]
    if not inside:
        raise Unfit(f"the answer {answer[:40]!r} has no token of its own: give another")
    return inside[0], inside[-1]


def rates(wanted: Sequence[str], told: Sequence[str]) -> dict[str, float]:
    """The shares of exact matches, and the mean F1 of words; without case, punctuation and articles."""
    exact = f1 = 0.0
    for one, two in zip(map(words, wanted), map(words, told), strict=True):
        exact += one == two
        both = sum((Counter(one) & Counter(two)).values())
        f1 += 2 * both / (len(one) + len(two)) if one and two else float(one == two)
    return {"exact": exact / max(1, len(wanted)), "f1": f1 / max(1, len(wanted))}


def words(text: str) -> list[str]:
    """A text's words as SQuAD compares them."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _sentence(question: str, context: str) -> str:
    asked = set(words(question))
    return max(re.split(r"(?<=[.!?])\s+", context), key=lambda sentence: len(asked & set(words(sentence))))
